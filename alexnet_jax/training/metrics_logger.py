"""The outputs of a training run: metrics.jsonl, layers.jsonl, result.json, log lines and trackers."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence

import jax

from alexnet_jax import parallel
from alexnet_jax.augment import PreprocessParams
from alexnet_jax.config import Config
from alexnet_jax.data import dataset
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.runtime.files import JsonObject, atomic_write, write_json
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import TrainState
from alexnet_jax.training.trackers import CompositeTracker, SamplePredictions, TrackingConfig


@dataclasses.dataclass
class Timing:
    """Training time in seconds, the part of it spent waiting for input, and the number of processed images."""

    seconds: float = 0.0
    input_wait_secs: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        """Throughput, or 0 if nothing was timed."""
        return self.images / self.seconds if self.images else 0.0

    @property
    def input_wait(self) -> float:
        """The fraction of the time that was spent waiting for input, 0 to 1."""
        return self.input_wait_secs / self.seconds if self.seconds else 0.0


class Throughput:
    """The timing of this process in total, and of the interval since the last log line.

    Evaluation and the first step of the process, which includes compilation, are not counted.
    """

    def __init__(self):
        self.total, self.interval = Timing(), Timing()

    def add(self, seconds: float, input_wait_secs: float = 0.0, images: int = 0) -> None:
        """Adds `seconds` of training, which include `input_wait_secs` of waiting for input, and `images` images."""
        for timing in (self.total, self.interval):
            timing.seconds += seconds
            timing.input_wait_secs += input_wait_secs
            timing.images += images

    def end_interval(self) -> Timing:
        """Returns the timing of the interval, and starts the next interval."""
        ended, self.interval = self.interval, Timing()
        return ended


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

    def log_images(self, step: int, state: TrainState, preprocessing: PreprocessParams) -> None:
        """Logs the conv1 kernels and predictions for some validation images to the trackers, if any. Collective."""
        if self.samples is None:
            return
        scores = self.samples.scores(state, preprocessing)
        kernel = distributed.gather_to_host(state.params['conv1']['kernel'])
        model = self.config.model
        shared = None if 'conv1' in model.locally_connected else kernel  # locally connected: one kernel per pixel
        self.tracker.log_images(step, shared, model.towers, self.samples.examples, scores, self.class_names)

    def close(self) -> None:
        """Closes the files and the trackers."""
        for output in (self.metrics, self.layers, self.tracker):
            output.close()


class JsonlWriter:
    """Writer of metrics.jsonl and layers.jsonl: one JSON object per line, flushed line by line.

    The constructor drops corrupt lines and lines after the resumed step, so that no step appears twice.

    Args:
      path: path of the file, or None to write nothing and to call no trackers.
      last: the last step to keep, by `split`; lines of other splits are dropped.
      trackers: functions that also receive each written line, as a dict.
    """

    def __init__(self, path: str | None, last: dict[str, int], trackers: Sequence[Callable[[JsonObject], None]] = ()):
        self.file, self.trackers = None, trackers
        if path is None:
            return
        kept = []
        if os.path.exists(path):
            with open(path) as file:
                kept = [line.rstrip('\n') + '\n' for line in file if _is_kept(line, last)]
        with atomic_write(path) as file:
            file.writelines(kept)
        self.file = open(path, 'a', buffering=1)  # noqa: SIM115

    def write(self, **values: object) -> None:
        """Appends one line and passes it to the trackers."""
        if self.file:
            self.file.write(json.dumps(values) + '\n')
            for tracker in self.trackers:
                tracker(values)

    def close(self) -> None:
        """Closes the file."""
        if self.file:
            self.file.close()


def _is_kept(line: str, last: dict[str, int]) -> bool:
    try:
        values = json.loads(line)
        return values['step'] <= last[values['split']]
    except (ValueError, KeyError, TypeError):  # for example an incomplete line of a killed run
        return False


def log_start(config: Config, mesh: parallel.Mesh, data: dataset.PreparedDataset, total_steps: int) -> None:
    """Logs the data set, the processes, the mesh and the length of the run."""
    log(
        f'{config.data.source}: {len(data.train)} training and {len(data.validation)} validation images;'
        f' {jax.process_count()} processes, mesh data={mesh.shape["data"]}, model={mesh.shape["model"]};'
        f' {total_steps} steps of {config.train.batch_size} images'
    )


def write_result(
    config: Config,
    workdir: str,
    data: dataset.PreparedDataset,
    run: RunState,
    views: dict[str, dict[str, float]],
    preempted: bool,
    digest: str,
) -> None:
    """Writes result.json on the primary process. Collective.

    Args:
      config: the configuration.
      workdir: the folder of the run.
      data: the prepared data set, which counts its corrupt records.
      run: the progress of the run.
      views: results of evaluations at the last step by number of views; the errors are those of eval.views.
      preempted: whether steps or the final evaluation are missing.
      digest: see state_digest().
    """
    errors = views.get(str(config.eval.views)) or run.last_evaluation or {}
    corrupt_records = (split.corrupt_mask() for split in (data.train, data.validation))
    result = {
        'status': 'preempted' if preempted else 'done',
        'step': run.step,
        'target_step': run.target_step,
        'stalled_step': run.stalled_step,
        'evaluated': run.last_evaluated_step,
        'top1_error': errors.get('top1_error'),
        'top5_error': errors.get('top5_error'),
        'views': views,
        'images_per_second': run.images_per_second,
        'corrupt_records': sum(distributed.count_set_on_any_process(mask) for mask in corrupt_records),
        'state_digest': digest,
    }
    if distributed.is_primary_process():
        write_json(os.path.join(workdir, 'result.json'), result)
