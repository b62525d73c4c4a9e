"""Checks for values that are not finite, for a stalled loss, and for dead units."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from alexnet_jax import parallel
from alexnet_jax.augment import PreprocessParams
from alexnet_jax.config import Config
from alexnet_jax.runtime.console import log
from alexnet_jax.training.checkpointing import Checkpointer
from alexnet_jax.training.eval_step import Images, make_layer_stats_fn
from alexnet_jax.training.run_state import RunState, Window
from alexnet_jax.training.state import TrainState

STALL_MARGIN = 0.02  # a loss above ln(classes) - STALL_MARGIN counts as stalled
LAYER_STATS = ('kernel', 'kernel_update', 'bias', 'bias_update', 'dead')  # see make_layer_stats_fn()


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line with the cause and a remedy."""


@jax.jit
def all_finite(params: PyTree[Array]) -> PyTree[Bool[Array, '']]:
    """Returns for each parameter whether all values are finite; a sum would take four times as long on a CPU."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


class Diagnostics:
    """The checks of one run.

    Args:
      config: the configuration.
      mesh: see parallel.make_mesh().
      preprocessing: see augment.make_preprocess_params().
      stall_after: see schedules.Intervals.
      checkpoints: the checkpoints of the run; error messages name the newest step.
    """

    def __init__(
        self,
        config: Config,
        mesh: parallel.Mesh,
        preprocessing: PreprocessParams,
        stall_after: int,
        checkpoints: Checkpointer,
    ):
        self.config, self.preprocessing = config, preprocessing
        self.stall_after, self.checkpoints = stall_after, checkpoints
        self.layer_stats_fn = make_layer_stats_fn(config, mesh)

    def check_finite(self, value: float, step: int, learning_rate: float) -> None:
        """Raises TrainingError if `value`, the loss or a sum of weights after `step` steps, is infinite or NaN."""
        if not math.isfinite(value):
            latest_step, workdir = self.checkpoints.latest_step(), os.path.dirname(self.checkpoints.directory)
            remedy = f'can be resumed from step {latest_step}' if latest_step is not None else 'has no checkpoint yet'
            raise TrainingError(
                f'the loss or the weights are {value} at step {step}: lower config.optimizer.learning_rate'
                f' ({learning_rate:g}) or raise config.optimizer.warmup; {workdir} {remedy}'
            )

    def check_params_finite(self, params: PyTree[Array], step: int, learning_rate: float) -> None:
        """Raises TrainingError if a value of `params` is not finite; the message names the other arguments."""
        finite = jax.tree.leaves(jax.device_get(all_finite(params)))
        for leaf, is_finite in zip(jax.tree.leaves(params), finite, strict=True):
            if not is_finite:
                self.check_finite(float(jnp.sum(jnp.abs(leaf))), step, learning_rate)

    def check_window(self, run: RunState, state: TrainState, images: Images) -> RunState:
        """Compares the mean metrics of `run.window` with train.target_error and with the loss of random guessing.

        Args:
          run: the progress of the run; its window is not empty.
          state: the train state.
          images: the images of the last batch, for the fraction of dead units in the stall message.

        Returns:
          `run` with an empty window, and with `target_step` or `stalled_step` set if reached for the first time.

        Raises:
          TrainingError: training stalls and train.stall_action is 'stop'.
        """
        window, train = run.window, self.config.train
        run = dataclasses.replace(run, window=Window())
        loss, error = window.loss / window.steps, window.top1_error / window.steps
        if error < train.target_error and run.target_step is None:
            run = dataclasses.replace(run, target_step=run.step)
            log(f'step {run.step}: the training error {error:.2%} is below train.target_error={train.target_error:g}')
        may_stall = run.stalled_step is None and run.step >= self.stall_after
        if may_stall and loss > math.log(self.config.model.num_classes) - STALL_MARGIN:
            run = dataclasses.replace(run, stalled_step=run.step)
            message = self._stall_message(run.step, loss, state, images)
            if train.stall_action == 'stop':
                raise TrainingError(message)
            log(message)
        return run

    def _stall_message(self, step: int, loss: float, state: TrainState, images: Images) -> str:
        """Returns a one-line message with the stalled loss, the likely cause and settings to try."""
        classes = self.config.model.num_classes
        dead = {name: stats['dead'] for name, stats in self.layer_stats(state, images).items()}
        worst = max(dead, key=lambda name: dead[name])
        cause = 'the logits do not depend on the images, because weights are too small or units are saturated'
        if dead[worst] > 0.5:
            cause = f'{dead[worst]:.0%} of the units of {worst} are dead'
        return (
            f'stalled: at step {step} the loss is {loss:.4f}, and the loss of guessing among {classes} classes is'
            f' ln({classes}) = {math.log(classes):.4f}; likely cause: {cause}; try config.model.bias_init with 0.1 in'
            ' place of 1, config.optimizer.warmup, another config.model.kernel_std or config.optimizer.learning_rate,'
            f' or another config.seed than {self.config.seed}'
        )

    def layer_stats(self, state: TrainState, images: Images) -> dict[str, dict[str, float]]:
        """Returns the values of make_layer_stats_fn() on `images`, by layer and by name in LAYER_STATS."""
        stats = jax.device_get(self.layer_stats_fn(state, images, self.preprocessing))
        return {
            layer: {name: float(value) for name, value in zip(LAYER_STATS, values, strict=True)}
            for layer, values in stats.items()
        }
