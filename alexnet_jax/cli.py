"""Flags of the commands without --config, and checks of output files."""

import io
import os
import sys

from absl import flags

from alexnet_jax.config import ConfigError
from alexnet_jax.runtime.console import log_error


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
