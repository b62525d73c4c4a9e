"""The outputs of a training run: metrics.jsonl, layers.jsonl, log lines and trackers."""

import os

from alexnet_jax import parallel
from alexnet_jax.config import Config
from alexnet_jax.data import dataset
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.training.metrics_file import JsonlWriter
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import TrainState
from alexnet_jax.training.throughput import Timing
from alexnet_jax.training.trackers import CompositeTracker, SamplePredictions, TrackingConfig


class MetricsLogger:
    """Logs the metrics of a run; only the primary process writes files and log lines.

    Args:
      config: the configuration.
      workdir: the folder of the run.
      mesh: see parallel.make_mesh().
      data: the prepared data set; trackers show predictions for some validation images.
      run: the progress of the run; lines of later steps are removed from the files.
      total_steps: length of the run, for the progress bar.
      tracking: the trackers.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: parallel.Mesh,
        data: dataset.PreparedDataset,
        run: RunState,
        total_steps: int,
        tracking: TrackingConfig,
    ):
        self.config, self.class_names = config, data.class_names
        is_primary = distributed.is_primary_process()
        metrics, layers = (
            os.path.join(workdir, name) if is_primary else None for name in ('metrics.jsonl', 'layers.jsonl')
        )
        evaluated = run.last_evaluated_step
        self.tracker = CompositeTracker(tracking, workdir, run.step, config, is_primary)
        self.samples = SamplePredictions(config, mesh, data.validation) if tracking.images else None
        self.metrics = JsonlWriter(metrics, {'train': run.step, 'validation': evaluated}, [self.tracker.log])
        self.layers = JsonlWriter(layers, {'layers': evaluated}, [self.tracker.log])
        self.progress = ProgressBar('train', total_steps, 'steps', done=run.step)
        self.note = ''  # the last training metrics, for the progress bar

    def log_step(self) -> None:
        """Advances the progress bar by one train step."""
        self.progress.update(note=self.note)

    def log_training(self, step: int, means: dict[str, float], learning_rate: float, timing: Timing) -> None:
        """Logs the mean metrics (loss, top1_error, top5_error) of the train steps since the last line."""
        self.metrics.write(
            step=step,
            split='train',
            **means,
            learning_rate=learning_rate,
            images_per_second=timing.images_per_second,
            input_wait=timing.input_wait,
        )
        self.note = (
            f'loss {means["loss"]:.4f}  top-1 error {means["top1_error"]:.1%}  learning rate {learning_rate:.2g}'
            f'  {timing.images_per_second:.1f} images/s  input wait {timing.input_wait:.1%}'
        )
        self.progress.log_line(self.note)

    def log_validation(self, step: int, errors: dict[str, float], learning_rate: float) -> None:
        """Logs the result of an evaluation with one view, see Evaluator.evaluate()."""
        means = {name: errors[name] for name in ('loss', 'top1_error', 'top5_error')}
        self.metrics.write(step=step, split='validation', **means, learning_rate=learning_rate)
        log(
            f'step {step}/{self.progress.total}  validation: loss {errors["loss"]:.4f}'
            f'  top-1 {errors["top1_error"]:.2%}  top-5 {errors["top5_error"]:.2%}'
            f'  ({errors["examples"]} images, 1 view)'
        )

    def log_layer_stats(self, step: int, stats: dict[str, dict[str, float]]) -> None:
        """Logs the result of Diagnostics.layer_stats(), which cuda-convnet printed at each test."""
        self.layers.write(step=step, split='layers', **stats)
        ratios = [f'{layer} {row["kernel_update"] / max(row["kernel"], 1e-30):.1e}' for layer, row in stats.items()]
        dead = [f'{layer} {row["dead"]:.0%}' for layer, row in stats.items() if row['dead'] >= 0.005]
        log(f'update/weight: {"  ".join(ratios)}; dead units: {"  ".join(dead) or "none"}')

    def log_images(self, step: int, state: TrainState, preprocessing: dict) -> None:
        """Shows the conv1 kernels and predictions for some validation images in the trackers, if any. Collective."""
        if self.samples is None:
            return
        scores = self.samples.scores(state, preprocessing)
        kernel = distributed.gather_to_host(state.params['conv1']['kernel'])
        model = self.config.model
        shared = None if 'conv1' in model.locally_connected else kernel  # otherwise one kernel per pixel
        self.tracker.log_images(step, shared, model.towers, self.samples.examples, scores, self.class_names)

    def close(self) -> None:
        """Closes the files and the trackers."""
        for output in (self.metrics, self.layers, self.tracker):
            output.close()
