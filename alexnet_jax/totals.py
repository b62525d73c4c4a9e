"""Sums over what many steps report, kept on the devices: a step is only waited for when they are read."""

from typing import Any

import jax
import numpy as np


@jax.jit
def _added(sums: Any, lost: Any, values: Any) -> tuple[Any, Any]:
    """The sums with `values` added, and with that what rounding has taken off them so far (Knuth's TwoSum)."""

    def add(total, rest, value):
        new = total + value
        part = new - total
        return new, rest + ((total - (new - part)) + (value - part))

    pairs = jax.tree.map(add, sums, lost, values)
    return jax.tree.transpose(jax.tree.structure(sums), jax.tree.structure((0, 0)), pairs)


class Totals:
    """Sums of trees of float32 arrays, as good as float64 sums although devices may have no float64.

    Attributes:
      count: how many trees were added.
    """

    def __init__(self):
        self.count = 0
        self.sums: Any = None

    def add(self, values: Any) -> None:
        """Add `values`, the results of a step, which need not be there yet; the same tree every time."""
        if self.sums is None:
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), values)
            self.sums = zeros, zeros
        self.sums = _added(*self.sums, values)
        self.count += 1

    def read(self) -> Any:
        """The sums as float64 NumPy arrays, when all that was added is there. Raises ValueError: nothing was."""
        if self.sums is None:
            raise ValueError('nothing was added')
        return jax.tree.map(lambda total, rest: np.float64(total) + np.float64(rest), *jax.device_get(self.sums))
