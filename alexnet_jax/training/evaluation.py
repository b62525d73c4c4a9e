"""Exact evaluation: every validation image counts once."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from alexnet_jax.runtime.console import ProgressBar


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
    """Evaluates a network on `batches`.

    Args:
      eval_step: see step.make_eval_step().
      state: step.TrainState, sharded over the mesh.
      batches: this process's rows of each batch, see data/pipeline.validation_batches().
      preprocessing: see augment.preprocessing().
      sharding: sharding of the rows of a batch, see parallel.batch_sharding().
      what: label of the progress bar.
      total: number of batches, for the progress bar.
      stop: called before each batch; True aborts the evaluation.

    Returns:
      The means over all images, loss, top1_error and top5_error (0 to 1), and the number of images, examples; None if
      `stop` returned True.
    """
    import jax

    from alexnet_jax import parallel
    from alexnet_jax.training.metric_sum import MetricSum

    totals, previous = MetricSum(), None
    progress = ProgressBar(what, total, 'batches')
    for batch in batches:
        if stop():
            progress.close()
            return None
        sums = eval_step(state, parallel.make_global_batch(sharding, batch), preprocessing)
        totals.add(sums)
        jax.block_until_ready(previous)  # keeps at most two batches in flight
        previous = sums
        progress.update()
    progress.close()
    loss, top1_error, top5_error, examples = totals.read().tolist()
    means = {'loss': loss, 'top1_error': top1_error, 'top5_error': top5_error}
    return {name: value / examples for name, value in means.items()} | {'examples': int(examples)}
