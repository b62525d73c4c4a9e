"""Reads the members of an uncompressed tar file by their positions; nothing is extracted.

Unlike tarfile.TarFile, the reader keeps no list of members, and refuses headers that claim more than the file contains.
"""

import dataclasses
import os
import tarfile
from collections.abc import Iterator

from alexnet_jax.paths import shown
from alexnet_jax.prepare.raw_sources import SourceError

BLOCK_BYTES = 512
_MAX_EXTENSION_BYTES = 1 << 16  # of an extended header, such as a long name; Linux allows paths of 4,096 bytes
_MAX_PADDING_BYTES = 1 << 20  # at the end of a tar file
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSION_TYPES = (*_PAX_TYPES, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_OTHER_TYPES = {
    tarfile.LNKTYPE: 'a link',
    tarfile.SYMTYPE: 'a link',
    tarfile.CHRTYPE: 'a device',
    tarfile.BLKTYPE: 'a device',
    tarfile.FIFOTYPE: 'a pipe',
}


@dataclasses.dataclass(slots=True)
class Member:
    """A member of a tar file.

    Attributes:
      name: its path; bytes that are not UTF-8 are surrogates.
      header: position of its first header.
      start, size: position and number of bytes of its content.
      problem: why the member must not be read: it is no regular file, or its path leads out of the archive.
    """

    name: str
    header: int
    start: int
    size: int
    problem: str | None


def read_members(descriptor: int, path: str, position: int = 0) -> Iterator[Member]:
    """Yields the members of a tar file, except folders.

    Args:
      descriptor: the open file.
      path: its path, for messages.
      position: position of the header of the first member.

    Raises SourceError: the file is compressed, truncated, corrupt or no tar file, or has a sparse member.
    """
    length = os.fstat(descriptor).st_size
    header = position
    extension: dict[str, str] = {}
    while position < length:
        block = os.pread(descriptor, BLOCK_BYTES, position)
        if not any(block):  # the end of the archive
            if any(os.pread(descriptor, _MAX_PADDING_BYTES, position)):
                raise SourceError(
                    f'{path} has data after the end of the archive at byte {position}; download it again if it is'
                    ' corrupt, and join tar files with tar -A, not cat'
                )
            return
        info = _parse_header(block, path, position)
        name, size = extension.get('path', info.name), int(extension.get('size', info.size))
        start = position + BLOCK_BYTES
        is_extension = info.type in _EXTENSION_TYPES
        if not (is_extension or info.type in _REGULAR_TYPES):
            size = 0
        position = start + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if start + size > length:
            raise SourceError(
                f'{path} is truncated or corrupt: {shown(name)} claims {size:,} bytes, but the file ends after'
                f' {max(length - start, 0):,}; download it again'
            )
        if is_extension:
            extension |= _read_extension(descriptor, path, info.type, start, size)
            continue
        if any(key.startswith('GNU.sparse') for key in extension):
            raise _sparse(path, name)
        if info.type != tarfile.DIRTYPE:
            problem = _OTHER_TYPES.get(info.type)
            if problem is None and (name.startswith('/') or '..' in name.split('/')):
                problem = 'a path that leads out of the tar file'
            yield Member(name, header, start, size, problem)
        header, extension = position, {}


def _parse_header(block: bytes, path: str, position: int) -> tarfile.TarInfo:
    """Returns the fields of a header. Raises SourceError: it is corrupt, or of a type that cannot be read."""
    try:
        info = tarfile.TarInfo.frombuf(block, 'utf-8', 'surrogateescape')
    except tarfile.HeaderError:
        what = f'has a corrupt header at byte {position}; download it again'
        raise SourceError(f'{path} {what if position else "is no uncompressed tar file"}') from None
    if info.type == tarfile.GNUTYPE_SPARSE:
        raise _sparse(path, info.name)
    if info.size < 0 or info.type not in (*_EXTENSION_TYPES, *_REGULAR_TYPES, *_OTHER_TYPES, tarfile.DIRTYPE):
        raise SourceError(f'{path}: {shown(info.name)} has the unknown type {info.type!r} or a negative size')
    return info


def _sparse(path: str, name: str) -> SourceError:
    return SourceError(f'{path}: {shown(name)} is a sparse file; write the tar file without --sparse')


def _read_extension(descriptor: int, path: str, kind: bytes, start: int, size: int) -> dict[str, str]:
    """Returns the fields, such as path and size, that an extended header sets for the next member.

    Raises SourceError: the extended header is corrupt or too long.
    """
    if kind in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return {}
    if size > _MAX_EXTENSION_BYTES:
        raise SourceError(f'{path} has an extended header of {size:,} bytes at byte {start}; write the tar file again')
    content = os.pread(descriptor, size, start)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {'path': content.split(b'\0')[0].decode(errors='surrogateescape')}
    fields, position = {}, 0
    try:
        while position < size and content[position]:  # records '<length> <key>=<value>\n'
            digits, _, _ = content[position : position + 20].partition(b' ')
            stop = position + int(digits)
            key, separator, value = content[position + len(digits) + 1 : stop - 1].partition(b'=')
            if not separator or stop > size or content[stop - 1 : stop] != b'\n':
                raise ValueError
            fields[key.decode(errors='surrogateescape')] = value.decode(errors='surrogateescape')
            position = stop
        if int(fields.get('size', 0)) < 0:
            raise ValueError
    except ValueError:
        raise SourceError(f'{path} has a corrupt extended header at byte {start}; download it again') from None
    return fields
