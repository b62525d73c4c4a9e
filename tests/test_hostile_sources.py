"""Hostile archives, tables and records: one line names what is refused or skipped, and nothing outside is touched."""

import gzip
import json
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zoo
from helpers import ROOT, run_command
from picture_sets import CLASSES, add, pictures, tf_example, tfrecord, write
from PIL import Image

pytestmark = pytest.mark.slow

MEMORY = 3 * 1024**3  # address space of each process, in bytes
LIMIT = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
os.execv(sys.executable, [sys.executable, '-m', 'alexnet_jax.prepare', *sys.argv[1:]])
"""
SECRET = (255, 0, 255)
LONG = 'x' * 100_000
GOOD = [pictures('train')[i].content for i in range(24)]


def listing(folder: Path) -> dict[str, tuple]:
    """Returns size, time and mode of everything below `folder`."""
    found = {}
    for path in sorted(folder.rglob('*')):
        status = os.lstat(path)
        found[str(path)] = status.st_size, status.st_mtime_ns, status.st_mode
    return found


def attempt(tmp_path: Path, source: str, *flags: str) -> str:
    """Prepares pictures from `source`, within limits of memory and time, and checks that nothing else is written.

    Returns the line of the refusal, or the log and the lines of skipped.jsonl.
    """
    before = listing(tmp_path)
    run = run_command(
        *('-c', LIMIT, f'--source={source}', '--image_size=32', '--workers=1', '--max_corrupt_fraction=0.5', *flags),
        *(f'--data_dir={tmp_path / "in"}', f'--prepared_dir={tmp_path / "prepared"}'),
        cwd=tmp_path,
        timeout=100,
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS='1',
    )
    assert run.stdout == ''
    assert 'Traceback' not in run.stderr, run.stderr
    assert all(line.isprintable() and len(line) < 2000 for line in run.stderr.split('\n')), run.stderr[:5000]
    after = listing(tmp_path)
    new = [path for path in after if path not in before and not path.startswith(str(tmp_path / 'prepared'))]
    assert not new
    assert {path: after[path] for path in before if path != str(tmp_path)} == before
    [folder] = [path for path in (tmp_path / 'prepared').glob('*px') if path.is_dir()] or [None]
    if run.returncode:
        assert folder is None
        assert run.returncode in (1, 2)
        assert len([line for line in run.stderr.splitlines() if line.startswith('alexnet_jax: ')]) == 1, run.stderr
        return run.stderr
    check_images(folder)
    return run.stderr + (folder / 'skipped.jsonl').read_text()


def check_images(folder: Path) -> None:
    """Checks that the secret picture is not in the data set."""
    for split in ('train', 'validation'):
        images = [example['image'] for example in tfds.builder_from_directory(str(folder)).as_data_source(split)]
        assert images
        assert not any(np.abs(image.astype(int) - SECRET).max() < 50 for image in images)


@pytest.fixture
def place(tmp_path) -> Path:
    """Returns a folder with a secret picture in its folder `outside`; sources belong to its folder `in`."""
    Image.new('RGB', (64, 64), SECRET).save(write(tmp_path / 'outside' / 'secret.jpg', ''))
    write(tmp_path / 'outside' / 'secret.txt', '0')
    (tmp_path / 'in').mkdir()
    return tmp_path


def check(text: str, *words: str) -> None:
    assert any(word in text for word in words), text


# Tars of WebDataset ---------------------------------------------------------------------------------------------------

Tar = Callable[[tarfile.TarFile, Path], None]


def link(kind: bytes, target: str) -> Tar:
    def write_member(tar: tarfile.TarFile, place: Path) -> None:
        add(tar, 'evil.jpg', b'', type=kind, linkname=target.format(place=place))
        add(tar, 'evil.cls', b'0')

    return write_member


def example(name: str, label: bytes = b'0', content: bytes = GOOD[0]) -> Tar:
    def write_members(tar: tarfile.TarFile, place: Path) -> None:
        add(tar, name.format(place=place) + '.jpg', content)
        add(tar, name.format(place=place) + '.cls', label)

    return write_members


def absurd_size(size: int) -> Tar:
    """Writes a header whose size is false; the archive ends after it."""

    def write_header(tar: tarfile.TarFile, place: Path) -> None:
        info = tarfile.TarInfo('evil.jpg')
        info.size = size
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
        tar.offset += 512

    return write_header


def sparse(tar: tarfile.TarFile, place: Path) -> None:
    """Writes a sparse member of one terabyte, whose map has no data."""
    headers = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.realsize': str(2**40)}
    add(tar, 'evil.jpg', b'0\n'.ljust(512, b'\0'), pax_headers=headers | {'GNU.sparse.name': 'evil.jpg'})
    add(tar, 'evil.cls', b'0')


def secret_label(tar: tarfile.TarFile, place: Path) -> None:
    add(tar, 'evil.jpg', GOOD[0])
    add(tar, 'evil.cls', b'', type=tarfile.SYMTYPE, linkname=str(place / 'outside' / 'secret.txt'))


TARS: dict[str, Tar] = {
    'path that climbs out': example('../../outside/evil'),
    'absolute path': example('{place}/outside/evil'),
    'symbolic link': link(tarfile.SYMTYPE, '{place}/outside/secret.jpg'),
    'symbolic link to a relative path': link(tarfile.SYMTYPE, '../outside/secret.jpg'),
    'symbolic link to a password file': link(tarfile.SYMTYPE, '/etc/passwd'),
    'hard link': link(tarfile.LNKTYPE, '../outside/secret.jpg'),
    'hard link to a later member': link(tarfile.LNKTYPE, 'evil.cls'),
    'hard link to itself': link(tarfile.LNKTYPE, 'evil.jpg'),
    'pipe': link(tarfile.FIFOTYPE, ''),
    'device': lambda tar, place: add(tar, 'evil.jpg', b'', type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    'symbolic link as a label': secret_label,
    'absurd size': absurd_size(2**42),
    'size above 64 bits': absurd_size(2**80),
    'sparse': sparse,
    'bomb': example('evil', content=zoo.zoo()['bomb.png'][0]),
    'label of 10 digits': example('evil', b'1000000000'),
    'negative label': example('evil', b'-5'),
    'label of 10,000 digits': example('evil', b'9' * 10_000),
    'label that is no text': example('evil', b'\xff\xfe\x00\x01'),
    'empty label': example('evil', b''),
    'control characters': example('evil\x1b[31m\x07', b'7'),
}


def write_tar(path: Path, write_members: Tar, place: Path, good: slice) -> None:
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as tar:
        for i, content in enumerate(GOOD[good]):
            add(tar, f'{i:04d}.jpg', content)
            add(tar, f'{i:04d}.cls', str(i % 2).encode())
        write_members(tar, place)


@pytest.mark.parametrize('case', TARS)
def test_tar(case, place):
    write_tar(place / 'in' / 'train-0.tar', TARS[case], place, slice(16))
    write_tar(place / 'in' / 'val-0.tar', lambda tar, place: None, place, slice(16, 20))
    text = attempt(place, f'wds:{place}/in/{{train,val}}-0.tar')
    check(text, 'evil', 'train-0.tar')


def test_bomb_of_a_compressed_tar(place):
    """Eight gigabytes of zeros follow the header; gzip allows that its streams are concatenated."""
    info = tarfile.TarInfo('evil.jpg')
    info.size = 2**33
    zeros = gzip.compress(bytes(2**25), 9)
    header = gzip.compress(info.tobuf(tarfile.GNU_FORMAT))
    write(place / 'in' / 'train-0.tar', header + zeros * 256)
    write_tar(place / 'in' / 'val-0.tar', lambda tar, place: None, place, slice(16, 20))
    check(attempt(place, f'wds:{place}/in/{{train,val}}-0.tar'), 'train-0.tar', 'evil')
    os.rename(place / 'in' / 'train-0.tar', place / 'in' / 'train-0.tar.gz')
    check(attempt(place, f'wds:{place}/in/{{train-0.tar.gz,val-0.tar}}'), 'train-0.tar', 'evil')


# Tables: labels.csv and the label files of ImageNet -------------------------------------------------------------------

ROWS: dict[str, tuple[str, str]] = {
    'path that climbs out': ('../outside/secret.jpg,a', 'secret.jpg'),
    'absolute path': ('{place}/outside/secret.jpg,a', 'secret.jpg'),
    'climbs out in the middle': ('images/../../outside/secret.jpg,a', 'secret.jpg'),
    'link to a folder outside': ('link/secret.jpg,a', 'secret.jpg'),
    'folder': ('images,a', 'images'),
    'no path': (',a', 'labels.csv'),
    'long path': (f'{LONG},a', 'labels.csv'),
    'path with a zero byte': ('images/\0.jpg,a', 'labels.csv'),
    'missing file': ('images/missing.jpg,a', 'missing.jpg'),
    'no label': ('images/0.jpg,', 'labels.csv'),
    'long label': (f'images/0.jpg,{LONG}', 'labels.csv'),
    'label of control characters': ('images/0.jpg,\x1b[31mred\x07', 'labels.csv'),
    'too many fields': ('images/0.jpg,a,train,x,y', 'labels.csv'),
    'too few fields': ('images/0.jpg', 'labels.csv'),
    'field above the limit of csv': ('images/0.jpg,"' + 'y' * 200_000 + '"', 'labels.csv'),
    'quote without an end': ('images/0.jpg,"a', 'labels.csv'),
    'unknown split': ('images/0.jpg,a,../x', 'labels.csv'),
}


def write_labels(place: Path, row: str, encoding: str = 'utf-8') -> None:
    rows = []
    for i, content in enumerate(GOOD[:20]):
        write(place / 'in' / 'images' / f'{i}.jpg', content)
        rows.append(f'images/{i}.jpg,{"ab"[i % 2]},{"val" if i > 15 else "train"}')
    row = row.format(place=place) + (',train' if row.count(',') == 1 else '')
    write(place / 'in' / 'labels.csv', '\n'.join(['path,label,split', *rows[1:], row, '']).encode(encoding))


@pytest.mark.parametrize('case', ROWS)
def test_row_of_a_table(case, place):
    row, word = ROWS[case]
    (place / 'in').joinpath('link').symlink_to(place / 'outside')
    write_labels(place, row)
    check(attempt(place, f'folder:{place}/in'), word)


@pytest.mark.parametrize('content', [b'\x89PNG\r\n\x1a\n' + bytes(range(256)), b'', b'path,label\n', b'\xff\xfea\0b\0'])
def test_table_that_is_no_table(content, place):
    write_labels(place, 'images/0.jpg,a')
    write(place / 'in' / 'labels.csv', content)
    check(attempt(place, f'folder:{place}/in'), 'labels.csv')


def test_emoji_and_a_climbing_name_are_plain_class_names(place):
    """A class name is text that is never a path."""
    write_labels(place, 'images/0.jpg,🐟')
    table = place / 'in' / 'labels.csv'
    write(table, table.read_text().replace(',a,', ',../x,'))
    attempt(place, f'folder:{place}/in')
    [manifest] = place.glob('prepared/*/prepared.json')
    assert sorted(json.loads(manifest.read_text())['class_names']) == ['../x', 'b', '🐟']


def flat(place: Path) -> Path:
    for i, content in enumerate(GOOD):
        name = f'val/ILSVRC2012_val_{i - 15:08d}.JPEG' if i > 15 else f'train/{CLASSES[i % 2]}/{i}.JPEG'
        write(place / 'in' / name, content)
    return place / 'in'


@pytest.mark.parametrize(
    'line',
    ['../../outside/secret.jpg\tn01440764\n', '{place}/outside/secret.jpg\tn01440764\n', f'{LONG}\t{LONG}\n', '\0\n'],
)
def test_annotations_name_no_file_outside(line, place):
    root = flat(place)
    lines = [f'ILSVRC2012_val_{i:08d}.JPEG\t{CLASSES[i % 2]}\t0\t0\t9\t9\n' for i in range(1, 8)]
    lines.append('ILSVRC2012_val_00000008.JPEG\t../x\t0\t0\t9\t9\n')
    write(root / 'val' / 'val_annotations.txt', ''.join(lines) + line.format(place=place))
    check(attempt(place, f'folder:{root}'), 'val_annotations.txt')


@pytest.mark.parametrize('number', ['1000000000', '-5', '9' * 10_000, 'x', '0'])
def test_number_of_a_class_in_the_development_kit(number, place):
    import scipy.io

    root, synsets = flat(place), np.zeros((2, 1), [('ILSVRC2012_ID', object), ('WNID', object)])
    for i, wnid in enumerate(CLASSES[:2]):
        synsets['ILSVRC2012_ID'][i, 0], synsets['WNID'][i, 0] = float(i + 1), wnid
    truth = 'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt'
    write(root / truth, '1\n2\n' * 3 + f'1\n{number}\n')
    scipy.io.savemat(root / 'ILSVRC2012_devkit_t12' / 'data' / 'meta.mat', {'synsets': synsets})
    check(attempt(place, f'folder:{root}'), 'ground_truth', 'ILSVRC2012_val_00000008')


@pytest.mark.parametrize('content', [b'', b'MATLAB 5.0 MAT-file'.ljust(124) + b'\0\1IM' + b'\xff' * 64, b'\x80\x04.'])
def test_corrupt_development_kit(content, place):
    root = flat(place)
    write(root / 'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt', '1\n2\n' * 4)
    write(root / 'ILSVRC2012_devkit_t12/data/meta.mat', content)
    check(attempt(place, f'folder:{root}'), 'meta.mat')


# TFRecord -------------------------------------------------------------------------------------------------------------


def write_tfrecord(place: Path, *records: bytes, names: tuple[str, ...] = ('a', 'b'), **info) -> Path:
    """Writes a data set of TFDS by hand; the training file ends with `records`."""
    python = 'tensorflow_datasets.core.features.'
    image = {'dtype': 'uint8', 'encodingFormat': 'jpeg', 'shape': {'dimensions': ['-1', '-1', '3']}}
    features = {
        'image': {'image': image, 'pythonClassName': f'{python}image_feature.Image'},
        'label': {'classLabel': {'numClasses': '2'}, 'pythonClassName': f'{python}class_label_feature.ClassLabel'},
    }
    outer = {'featuresDict': {'features': features}, 'pythonClassName': f'{python}features_dict.FeaturesDict'}
    good = [tfrecord(tf_example(image=[content], label=[i % 2])) for i, content in enumerate(GOOD)]
    parts = {'train': [*good[:16], *records], 'validation': good[16:]}
    template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    splits = [
        {'name': name, 'filepathTemplate': template, 'numBytes': '9', 'shardLengths': [str(len(part))]}
        for name, part in parts.items()
    ]
    about = {'name': 'fishes', 'version': '1.0.0', 'fileFormat': 'tfrecord', 'moduleName': 'nowhere', 'splits': splits}
    folder = place / 'in' / 'fishes' / '1.0.0'
    write(folder / 'dataset_info.json', json.dumps(about | info))
    write(folder / 'features.json', json.dumps(outer))
    write(folder / 'label.labels.txt', '\n'.join(names))
    for name, part in parts.items():
        write(folder / f'fishes-{name}.tfrecord-00000-of-00001', b''.join(part))
    return folder


RECORDS: dict[str, bytes] = {
    'absurd length': tfrecord(b'', 2**60),
    'length above the file': tfrecord(tf_example(image=[GOOD[0]], label=[0]), 10**7),
    'length without a checksum': struct.pack('<QI', 2**63 + 9, 0) + bytes(50),
    'empty record': tfrecord(b''),
    'record that is no message': tfrecord(b'\xff' * 99),
    'absurd length of a field': tfrecord(b'\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f'),
    'label of 10 digits': tfrecord(tf_example(image=[GOOD[0]], label=[10**9])),
    'negative label': tfrecord(tf_example(image=[GOOD[0]], label=[-5])),
    'label that is text': tfrecord(tf_example(image=[GOOD[0]], label=[b'1'])),
    'no label': tfrecord(tf_example(image=[GOOD[0]])),
    'image that is a number': tfrecord(tf_example(image=[7], label=[0])),
    'two images': tfrecord(tf_example(image=[GOOD[0], GOOD[1]], label=[0])),
    'no image': tfrecord(tf_example(label=[0])),
    'bomb': tfrecord(tf_example(image=[zoo.zoo()['bomb.png'][0]], label=[0])),
}


@pytest.mark.parametrize('case', RECORDS)
def test_record(case, place):
    write_tfrecord(place, RECORDS[case])
    check(attempt(place, 'tfds:fishes'), 'record 16', 'fishes-train.tfrecord-00000-of-00001')


@pytest.mark.parametrize(
    'names', [('a', '\x1b[31m'), ('a', LONG), ('a', ''), ('a', 'a'), ('a',), ('a', 'b', 'c'), ('a', 'b\0')]
)
def test_class_names_of_tfds(names, place):
    write_tfrecord(place, names=names)
    text = attempt(place, 'tfds:fishes')
    check(text, 'alexnet_jax: ', 'is not a class' if names == ('a',) else 'alexnet_jax: ')


@pytest.mark.parametrize(
    'info',
    [
        {'splits': [{'name': 'train', 'filepathTemplate': '../../../../outside/secret.jpg', 'shardLengths': ['9']}]},
        {'splits': [{'name': 'train', 'shardLengths': [str(2**62)]}, {'name': 'validation', 'shardLengths': ['8']}]},
        {'splits': [{'name': 'train', 'shardLengths': ['-16']}, {'name': 'validation', 'shardLengths': ['8']}]},
        {'splits': []},
        {'fileFormat': '../x'},
        {'name': '../../outside'},
    ],
)
def test_description_of_tfds(info, place):
    write_tfrecord(place, **info)
    check(attempt(place, 'tfds:fishes'), 'fishes')


@pytest.mark.parametrize('content', [b'', b'{', b'[' * 100_000, b'\xff\xfe', b'{"featuresDict": 3}'])
@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
def test_corrupt_description_of_tfds(name, content, place):
    write(write_tfrecord(place) / name, content)
    check(attempt(place, 'tfds:fishes'), 'alexnet_jax: ')


def test_pipe_in_place_of_records(place):
    file = write_tfrecord(place) / 'fishes-train.tfrecord-00000-of-00001'
    file.unlink()
    os.mkfifo(file)
    check(attempt(place, 'tfds:fishes'), 'fishes-train')


# Parquet --------------------------------------------------------------------------------------------------------------


def write_parquet(place: Path, cells: list, features: object = None, image: str = 'struct', label: str = 'int64'):
    """Writes parquet files; the training file ends with `cells`, which are values of the columns image and label."""
    import pyarrow as pa
    import pyarrow.parquet

    kinds = {'struct': pa.struct([('bytes', pa.binary()), ('path', pa.string())]), 'string': pa.string()}
    kinds |= {'int64': pa.int64(), 'list': pa.list_(pa.binary())}
    names = {'image': {'_type': 'Image'}, 'label': {'_type': 'ClassLabel', 'names': ['a', 'b']}}
    metadata = json.dumps({'info': {'features': names}}) if features is None else features
    schema = pa.schema([('image', kinds[image]), ('label', kinds[label])], {b'huggingface': metadata})
    wrap = {'struct': lambda content: {'bytes': content, 'path': 'x.jpg'}, 'string': str, 'int64': len}
    wrap['list'] = lambda content: [content]
    good = [(wrap[image](content), i % 2 if label == 'int64' else 'a') for i, content in enumerate(GOOD)]
    for name, rows in (('train', good[:16] + cells), ('validation', good[16:])):
        table = pa.Table.from_pylist([{'image': one, 'label': other} for one, other in rows], schema)
        pyarrow.parquet.write_table(table, place / 'in' / f'{name}-00000-of-00001.parquet')


CELLS: dict[str, tuple] = {
    'path that climbs out': ({'bytes': None, 'path': '../outside/secret.jpg'}, 0),
    'absolute path': ({'bytes': None, 'path': '{place}/outside/secret.jpg'}, 0),
    'URL': ({'bytes': None, 'path': 'file://{place}/outside/secret.jpg'}, 0),
    'path beside bytes that are no image': ({'bytes': b'x', 'path': '{place}/outside/secret.jpg'}, 0),
    'no bytes and no path': ({'bytes': None, 'path': None}, 0),
    'no image': (None, 0),
    'empty image': ({'bytes': b'', 'path': None}, 0),
    'text': ({'bytes': b'<html>', 'path': 'evil\x1b[31m.jpg'}, 0),
    'bomb': ({'bytes': zoo.zoo()['bomb.png'][0], 'path': 'x.png'}, 0),
    'label of 10 digits': ({'bytes': GOOD[0], 'path': LONG}, 10**9),
    'negative label': ({'bytes': GOOD[0], 'path': 'x'}, -5),
    'no label': ({'bytes': GOOD[0], 'path': 'x'}, None),
}


@pytest.mark.parametrize('case', CELLS)
def test_cell(case, place):
    image, label = CELLS[case]
    if image and image['path']:
        image = image | {'path': image['path'].replace('{place}', str(place))}
    write_parquet(place, [(image, label)])
    check(attempt(place, f'hf:{place}/in'), 'train-00000', 'secret.jpg', 'row 16', 'x.jpg', 'x.png', '"x"', 'evil')


@pytest.mark.parametrize(('image', 'label'), [('string', 'int64'), ('int64', 'int64'), ('list', 'int64')])
def test_columns_of_other_types(image, label, place):
    write_parquet(place, [], image=image, label=label)
    check(attempt(place, f'hf:{place}/in'), 'image')


@pytest.mark.parametrize(
    'features',
    [
        b'',
        b'{',
        b'[' * 100_000,
        b'\xff\xfe',
        b'{"info": 3}',
        b'{"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": 5}}}}',
        *(
            json.dumps({'info': {'features': {'label': {'_type': 'ClassLabel', 'names': names}}}}).encode()
            for names in (['a', '\x1b[31m'], ['a', LONG], ['a', ''], ['a', 'a'], ['a', None], ['a', 3], [])
        ),
    ],
)
def test_class_names_of_parquet(features, place):
    write_parquet(place, [], features)
    check(attempt(place, f'hf:{place}/in'), 'alexnet_jax: ', 'prepared ')


def test_dictionary_bomb(place):
    """One cell of 64 MB of zeros occurs a hundred times; the file has a few kilobytes."""
    bomb = {'bytes': bytes(2**26), 'path': 'x'}
    write_parquet(place, [(bomb, 0)] * 100)
    assert (place / 'in' / 'train-00000-of-00001.parquet').stat().st_size < 10**7
    check(attempt(place, f'hf:{place}/in', '--max_corrupt_fraction=0.9'), 'train-00000', 'row 16', '"x"')


@pytest.mark.parametrize(
    'end', [b'', b'PAR1', struct.pack('<I', 2**31 - 9) + b'PAR1', bytes(99) + struct.pack('<I', 99) + b'PAR1']
)
def test_end_of_a_parquet_file(end, place):
    write_parquet(place, [])
    file = place / 'in' / 'train-00000-of-00001.parquet'
    file.write_bytes(file.read_bytes()[:-300] + end)
    check(attempt(place, f'hf:{place}/in'), 'train-00000-of-00001.parquet')


# Folders and IDX ------------------------------------------------------------------------------------------------------


def test_bomb_of_idx(place):
    for name, images in (('train', 16), ('t10k', 8)):
        shape = struct.pack('>IIII', 0x803, images, 8, 8)
        write(place / 'in' / f'{name}-images-idx3-ubyte.gz', gzip.compress(shape + bytes(images * 64)))
        labels = struct.pack('>II', 0x801, images) + bytes(images)
        write(place / 'in' / f'{name}-labels-idx1-ubyte.gz', gzip.compress(labels))
    file = place / 'in' / 'train-images-idx3-ubyte.gz'
    write(file, gzip.compress(struct.pack('>IIII', 0x803, 2**20, 128, 64)) + gzip.compress(bytes(2**25), 9) * 256)
    check(attempt(place, f'idx:{place}/in'), 'train-images-idx3-ubyte.gz')


def test_links_and_pipes_in_a_folder(place):
    for i, content in enumerate(GOOD):
        write(place / 'in' / 'ab'[i % 2] / f'{i}.jpg', content)
    os.mkfifo(place / 'in' / 'a' / 'pipe.jpg')
    (place / 'in' / 'a' / 'device.jpg').symlink_to('/dev/zero')
    (place / 'in' / 'a' / 'text.jpg').symlink_to('/etc/passwd')
    text = attempt(place, f'folder:{place}/in')
    for name in ('a/pipe.jpg', 'a/device.jpg', 'a/text.jpg'):
        check(text, name)


def test_class_folder_of_control_characters(place):
    for i, content in enumerate(GOOD):
        write(place / 'in' / ('a', 'b\x1b[31m')[i % 2] / f'{i}.jpg', content)
    check(attempt(place, f'folder:{place}/in'), 'b\\x1b[31m')
