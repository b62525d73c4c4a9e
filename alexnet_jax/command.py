"""The command line: flags of the commands that have no --config, refusals in one line, commands to be run next."""

import io
import os
import shlex
import shutil
import sys

from absl import flags

from alexnet_jax.config import ConfigError
from alexnet_jax.monitor import complain

_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of this package


def parse_flags(argv: list[str], wanted: str = '', most: float = 0) -> list[str]:
    """Read the flags; returns the command and its arguments. Where something is wrong it says so and exits with 2.

    Args:
      wanted: what to say where there is no argument; '': none is wanted.
      most: arguments there may be.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')  # names of files need not be text
    try:
        rest = flags.FLAGS(argv)
        if wanted and len(rest) == 1:
            raise flags.Error(wanted)
        if len(rest) - 1 > most:
            raise flags.Error(f'{rest[int(most) + 1]!r} is no flag; flags are written --name=value')
    except flags.Error as error:
        complain(' '.join(str(error).split()))
        sys.exit(2)
    return rest


def check_output(flag: str, path: str | None, endings: tuple[str, ...] = ()) -> str | None:
    """`path`, which --`flag` names, with ~ replaced; None stays None.

    Raises ConfigError, before any work is done: it has none of `endings`, or cannot be written.
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
    """Returns `alexnet ARGUMENTS` in the form that runs this package when pasted into the user's shell.

    That is `alexnet` where the shell finds the one installed beside this interpreter, otherwise its path; where the
    package is not installed, the interpreter with PYTHONPATH.
    """
    script = os.path.join(os.path.dirname(sys.executable), 'alexnet')
    if os.access(script, os.X_OK):
        on_path = shutil.which('alexnet') == script
        return shlex.join(['alexnet' if on_path else _short(script), *arguments])
    python = 'python' if shutil.which('python') == sys.executable else _short(sys.executable)
    variable = '' if os.getcwd() == _PARENT else f'PYTHONPATH={shlex.quote(_PARENT)} '
    return variable + shlex.join([python, '-m', 'alexnet_jax', *arguments])


def child_command(module: str, *arguments: str) -> list[str]:
    """Returns the command line of a child process that runs `module` of this package; needs child_environment()."""
    return [sys.executable, '-P', '-m', f'alexnet_jax.{module}', *arguments]  # -P: not the one in the current folder


def child_environment() -> dict[str, str]:
    """Returns this process's environment, with this package first among those that a child process finds."""
    paths = [_PARENT, *filter(None, [os.environ.get('PYTHONPATH')])]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(paths)}


def _short(path: str) -> str:
    """`path`, relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) or os.getcwd() == '/' else relative
