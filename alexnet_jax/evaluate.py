"""Exact evaluation: every validation image once, one view or the ten of section 4.1."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from alexnet_jax import parallel
from alexnet_jax.monitor import Progress


def evaluate(
    eval_step: Callable,
    state: Any,
    batches: Iterable[dict[str, np.ndarray]],
    preprocessing: dict[str, np.ndarray],
    sharding: Any,
    *,
    what: str,
    total: int,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Means over all images of `batches`: loss, top1_error and top5_error (0 to 1), and examples, their number.

    Args:
      eval_step: see step.make_eval_step.
      sharding: of the rows of a batch, see parallel.batch_sharding.
      what, total: shown as progress, with the number of batches.
      stop: asked before each batch; where it says so the evaluation is given up and the result is None.
    """
    sums = np.zeros(4)  # loss, top-1 and top-5 errors, images; float64
    progress = Progress(what, total, 'batches')
    for batch in batches:
        if stop():
            progress.close()
            return None
        sums += np.asarray(eval_step(state, parallel.put_batch(sharding, batch), preprocessing), np.float64)
        progress.update()
    progress.close()
    loss, top1_error, top5_error = (float(value) for value in sums[:3] / sums[3])
    return {'loss': loss, 'top1_error': top1_error, 'top5_error': top5_error, 'examples': int(sums[3])}
