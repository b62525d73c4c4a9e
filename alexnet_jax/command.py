"""Command-line helpers: flags of commands without --config, checks of output files, and commands of this package."""

import importlib.metadata
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from absl import flags

from alexnet_jax.config import ConfigError
from alexnet_jax.monitor import log_error

_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder that contains this package


def parse_flags(argv: list[str], wanted: str = '', most: float = 0) -> list[str]:
    """Parses the flags and returns the command and its positional arguments; on an error, logs it and exits with 2.

    Args:
      argv: the command line.
      wanted: error message if there is no positional argument; '' allows none.
      most: maximum number of positional arguments.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')  # file names may be invalid Unicode
    try:
        rest = flags.FLAGS(argv)
        if wanted and len(rest) == 1:
            raise flags.Error(wanted)
        if len(rest) - 1 > most:
            raise flags.Error(f'{rest[int(most) + 1]!r} is no flag; flags are written --name=value')
    except flags.Error as error:
        log_error(' '.join(str(error).split()))
        sys.exit(2)
    return rest


def check_output(flag: str, path: str | None, endings: tuple[str, ...] = ()) -> str | None:
    """Expands ~ in `path`, the value of --`flag`, and checks that the file can be written; None stays None.

    Raises ConfigError: `path` has none of the `endings`, or cannot be written.
    """
    if path is None:
        return None
    path = os.path.expanduser(path)
    folder = os.path.dirname(os.path.abspath(path))
    if endings and not path.lower().endswith(endings):
        raise ConfigError(f'--{flag}: {path!r} does not end with {" or ".join(endings)}')
    if not path or os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ConfigError(f'--{flag}: {path!r} cannot be written; name a file in a folder that can be')
    return path


def shell_command(*arguments: str) -> str:
    """Returns a shell command that runs `alexnet ARGUMENTS` with this package.

    The command begins with `alexnet` if the shell finds the script that was installed with this package, and otherwise
    with the path of the script. If the package is not installed, the command calls the interpreter with PYTHONPATH.
    """
    script = _installed_script()
    if script is not None:
        found = shutil.which('alexnet')
        on_path = found is not None and os.path.samefile(found, script)
        return shlex.join(['alexnet' if on_path else _short(script), *arguments])
    python = 'python' if shutil.which('python') == sys.executable else _short(sys.executable or 'python')
    paths = '' if os.getcwd() == _PARENT else f'PYTHONPATH={shlex.quote(_PARENT)}${{PYTHONPATH:+:$PYTHONPATH}} '
    return paths + shlex.join([python, '-m', 'alexnet_jax', *arguments])


def _installed_script() -> str | None:
    """Returns the path of the script `alexnet` installed with this package, or None if there is none."""
    try:
        distribution = importlib.metadata.distribution('alexnet_jax')
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text('direct_url.json') or '{}')
    if origin.get('dir_info', {}).get('editable'):
        is_this = origin['url'] == Path(_PARENT).as_uri()
    else:
        is_this = os.path.realpath(str(distribution.locate_file(''))) == os.path.realpath(_PARENT)
    files = [str(distribution.locate_file(file)) for file in distribution.files or () if file.stem == 'alexnet']
    return next((os.path.normpath(file) for file in files if is_this and os.access(file, os.X_OK)), None)


def child_command(module: str, *arguments: str) -> list[str]:
    """Returns the command line of a child process that runs `module` of this package; needs child_environment()."""
    # -P keeps Python from importing a package in the current folder.
    return [sys.executable, '-P', '-m', f'alexnet_jax.{module}', *arguments]


def child_environment() -> dict[str, str]:
    """Returns this process's environment with this package's folder first in PYTHONPATH."""
    paths = [_PARENT, *filter(None, [os.environ.get('PYTHONPATH')])]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(paths)}


def _short(path: str) -> str:
    """Returns `path` relative to the current folder if the program is below that folder, and otherwise unchanged."""
    relative = os.path.relpath(path)
    if relative.startswith(os.pardir) or os.getcwd() == os.sep:
        return path
    return relative if os.sep in relative else os.path.join(os.curdir, relative)
