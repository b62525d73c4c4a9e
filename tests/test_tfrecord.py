"""TFRecord files that TensorFlow writes: the same records, and every corrupt one is found."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from alexnet_jax.data.images import UnreadableImage
from alexnet_jax.prepare.tfrecord import TFRecordFile, is_gzip, masked_crc32c

RECORDS = [b'first', b'', b'third record', b'x', b'the last of five']


def written(path: Path, records: list[bytes], options: str = '') -> Path:
    """Returns `path` after TensorFlow has written `records` to the file."""
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for record in records:
            writer.write(record)
    return path


def found(path: Path, count: int) -> list[bytes | str]:
    """Returns each record, or the reason why it cannot be read."""
    records, result = TFRecordFile(str(path), count), []
    for index in range(count):
        try:
            result.append(records[index])
        except UnreadableImage as error:
            result.append(str(error))
    return result


def test_checksums_equal_those_of_tensorflow(tmp_path):
    lengths = [*range(12), 63, 64, 65, 700, 91_000, 1_500_000]
    generator = np.random.default_rng(0)
    records = [generator.bytes(length) for length in lengths]
    content = written(tmp_path / 'x', records).read_bytes()
    start = 0
    for record in records:
        end = start + 16 + len(record)
        assert struct.unpack('<I', content[end - 4 : end]) == (masked_crc32c(record),), len(record)
        assert struct.unpack('<I', content[start + 8 : start + 12]) == (masked_crc32c(content[start : start + 8]),)
        start = end
    assert start == len(content)


def test_records_that_tensorflow_writes(tmp_path):
    assert found(written(tmp_path / 'x', RECORDS), 5) == RECORDS
    large = [b'a', np.random.default_rng(0).bytes(20_000_000), b'b']
    assert found(written(tmp_path / 'large', large), 3) == large
    assert found(written(tmp_path / 'empty', []), 0) == []
    with pytest.raises(FileNotFoundError):
        TFRecordFile(str(tmp_path / 'missing'), 1)


@pytest.mark.parametrize(
    ('offset', 'reasons'),  # of a byte in the third record, and what becomes of the third to the fifth
    [
        (0, ['the length of the record is corrupt', *['the file is corrupt before the record'] * 2]),
        (7, ['the length of the record is corrupt', *['the file is corrupt before the record'] * 2]),
        (8, ['the length of the record is corrupt', *['the file is corrupt before the record'] * 2]),
        (11, ['the length of the record is corrupt', *['the file is corrupt before the record'] * 2]),
        (12, ['the checksum of the record does not match', *RECORDS[3:]]),
        (23, ['the checksum of the record does not match', *RECORDS[3:]]),
        (24, ['the checksum of the record does not match', *RECORDS[3:]]),
        (27, ['the checksum of the record does not match', *RECORDS[3:]]),
    ],
)
def test_flipped_bytes_are_found(tmp_path, offset, reasons):
    path = written(tmp_path / 'x', RECORDS)
    content = bytearray(path.read_bytes())
    content[16 + 5 + 16 + offset] ^= 16
    path.write_bytes(content)
    assert found(path, 5) == RECORDS[:2] + reasons
    with pytest.raises(tf.errors.DataLossError):
        list(tf.data.TFRecordDataset(str(path)))


def test_each_random_change_of_a_large_file_is_found(tmp_path):
    generator = np.random.default_rng(0)
    records = [generator.bytes(length) for length in (3000, 7000, 12_000, 800)]
    content = written(tmp_path / 'x', records).read_bytes()
    for _ in range(300):
        changed = bytearray(content)
        changed[generator.integers(len(content))] ^= 1 << generator.integers(8)
        (tmp_path / 'y').write_bytes(changed)
        seen = found(tmp_path / 'y', 4)
        assert all(record in (expected, str(record)) for record, expected in zip(seen, records, strict=True))
        assert seen != records


def test_truncated_file_keeps_its_first_records(tmp_path):
    content = written(tmp_path / 'x', RECORDS).read_bytes()
    ends = np.cumsum([16 + len(record) for record in RECORDS])
    for size in range(len(content)):
        (tmp_path / 'cut').write_bytes(content[:size])
        whole = int((ends <= size).sum())
        seen = found(tmp_path / 'cut', 5)
        assert seen[:whole] == RECORDS[:whole]
        where = 'before' if size in (0, *ends) else 'in'
        assert seen[whole] == f'the file is truncated {where} the record'
        assert seen[whole + 1 :] == ['the file is truncated before the record'] * (4 - whole)


@pytest.mark.parametrize('extra', [written, lambda path, _: path.write_bytes(path.read_bytes() + b'\0')])
def test_file_with_more_records_than_listed(tmp_path, extra):
    path = written(tmp_path / 'x', RECORDS)
    extra(path, [*RECORDS, b'sixth'])
    assert found(path, 5) == ['the file has more records than dataset_info.json lists'] * 5


@pytest.mark.parametrize(
    ('length', 'reason'),
    [
        (2**60, 'the file is truncated in the record'),
        (2**64 - 1, 'the file is truncated in the record'),
        (2**31, 'a record of more than 1 GiB'),
    ],
)
def test_absurd_lengths_need_no_memory(tmp_path, length, reason):
    header = struct.pack('<Q', length)
    path = tmp_path / 'x'
    path.write_bytes(header + struct.pack('<I', masked_crc32c(header)))
    if length == 2**31:
        with open(path, 'r+b') as file:
            file.truncate(16 + length)  # a sparse file
    tracemalloc.start()
    assert found(path, 1) == [reason]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_compressed_files_are_recognized(tmp_path):
    assert is_gzip(str(written(tmp_path / 'x', RECORDS, 'GZIP')))
    assert not is_gzip(str(written(tmp_path / 'x', RECORDS)))
    assert not is_gzip(str(written(tmp_path / 'x', [])))
    # The length of this record begins with the same bytes as a compressed file.
    path = written(tmp_path / 'x', [bytes(0x088B1F)])
    assert path.read_bytes()[:3] == gzip.compress(b'')[:3]
    assert not is_gzip(str(path))
