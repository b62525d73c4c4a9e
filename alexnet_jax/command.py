"""The command line of the package's commands that have no --config: their flags, and its refusals in one line."""

import io
import os
import sys

from absl import flags

from alexnet_jax.config import ConfigError
from alexnet_jax.monitor import complain


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
