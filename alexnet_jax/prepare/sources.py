"""Opens sources of raw images."""

import dataclasses
import os
from pathlib import Path

from alexnet_jax.paths import check_text_path, is_url, shown
from alexnet_jax.prepare.classes import describe_empty_classes
from alexnet_jax.prepare.folder import open_folder, open_folder_split
from alexnet_jax.prepare.idx import open_idx, open_idx_split
from alexnet_jax.prepare.raw_sources import Source, SourceError
from alexnet_jax.prepare.tfds_source import open_tfds, open_tfds_split
from alexnet_jax.prepare.webdataset import open_webdataset, open_webdataset_split


def is_local(source: str) -> bool:
    """Returns whether `source` is an existing folder of images or of IDX files."""
    kind, _, location = source.partition(':')
    return kind in ('folder', 'idx') and os.path.isdir(os.path.expanduser(location))


def check_downloaded(source: str) -> None:
    """Raises SourceError if open_source() would download parquet files of the Hugging Face Hub."""
    kind, _, location = source.partition(':')
    if kind == 'hf':
        from alexnet_jax.prepare import parquet

        parquet.check_downloaded(location)


def open_source(source: str, data_dir: str, validation_fraction: float, validation_split: str | None = None) -> Source:
    """Opens a source.

    Args:
      source: 'photos[:HALF[/COUNT]]', 'tfds:NAME[:config]', 'folder:DIR', 'idx:DIR', 'hf:DIR' or 'wds:PATTERN'.
      data_dir: folder of the TFDS data sets.
      validation_fraction: fraction of the training images to hold out if the source has no validation split.
      validation_split: name of the split to validate on; None selects the validation split of the source.

    Raises SourceError: the source does not exist, has a wrong format, or cannot be downloaded.
    Raises ConfigError: the path of the source cannot be used, or TFDS would have to write to a read-only `data_dir`.
    """
    opened = _open_source(source, data_dir, validation_fraction, validation_split)
    return dataclasses.replace(opened, notes=(*opened.notes, *describe_empty_classes(opened)))


def _open_source(source: str, data_dir: str, validation_fraction: float, validation_split: str | None) -> Source:
    kind, location = _parse(source)
    if kind == 'folder':
        return open_folder(Path(location).expanduser(), validation_fraction, validation_split)
    if kind == 'idx':
        return open_idx(Path(location).expanduser(), validation_fraction, validation_split)
    if kind == 'hf':
        from alexnet_jax.prepare.parquet import open_parquet  # imports pyarrow

        return open_parquet(location, validation_fraction, validation_split)
    if kind == 'wds':
        return open_webdataset(location, validation_fraction, validation_split)
    return open_tfds(source, data_dir, validation_fraction, validation_split)


def open_split(source: str, data_dir: str, split: str | None, labeled: bool = True) -> Source:
    """Opens one split of a source, to evaluate on: the split `split`, else the validation split, else the only split.

    A source without splits is one split. No training split is needed.

    Args:
      source, data_dir: see open_source().
      split: name of the split, or a word for its kind, such as 'test'; None selects it.
      labeled: whether images without labels are refused; otherwise a flat folder without labels has no classes, and
        the label of all images is -1.

    Returns a source with one split, under its name.

    Raises SourceError or ConfigError: see open_source(), or there is no such split, or the choice is ambiguous.
    """
    kind, location = _parse(source)
    if kind == 'folder':
        return open_folder_split(Path(location).expanduser(), split, labeled)
    if kind == 'idx':
        return open_idx_split(Path(location).expanduser(), split)
    if kind == 'hf':
        from alexnet_jax.prepare.parquet import open_parquet_split  # imports pyarrow

        return open_parquet_split(location, split)
    if kind == 'wds':
        return open_webdataset_split(location, split)
    return open_tfds_split(source, data_dir, split)


def _parse(source: str) -> tuple[str, str]:
    """Returns the kind and the location of a source. Raises SourceError or ConfigError: see open_source()."""
    kind, _, location = source.partition(':')
    if is_url(source) and not source.startswith('hf:s3://'):
        raise SourceError(
            f'config.data.source: {shown(source)} is a URL; only parquet files are read from one, hf:s3://BUCKET/DIR:'
            ' mount the bucket (gcsfuse, mount-s3, rclone mount) or copy the files, then give the local path'
        )
    if kind in ('folder', 'idx', 'hf', 'wds') and not location:
        raise SourceError(f'config.data.source: {source!r} names no folder; write {kind}:DIR')
    if kind in ('folder', 'idx'):
        check_text_path('config.data.source', location)
    if kind in ('folder', 'idx', 'hf', 'wds', 'tfds', 'photos'):
        return kind, location
    hint = f'; for the folder {source}, write folder:{source}' if os.path.isdir(os.path.expanduser(source)) else ''
    raise SourceError(
        f'config.data.source: {source!r} is not photos, tfds:NAME[:config], folder:DIR, idx:DIR, hf:DIR or'
        f' wds:PATTERN{hint}'
    )
