"""Random access to the records of a TFRecord file, whose checksums are verified.

The file is a sequence of records. A record is the length of its data (uint64, little-endian), the masked CRC-32C of the
length (uint32), the data, and the masked CRC-32C of the data (uint32).
"""

import array
import functools
import os
import struct
from typing import Any

import numpy as np
from jaxtyping import UInt32

from alexnet_jax.data.images import UnreadableImage

FRAMING_BYTES = 16  # of a record besides its data
MAX_RECORD_BYTES = 2**30
_HEADER = struct.Struct('<QI')
_POLYNOMIAL = 0x82F63B78  # of CRC-32C; the highest power of x is the lowest bit
# This sparse polynomial over GF(2), x^5685 + x^1362 + x^426 + 1, is divisible by the polynomial of CRC-32C.
_DEGREE, *_LOWER_EXPONENTS = 5685, 1362, 426, 0


def _byte_table() -> list[int]:
    """Returns the remainder of each byte after division by the polynomial."""
    table = []
    for remainder in range(256):
        for _ in range(8):
            remainder = remainder >> 1 ^ (remainder & 1) * _POLYNOMIAL
        table.append(remainder)
    return table


_TABLE = _byte_table()


@functools.cache
def _position_table() -> UInt32[np.ndarray, ' n']:
    """Returns the remainders of each byte (256 per position) at the positions of the last _DEGREE bytes of the data."""
    table = np.empty((_DEGREE, 256), np.uint32)
    table[-1] = one_byte = np.array(_TABLE, np.uint32)
    for position in range(_DEGREE - 2, -1, -1):
        later = table[position + 1]
        table[position] = later >> 8 ^ one_byte[later & 0xFF]
    return table.reshape(-1)


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of `data`, computed by NumPy at about 1 GB/s for a photograph.

    The CRC is the remainder of `data`, a polynomial over GF(2), after division by the polynomial of CRC-32C. A division
    by a sparse multiple of that polynomial does not change the remainder, and only needs XORs of long blocks. If
    x^a + x^b + ... is such a multiple, x^(a 2^k) + x^(b 2^k) + ... is another; with k >= 3, the blocks are whole bytes.
    """
    if len(data) < 64:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
        return crc ^ 0xFFFFFFFF
    rest = np.frombuffer(data, np.uint8).copy()
    rest[:4] ^= 0xFF  # the initial value of the CRC
    for doublings in range((len(rest) // _DEGREE).bit_length(), -1, -1):
        degree, *exponents = (exponent << doublings for exponent in (_DEGREE, *_LOWER_EXPONENTS))  # in bytes
        while (excess := len(rest) - degree) > 0:
            size = min(excess, degree - exponents[0])
            for exponent in exponents:
                rest[degree - exponent : degree - exponent + size] ^= rest[:size]
            rest = rest[size:]
    rows = 256 * np.arange(_DEGREE - len(rest), _DEGREE)
    xor: Any = np.bitwise_xor  # the type stubs of NumPy 2.5 reject its reduce() for Python 3.11
    return int(xor.reduce(_position_table().take(rows + rest))) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """Returns the checksum that TFRecord stores for `data`: the rotated CRC-32C plus a constant, modulo 2^32."""
    crc = crc32c(data)
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
