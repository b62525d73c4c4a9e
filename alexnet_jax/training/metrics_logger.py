"""The outputs of a training run: metrics.jsonl, layers.jsonl, result.json, log lines and trackers."""

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable, Container, Sequence

import jax

from alexnet_jax import parallel
from alexnet_jax.augment import PreprocessParams
from alexnet_jax.config import Config
from alexnet_jax.data import dataset
from alexnet_jax.lr_multipliers import frozen_names
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.console import ProgressBar, log, summarize_exception
from alexnet_jax.runtime.files import JsonObject, atomic_write, quarantine, write_json
from alexnet_jax.training.diagnostics import TrainingError
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
    """Writer of metrics.jsonl and layers.jsonl: one JSON object per line, written line by line.

    The constructor drops unusable lines, which the log counts, and lines after the resumed step, so that no step
    appears twice. If a line cannot be written, for example because the disk is full, the log says so once, the file
    ends with the last complete line, and the writer tries again with each further line.

    Args:
      path: path of the file, or None to write nothing and to call no trackers.
      last: the last step to keep, by `split`; lines of other splits are dropped.
      trackers: functions that also receive each written line, as a dict.
    """

    def __init__(self, path: str | None, last: dict[str, int], trackers: Sequence[Callable[[JsonObject], None]] = ()):
        self.path, self.trackers = path, trackers
        self.file: io.FileIO | None = None  # None until the kept lines are written
        self.size, self.pending, self.has_failed = 0, b'', False
        if path is not None:
            self.pending = b''.join(_kept_lines(path, last))
            self._write_pending()

    def write(self, **values: object) -> None:
        """Appends one line and passes it to the trackers."""
        if self.path is not None:
            self.pending += f'{json.dumps(values)}\n'.encode()
            self._write_pending()
            for tracker in self.trackers:
                tracker(values)

    def _write_pending(self) -> None:
        """Writes the lines that are not in the file yet; after an error the file is as before."""
        assert self.path is not None
        try:
            if self.file is None:
                with atomic_write(self.path, 'wb') as file:
                    file.write(self.pending)
                self.file = open(self.path, 'ab', buffering=0)  # noqa: SIM115
            else:
                self.file.truncate(self.size)  # a failed write may have left a part of a line
                rest = memoryview(self.pending)
                while rest:
                    rest = rest[self.file.write(rest) :]
            self.size, self.pending = self.size + len(self.pending), b''
        except OSError as error:
            if self.file is not None:
                with contextlib.suppress(OSError):
                    self.file.truncate(self.size)
            if not self.has_failed:
                log(f'{self.path} cannot be written ({summarize_exception(error)}); training continues, and retries')
            self.has_failed = True

    def close(self) -> None:
        """Closes the file; the log counts the lines that could not be written."""
        if self.pending:
            self._write_pending()
        if self.pending:
            lines = self.pending.count(b'\n')
            log(f'{self.path}: {lines} lines could not be written')
        if self.file:
            self.file.close()


def _kept_lines(path: str, last: dict[str, int]) -> list[bytes]:
    """Returns the lines of the file `path` up to the steps `last`, and logs the number of unusable lines.

    A file that cannot be read is renamed.
    """
    try:
        with open(path, 'rb') as file:
            lines = file.read().split(b'\n')
    except FileNotFoundError:
        return []
    except OSError as error:
        with contextlib.suppress(OSError):
            log(f'{path} cannot be read ({summarize_exception(error)}); moved to {quarantine(path)}')
        return []
    kept, unusable = [], 0
    for line in filter(None, lines):
        values = _parse(line, last)
        if values is None:
            unusable += 1
        elif values['step'] <= last[values['split']]:
            kept.append(line + b'\n')
    if unusable:
        log(f'{path}: {unusable} unusable line{"s" * (unusable > 1)} dropped, for example of a killed process')
    return kept


def _parse(line: bytes, splits: Container[str]) -> JsonObject | None:
    """Returns the values of a line, or None if the line has no step and none of the `splits`."""
    try:
        values = json.loads(line.decode())
        usable = isinstance(values['step'], int) and values['step'] >= 0 and values['split'] in splits
    except (ValueError, KeyError, TypeError, RecursionError):  # for example an incomplete line of a killed run
        return None
    return values if usable else None


def log_start(config: Config, mesh: parallel.Mesh, data: dataset.PreparedDataset, total_steps: int) -> None:
    """Logs the data set, the processes, the mesh, the length of the run and the frozen parameters."""
    origin = f' ({data.origins["validation"]})' if data.origins.get('validation') else ''
    processes = 'one process' if jax.process_count() == 1 else f'{jax.process_count()} processes'
    log(
        f'{config.data.source}: {len(data.train)} training and {len(data.validation)} validation images{origin};'
        f' {processes}, mesh data={mesh.shape["data"]}, model={mesh.shape["model"]};'
        f' {total_steps} steps of {config.train.batch_size} images'
    )
    for line in data.choices:
        log(f'{config.data.source}: {line}')
    if frozen := frozen_names(config):
        log(f'config.optimizer.lr_multipliers freezes {", ".join(frozen)}')


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

    Raises TrainingError: the file cannot be written.
    """
    errors = views.get(str(config.eval.views)) or run.last_evaluation or {}
    corrupt_records = (split.corrupt_mask() for split in (data.train, data.validation))
    result = {
        'status': 'preempted' if preempted else 'done',
        'step': run.step,
        'target_step': run.target_step,
        'stalled_step': run.stalled_step,
        'plateau_step': run.step if run.ends_at_plateau(config.optimizer) else None,
        'evaluated': run.last_evaluated_step,
        'top1_error': errors.get('top1_error'),
        'top5_error': errors.get('top5_error'),
        'views': views,
        'images_per_second': run.images_per_second,
        'corrupt_records': sum(distributed.count_set_on_any_process(mask) for mask in corrupt_records),
        'state_digest': digest,
    }
    if distributed.is_primary_process():
        path = os.path.join(workdir, 'result.json')
        try:
            write_json(path, result)
        except OSError as error:
            raise TrainingError(
                f'{path} cannot be written ({summarize_exception(error)}); the checkpoints are complete: free space and'
                ' run the same command again'
            ) from None
