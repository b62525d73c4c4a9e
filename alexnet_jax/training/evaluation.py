"""Exact evaluation: every validation image counts once."""

import math
from collections.abc import Callable

import jax

from alexnet_jax import parallel
from alexnet_jax.augment import PreprocessParams
from alexnet_jax.config import Config
from alexnet_jax.data import loader, split_reader
from alexnet_jax.runtime.console import ProgressBar
from alexnet_jax.training.eval_step import make_eval_step
from alexnet_jax.training.metric_sum import MetricSum
from alexnet_jax.training.state import TrainState


class Evaluator:
    """Evaluates a network on the validation images with one view, or with eval.views views.

    Args:
      config: the configuration.
      mesh: see parallel.make_mesh().
      split: the validation images.
    """

    def __init__(self, config: Config, mesh: parallel.Mesh, split: split_reader.SplitReader):
        self.split, self.threads = split, config.data.reader_threads
        self.sharding = parallel.batch_sharding(mesh, config.mesh.layout)
        shards = parallel.num_batch_shards(self.sharding)
        self.batch_size = math.ceil(config.eval.batch_size / shards) * shards
        self.eval_steps = {views: make_eval_step(config, mesh, views) for views in {1, config.eval.views}}

    def evaluate(
        self, views: int, state: TrainState, preprocessing: PreprocessParams, should_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Returns the mean loss, top1_error and top5_error (0 to 1) of all images, and their number, `examples`.

        Args:
          views: 1 or eval.views.
          state: the train state, sharded over the mesh.
          preprocessing: see augment.make_preprocess_params().
          should_stop: called before each batch; if it returns True, the evaluation ends and returns None.
        """
        shard_index, shard_count = parallel.process_shard(self.sharding)
        batches = loader.validation_batches(
            self.split,
            batch_size=self.batch_size,
            threads=self.threads,
            shard_index=shard_index,
            shard_count=shard_count,
        )
        count = math.ceil(len(self.split) / self.batch_size)
        progress = ProgressBar(f'evaluate, {views} view{"s" * (views > 1)}', count, 'batches')
        totals, previous = MetricSum(), None
        for batch in batches:
            if should_stop():
                progress.close()
                return None
            batch_sums = self.eval_steps[views](state, parallel.make_global_batch(self.sharding, batch), preprocessing)
            totals.add(batch_sums)
            jax.block_until_ready(previous)  # keeps at most two batches in flight
            previous = batch_sums
            progress.update()
        progress.close()
        loss, top1_error, top5_error, examples = totals.read().tolist()
        sums = {'loss': loss, 'top1_error': top1_error, 'top5_error': top5_error}
        return {name: value / examples for name, value in sums.items()} | {'examples': int(examples)}
