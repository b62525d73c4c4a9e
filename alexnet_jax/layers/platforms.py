"""The platform for which a program is traced, which need not be that of this process; see parallel.jit_shard_map()."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_traced_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar('traced_platform', default=None)


def platform() -> str:
    """Returns the platform of the program that is traced: that of for_platform(), or else jax.default_backend()."""
    return _traced_platform.get() or jax.default_backend()


@contextlib.contextmanager
def for_platform(name: str) -> Iterator[None]:
    """Within the context, layers are traced for the platform `name` ('cpu', 'gpu', 'tpu'), for any backend of JAX."""
    token = _traced_platform.set(name)
    try:
        yield
    finally:
        _traced_platform.reset(token)
