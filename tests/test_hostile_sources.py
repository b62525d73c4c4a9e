"""Hostile archives, tables and records: one line names what is refused or skipped, and nothing outside is touched."""

import contextlib
import gzip
import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zoo
from helpers import ROOT, read_json, read_lines, run_command
from picture_sets import CLASSES, add, pictures, tf_example, tfrecord, write
from PIL import Image

from alexnet_jax.config import ConfigError
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.prepare.writer import PrepareConfig, prepare

MEMORY = 3 * 1024**3  # address space of each process, in bytes
LIMIT = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
os.execv(sys.executable, [sys.executable, '-m', 'alexnet_jax.prepare', *sys.argv[1:]])
"""
SECRET = (255, 0, 255)
LONG = 'x' * 100_000
GOOD = [pictures('train')[i].content for i in range(24)]
BOMB = zoo.png(60000, 60000, 1, 0, bytes(7501) * 100)


@pytest.fixture
def place(tmp_path) -> Path:
    """Returns a folder with a secret picture in its folder `outside`; sources belong to its folder `in`."""
    Image.new('RGB', (64, 64), SECRET).save(write(tmp_path / 'outside' / 'secret.jpg', ''))
    write(tmp_path / 'outside' / 'secret.txt', '0')
    (tmp_path / 'in').mkdir()
    return tmp_path


@contextlib.contextmanager
def nothing_is_written(place: Path) -> Iterator[None]:
    """Checks that all files except those of prepared data sets are as before."""

    def listing() -> dict[str, tuple]:
        found = {}
        for path in sorted(place.rglob('*')):
            if 'prepared' not in path.relative_to(place).parts:
                status = os.lstat(path)
                found[str(path)] = status.st_size, status.st_mtime_ns, status.st_mode
        return found

    before = listing()
    yield
    assert listing() == before


def check_line(text: str, *words: str) -> None:
    """Checks that `text` is one short line without control characters, and contains one of `words`."""
    assert text.isprintable(), text[:3000]
    assert len(text) < 1500, text[:3000]
    assert any(word in text for word in words), text


def refused(place: Path, source: str, *words: str) -> None:
    """Checks that a source is refused in one line with one of `words`, and that nothing is written."""
    given = PrepareConfig(source=source, image_size=32, workers=1)
    with nothing_is_written(place), pytest.raises((ConfigError, SourceError, DatasetError)) as error:
        prepare(given, str(place / 'in'), str(place / 'prepared'))
    check_line(str(error.value), *words)
    assert not list(place.glob('prepared/*/prepared.json'))


def run_prepare(place: Path, source: str, *flags: str) -> tuple[str, dict[str, str]]:
    """Prepares pictures in a process with limits of memory and time, and checks that nothing else is written.

    Returns the log, and the reasons of the skipped images by name; {} if the source is refused in one line.
    """
    with nothing_is_written(place):
        run = run_command(
            *('-c', LIMIT, f'--source={source}', '--image_size=32', '--workers=1', '--max_corrupt_fraction=0.9'),
            *(f'--data_dir={place / "in"}', f'--prepared_dir={place / "prepared"}', *flags),
            cwd=place,
            timeout=200,
            PYTHONPATH=str(ROOT),
            OMP_NUM_THREADS='1',
        )
    assert run.stdout == ''
    for line in run.stderr.splitlines():
        check_line(line, '')
    folders = [path.parent for path in place.glob('prepared/*/prepared.json')]
    if not folders:
        assert run.returncode in (1, 2)
        assert run.stderr.startswith('alexnet_jax: ')
        assert run.stderr.count('\n') == 1, run.stderr
        return run.stderr, {}
    assert run.returncode == 0, run.stderr
    for split in ('train', 'validation'):
        images = [example['image'] for example in tfds.builder_from_directory(str(folders[0])).as_data_source(split)]
        assert images
        assert not any(np.abs(image.astype(int) - SECRET).max() < 50 for image in images)
    return run.stderr, {line['name']: line['reason'] for line in read_lines(folders[0] / 'skipped.jsonl')}


def check_skipped(skipped: dict[str, str], wanted: dict[str, str]) -> None:
    """Checks that each example whose name ends with a key of `wanted` is skipped for a reason with the value in it."""
    for end, reason in wanted.items():
        [name] = [name for name in skipped if name.endswith(end)]
        assert reason in skipped[name], name
    assert len(skipped) == len(wanted), skipped


# Tars of WebDataset ---------------------------------------------------------------------------------------------------


def write_tar(path: Path, good: slice, write_members: Callable[[tarfile.TarFile], None] = lambda tar: None) -> None:
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as tar:
        for i, content in enumerate(GOOD[good]):
            add(tar, f'{i:04d}.jpg', content)
            add(tar, f'{i:04d}.cls', str(i % 2).encode())
        write_members(tar)


def write_tars(place: Path, write_members: Callable[[tarfile.TarFile], None]) -> str:
    """Writes tars with good examples and hostile members; returns the source."""
    write_tar(place / 'in' / 'train-0.tar', slice(16), write_members)
    write_tar(place / 'in' / 'val-0.tar', slice(16, 24))
    return f'wds:{place}/in/{{train,val}}-0.tar'


@pytest.mark.slow
def test_members_of_tars(place):
    """Links, devices and paths that climb out are neither followed nor written."""
    secret = str(place / 'outside' / 'secret.jpg')
    links = {
        'symbolic': (tarfile.SYMTYPE, secret),
        'relative': (tarfile.SYMTYPE, '../outside/secret.jpg'),
        'passwords': (tarfile.SYMTYPE, '/etc/passwd'),
        'hard': (tarfile.LNKTYPE, '../outside/secret.jpg'),
        'later': (tarfile.LNKTYPE, 'pipe.cls'),
        'itself': (tarfile.LNKTYPE, 'itself.jpg'),
        'pipe': (tarfile.FIFOTYPE, ''),
        'device': (tarfile.CHRTYPE, ''),
        'disk': (tarfile.BLKTYPE, ''),
    }
    labels = {'negative': b'-5', 'digits': b'9' * 10_000, 'binary': b'\xff\xfe\0\1', 'empty': b'', 'long': b'7' * 2**21}

    def write_members(tar: tarfile.TarFile) -> None:
        for name, (kind, target) in links.items():
            add(tar, f'{name}.jpg', b'', type=kind, linkname=target, devmajor=1, devminor=5)
            add(tar, f'{name}.cls', b'0')
        for name, label in labels.items():
            add(tar, f'{name}.jpg', GOOD[0])
            add(tar, f'{name}.cls', label)
        add(tar, 'linked.jpg', GOOD[0])
        add(tar, 'linked.cls', b'', type=tarfile.SYMTYPE, linkname=str(place / 'outside' / 'secret.txt'))
        add(tar, 'bomb.jpg', BOMB)
        add(tar, 'bomb.cls', b'0')
        add(tar, 'red\x1b[31m.jpg', b'text')
        add(tar, 'red\x1b[31m.cls', b'0')
        add(tar, '../../outside/new.jpg', GOOD[0])
        add(tar, '../../outside/new.cls', b'0')
        add(tar, f'{place}/outside/new2.jpg', GOOD[0])
        add(tar, f'{place}/outside/new2.cls', b'0')

    log, skipped = run_prepare(place, write_tars(place, write_members))
    wanted = {f'/{name}.jpg': 'a link' for name in ('symbolic', 'relative', 'passwords', 'hard', 'later', 'itself')}
    wanted |= {'/pipe.jpg': 'a pipe', '/device.jpg': 'a device', '/disk.jpg': 'a device', '/bomb.jpg': 'pixels'}
    wanted |= {'/red\x1b[31m.jpg': 'not an image', '/../../outside/new.jpg': 'leads out', '/new2.jpg': 'leads out'}
    check_skipped(skipped, wanted)
    assert f'without the label of a class: {len(labels) + 1}; the first is train-0.tar/negative.jpg' in log
    assert ': 24 images' in log


def sparse(tar: tarfile.TarFile) -> None:
    """Writes a sparse member of one terabyte, whose map has no data."""
    headers = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.realsize': str(2**40)}
    add(tar, 'evil.jpg', b'0\n'.ljust(512, b'\0'), pax_headers=headers | {'GNU.sparse.name': 'evil.jpg'})


def absurd_size(tar: tarfile.TarFile) -> None:
    """Writes a header with a size far above that of the file."""
    info = tarfile.TarInfo('evil.jpg')
    info.size = 2**80
    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    tar.offset += 512


def absurd_name(tar: tarfile.TarFile) -> None:
    add(tar, 'evil.jpg', b'x', pax_headers={'path': 'evil' * 50_000})


def absurd_label(tar: tarfile.TarFile) -> None:
    add(tar, 'evil.jpg', GOOD[0])
    add(tar, 'evil.cls', b'1000000000')


@pytest.mark.parametrize('write_members', [sparse, absurd_size, absurd_name, absurd_label])
def test_absurd_sizes_in_tars(write_members, place):
    refused(place, write_tars(place, write_members), 'evil', 'train-0.tar', 'the label 1000000000 ')


@pytest.mark.parametrize('ending', ['.tar', '.tar.gz'])
def test_bomb_of_a_compressed_tar(ending, place):
    """Eight gigabytes of zeros follow the header; gzip allows that its streams are concatenated."""
    source = write_tars(place, lambda tar: None)
    info = tarfile.TarInfo('evil.jpg')
    info.size = 2**33
    (place / 'in' / 'train-0.tar').unlink()
    header = gzip.compress(info.tobuf(tarfile.GNU_FORMAT))
    write(place / 'in' / f'train-0{ending}', header + gzip.compress(bytes(2**25), 9) * 256)
    refused(place, source.replace('{train,val}-0.tar', f'{{train-0{ending},val-0.tar}}'), f'train-0{ending}')


# Tables: labels.csv and the label files of ImageNet -------------------------------------------------------------------


def write_labels(place: Path, *lines: str) -> str:
    """Writes labels.csv with 20 good rows, followed by `lines`; returns the source."""
    rows = []
    for i, content in enumerate(GOOD[:22]):
        write(place / 'in' / 'images' / f'{i}.jpg', content)
        rows.append(f'images/{i}.jpg,{"ab"[i % 2]},{"train" if i < 16 else "val"}')
    extra = [line.replace('{place}', str(place)) for line in lines]
    write(place / 'in' / 'labels.csv', '\n'.join(['path,label,split', *rows[1:20], *extra, '']))
    return f'folder:{place}/in'


ROWS = {
    'path that climbs out': '../outside/secret.jpg,a,train',
    'absolute path': '{place}/outside/secret.jpg,a,train',
    'climbs out in the middle': 'images/../../outside/secret.jpg,a,train',
    'no path': ',a,train',
    'zero byte': 'images/\0.jpg,a,train',
    'no label': 'images/0.jpg,,train',
    'label of control characters': 'images/0.jpg,\x1b[31mred\x07,train',
    'too many cells': 'images/0.jpg,a,train,x,y',
    'too few cells': 'images/0.jpg',
    'long cell': f'images/0.jpg,"{LONG}{LONG}",train',
    'quote without an end': 'images/0.jpg,"a,train',
}


@pytest.mark.parametrize('case', ROWS)
def test_row_of_a_table(case, place):
    refused(place, write_labels(place, ROWS[case]), 'labels.csv')


@pytest.mark.slow
def test_paths_and_names_of_a_table(place):
    """A class name is text and never a path; paths that cannot be read are named."""
    lines = ['images/20.jpg,🐟,train', 'images/missing.jpg,a,train', 'images,a,train', 'images/0.jpg/x.jpg,a,train']
    source = write_labels(place, *lines, f'{LONG},a,train', 'images/21.jpg,a,../x')
    table = place / 'in' / 'labels.csv'
    write(table, table.read_text().replace(',b,', ',../x,'))
    log, skipped = run_prepare(place, source)
    wanted = {'missing.jpg': 'No such file', 'images': 'directory', '0.jpg/x.jpg': 'directory', LONG: 'name too long'}
    assert {next(end for end in wanted if name.endswith(end)) for name in skipped} == set(wanted)
    assert '../x is not used' in log
    [manifest] = place.glob('prepared/*/prepared.json')
    assert sorted(read_json(manifest)['class_names']) == ['../x', 'a', '🐟']


@pytest.mark.parametrize('content', [b'\x89PNG\r\n\x1a\n' + bytes(range(256)), b'', b'path,label\n', b'\xff\xfea\0b\0'])
def test_table_that_is_no_table(content, place):
    source = write_labels(place)
    write(place / 'in' / 'labels.csv', content)
    refused(place, source, 'labels.csv')


def write_flat(place: Path) -> str:
    """Writes class folders and a flat folder of eight validation images; returns the source."""
    for i, content in enumerate(GOOD):
        name = f'val/ILSVRC2012_val_{i - 15:08d}.JPEG' if i > 15 else f'train/{CLASSES[i % 2]}/{i}.JPEG'
        write(place / 'in' / name, content)
    return f'folder:{place}/in'


@pytest.mark.slow
def test_annotations_name_no_file_outside(place):
    source = write_flat(place)
    lines = [f'ILSVRC2012_val_{i:08d}.JPEG\t{CLASSES[i % 2]}\t0\t0\t9\t9\n' for i in range(1, 8)]
    lines += ['ILSVRC2012_val_00000008.JPEG\t../x\n', f'../../outside/secret.jpg\t{CLASSES[0]}\n', f'{LONG}\t{LONG}\n']
    lines.append(f'{place}/outside/secret.jpg\t{CLASSES[0]}\n')
    write(place / 'in' / 'val' / 'val_annotations.txt', ''.join(lines))
    log, skipped = run_prepare(place, source)
    assert '7 validation images' in log
    assert 'ILSVRC2012_val_00000008.JPEG (../x)' in log
    assert skipped == {}


def write_devkit(place: Path, last: str) -> Path:
    """Writes the development kit of write_flat(); `last` is the number of the last image."""
    import scipy.io

    data = place / 'in' / 'ILSVRC2012_devkit_t12' / 'data'
    synsets = np.zeros((2, 1), [('ILSVRC2012_ID', object), ('WNID', object)])
    for i, wnid in enumerate(CLASSES[:2]):
        synsets['ILSVRC2012_ID'][i, 0], synsets['WNID'][i, 0] = float(i + 1), wnid
    write(data / 'ILSVRC2012_validation_ground_truth.txt', '1\n2\n1\n2\n1\n2\n1\n' + last)
    scipy.io.savemat(data / 'meta.mat', {'synsets': synsets})
    return data


@pytest.mark.parametrize('number', ['1000000000', '-5', '9' * 10_000, 'x', '0', '\x1b[31m'])
def test_number_in_the_development_kit(number, place):
    source = write_flat(place)
    write_devkit(place, f'{number}\n')
    refused(place, source, 'ground_truth')


@pytest.mark.parametrize('content', [b'', b'MATLAB 5.0 MAT-file'.ljust(124) + b'\0\1IM' + b'\xff' * 64, b'\x80\x04.'])
def test_corrupt_development_kit(content, place):
    source = write_flat(place)
    write(write_devkit(place, '2\n') / 'meta.mat', content)
    refused(place, source, 'meta.mat')


# TFRecord -------------------------------------------------------------------------------------------------------------


def write_tfrecord(place: Path, *records: bytes, names: tuple[str, ...] = ('a', 'b'), **info: Any) -> Path:
    """Writes a data set of TFDS by hand; the training file ends with `records`. Returns its folder."""
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


@pytest.mark.slow
def test_records_of_tfrecord(place):
    cases = {
        'empty': (b'', 'image'),
        'no message': (b'\xff' * 99, 'tf.train.Example'),
        'absurd length of a field': (b'\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f', 'tf.train.Example'),
        'label of 10 digits': (tf_example(image=[GOOD[0]], label=[10**9]), 'label 1000000000'),
        'negative label': (tf_example(image=[GOOD[0]], label=[-5]), 'label -5'),
        'label that is text': (tf_example(image=[GOOD[0]], label=[b'1']), 'label'),
        'no label': (tf_example(image=[GOOD[0]]), 'label'),
        'image that is a number': (tf_example(image=[7], label=[0]), 'image'),
        'two images': (tf_example(image=[GOOD[0], GOOD[1]], label=[0]), 'image'),
        'no image': (tf_example(label=[0]), 'image'),
        'bomb': (tf_example(image=[BOMB], label=[0]), 'pixels'),
    }
    write_tfrecord(place, *(tfrecord(content) for content, _ in cases.values()))
    _, skipped = run_prepare(place, 'tfds:fishes')
    assert len(skipped) == len(cases)
    for number, (case, (_, word)) in enumerate(cases.items(), 16):
        [reason] = [reason for name, reason in skipped.items() if name.startswith(f'record {number} of train')]
        assert word in reason, case


@pytest.mark.slow
@pytest.mark.parametrize('record', [tfrecord(b'', 2**60), struct.pack('<QI', 2**63 + 9, 0) + bytes(50)])
def test_absurd_length_of_a_record(record, place):
    """The records behind such a length cannot be found; those before are used."""
    write_tfrecord(place, record, tfrecord(tf_example(image=[GOOD[0]], label=[0])))
    text, skipped = run_prepare(place, 'tfds:fishes')
    assert skipped == {} or {name.split(' of ')[0] for name in skipped} == {'record 16', 'record 17'}
    assert skipped or 'fishes-train.tfrecord-00000-of-00001' in text


@pytest.mark.parametrize('names', [('a', '\x1b[31m'), ('a', ''), ('a', 'a'), ('a',), ('a', 'b\0')])
def test_class_names_of_tfds(names, place):
    write_tfrecord(place, names=names)
    refused(place, 'tfds:fishes', 'fishes')


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
    refused(place, 'tfds:fishes', 'fishes')


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json', 'label.labels.txt'])
@pytest.mark.parametrize('replace', [os.mkfifo, lambda path: path.symlink_to('/dev/zero')])
def test_pipe_or_device_in_the_place_of_a_description_of_tfds(name, replace, place):
    """Reading them would not end."""
    write_tfrecord(place)
    path = next(place.glob(f'in/**/{name}'))
    path.unlink()
    replace(path)
    refused(place, 'tfds:fishes', name, 'not a regular file')


@pytest.mark.parametrize('content', [b'', b'{', b'[' * 100_000, b'\xff\xfe', b'{"featuresDict": 3}'])
@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
def test_corrupt_description_of_tfds(name, content, place):
    write(write_tfrecord(place) / name, content)
    refused(place, 'tfds:fishes', name)


def test_pipe_in_place_of_records(place):
    file = write_tfrecord(place) / 'fishes-train.tfrecord-00000-of-00001'
    file.unlink()
    os.mkfifo(file)
    refused(place, 'tfds:fishes', 'fishes-train')


# Parquet --------------------------------------------------------------------------------------------------------------


def write_parquet(
    place: Path, cells: list, features: bytes | None = None, image: str = 'struct', label: str = 'int64'
) -> str:
    """Writes parquet files; the training file ends with `cells`, the values of image and label. Returns the source."""
    import pyarrow as pa
    import pyarrow.parquet

    kinds = {'struct': pa.struct([('bytes', pa.binary()), ('path', pa.string())]), 'string': pa.string()}
    kinds |= {'int64': pa.int64(), 'list': pa.list_(pa.binary())}
    names = {'image': {'_type': 'Image'}, 'label': {'_type': 'ClassLabel', 'names': ['a', 'b']}}
    metadata = json.dumps({'info': {'features': names}}).encode() if features is None else features
    schema = pa.schema([('image', kinds[image]), ('label', kinds[label])], {b'huggingface': metadata})
    wrap = {'struct': lambda content: {'bytes': content, 'path': 'x.jpg'}, 'string': str, 'int64': len}
    wrap['list'] = lambda content: [content]
    good = [(wrap[image](content), i % 2) for i, content in enumerate(GOOD)]
    for name, rows in (('train', good[:16] + cells), ('validation', good[16:])):
        table = pa.Table.from_pylist([{'image': one, 'label': other} for one, other in rows], schema)
        path = place / 'in' / f'{name}-00000-of-00001.parquet'
        pyarrow.parquet.write_table(table, path, compression='zstd', dictionary_pagesize_limit=2**28)
    return f'hf:{place}/in'


@pytest.mark.slow
def test_cells_of_parquet(place):
    """Paths in cells do not lead out of the folder, even if the cell has no bytes."""
    secret = str(place / 'outside' / 'secret.jpg')
    cells = [
        ({'bytes': None, 'path': '../outside/secret.jpg'}, 0, 'leads out'),
        ({'bytes': None, 'path': secret}, 0, 'leads out'),
        ({'bytes': None, 'path': f'file://{secret}'}, 0, ''),
        ({'bytes': b'x', 'path': secret}, 0, 'not an image'),
        ({'bytes': None, 'path': None}, 0, 'null'),
        (None, 0, 'null'),
        ({'bytes': b'', 'path': LONG}, 0, 'empty'),
        ({'bytes': b'<html>', 'path': 'evil\x1b[31m.jpg'}, 0, 'not an image'),
        ({'bytes': BOMB, 'path': 'x.png'}, 0, 'pixels'),
        ({'bytes': None, 'path': 'train-00000-of-00001.parquet'}, 0, 'not an image'),
        ({'bytes': None, 'path': 'missing\0.jpg'}, 0, 'zero byte'),
        ({'bytes': None, 'path': LONG}, 0, ''),
    ]
    labels = [({'bytes': GOOD[0], 'path': LONG}, label) for label in (10**9, -5, None)]
    source = write_parquet(place, [cell[:2] for cell in cells] + labels)
    log, skipped = run_prepare(place, source)
    assert f'without the label of a class: 3; the first is train-00000-of-00001.parquet row {16 + len(cells)}' in log
    assert ': 24 images' in log
    check_skipped(skipped, {f' row {16 + i}': reason for i, (*_, reason) in enumerate(cells)})


@pytest.mark.parametrize('image', ['string', 'int64', 'list'])
def test_columns_of_other_types(image, place):
    refused(place, write_parquet(place, [], image=image), 'image')


def class_label(names: object) -> bytes:
    features = {'image': {'_type': 'Image'}, 'label': {'_type': 'ClassLabel', 'names': names}}
    return json.dumps({'info': {'features': features}}).encode()


@pytest.mark.parametrize(
    'features',
    [
        *(b'', b'{', b'[' * 100_000, b'\xff\xfe', b'{"info": 3}'),
        *map(class_label, (5, ['a', '\x1b[31m'], ['a', ''], ['a', 'a'], ['a', None], ['a', 3], [])),
    ],
)
def test_class_names_of_parquet(features, place):
    refused(place, write_parquet(place, [], features), str(place / 'in'))


@pytest.mark.slow
def test_long_class_name(place):
    """A name of 100,000 characters is refused, or shortened in the log."""
    text, _ = run_prepare(place, write_parquet(place, [], class_label(['a', LONG])))
    assert 'xxx' in text


@pytest.mark.slow
def test_dictionary_bomb(place):
    """One cell of 128 MB of zeros occurs forty times; the file has less than a megabyte."""
    source = write_parquet(place, [({'bytes': bytes(2**27), 'path': 'x'}, 0)] * 40)
    assert (place / 'in' / 'train-00000-of-00001.parquet').stat().st_size < 10**6
    log, skipped = run_prepare(place, source)
    assert {name.rsplit(' ', 1)[1] for name in skipped} == {str(row) for row in range(16, 56)}
    assert '24 images' in log


@pytest.mark.parametrize(
    'end', [b'', b'PAR1', struct.pack('<I', 2**31 - 9) + b'PAR1', bytes(99) + struct.pack('<I', 99) + b'PAR1']
)
def test_end_of_a_parquet_file(end, place):
    source = write_parquet(place, [])
    file = place / 'in' / 'train-00000-of-00001.parquet'
    file.write_bytes(file.read_bytes()[:-300] + end)
    refused(place, source, file.name)


# Folders and IDX ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bomb_of_idx(place):
    for name, images in (('train', 16), ('t10k', 8)):
        shape = struct.pack('>IIII', 0x803, images, 8, 8)
        write(place / 'in' / f'{name}-images-idx3-ubyte.gz', gzip.compress(shape + bytes(images * 64)))
        labels = struct.pack('>II', 0x801, images) + bytes(images)
        write(place / 'in' / f'{name}-labels-idx1-ubyte.gz', gzip.compress(labels))
    file = place / 'in' / 'train-images-idx3-ubyte.gz'
    write(file, gzip.compress(struct.pack('>IIII', 0x803, 2**20, 128, 64)) + gzip.compress(bytes(2**25), 9) * 256)
    text, _ = run_prepare(place, f'idx:{place}/in')
    assert file.name in text


def test_pipe_in_place_of_idx(place):
    os.mkfifo(place / 'in' / 'train-images-idx3-ubyte')
    refused(place, f'idx:{place}/in', 'train-images-idx3-ubyte is not a file')


@pytest.mark.slow
def test_links_and_pipes_in_a_folder(place):
    for i, content in enumerate(GOOD):
        write(place / 'in' / 'ab'[i % 2] / f'{i}.jpg', content)
    os.mkfifo(place / 'in' / 'a' / 'pipe.jpg')
    (place / 'in' / 'a' / 'device.jpg').symlink_to('/dev/zero')
    (place / 'in' / 'a' / 'text.jpg').symlink_to('/etc/passwd')
    _, skipped = run_prepare(place, f'folder:{place}/in')
    check_skipped(skipped, {'a/pipe.jpg': 'a pipe', 'a/device.jpg': 'a device', 'a/text.jpg': 'not an image'})


def test_class_folder_of_control_characters(place):
    for i, content in enumerate(GOOD):
        write(place / 'in' / ('a', 'b\x1b[31m')[i % 2] / f'{i}.jpg', content)
    refused(place, f'folder:{place}/in', 'b\\x1b[31m')
