"""Random access to the records of a TFRecord file, whose checksums are verified.

The file is a sequence of records. A record is the length of its data (uint64, little-endian), the masked CRC-32C of the
length (uint32), the data, and the masked CRC-32C of the data (uint32).
"""

import array
import os
import struct

import google_crc32c

from alexnet_jax.data.images import UnreadableImage

FRAMING_BYTES = 16  # of a record besides its data
MAX_RECORD_BYTES = 2**30
_HEADER = struct.Struct('<QI')


def masked_crc32c(data: bytes) -> int:
    """Returns the checksum that TFRecord stores for `data`: the rotated CRC-32C plus a constant, modulo 2^32."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def is_gzip(path: str) -> bool:
    """Returns whether a file is compressed with GZIP, and not a TFRecord file whose first length looks like it."""
    with open(path, 'rb') as file:
        header = file.read(_HEADER.size)
    return header[:3] == b'\x1f\x8b\x08' and not _is_valid(header)


def _is_valid(header: bytes) -> bool:
    """Returns whether the checksum of the length in the first bytes of a record matches."""
    return len(header) == _HEADER.size and masked_crc32c(header[:8]) == _HEADER.unpack(header)[1]


class TFRecordFile:
    """Random access to the `count` records of the file `path`.

    The constructor reads the lengths of all records, not their data. If a length is corrupt or the file is truncated,
    only the records before that place can be read. If the file has more than `count` records, none can be read.

    Raises OSError: the file cannot be read.
    """

    def __init__(self, path: str, count: int):
        self.path = path
        self._ends = array.array('q', [0])  # the start of the file, then the end of each record that was found
        self._problems: tuple[str, ...] = ()  # of the record after the last one that was found, and of all later ones
        size = os.path.getsize(path)
        with open(path, 'rb', buffering=0) as file:
            while len(self._ends) <= count and not self._problems:
                file.seek(self._ends[-1])
                self._add(file.read(_HEADER.size), size)
        if not self._problems and self._ends[-1] < size:
            self._ends = self._ends[:1]
            self._problems = ('the file has more records than dataset_info.json lists',)

    def _add(self, header: bytes, size: int) -> None:
        """Adds the end of the record that begins with `header` at the end of the last record, or sets the problems."""
        room = size - self._ends[-1] - FRAMING_BYTES
        truncated = 'the file is truncated before the record'
        if len(header) == 0:
            self._problems = (truncated,)
        elif len(header) == _HEADER.size and not _is_valid(header):
            self._problems = ('the length of the record is corrupt', 'the file is corrupt before the record')
        elif len(header) < _HEADER.size or (length := _HEADER.unpack(header)[0]) > room:
            self._problems = ('the file is truncated in the record', truncated)
        else:
            self._ends.append(self._ends[-1] + length + FRAMING_BYTES)

    def __getitem__(self, index: int) -> bytes:
        """Returns the data of a record.

        Raises UnreadableImage: the record is corrupt, was not found or is longer than MAX_RECORD_BYTES. Raises OSError:
        the file cannot be read.
        """
        found = len(self._ends) - 1
        if index >= found:
            raise UnreadableImage(self._problems[0 if index == found else -1])
        start, end = self._ends[index], self._ends[index + 1]
        if end - start > MAX_RECORD_BYTES:
            raise UnreadableImage('a record of more than 1 GiB')
        with open(self.path, 'rb') as file:
            file.seek(start + _HEADER.size)
            content = file.read(end - start - _HEADER.size)
        data, checksum = content[:-4], content[-4:]
        if len(content) < end - start - _HEADER.size or struct.pack('<I', masked_crc32c(data)) != checksum:
            raise UnreadableImage('the checksum of the record does not match')
        return data
