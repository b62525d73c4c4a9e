"""Rows of parquet files: the examples of a split, of which a worker process decodes one column."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Integer
from pyarrow import fs

from alexnet_jax.data.images import UnreadableImage, read_file
from alexnet_jax.paths import is_url, shown
from alexnet_jax.prepare.raw_sources import Indices, Labels, RawExample
from alexnet_jax.runtime.console import summarize_exception

_WINDOW_BYTES = 1 << 24  # of the images that a worker process decodes from a row group at once
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises for corrupt files


@dataclasses.dataclass(frozen=True)
class ParquetExamples:
    """Rows of parquet files.

    Attributes:
      root: folder of the data set, a path or the URL of a bucket.
      files: paths relative to `root`.
      starts: number of the first row of each file, and the number after the last row of the last file.
      digests: digests of the footers of the files, which have the sizes and offsets of all columns.
      image: name of the image column.
      rows: numbers of the rows.
      labels: one label per row.
    """

    root: str
    files: tuple[str, ...]
    starts: Integer[np.ndarray, ' f']
    digests: tuple[str, ...]
    image: str
    rows: Integer[np.ndarray, ' n']
    labels: Labels

    def __len__(self) -> int:
        return len(self.rows)

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the position of the file in `files`, and the number of the row in the file."""
        row = self.rows[index]
        file = int(np.searchsorted(self.starts, row, 'right')) - 1
        return file, int(row - self.starts[file])

    def __getitem__(self, index: int) -> RawExample:
        file, row = self._locate(index)
        cell = _row_reader(self.root, self.files[file], self.digests[file], self.image).cell(row)
        content, path = (cell.get('bytes'), cell.get('path')) if isinstance(cell, dict) else (cell, None)
        if content is None:
            content = self._read_path(path)
        return content, int(self.labels[index])

    def _read_path(self, path: str | None) -> bytes:
        if not path:
            raise UnreadableImage('its image cell is null')
        if '\0' in path:
            raise UnreadableImage('the cell has only a path, which contains a zero byte')
        root = os.path.realpath(self.root)
        real = os.path.realpath(os.path.join(root, path))
        if not real.startswith(os.path.join(root, '')):
            raise UnreadableImage(f'the cell has only a path, {shown(path)}, that leads out of the data set')
        return read_file(real)

    def name(self, index: int) -> str:
        """Returns the file and the row, counted from 0."""
        file, row = self._locate(index)
        return f'{self.files[file]} row {row}'

    def subset(self, indices: Indices) -> 'ParquetExamples':
        """Returns the examples at `indices`."""
        rows, labels = self.rows[indices], self.labels[indices]
        first, last = np.searchsorted(self.starts, (rows.min(), rows.max()), 'right') if len(rows) else (1, 1)
        used = slice(first - 1, last)
        return dataclasses.replace(
            self,
            files=self.files[used],
            starts=self.starts[first - 1 : last + 1],
            digests=self.digests[used],
            rows=rows,
            labels=labels,
        )

    def digest(self) -> str:
        """Returns the digest of the names and footers of the files, the rows and the labels."""
        arrays = self.starts.tobytes() + self.rows.tobytes() + self.labels.tobytes()
        described = json.dumps([self.files, self.digests, self.image])
        return hashlib.sha256(described.encode() + arrays).hexdigest()


@functools.cache
def filesystem_of(root: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of a folder, and its path there. Raises OSError or ValueError: the URL is unusable."""
    return fs.FileSystem.from_uri(root) if is_url(root) else (fs.LocalFileSystem(), root)


def open_file(root: str, file: str) -> pq.ParquetFile:
    """Opens a file such that pyarrow reads a megabyte at once, not a whole row group."""
    filesystem, folder = filesystem_of(root)
    return pq.ParquetFile(
        os.path.join(folder, file),
        filesystem=filesystem,
        buffer_size=1 << 20,
        pre_buffer=False,
        page_checksum_verification=True,
    )


class _RowReader:
    """Reads cells of one column; the rows should increase, because the reader decodes a row group from its start."""

    def __init__(self, file: pq.ParquetFile, column: str):
        self.file, self.column = file, column
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.metadata.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])
        self.group, self.first = -1, 0  # `first` is the row number of the first of the decoded `values`
        self.values: Sequence[Any] = []
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def cell(self, row: int) -> Any:
        """Returns the value at `row`. Raises UnreadableImage: the row group is corrupt at or before `row`."""
        group = int(np.searchsorted(self.starts, row, 'right')) - 1
        try:
            if group != self.group or row < self.first:
                self.group, self.first, self.values = group, int(self.starts[group]), []
                self.batches = iter(())  # of no group, if the next line fails
                self.batches = self._decode(group)
            while row >= self.first + len(self.values):
                self.first += len(self.values)
                self.values = []
                self.values = next(self.batches).column(0)
            return self.values[row - self.first].as_py()
        except StopIteration:
            raise UnreadableImage('its row group is corrupt at or before the row') from None
        except PARQUET_ERRORS as error:
            raise UnreadableImage(f'its row group is corrupt ({summarize_exception(error)})') from None

    def _decode(self, group: int) -> Iterator[pa.RecordBatch]:
        description = self.file.metadata.row_group(group)
        mean_bytes = max(1, description.total_byte_size // max(1, description.num_rows))
        batch = min(1024, max(1, _WINDOW_BYTES // mean_bytes))
        return self.file.iter_batches(batch, [group], [self.column], use_threads=False)


@functools.lru_cache(maxsize=1)
def _row_reader(root: str, file: str, digest: str, column: str) -> _RowReader:
    """Returns the reader of a file. `digest` is a part of the key of the cache, because the file may be replaced."""
    try:
        return _RowReader(open_file(root, file), column)
    except PARQUET_ERRORS as error:
        raise UnreadableImage(f'{file} is corrupt ({summarize_exception(error)})') from None
