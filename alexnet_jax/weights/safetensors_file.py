"""Reads .safetensors files of model hubs and of this project."""

import contextlib
from collections.abc import Iterator

import numpy as np
from safetensors import SafetensorError, safe_open

from alexnet_jax.weights.formats import FormatError


def read_metadata(path: str) -> dict[str, str]:
    """Returns the metadata of `path`. Raises the errors of read()."""
    with _opened(path) as file:
        return file.metadata() or {}


def read(path: str) -> dict[str, np.ndarray]:
    """Returns the arrays in `path` by name.

    Raises:
      FormatError: The file is corrupt, or has a dtype that NumPy does not support.
      OSError: The file is unreadable.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: str) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework='numpy') as file:
            yield file
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(
            f'a .safetensors file that cannot be read ({" ".join(str(error).split())[:120]});'
            ' if it is truncated, download it again'
        ) from None
