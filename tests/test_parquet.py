"""Parquet files as the Hugging Face Hub has them, written with pyarrow; the expected rows are those of plain lists."""

import http.server
import json
import os
import pickle
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zoo
from helpers import ROOT, read_json, read_lines, run_command
from PIL import Image

from alexnet_jax.prepare import parquet_rows
from alexnet_jax.prepare.raw_sources import Examples, Source, SourceError
from alexnet_jax.prepare.sources import open_source
from alexnet_jax.prepare.writer import PrepareConfig, prepare

IMAGE = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
SPECIES = ['cow', 'ape', 'bee']  # The order of the schema is not that of the alphabet.


def metadata(**classes: list[str]) -> dict[bytes, bytes]:
    """Returns the schema metadata that the library `datasets` writes, with the class names of columns."""
    features = {name: {'names': names, '_type': 'ClassLabel'} for name, names in classes.items()}
    return {b'huggingface': json.dumps({'info': {'features': {'image': {'_type': 'Image'}} | features}}).encode()}


def picture(i: int) -> dict[str, object]:
    return {'bytes': f'picture {i}'.encode(), 'path': f'{i}.jpg'}


def write(path: Path, numbers: range, labels: list | pa.Array | None = None, group: int = 7, **columns) -> None:
    """Writes the pictures `numbers`, with labels 0, 1, 2, 0, ... unless given, and class names unless in an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = metadata(label=SPECIES) if not isinstance(labels, pa.Array) else {}
    labels = pa.array([i % 3 for i in numbers]) if labels is None else labels
    table = pa.table({'image': pa.array([picture(i) for i in numbers], IMAGE), 'label': labels} | columns)
    pq.write_table(table.replace_schema_metadata(described), path, row_group_size=group)


def opened(location: Path | str, validation_split: str | None = None) -> Source:
    return open_source(f'hf:{location}', '/nowhere', 0.25, validation_split)


def content(examples: Examples) -> list[tuple]:
    return [examples[i] for i in range(len(examples))]


def expected(numbers: range) -> list[tuple]:
    return [(f'picture {i}'.encode(), i % 3) for i in numbers]


def refused(location: Path | str, validation_split: str | None = None) -> str:
    with pytest.raises(SourceError) as error:
        opened(location, validation_split)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    'layout',
    [
        'data/{split}-0000{shard}-of-00002.parquet',
        'data/{split}-0000{shard}-of-00002-4bcb11a4f1ba6de3.parquet',
        'default/{split}/000{shard}.parquet',
        '{split}/000{shard}.parquet',
        'animals/{split}-0000{shard}-of-00002.parquet',
        '{split}/part-0000{shard}-c000.snappy.parquet',
        'zoo_{split}_{shard}.parquet',
    ],
)
def test_layouts_of_the_hub(tmp_path, layout):
    write(tmp_path / layout.format(split='train', shard=0), range(20))
    write(tmp_path / layout.format(split='train', shard=1), range(20, 33))
    write(tmp_path / layout.format(split='validation', shard=0), range(33, 40))
    write(tmp_path / layout.format(split='validation', shard=1), range(40, 45))
    write(tmp_path / layout.format(split='test', shard=0), range(45, 50), [-1] * 5)
    write(tmp_path / '.cache' / 'train.parquet', range(9))
    source = opened(tmp_path)
    assert (source.class_names, source.names_classes) == (SPECIES, True)
    assert not source.holds_out_validation
    assert content(source.splits['train']) == expected(range(33))
    assert content(source.splits['validation']) == expected(range(33, 45))
    assert any(note.startswith('test is not used') for note in source.notes)
    assert source.roots == (str(tmp_path),)
    assert source.origins['train'].endswith('(2 files)')
    assert 'test of' in refused(tmp_path, 'test')  # It has no labels.


def test_examples_in_any_order_and_in_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, '_WINDOW_BYTES', 100)  # a row group is decoded in several parts
    write(tmp_path / 'train-00000-of-00002.parquet', range(20))
    write(tmp_path / 'train-00001-of-00002.parquet', range(20, 40))
    write(tmp_path / 'dev.parquet', range(40, 60))
    examples = opened(tmp_path).splits['train']
    order = np.random.default_rng(0).permutation(40).tolist()
    assert [examples[i] for i in order] == [expected(range(40))[i] for i in order]
    part = pickle.loads(pickle.dumps(examples.subset(np.array([3, 25, 39]))))
    assert content(part) == [expected(range(40))[i] for i in (3, 25, 39)]
    names = ['train-00000-of-00002.parquet row 3', 'train-00001-of-00002.parquet row 5']
    assert [part.name(i) for i in range(2)] == names
    assert len(pickle.dumps(examples.subset(range(30, 32)))) < len(pickle.dumps(examples))
    assert examples.subset(range(30, 32)).files == ('train-00001-of-00002.parquet',)
    digests = {examples.digest(), part.digest(), examples.subset(range(10)).digest()}
    write(tmp_path / 'train-00001-of-00002.parquet', range(23, 43))  # other pictures with the same labels
    digests.add(opened(tmp_path).splits['train'].digest())
    assert len(digests) == 4


def test_one_file_holds_out_a_part_of_each_class(tmp_path):
    write(tmp_path / 'train-00000-of-00009.parquet', range(40))
    source = opened(tmp_path / 'train-00000-of-00009.parquet')
    assert source.holds_out_validation
    assert sorted(content(source.splits['train']) + content(source.splits['validation'])) == sorted(expected(range(40)))
    assert np.bincount([label for _, label in content(source.splits['validation'])]).tolist() == [4, 3, 3]
    assert any('only 1 of its 9 files' in note for note in source.notes)


def test_files_of_a_split_must_have_the_same_columns_and_classes(tmp_path):
    write(tmp_path / 'train-00000-of-00002.parquet', range(20))
    write(tmp_path / 'train-00001-of-00002.parquet', range(20), pa.array([0, 1] * 10))
    assert 'train-00001-of-00002.parquet has other columns or class names than train-00000' in refused(tmp_path)


@pytest.mark.parametrize(
    ('labels', 'classes', 'named', 'first'),
    [
        (pa.array(['dog', 'cat', 'eel'] * 4), ['cat', 'dog', 'eel'], True, 1),
        (pa.array(['dog', 'cat', 'eel'] * 4).dictionary_encode(), ['cat', 'dog', 'eel'], True, 1),
        (pa.array(['10', '9', '2'] * 4, pa.large_string()), ['10', '2', '9'], True, 0),
        (pa.array([4, 0, 2] * 4, pa.uint8()), ['0', '1', '2', '3', '4'], False, 4),
    ],
)
def test_labels_without_names_in_the_schema(tmp_path, labels, classes, named, first):
    write(tmp_path / 'train.parquet', range(12), labels)
    write(tmp_path / 'val.parquet', range(12), labels)
    source = opened(tmp_path)
    assert (source.class_names, source.names_classes) == (classes, named)
    assert source.splits['train'][0] == (b'picture 0', first)
    assert source.splits['train'][0] == source.splits['validation'][0]


def test_column_of_labels_is_never_guessed(tmp_path):
    fine, coarse = pa.array([i % 4 for i in range(24)]), pa.array([i % 2 for i in range(24)])
    images = pa.array([picture(i) for i in range(24)], IMAGE)
    described = metadata(fine_label=['ape', 'bee', 'cow', 'dog'], coarse_label=['wild', 'tame'])
    table = pa.table({'img': images, 'id': fine, 'fine_label': fine, 'coarse_label': coarse})
    path = tmp_path / 'train.parquet'
    pq.write_table(table.replace_schema_metadata(described), path)
    assert 'fine_label, coarse_label; choose one' in refused(path)
    advised = re.search(r'such as hf:(.*)', refused(path))
    assert advised
    source = opened(advised[1])
    assert source.class_names == ['ape', 'bee', 'cow', 'dog']
    assert any('not read: id, coarse_label;' in note for note in source.notes)
    assert opened(f'{path}:coarse_label').class_names == ['wild', 'tame']
    assert 'a column of labels, medium' in refused(f'{path}:medium')
    described = metadata(coarse_label=['wild', 'tame'])  # the only column with names of classes
    pq.write_table(table.replace_schema_metadata(described), path)
    assert opened(path).class_names == ['wild', 'tame']


def test_plain_binary_column_and_two_image_columns(tmp_path):
    files = pa.array([b'picture %d' % i for i in range(12)])
    labels = pa.array([i % 3 for i in range(12)])
    pq.write_table(pa.table({'jpg': files, 'label': labels}), tmp_path / 'train.parquet')
    pq.write_table(pa.table({'jpg': files, 'label': labels}), tmp_path / 'val.parquet')
    assert content(opened(tmp_path).splits['train']) == expected(range(12))
    pq.write_table(pa.table({'jpg': files, 'mask': files, 'label': labels}), tmp_path / 'train.parquet')
    assert 'one column of images, but has jpg: binary, mask: binary, label: int64' in refused(tmp_path)


def test_rows_without_labels_are_named(tmp_path):
    write(tmp_path / 'train.parquet', range(6), pa.array([0, -1, 1, None, 0, 1]))
    write(tmp_path / 'val.parquet', range(4), pa.array([0, 1, 0, 1]))
    source = opened(tmp_path)
    assert [name for name, _ in content(source.splits['train'])] == [b'picture %d' % i for i in (0, 2, 4, 5)]
    assert 'images of train without a label: 2; the first is train.parquet row 1' in source.notes


def saved(path: Path, numbers: list[int], cells: list) -> None:
    table = pa.table({'image': pa.array(cells, IMAGE), 'label': pa.array(numbers)})
    pq.write_table(table.replace_schema_metadata(metadata(label=['red', 'blue'])), path, row_group_size=4)


def test_unusable_cells_are_skipped_by_name(tmp_path):
    root = tmp_path / 'zoo'
    root.mkdir()
    image = zoo.saved(Image.new('RGB', (9, 9)), 'PNG')
    for folder in (tmp_path, root):
        (folder / 'a.png').write_bytes(image)
    os.symlink(tmp_path / 'a.png', root / 'link.png')
    cells = [
        {'bytes': image, 'path': None},
        {'bytes': None, 'path': 'a.png'},
        None,
        {'bytes': None, 'path': None},
        {'bytes': b'no picture', 'path': 'a.png'},
        {'bytes': None, 'path': '../a.png'},
        {'bytes': None, 'path': str(tmp_path / 'a.png')},
        {'bytes': None, 'path': 'link.png'},
        {'bytes': None, 'path': 'missing.png'},
        {'bytes': b'', 'path': 'a.png'},
    ]
    saved(root / 'train.parquet', [0, 1] * 5, cells)
    saved(root / 'val.parquet', [0, 1], [{'bytes': image, 'path': ''}] * 2)
    settings = PrepareConfig(f'hf:{root}', 8, max_corrupt_fraction=0.9, workers=1)
    store = Path(prepare(settings, str(tmp_path / 'data')))
    skipped = {line['name']: line['reason'] for line in read_lines(store / 'skipped.jsonl')}
    reasons = {2: 'null', 3: 'null', 4: 'not an image', 5: 'leads out', 6: 'leads out', 7: 'leads out'}
    reasons |= {8: 'No such file', 9: 'empty file'}
    assert list(skipped) == [f'train.parquet row {i}' for i in reasons]
    for i, reason in reasons.items():
        assert reason in skipped[f'train.parquet row {i}']
    assert read_json(store / 'prepared.json')['images'] == {'train': 2, 'validation': 2}


def test_rows_after_a_corrupt_page_are_skipped_by_name(tmp_path):
    cells = [{'bytes': b'%04d' % i * 3000, 'path': None} for i in range(12)]
    saved(tmp_path / 'train.parquet', [0, 1] * 6, cells)
    saved(tmp_path / 'val.parquet', [0, 1] * 6, cells)
    pristine = (tmp_path / 'train.parquet').read_bytes()
    start = pq.ParquetFile(tmp_path / 'train.parquet').metadata.row_group(1).column(0).data_page_offset
    broken = bytearray(pristine)
    broken[start : start + 40] = b'\xff' * 40
    (tmp_path / 'train.parquet').write_bytes(broken)
    examples = opened(tmp_path).splits['train']
    for i in (11, 4, *range(12)):  # The second row group is corrupt, from wherever it is read.
        if 4 <= i < 8:
            with pytest.raises((ValueError, OSError), match='row group is corrupt'):
                examples[i]
            assert examples.name(i) == f'train.parquet row {i}'
        else:
            assert examples[i] == (cells[i]['bytes'], i % 2)


def broken_file(path: Path, how: str) -> None:
    write(path, range(12))
    data = path.read_bytes()
    if how == 'text':
        path.write_text('version https://git-lfs.github.com/spec/v1\n')
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'truncated':
        path.write_bytes(data[:-20])
    elif how == 'footer':
        path.write_bytes(data[:-300] + b'\xff' * 290 + data[-10:])
    elif how in ('names', 'metadata'):
        table = pq.read_table(path)
        described = metadata(label=[1, 2, 3]) if how == 'names' else {b'huggingface': b'{"info": '}
        pq.write_table(table.replace_schema_metadata(described), path)
    elif how == 'link':
        path.unlink()
        os.symlink(path.parent / 'missing', path)
    elif how == 'pipe':
        path.unlink()
        os.mkfifo(path)


@pytest.mark.parametrize(
    ('how', 'reason'),
    [
        ('text', r'train.parquet cannot be read .*; if it is corrupt, download it again'),
        ('empty', r'train.parquet cannot be read .*; if it is corrupt, download it again'),
        ('truncated', r'train.parquet cannot be read .*; if it is corrupt, download it again'),
        ('footer', r'train.parquet cannot be read .*; if it is corrupt, download it again'),
        ('names', r'train.parquet: the names of the classes of label are corrupt; download the file again'),
        ('metadata', r'train.parquet: the metadata of the schema, huggingface, are corrupt; download it again'),
        ('link', 'train.parquet is a link to a missing file, or no regular file'),
        ('pipe', 'train.parquet is a link to a missing file, or no regular file'),
    ],
)
def test_corrupt_files_are_refused(tmp_path, how, reason):
    broken_file(tmp_path / 'train.parquet', how)
    assert re.search(reason, refused(tmp_path))


def test_other_files_are_refused(tmp_path):
    assert 'has no parquet files' in refused(tmp_path)
    assert 'does not exist; hf:DIR takes' in refused(tmp_path / 'missing')
    for name in ('en', 'fr'):
        write(tmp_path / name / 'train-00000-of-00001.parquet', range(12))
    message = refused(tmp_path)
    assert 'several data sets' in message
    assert 'en, fr' in message
    advised = re.search(r'such as hf:([^;]*);', message)
    assert advised
    assert opened(advised[1]).class_names == SPECIES
    write(tmp_path / 'en' / 'val.parquet', range(12), pa.array([0] * 12))  # without class names
    assert 'class names of train and val differ' in refused(tmp_path / 'en')
    write(tmp_path / 'fr' / 'train.parquet', range(12), pa.array(['ape', 'bee'] * 6))
    write(tmp_path / 'fr' / 'val.parquet', range(12), pa.array(['ape', 'elk'] * 6))
    os.remove(tmp_path / 'fr' / 'train-00000-of-00001.parquet')
    assert 'elk is a class of the validation split only' in refused(tmp_path / 'fr')
    write(tmp_path / 'fr' / 'train.parquet', range(12), pa.array([2**60, 1] * 6))
    os.remove(tmp_path / 'fr' / 'val.parquet')
    assert f'the label of train.parquet row 0 is {2**60}' in refused(tmp_path / 'fr')
    write(tmp_path / 'fr' / 'train.parquet', range(12), pa.array([1.5, 1] * 6))
    assert 'a column of labels, but has image: struct' in refused(tmp_path / 'fr')
    write(tmp_path / 'fr' / 'train_extra.parquet', range(12))
    write(tmp_path / 'fr' / 'train.parquet', range(12))
    source = opened(tmp_path / 'fr')
    assert sum(map(len, source.splits.values())) == 12
    assert 'train_extra is not used' in source.notes


BOUNDED = """
import sys, pyarrow as pa, pyarrow.parquet as pq
from alexnet_jax.prepare.sources import open_source
examples = open_source(f'hf:{sys.argv[1]}', '/nowhere', 0.25).splits['validation']
before = pa.default_memory_pool().max_memory()
assert before < 4e6, before
total = sum(len(examples[i][0]) for i in range(len(examples)))
print(total, pa.default_memory_pool().max_memory())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_row_group(tmp_path):
    random = np.random.default_rng(0)
    block = random.bytes(1 << 20)
    cells = [{'bytes': block[i:] + block[:i], 'path': None} for i in range(120)]
    table = pa.table({'image': pa.array(cells, IMAGE), 'label': pa.array([0, 1] * 60)})
    for split in ('train', 'val'):
        writer = pq.ParquetWriter(tmp_path / f'{split}.parquet', table.schema, write_batch_size=1)
        writer.write_table(table if split == 'val' else table.slice(0, 4), row_group_size=10**6)
        writer.close()
    run = run_command('-c', BOUNDED, tmp_path)
    assert run.returncode == 0, run.stderr
    total, peak = map(int, run.stdout.split())
    assert total == 120 << 20  # in a single row group
    assert peak < 60 << 20


class ObjectStore(http.server.BaseHTTPRequestHandler):
    """The part of the protocol of S3 that reading needs: lists of objects, and ranges of bytes."""

    protocol_version, root = 'HTTP/1.1', Path()

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        bucket, _, key = urllib.parse.unquote(url.path).strip('/').partition('/')
        folder = self.root / bucket
        if bucket == 'private':
            self.answer(403)
        elif key and (folder / key).is_file():
            data = (folder / key).read_bytes()
            if 'Range' in self.headers:
                start, stop = map(int, self.headers['Range'].removeprefix('bytes=').split('-'))
                headers = {'Content-Range': f'bytes {start}-{stop}/{len(data)}'}
                self.answer(206, data[start : stop + 1], headers)
            else:
                self.answer(200, data)
        elif key or not folder.is_dir():
            self.answer(404)
        else:
            prefix = urllib.parse.parse_qs(url.query).get('prefix', [''])[0]
            found = [path for path in sorted(folder.rglob('*')) if path.is_file()]
            objects = ''.join(
                f'<Contents><Key>{path.relative_to(folder)}</Key><Size>{path.stat().st_size}</Size></Contents>'
                for path in found
                if str(path.relative_to(folder)).startswith(prefix)
            )
            self.answer(200, f'<ListBucketResult>{objects}</ListBucketResult>'.encode())

    def answer(self, status: int, body: bytes = b'', headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Iterator[str]:
    """The address of an object store on this machine, whose buckets are the folders of tmp_path."""
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'name')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
    handler = type('Handler', (ObjectStore,), {'root': tmp_path})
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1'
        server.shutdown()


@pytest.mark.slow
def test_object_store(tmp_path, bucket):
    image = zoo.saved(Image.new('RGB', (9, 9), (200, 0, 0)), 'PNG')
    root = tmp_path / 'zoo' / 'animals'
    (root / 'data').mkdir(parents=True)
    saved(root / 'data' / 'train-00000-of-00001.parquet', [0, 1] * 10, [{'bytes': image, 'path': ''}] * 20)
    cells = [{'bytes': b'no picture', 'path': ''}, {'bytes': None, 'path': 'a.png'}, {'bytes': image, 'path': ''}]
    saved(root / 'data' / 'validation-00000-of-00001.parquet', [0, 0, 1], cells)
    remote, local = opened(f's3://zoo/animals?{bucket}'), opened(root)
    assert remote.class_names == ['red', 'blue']
    assert content(remote.splits['train']) == content(local.splits['train'])
    assert opened(f's3://zoo/animals?{bucket}:label').class_names == ['red', 'blue']
    settings = PrepareConfig(f'hf:s3://zoo/animals?{bucket}', 8, max_corrupt_fraction=0.9, workers=1)
    store = Path(prepare(settings, str(tmp_path / 'data')))
    assert read_json(store / 'prepared.json')['images'] == {'train': 20, 'validation': 1}
    names = [line['name'] for line in read_lines(store / 'skipped.jsonl')]
    assert names == [f'data/validation-00000-of-00001.parquet row {i}' for i in range(2)]
    assert 'cannot be read (' in refused(f's3://nothing/animals?{bucket}')
    assert 'ACCESS_DENIED' in refused(f's3://private/animals?{bucket}')


HUB = '''
import os

class Refusal(Exception):
    pass

def snapshot_download(repo_id, repo_type=None, allow_patterns=None, local_files_only=False):
    """Stands for the Hub: a folder of links, as in the cache of the library."""
    if repo_id == "zoo/private":
        raise Refusal("401 Client Error.\\n\\nAccess to dataset zoo/private is restricted.")
    assert (repo_id, repo_type, allow_patterns) == ("zoo/animals", "dataset", "*.parquet")
    if local_files_only and not os.path.exists(os.environ["SNAPSHOT"] + ".cached"):
        raise Refusal("LocalEntryNotFound")
    assert local_files_only or not os.path.exists(os.environ["SNAPSHOT"] + ".cached")
    open(os.environ["SNAPSHOT"] + ".cached", "w").close()
    return os.environ["SNAPSHOT"]
'''


@pytest.mark.slow
def test_data_set_of_the_hub(tmp_path):
    (tmp_path / 'library').mkdir()
    (tmp_path / 'library' / 'huggingface_hub.py').write_text(HUB)
    (tmp_path / 'snapshot').mkdir()
    image = zoo.saved(Image.new('RGB', (9, 9), (200, 0, 0)), 'PNG')
    saved(tmp_path / 'blob', [0, 1] * 10, [{'bytes': image, 'path': ''}] * 20)
    os.symlink(tmp_path / 'blob', tmp_path / 'snapshot' / 'train-00000-of-00001.parquet')

    def prepare_command(name: str, path: str, *more: str):
        flags = [*more, f'--source=hf:{name}', f'--data_dir={tmp_path}', '--image_size=8', '--workers=1']
        variables = {'PYTHONPATH': f'{path}:{ROOT}', 'SNAPSHOT': str(tmp_path / 'snapshot')}
        return run_command('-m', 'alexnet_jax.prepare', *flags, **variables)

    run = prepare_command('zoo/animals', str(tmp_path / 'library'), '--show')
    assert run.returncode == 2  # nothing is downloaded only to look at it
    assert 'prepare --source=hf:zoo/animals downloads it' in run.stderr
    run = prepare_command('zoo/animals', str(tmp_path / 'library'))
    assert run.returncode == 0, run.stderr
    assert read_json(next((tmp_path / 'prepared').glob('*/prepared.json')))['images'] == {'train': 18, 'validation': 2}
    run = prepare_command('zoo/private', str(tmp_path / 'library'))
    assert run.returncode == 2
    assert 'could not download it: Refusal: 401 Client Error. Access to dataset' in run.stderr.splitlines()[-1]
    assert 'Traceback' not in run.stderr
    run = prepare_command('zoo/elephants', '/nowhere')
    assert run.returncode == 2
    assert 'pip install huggingface_hub, or download it, hf download zoo/elephants --repo-type=dataset' in run.stderr
