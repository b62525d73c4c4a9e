"""Files of the safetensors library: those of model hubs, and those that this project writes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from alexnet_jax.formats import FormatError


def read_metadata(path: str) -> dict[str, str]:
    """The metadata of `path`. Raises as read()."""
    with _opened(path) as file:
        return file.metadata() or {}


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays in `path` by name.

    Raises:
      FormatError: it is damaged, or has numbers of a type that NumPy does not know.
      OSError: it cannot be read.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework='numpy') as file:
            yield file
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(
            f'a .safetensors file that cannot be read ({" ".join(str(error).split())[:120]});'
            ' where it was cut off, download it again'
        ) from None
