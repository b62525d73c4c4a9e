"""Reads the state dicts that torch.save writes, in the ZIP format or the legacy format, without importing torch."""

import dataclasses
import io
import math
import mmap
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import TypeGuard

import ml_dtypes
import numpy as np

from alexnet_jax.weights import safe_unpickle
from alexnet_jax.weights.formats import FormatError

# First two objects of the legacy format.
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES: dict[str, str | type] = {
    'torch.FloatStorage': '<f4',
    'torch.DoubleStorage': '<f8',
    'torch.HalfStorage': '<f2',
    'torch.BFloat16Storage': ml_dtypes.bfloat16,
    'torch.LongStorage': '<i8',
    'torch.IntStorage': '<i4',
    'torch.ShortStorage': '<i2',
    'torch.CharStorage': 'i1',
    'torch.ByteStorage': 'u1',
    'torch.BoolStorage': '?',
}
_TENSOR = ('torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2')
_PARAMETER = 'torch._utils._rebuild_parameter'
# Checkpoints of torchvision's training script contain an argparse.Namespace beside the weights.
KNOWN = frozenset([*_DTYPES, *_TENSOR, _PARAMETER, safe_unpickle.ORDERED_DICT, 'argparse.Namespace'])
# Keys of the state dict in checkpoints of training programs.
_WRAPPERS = ('state_dict', 'model_state_dict', 'model')
_ADVICE = 'save only the weights, with torch.save(model.state_dict(), FILE)'


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Contiguous block of numbers that one or more tensors view."""

    dtype: np.dtype
    key: str
    count: int


def read(path: str) -> dict[str, np.ndarray]:
    """Returns the tensors of the state dict in `path`, which may be nested in the checkpoint of a training program.

    The arrays are read-only views of the memory-mapped file with the shape and strides of each tensor. Their dtype is
    float32, float64, float16, bfloat16, an integer type or bool. Code in the pickle is never executed.

    Raises:
      FormatError: The file is not a state dict, is corrupt, or its pickle references a name outside KNOWN.
      OSError: The file is unreadable.
    """
    with open(path, 'rb') as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        value, storages = _read_zip(content, path) if content[:2] == b'PK' else _read_legacy(content)
        tensors = {name: item for name, item in _state_dict(value).items() if _is_tensor(item)}
        if not tensors:
            raise FormatError(f'it does not contain named tensors; {_ADVICE}')
        return {str(name): _array(item, storages) for name, item in tensors.items()}
    except safe_unpickle.UnknownName as error:
        if re.match(r'torch\.nn\.|torchvision\.|timm\.|__main__\.|__torch__\.', str(error)):
            raise FormatError(f'a whole pickled module ({error}), not a state dict; {_ADVICE}') from None
        raise FormatError(
            f'refused: its pickle asks for {error}, which a state dict never needs; nothing was executed. If it is a'
            f' whole module, {_ADVICE}'
        ) from None
    except safe_unpickle.UnreadablePickle as error:
        raise FormatError(str(error)) from None


def _read_zip(content: mmap.mmap, path: str) -> tuple[object, dict[str, np.ndarray]]:
    """Reads the ZIP format (torch 1.6 and later). Returns the pickled value, and the storages by key."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error):
        raise FormatError('a truncated or corrupt ZIP archive; download it again') from None
    folder = next((name.removesuffix('data.pkl') for name in entries if re.fullmatch(r'[^/]+/data\.pkl', name)), None)
    if folder is None:
        raise FormatError(_other_archive(list(entries)))
    if f'{folder}constants.pkl' in entries:
        raise FormatError(f'a TorchScript module, not a state dict; {_ADVICE}')
    if f'{folder}byteorder' in entries and _entry(content, entries, f'{folder}byteorder').tobytes() != b'little':
        raise FormatError('written on a big-endian machine; load and save it with torch on another')
    value, stored = safe_unpickle.safe_unpickle(
        io.BytesIO(_entry(content, entries, f'{folder}data.pkl').tobytes()), KNOWN
    )

    def numbers(storage: _Storage) -> np.ndarray:
        own = _entry(content, entries, f'{folder}data/{storage.key}')
        if own.size != storage.count * storage.dtype.itemsize:
            raise FormatError(
                f'corrupt: storage {storage.key} has {own.size} bytes, which do not fit {storage.count} numbers'
            )
        return own.view(storage.dtype)

    return value, _storages(stored, numbers)


def _other_archive(names: list[str]) -> str:
    if names and all(name.endswith('.npy') for name in names):
        return "NumPy's .npz, not weights written by torch.save"
    if any(name.endswith(('/archive_format', 'serialized_exported_program.json')) for name in names):
        return f'a program of torch.export (.pt2), not a state dict; {_ADVICE}'
    if 'model.weights.h5' in names:
        return 'a model of Keras (.keras), not weights written by torch.save'
    inside = f'whose first file is {names[0]!r}' if names else 'without files'
    return f'a ZIP archive {inside}, not weights written by torch.save; if it contains such a file, unpack it'


def _entry(content: mmap.mmap, entries: dict[str, zipfile.ZipInfo], name: str) -> np.ndarray:
    """Returns the content of a file in the archive, (N,) uint8, without a copy. Raises FormatError."""
    entry = entries.get(name)
    if entry is None:
        raise FormatError(f'corrupt: {name} is missing')
    if entry.compress_type != zipfile.ZIP_STORED:
        raise FormatError(f'{name} is compressed, which torch.save never does; {_ADVICE}')
    header = content[entry.header_offset : entry.header_offset + 30]
    start = entry.header_offset + 30 + int.from_bytes(header[26:28], 'little') + int.from_bytes(header[28:30], 'little')
    own = np.frombuffer(content, np.uint8)[start : start + entry.file_size]
    # torch has an option to omit checksums; the CRC is then 0.
    if own.size != entry.file_size or entry.CRC not in (0, zlib.crc32(own.data)):
        raise FormatError(f'corrupt: the checksum of {name} does not match; download the file again')
    return own


def _read_legacy(content: mmap.mmap) -> tuple[object, dict[str, np.ndarray]]:
    """Reads the legacy format: five pickles, then the length and the content of each storage.

    Returns the pickled value, and the storages by key.
    """
    if any(safe_unpickle.safe_unpickle(content, KNOWN)[0] != expected for expected in (MAGIC, PROTOCOL)):
        raise FormatError(f'a Python pickle, but not one that torch.save wrote; {_ADVICE}')
    machine, _ = safe_unpickle.safe_unpickle(content, KNOWN)
    if not isinstance(machine, dict) or machine.get('little_endian') is not True:
        raise FormatError('written on a big-endian machine; load and save it with torch on another')
    value, stored = safe_unpickle.safe_unpickle(content, KNOWN)
    keys, _ = safe_unpickle.safe_unpickle(content, KNOWN)
    wanted = {storage.key: storage for storage in map(_storage, stored)}
    found = {}
    position = content.tell()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in wanted:
            raise FormatError(f'corrupt: no tensor has storage {key!r}')
        dtype, count = wanted[key].dtype, int.from_bytes(content[position : position + 8], 'little')
        position += 8
        if count != wanted[key].count or position + count * dtype.itemsize > len(content):
            raise FormatError(f'truncated or corrupt at storage {key!r}; download it again')
        found[key] = np.frombuffer(content, np.uint8)[position : position + count * dtype.itemsize].view(dtype)
        position += count * dtype.itemsize
    missing = next((key for key in wanted if key not in found), None)
    if missing is not None:
        raise FormatError(f'corrupt: storage {missing!r} is missing')
    return value, _storages(stored, lambda storage: found[storage.key])


def _storages(stored: list[safe_unpickle.Stored], numbers: Callable[[_Storage], np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the numbers of each storage by key."""
    found: dict[str, np.ndarray] = {}
    for storage in map(_storage, stored):
        if storage.key not in found:
            found[storage.key] = numbers(storage)
        if found[storage.key].dtype != storage.dtype:
            raise FormatError(f'corrupt: storage {storage.key!r} has two types')
    return found


def _storage(stored: safe_unpickle.Stored) -> _Storage:
    """Parses the persistent id ('storage', type, key, device, count) or, in the legacy format, (..., count, None)."""
    match stored.where:
        case ('storage', safe_unpickle.Name(name), str(key), str(), int(count), *view) if (
            name in _DTYPES and count >= 0
        ):
            if not any(view):
                return _Storage(np.dtype(_DTYPES[name]), key, count)
    raise FormatError('its pickle has a persistent id that is not a tensor storage; nothing was executed')


def _state_dict(value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        what = 'a tensor' if _is_tensor(value) else f'a {type(value).__name__}'
        raise FormatError(f'it contains {what}, not a state dict; {_ADVICE}')
    return next((value[name] for name in _WRAPPERS if isinstance(value.get(name), dict)), value)


def _is_tensor(value: object) -> TypeGuard[safe_unpickle.Call]:
    return isinstance(value, safe_unpickle.Call) and value.name in (*_TENSOR, _PARAMETER)


def _array(tensor: safe_unpickle.Call, storages: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the tensor as a view of its storage. Raises FormatError: the tensor exceeds the storage."""
    match tensor.arguments:
        case (safe_unpickle.Call() as inner, *_) if tensor.name == _PARAMETER and inner.name in _TENSOR:
            return _array(inner, storages)
        case (safe_unpickle.Stored() as stored, int(offset), tuple(shape), tuple(strides), *_):
            storage = storages[_storage(stored).key]
            whole = all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides))
            if whole and len(shape) == len(strides) and math.prod(max(size, 1) for size in shape) < 2**40:
                last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
                if 0 in shape:
                    return np.zeros(shape, storage.dtype)
                if last < len(storage):
                    steps = [stride * storage.itemsize for stride in strides]
                    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
    raise FormatError('corrupt: a tensor extends beyond its storage')
