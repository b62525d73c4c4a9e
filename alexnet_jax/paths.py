"""Checks of the paths that a user names, at the start of a command and in one line.

Some libraries (Orbax, TensorStore, ArrayRecord, TFDS) pass a path to C++ as UTF-8 text. Folders that those libraries
open must therefore have paths that the file system stores as UTF-8; see check_folder().
"""

import os
import sys
import tempfile

from alexnet_jax.config_schema import ConfigError

_LONGEST_NAME = '_' * 255  # the longest file name of common file systems
_EPATH_URLS = ('/gs/', '/s3/', '/az/', '/hf/')  # local folders that etils.epath reads as gs://... and so on
# Orbax writes checkpoints to such folders, and then reads them from other folders.
_ORBAX_SYNTAX = {
    '\\': 'a slash',
    '*': 'a pattern',
    '?': 'a pattern',
    '[': 'a pattern',
    'gs:/': 'a URL',
}
_MAX_SHOWN = 200  # characters of a path in a message


def is_url(path: str) -> bool:
    """Returns whether `path` is a URL, such as gs://bucket/folder."""
    return '://' in path


def shown(path: str) -> str:
    """Returns `path` in one line of printable text, with an ellipsis in a very long path."""
    if len(path) > _MAX_SHOWN:
        path = f'{path[: _MAX_SHOWN // 2]}...{path[-_MAX_SHOWN // 2 :]}'
    return path if path.isprintable() and path else repr(path)


def absolute_path(field: str, path: str) -> str:
    """Returns `path` as an absolute path, with ~ expanded; a URL is unchanged.

    Raises ConfigError: `path` is relative and the current folder was deleted; the message begins with `field`.
    """
    if is_url(path):
        return path
    path = os.path.expanduser(path)
    if not os.path.isabs(path):
        check_current_folder(f'{field}: {shown(path)}')
    return os.path.abspath(path)


def absolute_source(field: str, source: str) -> str:
    """Returns `source`, a value of config.data.source, with its path as absolute_path(); other sources are unchanged.

    The path of hf: begins with a slash, a period or ~, or exists; otherwise hf: names a data set of the
    Hugging Face Hub. Symbolic links remain.

    Raises ConfigError: see absolute_path().
    """
    kind, _, location = source.partition(':')
    is_path = kind in ('folder', 'idx', 'wds')
    if kind == 'hf':  # hf:PATH[:COLUMN]
        known = (location, location.rpartition(':')[0])
        is_path = location.startswith(('/', '.', '~')) or any(os.path.exists(path) for path in known if path)
    if not is_path or not location or is_url(location) or location.startswith('{/'):  # wds:{/a,/b}/*.tar
        return source.rstrip('/')
    return f'{kind}:/{absolute_path(field, location).lstrip("/")}'


def check_current_folder(what: str) -> None:
    """Raises ConfigError if the current folder was deleted; `what` needs it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError(f'{what}: the current folder was deleted; change to another folder') from None


def check_path(field: str, path: str, suffix: str = '') -> str:
    """Returns the absolute path of `path`, which may be that of a missing file.

    Args:
      field: name of the setting at the beginning of the message.
      path: path of a file or folder.
      suffix: text after `path` in the longest path of a file that belongs to it.

    Raises ConfigError: the system accepts no file with this path, because the path contains a NUL character, a file in
      the place of a folder or a loop of links, or is too long.
    """
    path = absolute_path(field, path)
    try:
        os.lstat(path + suffix)
        os.stat(path)
    except UnicodeEncodeError:
        raise _encoding_error(field, path) from None
    except ValueError:
        raise _unusable(field, path, 'it contains a NUL character') from None
    except (FileNotFoundError, PermissionError):
        pass
    except NotADirectoryError:
        raise _unusable(field, path, f'{shown(nearest_existing(path))} is a file, not a folder') from None
    except OSError as error:
        raise _unusable(field, path, str(error.strerror)) from None
    return path


def check_text_path(field: str, path: str) -> str:
    """Returns the absolute path of `path`. Raises ConfigError: see check_path(), or the path is not stored as UTF-8."""
    path = check_path(field, path)
    try:
        if path.encode() == os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise _encoding_error(field, path)


def _encoding_error(field: str, path: str) -> ConfigError:
    encoding = sys.getfilesystemencoding()
    if encoding != 'utf-8':
        problem = f'it is not ASCII, and the encoding of file names is {encoding}'
        return _unusable(field, path, problem, 'set a UTF-8 locale, such as LC_ALL=C.UTF-8, or PYTHONUTF8=1')
    return _unusable(field, path, 'it contains bytes that are not UTF-8', 'rename the folder or use another path')


def _unusable(field: str, path: str, problem: str, remedy: str = 'use another path') -> ConfigError:
    return ConfigError(f'{field}: {shown(path)} cannot be used: {problem}; {remedy}')


def check_run_path(field: str, path: str) -> str:
    """Returns the absolute path of the folder of a run or of a checkpoint, which may be missing.

    Raises ConfigError: see check_text_path(), or Orbax would read and write another folder.
    """
    path = check_text_path(field, path)
    for part, meaning in _ORBAX_SYNTAX.items():
        if part in f'{path}/':
            raise _unusable(field, path, f'it contains {part}, which Orbax takes for {meaning}')
    _check_epath(field, path)
    return path


def _check_epath(field: str, path: str) -> None:
    if path.startswith(_EPATH_URLS):
        url = f'{path[1:3]}://{path[4:]}'
        raise _unusable(field, path, f'etils.epath takes it for {url}', 'use another path, such as a bind mount')


def check_folder(field: str, path: str) -> str:
    """Returns the absolute path of a folder that libraries may open, and that may be missing; a URL is unchanged.

    Raises ConfigError: see check_text_path(), or `path` is a file or a link to a missing folder, leaves no room for the
      names of files in the folder, or would be taken for a URL.
    """
    if is_url(path):
        return path
    path = check_text_path(field, path)
    _check_epath(field, path)
    check_path(field, path, suffix=f'/{_LONGEST_NAME}')
    if os.path.islink(path) and not os.path.exists(path):
        problem = f'it is a link to {shown(os.readlink(path))}, which does not exist'
        raise _unusable(field, path, problem, 'create that folder')
    if os.path.exists(path) and not os.path.isdir(path):
        raise _unusable(field, path, f'{shown(path)} is a file, not a folder')
    return path


def check_writable(field: str, folder: str, remedy: str = 'use another folder') -> None:
    """Raises ConfigError, which ends with `remedy`, if the program cannot create `folder` or files in `folder`.

    `folder` is a result of check_folder(), and not a URL.
    """
    parent = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise _unusable(field, folder, f'{shown(parent)} is not writable ({error.strerror})', remedy) from None


def nearest_existing(path: str) -> str:
    """Returns the absolute path of `path` or, if it is missing, of its nearest parent that exists."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
