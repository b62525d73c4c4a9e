"""The command line of the package's commands that have no --config: their flags, and its refusals in one line."""

import sys

from absl import flags

from alexnet_jax.monitor import complain


def parse_flags(argv: list[str], wanted: str = '', most: float = 0) -> list[str]:
    """Read the flags; returns the command and its arguments. Where something is wrong it says so and exits with 2.

    Args:
      wanted: what to say where there is no argument; '': none is wanted.
      most: arguments there may be.
    """
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
