"""Sums over what many steps report, kept on the devices: a step is only waited for when they are read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLUSH_EVERY = 32  # results that are added up in one go: a call for each takes a quick step half a percent


@jax.jit
def _added(sums: Any, lost: Any, results: list[Any]) -> tuple[Any, Any]:
    """The sums with all of `results` added, and with that what rounding has taken off them so far (Knuth's TwoSum)."""

    def add(total, rest, value):
        new = total + value
        part = new - total
        return new, rest + ((total - (new - part)) + (value - part))

    def add_tree(carried, values):
        pairs = jax.tree.map(add, *carried, values)
        return jax.tree.transpose(jax.tree.structure(sums), jax.tree.structure((0, 0)), pairs), None

    return jax.lax.scan(add_tree, (sums, lost), jax.tree.map(lambda *leaves: jnp.stack(leaves), *results))[0]


class MetricSum:
    """Sums of trees of float32 arrays, as good as float64 sums although devices may have no float64.

    Attributes:
      count: how many trees were added.
    """

    def __init__(self):
        self.count = 0
        self.sums: tuple[Any, ...] = ()
        self.results: list[Any] = []  # not yet in the sums

    def add(self, values: Any) -> None:
        """Add `values`, the results of a step, which need not be there yet; the same tree every time."""
        self.results.append(values)
        self.count += 1
        if len(self.results) == FLUSH_EVERY:
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), values)
            self.sums, self.results = _added(*(self.sums or (zeros, zeros)), self.results), []

    def read(self) -> Any:
        """The sums as float64 NumPy arrays, when all that was added is there. Raises ValueError: nothing was."""
        if not self.count:
            raise ValueError('nothing was added')
        parts = jax.device_get([*self.sums, *self.results])
        return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0, dtype=np.float64), *parts)
