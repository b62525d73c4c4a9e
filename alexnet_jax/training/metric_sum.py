"""Sums of the metrics of many steps, accumulated on the devices without waiting for the steps."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, PyTree

FLUSH_EVERY = 32  # results added per jitted call; one call per result takes 0.5 % of the time of a short step


@jax.jit
def _add(
    sums: PyTree[Array], errors: PyTree[Array], results: list[PyTree[Array]]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Adds all of `results` to `sums`. Returns the sums and their accumulated rounding errors (Knuth's TwoSum)."""

    def add(total, error, value):
        new = total + value
        part = new - total
        return new, error + ((total - (new - part)) + (value - part))

    def add_tree(carried, values):
        pairs = jax.tree.map(add, *carried, values)
        return jax.tree.transpose(jax.tree.structure(sums), jax.tree.structure((0, 0)), pairs), None

    return jax.lax.scan(add_tree, (sums, errors), jax.tree.map(lambda *leaves: jnp.stack(leaves), *results))[0]


class MetricSum:
    """Sums trees of float32 arrays as accurately as float64 sums, although devices may lack float64.

    Attributes:
      count: number of trees added.
    """

    def __init__(self):
        self.count = 0
        self.sums: tuple[PyTree[Array], ...] = ()
        self.results: list[PyTree[Array]] = []  # results not yet added to the sums

    def add(self, values: PyTree[Float32[Array, '...']]) -> None:
        """Adds `values`, the results of a step, without waiting for them; every call must pass the same structure."""
        self.results.append(values)
        self.count += 1
        if len(self.results) == FLUSH_EVERY:
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), values)
            self.sums, self.results = _add(*(self.sums or (zeros, zeros)), self.results), []

    def read(self) -> PyTree[Float64[np.ndarray | np.float64, '...']]:
        """Waits for all added values and returns their sums. Raises ValueError: no values were added."""
        if not self.count:
            raise ValueError('nothing was added')
        parts = jax.device_get([*self.sums, *self.results])
        return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0, dtype=np.float64), *parts)
