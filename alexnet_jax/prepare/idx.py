"""Files in the format of MNIST."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from alexnet_jax.prepare.raw_sources import ArrayExamples, Source, SourceError, hold_out
from alexnet_jax.prepare.splits import choose_splits


def open_idx(folder: Path, fraction: float, validation_split: str | None) -> Source:
    """Opens files in MNIST's format, *train*images*idx3* and *train*labels*idx1*, optionally compressed with gzip.

    `fraction` of the training images is held out, unless `validation_split` is t10k or test.
    """
    folder = Path(os.path.abspath(folder))
    train = _idx_split(folder, 'train')
    classes = int(train.labels.max()) + 1
    found = {'train': 'train'} | {name: name for name in ('t10k', 'test') if list(folder.glob(f'*{name}*idx3*'))}
    choice = choose_splits(found, validation_split, str(folder))
    if choice.validation is None:
        splits = hold_out(train, fraction, str(folder))
    else:
        validation = _idx_split(folder, choice.validation)
        classes = max(classes, int(validation.labels.max()) + 1)
        splits = {'train': train, 'validation': validation}
    return Source(
        splits,
        [str(label) for label in range(classes)],
        choice.validation is None,
        origins={'train': 'train', 'validation': choice.validation or f'{100 * fraction:g}% of each class of train'},
        notes=choice.notes,
        names_classes=False,
        roots=(str(folder),),
    )


def _idx_split(folder: Path, split: str) -> ArrayExamples:
    """Returns the examples of a split. Raises SourceError: the files are missing or corrupt."""
    arrays = []
    for what, dimensions in (('images', 3), ('labels', 1)):
        found = sorted(folder.glob(f'*{split}*{what}*idx{dimensions}*'))
        if len(found) != 1:
            names = ', '.join(path.name for path in found) or 'none'
            pattern = f'{split}-{what}-idx{dimensions}-ubyte[.gz]'
            raise SourceError(f'config.data.source: {folder} must contain one file {pattern}, but contains {names}')
        arrays.append(_idx_array(found[0], dimensions))
    images, labels = arrays
    if len(images) != len(labels) or not len(images):
        raise SourceError(f'{folder}: {len(images)} {split} images but {len(labels)} labels; the numbers must be equal')
    return ArrayExamples(images, labels, np.arange(len(images)))


def _idx_array(path: Path, dimensions: int) -> UInt8[np.ndarray, '...']:
    """Reads a uint8 array from an IDX file: two zero bytes, 8 for uint8, rank, sizes (4 bytes, big-endian), data."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b'\x1f\x8b' else content
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f'{path} is corrupt: {error}; download it again') from None
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * dimensions], '>u4').tolist())
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != 4 + 4 * dimensions + np.prod(shape, dtype=int):
        raise SourceError(f'{path} is not a complete IDX file of bytes with {dimensions} dimensions; download it again')
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
