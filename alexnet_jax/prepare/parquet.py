"""Parquet files, as the Hugging Face Hub has them: one row per image, with an image column and a label column."""

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from alexnet_jax.data.split_names import split_word
from alexnet_jax.paths import check_text_path, is_url, shown
from alexnet_jax.prepare.parquet_rows import PARQUET_ERRORS, ParquetExamples, filesystem_of, open_file
from alexnet_jax.prepare.raw_sources import Source, SourceError
from alexnet_jax.prepare.record_files import (
    FoundFiles,
    LabelColumn,
    RawSplit,
    find_files,
    open_one_split,
    open_splits,
)
from alexnet_jax.runtime.console import log, summarize_exception


def _find_local(location: str) -> tuple[str, str | None] | None:
    """Returns the local path and the label column of DIR or DIR:COLUMN; None if neither path exists."""
    path, _, column = location.rpartition(':')
    for candidate, label in ((location, None), (path, column)):
        if candidate and os.path.exists(os.path.expanduser(candidate)):
            return os.path.abspath(os.path.expanduser(candidate)), label
    return None


def open_parquet(location: str, fraction: float, validation_split: str | None) -> Source:
    """Opens parquet files.

    Args:
      location: DIR, a folder with parquet files or one parquet file; s3://BUCKET/DIR; or ORG/NAME,
        a data set of the Hugging Face Hub; optionally with a colon and the name of the label column.
      fraction, validation_split: see sources.open_source().

    Raises SourceError: files are missing or corrupt, or have no image column or label column, or several.
    """
    return open_splits(*_find_splits(location), fraction, validation_split)


def open_parquet_split(location: str, split: str | None) -> Source:
    """Opens one split of parquet files, see open_parquet() and sources.open_split()."""
    return open_one_split(*_find_splits(location), split)


def _find_splits(location: str) -> FoundFiles:
    """Finds the parquet files of a source, after a download if necessary. Raises SourceError: see open_parquet()."""
    path, label = _locate(location)
    if is_url(path) or os.path.isdir(path):
        root, files = path, _parquet_files(path)
    else:
        root, files = os.path.dirname(path), [os.path.basename(path)]
    open_split = functools.partial(_open_split, root, label, location)
    return path, files, open_split, () if is_url(path) else (path,)


def _locate(location: str) -> tuple[str, str | None]:
    """Returns the URL, or the absolute local path after a download, and the label column of a source."""
    if is_url(location):
        url = re.fullmatch(r'(.+?)(?::([^\W\d]\w*))?', location)  # a number after a colon is a port
        assert url is not None
        return url[1], url[2]
    path, label = _find_local(location) or _download(location)
    return check_text_path('config.data.source', path), label


def check_downloaded(location: str) -> None:
    """Raises SourceError if open_parquet() would download the data set `location`, or could not."""
    if not is_url(location) and _find_local(location) is None:
        _download(location, only_from_cache=True)


def _download(location: str, only_from_cache: bool = False) -> tuple[str, str | None]:
    """Returns the local folder of the parquet files of ORG/NAME[:COLUMN] on the Hugging Face Hub, and the column.

    With `only_from_cache`, nothing is downloaded.

    Raises SourceError: `location` has another form, huggingface_hub is not installed, or the download failed.
    """
    name, _, label = location.partition(':')
    if not re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', name, re.ASCII):
        raise SourceError(
            f'config.data.source: {shown(location)} does not exist; hf:DIR takes a folder with parquet files or one'
            ' parquet file, and hf:ORG/NAME a data set of the Hugging Face Hub'
        )
    try:
        hub = importlib.import_module('huggingface_hub')
    except ModuleNotFoundError:
        raise SourceError(
            f'config.data.source: {name} does not exist; to read that data set of the Hugging Face Hub, pip install'
            f' huggingface_hub, or download it, hf download {name} --repo-type=dataset --local-dir=DIR, and give hf:DIR'
        ) from None
    if not only_from_cache:
        log(f'reading the parquet files of {name} from the Hugging Face Hub')
    try:
        folder = hub.snapshot_download(
            name, repo_type='dataset', allow_patterns='*.parquet', local_files_only=only_from_cache
        )
    except Exception as error:  # the library and its HTTP client raise many types
        if only_from_cache:
            raise SourceError(
                f'config.data.source: {name} is no local folder, and is not in the cache of huggingface_hub; alexnet'
                f' prepare --source=hf:{location} downloads it'
            ) from None
        raise SourceError(
            f'config.data.source: {name} is no local folder, and huggingface_hub could not download it:'
            f' {type(error).__name__}: {" ".join(str(error).split())[:200]}'
        ) from None
    return folder, label or None


def _parquet_files(root: str) -> list[str]:
    """Returns the sorted paths, relative to `root`, of the parquet files in `root`.

    Raises SourceError: there is none, or the files belong to several configurations.
    """
    files = _files_of_bucket(root) if is_url(root) else find_files(root, ('.parquet',))
    if not files:
        raise SourceError(f'config.data.source: {root} has no parquet files')
    unusable = next((file for file in files if not os.path.isfile(os.path.join(root, file))), None)
    if unusable is not None and not is_url(root):
        raise SourceError(f'{os.path.join(root, unusable)} is a link to a missing file, or no regular file')
    sets: dict[str, str] = {}  # folder by the part of its path that tells neither a split nor a usual folder
    for file in files:
        parts = os.path.dirname(file).split(os.sep)
        named = [part for part in parts if part not in ('data', 'default') and not split_word(part)]
        sets.setdefault(os.sep.join(named), os.sep.join(parts[: parts.index(named[-1]) + 1] if named else ()))
    if len(sets) > 1:
        raise SourceError(
            f'config.data.source: {root} has the parquet files of several data sets; choose the folder of one, such as'
            f' hf:{os.path.join(root, max(sets.values()))}; the folders are {", ".join(map(shown, sets.values()))}'
        )
    return files


def _files_of_bucket(url: str) -> list[str]:
    """Returns the sorted paths of the parquet files below `url`. Raises SourceError: the bucket cannot be read."""
    try:
        filesystem, folder = filesystem_of(url)
        found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    except PARQUET_ERRORS as error:
        raise SourceError(f'config.data.source: {shown(url)} cannot be read ({summarize_exception(error)})') from None
    return sorted(os.path.relpath(info.path, folder) for info in found if info.path.lower().endswith('.parquet'))


def _open_split(root: str, label: str | None, location: str, files: Sequence[str]) -> RawSplit:
    """Reads the footers and the label columns of the files of a split."""
    parts = [_read_labels(root, file, label, location) for file in files]
    image, _, class_names = parts[0].columns
    for file, part in zip(files, parts, strict=True):
        if part.columns != parts[0].columns:
            raise SourceError(f'{os.path.join(root, file)} has other columns or class names than {files[0]}')
    values: dict[int | str, int] = {}
    codes = []
    for part in parts:
        table = np.array([values.setdefault(value, len(values)) for value in part.labels.values] + [-1])
        codes.append(table[part.labels.codes])
    starts = np.cumsum([0, *(len(part.labels.codes) for part in parts)])
    digests = tuple(part.digest for part in parts)
    build = functools.partial(ParquetExamples, root, tuple(files), starts, digests, image)
    everything = build(np.arange(starts[-1]), np.zeros(starts[-1], np.int32))
    others = parts[0].others
    notes = (f'columns that are not read: {", ".join(others)}; hf:DIR:COLUMN chooses the labels',) if others else ()
    return RawSplit(LabelColumn(list(values), np.concatenate(codes)), build, everything.name, class_names, notes)


@dataclasses.dataclass(frozen=True)
class _File:
    """A parquet file: image column, label column and class names; labels; digest of the footer; other columns."""

    columns: tuple[str, str, list[str] | None]
    labels: LabelColumn
    digest: str
    others: tuple[str, ...]


def _read_labels(root: str, file: str, label: str | None, location: str) -> _File:
    """Reads the footer and the label column. Raises SourceError: the file is corrupt or lacks a column."""
    path = os.path.join(root, file)
    try:
        with open_file(root, file) as parquet:
            columns = _choose_columns(path, parquet.schema_arrow, label, location)
            others = tuple(name for name in parquet.schema_arrow.names if name not in columns[:2])
            labels = parquet.read([columns[1]], use_threads=False).column(0)
            footer_bytes, rows = parquet.metadata.serialized_size, parquet.metadata.num_rows
        labels = labels.combine_chunks()
        if pa.types.is_dictionary(labels.type):
            labels = labels.dictionary_decode()
        encoded = labels.dictionary_encode()
        column = LabelColumn(encoded.dictionary.to_pylist(), encoded.indices.fill_null(-1).to_numpy())
        filesystem, folder = filesystem_of(root)
        with filesystem.open_input_file(os.path.join(folder, file)) as raw:
            raw.seek(raw.size() - footer_bytes - 8)
            digest = hashlib.sha256(raw.read()).hexdigest()
    except SourceError:
        raise
    except PARQUET_ERRORS as error:
        raise SourceError(
            f'{shown(path)} cannot be read ({summarize_exception(error)}); if it is corrupt, download it again'
        ) from None
    if len(column.codes) != rows:
        raise SourceError(f'{path} is corrupt: {rows} rows, but {len(column.codes)} labels; download it again')
    return _File(columns, column, digest, others)


def _choose_columns(
    path: str, schema: pa.Schema, label: str | None, location: str
) -> tuple[str, str, list[str] | None]:
    """Returns the names of the image column and of the label column, and the class names if the schema has them.

    The image column is `image` or `img`, else the only one that can be one. The label column is `label` if not None,
    else the column `label`, else the only column with class names, else the only column of integers or texts.

    Raises SourceError: a column is missing, or there are several.
    """
    features = _features(path, schema)
    images = [field.name for field in schema if _is_image(field.type)]
    labels = [field.name for field in schema if field.name not in images and _is_label(field.type)]
    classes = [name for name in labels if features.get(name, {}).get('_type') == 'ClassLabel']
    image = _only(images, 'image', 'img')
    chosen = label if label in labels else _only(labels, 'label') or _only(classes)
    if image is None or not labels or (label and label != chosen):
        what = 'one column of images' if image is None else f'a column of labels{f", {label}" if label else ""}'
        columns = ', '.join(f'{field.name}: {field.type}' for field in schema)
        raise SourceError(f'config.data.source: {path} must have {what}, but has {shown(columns)}')
    if chosen is None:
        found = classes or labels
        raise SourceError(
            f'config.data.source: {path} has several columns of labels, {", ".join(found)}; choose one, such as'
            f' hf:{location}:{found[0]}'
        )
    names = features.get(chosen, {}).get('names')
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise SourceError(f'{path}: the names of the classes of {chosen} are corrupt; download the file again')
    return image, chosen, names


def _features(path: str, schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Returns the description of the columns by the library `datasets`; {} without one."""
    try:
        features = json.loads((schema.metadata or {}).get(b'huggingface', b'{}')).get('info', {}).get('features', {})
        return {name: value for name, value in (features or {}).items() if isinstance(value, dict)}
    except (ValueError, AttributeError, RecursionError):
        raise SourceError(f'{path}: the metadata of the schema, huggingface, are corrupt; download it again') from None


def _is_image(column: pa.DataType) -> bool:
    if pa.types.is_struct(column):
        return any(field.name == 'bytes' and _is_image(field.type) for field in column)
    return pa.types.is_binary(column) or pa.types.is_large_binary(column) or pa.types.is_binary_view(column)


def _is_label(column: pa.DataType) -> bool:
    column = column.value_type if pa.types.is_dictionary(column) else column
    return pa.types.is_integer(column) or pa.types.is_string(column) or pa.types.is_large_string(column)


def _only(names: list[str], *preferred: str) -> str | None:
    """Returns the first of `preferred` in `names`, else the only one of `names`, else None."""
    found = [name for name in preferred if name in names]
    return found[0] if found else names[0] if len(names) == 1 else None
