"""Files in the format of MNIST."""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from alexnet_jax.prepare.raw_sources import ArrayExamples, Source, SourceError, held_out_share, hold_out
from alexnet_jax.prepare.splits import choose_one_split, choose_splits

MAX_BYTES = 4 * 1024**3  # of an IDX file, which is read into memory; the largest EMNIST has 550 MB


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
        origins={'train': 'train', 'validation': choice.validation or held_out_share(fraction, 'train')},
        notes=choice.notes,
        names_classes=False,
        roots=(str(folder),),
    )


def open_idx_split(folder: Path, split: str | None) -> Source:
    """Opens one split of files in MNIST's format, see sources.open_split()."""
    folder = Path(os.path.abspath(folder))
    found = [name for name in ('train', 't10k', 'test') if list(folder.glob(f'*{name}*idx3*'))]
    chosen = choose_one_split(found or ['train'], split, str(folder))
    examples = _idx_split(folder, chosen)
    names = [str(label) for label in range(int(examples.labels.max()) + 1)]
    origins = {chosen: chosen}
    return Source({chosen: examples}, names, False, origins, names_classes=False, roots=(str(folder),))


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
    if not path.is_file():  # opening a pipe would wait for a writer
        raise SourceError(f'{path} is not a file; download it again')
    header_bytes = 4 + 4 * dimensions
    try:
        with open(path, 'rb') as raw:
            is_compressed = raw.read(2) == b'\x1f\x8b'
        with gzip.open(path) if is_compressed else open(path, 'rb') as file:
            header = file.read(header_bytes)
            shape = tuple(np.frombuffer(header[4:], '>u4').tolist()) if len(header) == header_bytes else ()
            size = math.prod(shape)
            if size > MAX_BYTES:  # the header is corrupt, or the file expands to more than fits into memory
                raise SourceError(
                    f'{path} claims {size:,} bytes, but at most {MAX_BYTES:,} are read; use folder:DIR for more images'
                )
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f'{path} is corrupt: {error}; download it again') from None
    if header[:4] != bytes([0, 0, 8, dimensions]) or len(content) != size:
        raise SourceError(f'{path} is not a complete IDX file of bytes with {dimensions} dimensions; download it again')
    return np.frombuffer(content, np.uint8).reshape(shape)
