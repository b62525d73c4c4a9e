"""Sources of raw images: folders and IDX files, and what is rejected."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.prepare import sources


def tree(root: Path, *paths: str) -> Path:
    """Writes files below `root`, each with its own path as content."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return root


def opened(source: str, fraction: float = 0.25, validation_split: str | None = None) -> sources.Source:
    return sources.open_source(source, '/nowhere', fraction, validation_split)


def content(examples) -> list[tuple]:
    return [(examples.name(i), *examples[i]) for i in range(len(examples))]


@pytest.mark.parametrize(
    ('source', 'reason'),
    [
        ('folder:', "'folder:' names no folder; write folder:DIR"),
        ('hf:', "'hf:' names no folder"),
        ('{root}', 'for the folder {root}, write folder:{root}'),
        ('folder:{root}/rows', '{root}/rows has no folders of images; hf:{root}/rows reads the *.parquet files'),
        ('folder:{root}/tars', '{root}/tars has no folders of images; wds:{root}/tars reads the *.tar files'),
    ],
)
def test_message_names_the_source_that_was_meant(tmp_path, source, reason):
    tree(tmp_path, 'rows/data/train.parquet', 'tars/0.tar')
    with pytest.raises(sources.SourceError) as caught:
        opened(source.format(root=tmp_path))
    assert reason.format(root=tmp_path) in str(caught.value)


def test_folder_with_train_and_val(tmp_path):
    tree(tmp_path, 'train/dog/b.jpg', 'train/dog/a.jpg', 'train/cat/deep/c.jpg', 'train/dog/.hidden', 'train/x.txt')
    tree(tmp_path, 'val/dog/d.jpg', '.git/e')
    (tmp_path / 'train' / 'ant').mkdir()
    source = opened(f'folder:{tmp_path}')
    assert source.class_names == ['ant', 'cat', 'dog']
    assert not source.holds_out_validation
    expected = [('train/cat/deep/c.jpg', 1), ('train/dog/a.jpg', 2), ('train/dog/b.jpg', 2)]
    assert content(source.splits['train']) == [(name, name.encode(), label) for name, label in expected]
    assert content(source.splits['validation']) == [('val/dog/d.jpg', b'val/dog/d.jpg', 2)]
    part = source.splits['train'].subset(range(1, 3))
    assert content(part) == content(source.splits['train'])[1:]


def test_folder_without_val_holds_out_part_of_each_class(tmp_path):
    tree(tmp_path, *(f'{name}/{i}.jpg' for name, count in (('a', 8), ('b', 40)) for i in range(count)))
    source = opened(f'folder:{tmp_path}')
    assert source.holds_out_validation
    names = {split: {name for name, *_ in content(source.splits[split])} for split in source.splits}
    assert not names['train'] & names['validation']
    assert len(names['train'] | names['validation']) == 48
    labels = [label for *_, label in content(source.splits['validation'])]
    assert np.bincount(labels).tolist() == [2, 10]
    assert content(opened(f'folder:{tmp_path}').splits['validation']) == content(source.splits['validation'])
    # The validation images are not simply the first or last files, which may be frames of one film.
    assert {f'b/{i}.jpg' for i in range(10)} - names['validation']


def test_fingerprint_changes_with_the_folder(tmp_path):
    tree(tmp_path, *(f'a/{i}.jpg' for i in range(8)))
    prints = [opened(f'folder:{tmp_path}').fingerprint]
    assert opened(f'folder:{tmp_path}').fingerprint == prints[0]
    (tmp_path / 'a' / '0.jpg').write_text('longer than before')
    prints.append(opened(f'folder:{tmp_path}').fingerprint)
    (tmp_path / 'a' / '0.jpg').rename(tmp_path / 'a' / '9.jpg')
    prints.append(opened(f'folder:{tmp_path}').fingerprint)
    (tmp_path / 'b').mkdir()
    prints.append(opened(f'folder:{tmp_path}').fingerprint)
    prints.append(opened(f'folder:{tmp_path}', 0.5).fingerprint)
    assert len(set(prints)) == 5


def test_class_may_be_named_train(tmp_path):
    tree(tmp_path, *(f'{name}/{i}.jpg' for name in ('bus', 'train') for i in range(8)))
    assert opened(f'folder:{tmp_path}').class_names == ['bus', 'train']


def test_unusual_names_and_symbolic_links(tmp_path):
    tree(tmp_path, *(f'a, b/{i} ü.jpg' for i in range(8)))
    os.symlink('..', tmp_path / 'a, b' / 'loop')
    with pytest.raises(sources.SourceError, match=r'loop .*link'):
        opened(f'folder:{tmp_path}')
    (tmp_path / 'a, b' / 'loop').unlink()
    os.mkdir(os.fsencode(tmp_path) + b'/\xff')
    with pytest.raises(sources.SourceError, match='printable'):
        opened(f'folder:{tmp_path}')
    os.rename(os.fsencode(tmp_path) + b'/\xff', tmp_path / 'a, b' / 'deeper')
    (tmp_path / 'a, b' / 'deeper' / os.fsdecode(b'\xfe.jpg')).write_text('')
    os.symlink(tmp_path / 'a, b' / 'deeper', tmp_path / 'a, b' / 'again')  # A link to a folder elsewhere is followed.
    source = opened(f'folder:{tmp_path}')
    assert sum(map(len, source.splits.values())) == 10
    assert source.class_names == ['a, b']
    assert len(source.fingerprint) == 64


@pytest.mark.parametrize(
    ('paths', 'reason'),
    [
        ([], 'folder:DIR'),
        (['a.jpg'], 'class'),
        (['train/a/.hidden'], 'empty'),
        (['train/a/1.jpg', 'val/b/1.jpg'], 'val/b .*train'),
        (['train/a/1.jpg', 'val/b.jpg'], 'val .*images'),
        (['a/1.jpg'], r'data.validation_fraction: 0.25 of each class of the 1 images'),
    ],
)
def test_invalid_folders_are_rejected(tmp_path, paths, reason):
    root = tree(tmp_path / 'root', *paths)
    with pytest.raises(sources.SourceError, match=reason) as caught:
        opened(f'folder:{root}')
    assert '\n' not in str(caught.value)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, ending: str = '') -> None:
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if ending == '.gz' else bytes
    (folder / f'{split}-images-idx3-ubyte{ending}').write_bytes(pack(idx(images)))
    (folder / f'{split}-labels-idx1-ubyte{ending}').write_bytes(pack(idx(labels)))


GENERATOR = np.random.default_rng(0)
IMAGES, LABELS = GENERATOR.integers(0, 256, (20, 4, 5), np.uint8), np.arange(20, dtype=np.uint8) % 3


@pytest.mark.parametrize('ending', ['', '.gz'])
def test_idx_files_written_byte_by_byte(tmp_path, ending):
    write_idx(tmp_path, 'train', IMAGES, LABELS, ending)
    write_idx(tmp_path, 't10k', IMAGES[:4], LABELS[:4] + 1, ending)
    source = opened(f'idx:{tmp_path}', validation_split='test')
    assert source.class_names == ['0', '1', '2', '3']
    for split, start in (('train', 0), ('validation', 1)):
        for i, (name, pixels, label) in enumerate(content(source.splits[split].subset(range(1, 3)))):
            assert (name, label) == (f'image {i + 1}', LABELS[i + 1] + start)
            np.testing.assert_array_equal(pixels, IMAGES[i + 1])
    assert len(source.splits['train']) == 20


def test_idx_without_test_images_holds_out_a_part(tmp_path):
    write_idx(tmp_path, 'emnist-letters-train', IMAGES, LABELS)
    source = opened(f'idx:{tmp_path}')
    assert source.holds_out_validation
    found = {split: content(source.splits[split]) for split in source.splits}
    assert sorted(int(name.split()[1]) for split in found.values() for name, *_ in split) == list(range(20))
    for name, pixels, label in found['validation']:
        np.testing.assert_array_equal(pixels, IMAGES[int(name.split()[1])])
        assert label == LABELS[int(name.split()[1])]
    assert len(found['validation']) == 6  # a quarter of 7, 7 and 6, rounded


@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (lambda folder: (folder / 'train-labels-idx1-ubyte').unlink(), 'train-labels-idx1-ubyte'),
        (lambda folder: (folder / 'a-train-images-idx3').write_bytes(b''), 'a-train-images-idx3, train-im'),
        (lambda folder: cut(folder / 'train-images-idx3-ubyte'), 'train-images-idx3-ubyte .*3 dimensions'),
        (lambda folder: cut(folder / 'train-labels-idx1-ubyte', gzip.compress), 'train-labels-idx1-ubyte'),
        (lambda folder: write_idx(folder, 'train', IMAGES, LABELS[:9]), '20 train images but 9 labels'),
    ],
)
def test_invalid_idx_files_are_rejected(tmp_path, spoil, reason):
    write_idx(tmp_path, 'train', IMAGES, LABELS)
    spoil(tmp_path)
    with pytest.raises(sources.SourceError, match=reason):
        opened(f'idx:{tmp_path}')


def cut(path: Path, pack=bytes) -> None:
    path.write_bytes(pack(path.read_bytes())[:-5])
