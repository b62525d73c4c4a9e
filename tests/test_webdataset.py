"""Tar files of WebDataset, written with tarfile or byte by byte; the expected examples are those of plain lists."""

import gzip
import io
import os
import pickle
import random
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zoo
from helpers import read_json, read_lines
from PIL import Image

from alexnet_jax.data.images import UnreadableImage
from alexnet_jax.prepare.raw_sources import Examples, Source, SourceError
from alexnet_jax.prepare.sources import open_source
from alexnet_jax.prepare.writer import PrepareConfig, prepare


def member(name: str, content: bytes = b'', **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def pictures(numbers: range, ending: str = 'jpg') -> list[tuple[tarfile.TarInfo, bytes]]:
    """Returns an image and a member .cls for each number; the labels are 0, 1, 2, 0, ..."""
    pairs = [(member(f'{i:06d}.{ending}', b'picture %d' % i), member(f'{i:06d}.cls', b'%d' % (i % 3))) for i in numbers]
    return [part for pair in pairs for part in pair]


def expected(numbers: range) -> list[tuple]:
    return [(b'picture %d' % i, i % 3) for i in numbers]


def opened(pattern: Path | str, validation_split: str | None = None) -> Source:
    return open_source(f'wds:{pattern}', '/nowhere', 0.25, validation_split)


def content(examples: Examples) -> list[tuple]:
    return [examples[i] for i in range(len(examples))]


def everything(pattern: Path | str) -> dict[str, tuple]:
    """Returns the examples of both splits by name."""
    splits = opened(pattern).splits.values()
    return {examples.name(i): examples[i] for examples in splits for i in range(len(examples))}


def refused(pattern: Path | str) -> str:
    with pytest.raises(SourceError) as error:
        opened(pattern)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_folder_of_tar_files_with_splits(tmp_path):
    for shard in range(3):
        write(tmp_path / f'imagenet1k-train-{shard:04d}.tar', pictures(range(shard * 10, shard * 10 + 10)))
    write(tmp_path / 'imagenet1k-validation-00.tar', pictures(range(30, 42)))
    write(tmp_path / 'imagenet1k-test-00.tar', pictures(range(42, 50)))
    source = opened(tmp_path)
    assert (source.class_names, source.names_classes, source.holds_out_validation) == (['0', '1', '2'], False, False)
    assert content(source.splits['train']) == expected(range(30))
    assert content(source.splits['validation']) == expected(range(30, 42))
    assert content(opened(tmp_path, 'test').splits['validation']) == expected(range(42, 50))
    assert source.splits['train'].name(11) == 'imagenet1k-train-0001.tar/000011.jpg'
    assert [note.partition(';')[0] for note in source.notes] == ['test is not used']
    assert source.roots == (str(tmp_path),)


def test_examples_in_any_order_and_in_other_processes(tmp_path):
    for shard in range(2):
        write(tmp_path / f'train-{shard}.tar', pictures(range(shard * 20, shard * 20 + 20)))
    write(tmp_path / 'val.tar', pictures(range(40, 50)))
    examples = opened(tmp_path).splits['train']
    part = pickle.loads(pickle.dumps(examples.subset(np.array([39, 3, 25]))))
    assert content(part) == [expected(range(40))[i] for i in (39, 3, 25)]
    assert part.name(1) == 'train-0.tar/000003.jpg'
    assert examples.subset(range(30, 32)).files == ('train-1.tar',)
    digests = {examples.digest(), part.digest(), examples.subset(range(3)).digest()}
    write(tmp_path / 'train-1.tar', [*pictures(range(20, 39)), *pictures(range(40, 41))])  # another label
    digests.add(opened(tmp_path).splits['train'].digest())
    assert len(digests) == 4


def test_one_tar_file_holds_out_a_part_of_each_class(tmp_path):
    source = opened(write(tmp_path / '0.tar', pictures(range(40))))
    assert source.holds_out_validation
    assert sorted(content(source.splits['train']) + content(source.splits['validation'])) == sorted(expected(range(40)))
    assert np.bincount([label for _, label in content(source.splits['validation'])]).tolist() == [4, 3, 3]


LABELS = {
    'numbers': ({'cls': b' 1\n'}, {'cls': b'0'}, ['0', '1'], False, 1),
    'names': ({'cls': b'dog\n'}, {'cls': 'cät'.encode()}, ['cät', 'dog'], True, 1),
    'json': ({'json': b'{"label": 2, "text": "x"}'}, {'json': b'{"cls": 0}'}, ['0', '1', '2'], False, 2),
    'json names': ({'json': b'{"class": "dog"}'}, {'json': b'{"class": "cat"}'}, ['cat', 'dog'], True, 1),
    'cls before json': ({'cls': b'1', 'json': b'{"label": 9}'}, {'cls': b'0', 'json': b'{'}, ['0', '1'], False, 1),
    'number and name': ({'cls': b'7'}, {'cls': b'cat'}, ['7', 'cat'], True, 0),
}


@pytest.mark.parametrize('form', LABELS)
def test_forms_of_labels(tmp_path, form):
    first, second, classes, named, label = LABELS[form]
    members = []
    for i, labels in enumerate([first, second] * 8):
        members += [member(f'a/{i}.{ending}', text) for ending, text in labels.items()]
        members += [member(f'a/{i}.PNG', b'picture'), member(f'a/{i}.txt', b'a caption'), member(f'a/._{i}.cls', b'?')]
    write(tmp_path / 'train.tar', [member('a', type=tarfile.DIRTYPE), *members])
    write(tmp_path / 'val.tar', members)
    source = opened(tmp_path)
    assert (source.class_names, source.names_classes) == (classes, named)
    assert source.splits['train'][0] == (b'picture', label)
    assert len(source.splits['train']) == 16
    assert source.notes == tuple(
        f'a class has no {split} image: 1' for split in ('training', 'validation') if form == 'json'
    )


def test_roots_are_the_folder_or_the_files(tmp_path):
    """A tar file that is added to a folder is a change of the source, and so are other class names."""
    write(tmp_path / 'train' / '0.tar', pictures(range(30)))
    assert opened(tmp_path / 'train').roots == (str(tmp_path / 'train'),)
    (tmp_path / 'classes.txt').write_text('cow\nape\nbee\nelk\n')
    assert opened(tmp_path).roots == (str(tmp_path), str(tmp_path / 'classes.txt'))
    assert opened(tmp_path / 'train').roots == (str(tmp_path / 'train'), str(tmp_path / 'classes.txt'))
    assert opened(tmp_path / 'train' / '*.tar').roots == (
        str(tmp_path / 'train' / '0.tar'),
        str(tmp_path / 'classes.txt'),
    )


def test_name_of_an_image_whose_tar_file_is_gone(tmp_path):
    write(tmp_path / 'train.tar', pictures(range(30)))
    examples = opened(tmp_path / 'train.tar').splits['train']
    (tmp_path / 'train.tar').unlink()
    assert examples.name(0).startswith('train.tar byte ')


def test_class_names_in_a_file_beside_the_tar_files(tmp_path):
    write(tmp_path / 'train.tar', pictures(range(30)))
    (tmp_path / 'classes.txt').write_text('cow\nape\nbee\nelk\n')
    source = opened(tmp_path / 'train.tar')
    assert (source.class_names, source.names_classes) == (['cow', 'ape', 'bee', 'elk'], True)
    assert set(everything(tmp_path).values()) == set(expected(range(30)))
    assert any('classes.txt' in note for note in source.notes)
    write(tmp_path / 'test' / '0.tar', pictures(range(30)))
    assert opened(tmp_path / 'test' / '0.tar').class_names == ['cow', 'ape', 'bee', 'elk']
    (tmp_path / 'classes.txt').write_bytes(b'\xff\xfe')
    assert 'classes.txt is not UTF-8 text' in refused(tmp_path)


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_formats_and_members_in_any_order(tmp_path, format):
    folder = 'très long/' * (1 if format == tarfile.USTAR_FORMAT else 30)
    members = [member(folder + info.name, text) for info, text in pictures(range(20))]
    random.Random(0).shuffle(members)
    if format == tarfile.PAX_FORMAT:
        members[0][0].pax_headers = {'SCHILY.xattr.user.note': 'x = 1\n2' * 100, 'mtime': '1.5'}
    path = write(tmp_path / '0.tar', members, format)
    with tarfile.open(path) as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar if info.name.endswith('.jpg')}
    order = [f'0.tar/{info.name}' for info, _ in members if info.name.endswith('.jpg')]
    result = everything(path)
    assert {name: text for name, (text, _) in result.items()} == {f'0.tar/{name}': text for name, text in found.items()}
    assert all(label == int(text.split()[1]) % 3 for text, label in result.values())
    splits = opened(path).splits.values()
    positions = [[order.index(examples.name(i)) for i in range(len(examples))] for examples in splits]
    assert all(split == sorted(split) for split in positions)  # the order of the images in the tar file


def test_tar_files_of_the_command_tar(tmp_path):
    (tmp_path / 'a').mkdir()
    for info, text in pictures(range(20)):
        (tmp_path / 'a' / info.name).write_bytes(text)
    subprocess.run(['tar', '-cf', 'train.tar', './a'], cwd=tmp_path, check=True)
    assert set(everything(tmp_path / 'train.tar').values()) == set(expected(range(20)))


@pytest.mark.parametrize(
    ('pattern', 'names'),
    [
        ('t-{0..2}.tar', ['t-0', 't-1', 't-2']),
        ('t-{08..10}.tar', ['t-08', 't-09', 't-10']),
        ('t-{0,2}.tar', ['t-0', 't-2']),
        ('{t,u}-{0..1}.tar', ['t-0', 't-1', 'u-0', 'u-1']),
        ('{t-{0..1},u-{1..1}}.tar', ['t-0', 't-1', 'u-1']),
        ('t-?.tar', ['t-0', 't-1', 't-2']),
        ('*', ['t-0', 't-08', 't-09', 't-1', 't-10', 't-2', 'u-0', 'u-1']),
        ('u-[01].tar', ['u-0', 'u-1']),
        ('a{b}.tar', ['a{b}']),
    ],
)
def test_patterns(tmp_path, pattern, names):
    for i, name in enumerate(['t-0', 't-1', 't-2', 't-08', 't-09', 't-10', 'u-0', 'u-1']):
        write(tmp_path / f'{name}.tar', pictures(range(i * 12, i * 12 + 12)))
    if pattern.startswith('a'):
        write(tmp_path / 'a{b}.tar', pictures(range(12)))
    found = opened(tmp_path / pattern)
    assert sorted(os.path.basename(root) for root in found.roots) == [f'{name}.tar' for name in names]
    assert sum(map(len, found.splits.values())) == 12 * len(names)


def test_missing_and_unsuitable_files_are_refused(tmp_path):
    path = write(tmp_path / 'd' / 'train-0000.tar', pictures(range(12)))
    message = refused(tmp_path / 'd' / 'train-{0000..0146}.tar')
    assert '146 of the 147 tar files' in message
    assert message.endswith(f'the first is {tmp_path}/d/train-0001.tar')
    assert 'no tar file matches wds:' in refused(tmp_path / 'd' / '*.tgz')
    assert 'neither a list {a,b} nor a range' in refused(tmp_path / '{x}.tar')
    assert 'more than 100,000 files' in refused(tmp_path / '{0..999999999}{0..9}.tar')
    (tmp_path / 'e').mkdir()
    assert 'has no tar files' in refused(tmp_path / 'e')
    assert 'no tar file matches' in refused('a\0b')
    (tmp_path / 'd' / 'train-0001.tar.gz').write_bytes(gzip.compress(path.read_bytes()))
    assert re.search(r'train-0001.tar.gz is compressed.*gunzip', refused(tmp_path / 'd'))
    (tmp_path / 'd' / 'train-0001.tar.gz').rename(tmp_path / 'd' / 'train-0001.tar')
    assert 'train-0001.tar is no uncompressed tar file' in refused(tmp_path / 'd')
    write(tmp_path / 'f' / 'test' / '0.tar', pictures(range(12)))
    assert 'no training split; its splits are test' in refused(tmp_path / 'f')
    os.remove(path)
    os.mkfifo(path)
    assert 'train-0000.tar is not a file' in refused(path)
    assert 'endings of its members are .txt' in refused(write(tmp_path / '0.tar', [member('a.txt', b'')]))
    assert 'has no images with labels' in refused(write(tmp_path / '1.tar', pictures(range(9))[::2]))
    large = [member('a.jpg', b'x'), member('a.cls', b'9' * 900), *pictures(range(9))]
    assert re.search('label of 2.tar/a.jpg is 9+[.]{3}9+, but', refused(write(tmp_path / '2.tar', large)))
    for url in ('wds:s3://bucket/{0..9}.tar', 'hf:gs://bucket/d', 'folder:gs://bucket/d', 'idx:https://host/d'):
        with pytest.raises(SourceError, match=re.escape(url) + r' is a URL.*gcsfuse'):
            open_source(url, '/nowhere', 0.25)


def test_hostile_members_are_named_and_nothing_is_written(tmp_path):
    (tmp_path / 'secret.jpg').write_bytes(zoo.saved(Image.new('RGB', (9, 9)), 'PNG'))
    image = (tmp_path / 'secret.jpg').read_bytes()
    bomb = zoo.png(60000, 60000, 8, 2, b'')
    members = [
        *(part for i in range(3) for part in (member(f'{i}.jpg', image), member(f'{i}.cls', b'%d' % (i % 2)))),
        *(member('../../x.jpg', image), member('../../x.cls', b'0')),
        *(member('/etc/x.jpg', image), member('/etc/x.cls', b'0')),
        *(member('sym.jpg', type=tarfile.SYMTYPE, linkname=str(tmp_path / 'secret.jpg')), member('sym.cls', b'0')),
        *(member('hard.jpg', type=tarfile.LNKTYPE, linkname='0.jpg'), member('hard.cls', b'0')),
        *(member('dev.jpg', type=tarfile.CHRTYPE, devmajor=1, devminor=5), member('dev.cls', b'0')),
        *(member('fifo.jpg', type=tarfile.FIFOTYPE), member('fifo.cls', b'0')),
        *(member('text.jpg', b'no picture'), member('text.cls', b'0')),
        *(member('empty.jpg'), member('empty.cls', b'0')),
        *(member('bomb.jpg', bomb), member('bomb.cls', b'0')),
        *(member('c/d.jpg', image), member('c/d.cls', type=tarfile.SYMTYPE, linkname='0.cls')),
        *(member('huge.jpg', image), member('huge.cls', b'1' * 5000)),
        *(member('deep.jpg', image), member('deep.json', b'[' * 100000)),
        *(member('binary.jpg', image), member('binary.cls', b'\xff\xfe')),
        *(member('negative.jpg', image), member('negative.cls', b'-1')),
        *(member('two.jpg', image), member('two.png', image), member('two.cls', b'0')),
        *(member('1.jpg', image), member('1.cls', b'0')),
        member('alone.cls', b'0'),
    ]
    write(tmp_path / 'wds' / 'train.tar', members)
    write(tmp_path / 'wds' / 'val.tar', members[:6])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    settings = PrepareConfig(f'wds:{tmp_path}/wds', 8, max_corrupt_fraction=0.9, workers=1)
    store = Path(prepare(settings, str(tmp_path / 'data')))
    reasons = {
        '../../x.jpg': 'leads out',
        '/etc/x.jpg': 'leads out',
        'sym.jpg': 'a link',
        'hard.jpg': 'a link',
        'dev.jpg': 'a device',
        'fifo.jpg': 'a pipe',
        'text.jpg': 'not an image',
        'empty.jpg': 'empty file',
        'bomb.jpg': 'pixels',
    }
    skipped = {line['name']: line['reason'] for line in read_lines(store / 'skipped.jsonl')}
    assert list(skipped) == [f'train.tar/{name}' for name in reasons]
    for name, reason in reasons.items():
        assert reason in skipped[f'train.tar/{name}']
    notes = '\n'.join(opened(tmp_path / 'wds').notes)
    assert 'images of train without a label: 5; the first is train.tar/c/d.jpg' in notes
    assert f'images with the key of an earlier image: 2; the first is {tmp_path}/wds/train.tar/two.png' in notes
    assert f'labels without an image: 1; the first is {tmp_path}/wds/train.tar/alone' in notes
    assert read_json(store / 'prepared.json')['images'] == {'train': 4, 'validation': 3}
    outside = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if not path.is_relative_to(tmp_path / 'data')
    }
    assert outside == before


def header_with(position: int, content: bytes) -> bytes:
    """Returns the header of an empty member big.jpg with `content` at `position`, and a correct checksum."""
    header = bytearray(tarfile.TarInfo('big.jpg').tobuf())
    header[position : position + len(content)] = content
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    return bytes(header)


def extended(record: bytes) -> bytes:
    """Returns an extended header with one record, and the member it belongs to."""
    info = tarfile.TarInfo('././@PaxHeader')
    info.type, info.size = tarfile.XHDTYPE, len(record)
    return info.tobuf() + record + bytes(-len(record) % 512) + tarfile.TarInfo('a.jpg').tobuf()


SIZE, TYPE = 124, 156  # positions in a header
HOSTILE = {
    '2^60 bytes': (header_with(SIZE, b'\x80\0\0\0\x10' + bytes(7)), r'big.jpg claims 1,152,921,504,606,846,976 bytes'),
    'beyond the end': (header_with(SIZE, b'00000077777\0'), 'big.jpg claims 32,767 bytes, but the file ends after 1,0'),
    'negative size': (header_with(SIZE, b'\xff' * 12), 'big.jpg has .*negative size'),
    'size is no number': (header_with(SIZE, b'abcdefghijk\0'), 'corrupt header at byte'),
    'unknown type': (header_with(TYPE, b'Q'), "big.jpg has the unknown type b'Q'"),
    'sparse': (header_with(TYPE, b'S'), 'big.jpg is a sparse file'),
    'sparse in an extended header': (extended(b'22 GNU.sparse.major=1\n'), 'a.jpg is a sparse file'),
    'negative extended size': (extended(b'13 size=-512\n'), 'corrupt extended header'),
    'extended size of 2^60': (extended(b'28 size=1152921504606846976\n'), 'a.jpg claims 1,152,921,504,606,846,976'),
    'record of length 0': (extended(b'0 path=x\n'), 'corrupt extended header'),
    'record beyond its header': (extended(b'99 path=x\n'), 'corrupt extended header'),
    'long extended header': (extended(b'200000 path=' + b'x' * 199987 + b'\n'), 'extended header of 200,000 bytes'),
    'garbage': (b'\x01' * 512, 'corrupt header at byte'),
    'joined with cat': (bytes(1024) + tarfile.TarInfo('a.jpg').tobuf(), 'data after the end of the archive'),
}


@pytest.mark.parametrize('how', HOSTILE)
def test_hostile_headers_are_refused(tmp_path, how):
    addition, reason = HOSTILE[how]
    path = write(tmp_path / '0.tar', pictures(range(12)))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + addition + bytes(1024))
    assert re.search(reason, refused(path))


def test_link_with_a_size_has_no_content(tmp_path):
    path = write(tmp_path / '0.tar', pictures(range(12)))
    link = header_with(SIZE, b'00000004000\0' + b'0' * 11 + b'\0' + b' ' * 8 + tarfile.LNKTYPE)
    path.write_bytes(link + path.read_bytes())
    assert set(everything(path).values()) == set(expected(range(12)))


def test_truncated_tar_files(tmp_path):
    path = write(tmp_path / '0.tar', pictures(range(12)))
    data = path.read_bytes()
    assert not opened(path).notes
    path.write_bytes(data[: 1024 * 24 - 512])  # before the content of the last label
    assert 'is truncated or corrupt: 000011.cls claims 1 bytes, but the file ends after 0' in refused(path)
    path.write_bytes(data[: 1024 * 20])  # between two members
    assert len(everything(path)) == 10
    assert any('without an end mark' in note for note in opened(path).notes)


def test_random_changes_never_end_in_another_error(tmp_path):
    path = write(tmp_path / '0.tar', pictures(range(12)), tarfile.PAX_FORMAT)
    data, generator = path.read_bytes(), random.Random(0)
    refusals = 0
    for _ in range(400):
        changed = bytearray(data[: 1024 * 24])
        for _ in range(generator.choice([1, 1, 30])):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path.write_bytes(changed[: generator.choice([len(changed), generator.randrange(len(changed))])] + bytes(1024))
        try:
            splits = opened(path).splits.values()
        except SourceError as error:
            refusals += str(error).count('\n') == 0
            continue
        for examples in splits:
            for i in range(len(examples)):
                assert examples.name(i).startswith('0.tar/')
                assert data.find(examples[i][0][:4]) >= 0 or examples[i][0]
    assert 100 < refusals < 400


def test_tar_file_that_changes_during_the_preparation(tmp_path):
    path = write(tmp_path / '0.tar', pictures(range(12)))
    examples = opened(path).splits['train']
    path.write_bytes(b'')
    with pytest.raises(UnreadableImage, match='changed'):
        examples[0]
