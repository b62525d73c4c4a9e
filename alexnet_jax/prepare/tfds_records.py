"""Examples of TFDS data sets in TFRecord and ArrayRecord files."""

import bisect
import dataclasses
import functools
import os
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from alexnet_jax.data.images import UnreadableImage
from alexnet_jax.paths import shown
from alexnet_jax.prepare.raw_sources import Indices, RawExample, digest
from alexnet_jax.prepare.tfrecord import TFRecordFile


@dataclasses.dataclass(frozen=True)
class TfdsShard:
    """File `path` with `count` records, of which the first has the number `first` in the split; `size` is in bytes."""

    path: str
    first: int
    count: int
    size: int


@dataclasses.dataclass(frozen=True)
class TfdsExamples:
    """Examples of a split of a TFDS data set.

    Attributes:
      shards: the files that contain the records `start` to `stop` of the split.
      file_format: 'tfrecord' or 'array_record'.
      split: name of the split.
      image, label, file_name: names of the features; `file_name` is None if a record has no file name.
      start, stop: range of records in the split.
      metadata_digest: digest of the TFDS metadata of the data set.
    """

    shards: tuple[TfdsShard, ...]
    file_format: str
    split: str
    image: str
    label: str
    file_name: str | None
    start: int
    stop: int
    metadata_digest: str

    def __len__(self) -> int:
        return self.stop - self.start

    def _locate(self, index: int) -> tuple[TfdsShard, int]:
        """Returns the file of an example, and the position of the record in that file."""
        number = self.start + index
        shard = self.shards[bisect.bisect_right(self.shards, number, key=lambda shard: shard.first) - 1]
        return shard, number - shard.first

    def __getitem__(self, index: int) -> RawExample:
        features = self._features(index)
        return _only_value(features, self.image, 'bytes_list'), int(_only_value(features, self.label, 'int64_list'))

    def _features(self, index: int) -> Any:
        """Returns the features of a record by name. Raises UnreadableImage, OSError, RuntimeError: it is corrupt."""
        shard, position = self._locate(index)
        record = _open_records(shard.path, shard.count, self.file_format)[position]
        try:
            return tf_example_pb2.Example.FromString(record).features.feature
        except DecodeError:
            raise UnreadableImage('the record is not a tf.train.Example') from None

    def name(self, index: int) -> str:
        """Returns the file name if the record has one, as in ImageNet, otherwise the position in split and file."""
        shard, _ = self._locate(index)
        position = f'record {self.start + index} of {self.split} in {os.path.basename(shard.path)}'
        if self.file_name is None:
            return position
        try:
            return shown(_only_value(self._features(index), self.file_name, 'bytes_list').decode(errors='replace'))
        except (UnreadableImage, OSError, RuntimeError):  # corrupt record
            return position

    def subset(self, indices: Indices) -> 'TfdsExamples':
        """Returns the examples at `indices`, which must be contiguous and not empty."""
        start, stop = self.start + int(indices[0]), self.start + int(indices[-1]) + 1
        shards = tuple(shard for shard in self.shards if shard.first < stop and shard.first + shard.count > start)
        return dataclasses.replace(self, shards=shards, start=start, stop=stop)

    def digest(self) -> str:
        """Returns the digest of the TFDS metadata, the split and the range, which does not depend on the folder."""
        return digest(self.metadata_digest, self.split, self.start, self.stop)


@functools.lru_cache(maxsize=4)
def _open_records(path: str, count: int, file_format: str) -> TFRecordFile | ArrayRecordDataSource:
    if file_format == 'tfrecord':
        return TFRecordFile(path, count)
    records = ArrayRecordDataSource(path)
    if len(records) != count:
        raise UnreadableImage(f'the file has {len(records)} records, but dataset_info.json lists {count}')
    return records


def _only_value(features: Any, name: str, kind: str) -> Any:
    """Returns the value of the feature `name`, which must have one value of `kind`, such as 'int64_list'."""
    values = getattr(features[name], kind).value
    if len(values) != 1:
        raise UnreadableImage(f'the record has {len(values)} values of {name}')
    return values[0]
