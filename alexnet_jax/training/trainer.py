"""The training loop, which resumes from the newest checkpoint."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array

from alexnet_jax import parallel
from alexnet_jax.config import (
    Config,
    ConfigError,
    field_names,
    get_by_path,
    total_steps,
    with_num_classes,
)
from alexnet_jax.data import dataset
from alexnet_jax.data.open_or_prepare import open_or_prepare
from alexnet_jax.paths import check_writable
from alexnet_jax.runtime import backend, distributed
from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.environment import environment
from alexnet_jax.runtime.files import JsonObject, write_json
from alexnet_jax.runtime.preemption import PreemptionHandler, Watchdog
from alexnet_jax.runtime.workdir import (
    PATH_FIELDS,
    append_history,
    check_fits_import,
    describe_changes,
    has_untrained_import,
    quarantine_folders,
    statistics_digest,
    trained_on,
)
from alexnet_jax.schedules import Intervals, Schedule
from alexnet_jax.training.checkpointing import Checkpointer, state_digest
from alexnet_jax.training.diagnostics import Diagnostics
from alexnet_jax.training.evaluation import Evaluator
from alexnet_jax.training.initial_weights import init_state_from, read_initial_weights
from alexnet_jax.training.input_pipeline import (
    DeviceLearningRates,
    load_dataset_statistics,
    prefetch_to_device,
    preprocessing_on_devices,
)
from alexnet_jax.training.metric_sum import MetricSum
from alexnet_jax.training.metrics_logger import MetricsLogger, Throughput, log_start, write_result
from alexnet_jax.training.profiler import StepProfiler
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import TrainState, abstract_state, init_state, with_average
from alexnet_jax.training.trackers import TrackingConfig
from alexnet_jax.training.train_step import Metrics, TrainBatch, make_train_step

EXIT_DONE, EXIT_ERROR, EXIT_PREEMPTED = 0, 1, 75


def train_and_evaluate(config: Config, workdir: str, process_group: JsonObject | None, tracking: TrackingConfig) -> int:
    """Trains the network of `config` to the end, from the newest checkpoint in `workdir` if there is one.

    Writes config.json, config_history.jsonl, environment.json, dataset_statistics.npz, metrics.jsonl, layers.jsonl,
    checkpoints/ and result.json.

    Args:
      config: the configuration.
      workdir: the folder of the run.
      process_group: the processes of the run, see distributed.initialize(). After an exception, the connected
        processes still wait for each other, so the caller must end this process with distributed.hard_exit().
      tracking: trackers and profile to write besides the log; the same on all processes.

    Returns:
      The exit code: 0, or 75 after a preemption signal. With 75, a checkpoint was written if training had started. A
      preemption before all processes have connected ends this process with 75 and does not return.

    Raises:
      ConfigError: mesh, data, settings and processes do not match, or `workdir` cannot be used.
      TrainingError: the loss or the weights are not finite, or training stalls and train.stall_action is 'stop'.
      DatasetError: the process that prepared the data was killed, or too many records are corrupt.
      CheckpointError: no checkpoint can be read, or one cannot be written, for example because the disk is full.
      DistributedInitError: the other processes did not connect.
      SystemExit: the preparation of the data set failed.
    """
    with PreemptionHandler(ignore_afterwards=True) as preemption:
        check_writable('--workdir', workdir)  # without creating it: an empty folder among the images is a class
        if process_group is None:
            parallel.make_mesh(config)  # raises ConfigError for an invalid mesh before the data are prepared
        # The data set is prepared before the processes connect, because connected processes should not wait for hours.
        data = open_or_prepare(config, preemption, trained_on(workdir))
        if data is None:
            log('stopped while preparing the data set; run the same command again to resume')
            return EXIT_PREEMPTED
        try:
            os.makedirs(workdir, exist_ok=True)
        except OSError as error:
            raise ConfigError(f'--workdir: {workdir} cannot be used: {error}') from None
        config = with_num_classes(config, len(data.class_names))
        check_fits_import(config, workdir)
        if not distributed.initialize(process_group, config.distributed, preemption):
            log('stopped before all processes were connected; run the same command again')
            distributed.hard_exit(EXIT_PREEMPTED)
        with Watchdog(config.distributed.watchdog_timeout) as watchdog, distributed.workdir_lock(workdir):
            mesh = parallel.make_mesh(config)
            _check_equal_on_all_processes(config, data)
            if distributed.is_primary_process():
                quarantine_folders(workdir)
            trainer = Trainer(config, workdir, mesh, data, preemption, watchdog, tracking)
            if distributed.is_primary_process():
                _write_settings(config, workdir, trainer.run.step, trainer.resumed)
            try:
                code = trainer.fit()
            except Exception:
                if jax.process_count() == 1:  # other processes may never reach this point
                    trainer.checkpoints.latest_step()  # waits for the checkpoint in progress
                raise
            jax.distributed.shutdown()
            return code


def _write_settings(config: Config, workdir: str, step: int, resumed: bool) -> None:
    """Logs the settings that differ from those of the resumed run, and writes the files of a start at `step`.

    Raises ConfigError: the files cannot be written.
    """
    if resumed:
        for line in describe_changes(config, workdir):
            log(line)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(workdir, 'result.json'))  # written by a shorter run that this run continues
        write_json(os.path.join(workdir, 'config.json'), config.to_dict())
    except OSError as error:
        raise ConfigError(f'--workdir: {workdir} cannot be used: {error}') from None
    append_history(workdir, step, config)
    try:
        write_json(os.path.join(workdir, 'environment.json'), environment())
    except OSError as error:
        log(f'{workdir}/environment.json is not written: {error}')


def _check_equal_on_all_processes(config: Config, data: dataset.PreparedDataset) -> None:
    """Raises ConfigError if settings or data differ between processes; PATH_FIELDS may differ between hosts."""
    settings = {f'config.{field}': get_by_path(config, field) for field in field_names(config)}
    for field in PATH_FIELDS:
        settings.pop(f'config.{field}', None)
    settings['the images of the prepared data set'] = data.fingerprint
    distributed.assert_equal_across_processes(settings)


def restore_or_init(
    config: Config, workdir: str, mesh: parallel.Mesh, data: dataset.PreparedDataset, checkpoints: Checkpointer
) -> tuple[TrainState[Array], RunState, dict[str, np.ndarray], bool]:
    """Returns the train state, the progress, the data set statistics, and whether the run resumes. Collective.

    Raises:
      ConfigError: the run was started with another prepared data set, or see load_dataset_statistics() and
        read_initial_weights().
      CheckpointError: see Checkpointer.restore().
    """
    checkpoint = checkpoints.restore(abstract_state(config, mesh))
    run = checkpoint.run_state if checkpoint else RunState()
    recorded = run.dataset_fingerprint  # None: a new run, or imported weights
    if recorded is not None and not data.has_fingerprint(recorded):
        raise ConfigError(
            f'config.data: the prepared data set is not the one that {workdir} was started with; put that one back, or'
            ' use another --workdir'
        )
    weights = None
    if checkpoint is None and config.train.init is not None:
        weights = read_initial_weights(config.train.init)
    is_import = checkpoint is not None and has_untrained_import(workdir)
    of_weights = weights.statistics if weights else None
    statistics = load_dataset_statistics(config, workdir, data, run if checkpoint else None, of_weights)
    if is_import:
        log(f'training starts from the imported weights in {workdir}')
    elif checkpoint:
        log(f'resuming {workdir} at step {run.step} of {total_steps(config.train, len(data.train))}')
    run = dataclasses.replace(
        run, dataset_fingerprint=data.fingerprint, statistics_digest=statistics_digest(statistics)
    )
    run = run.with_stopping_criteria((config.train.target_error, config.train.stall_after, config.train.stall_action))
    state = with_average(checkpoint.state, config) if checkpoint and checkpoint.state else None
    if state is None and weights is not None:
        state = init_state_from(weights, config, mesh, data.class_names)
    return init_state(config, mesh) if state is None else state, run, statistics, checkpoint is not None


class Trainer:
    """The training loop on this process, with the train state and the progress of the run."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: parallel.Mesh,
        data: dataset.PreparedDataset,
        preemption: PreemptionHandler,
        watchdog: Watchdog,
        tracking: TrackingConfig,
    ):
        self.config, self.workdir, self.mesh, self.data = config, workdir, mesh, data
        self.preemption, self.watchdog = preemption, watchdog
        self.stopping, self._sync_count = False, 0
        self.schedule = Schedule(config.optimizer, config.train, len(data.train))
        self.learning_rates = DeviceLearningRates(mesh, self.schedule)
        self.intervals = Intervals.from_config(config, len(data.train))
        self.checkpoints = Checkpointer(os.path.join(workdir, 'checkpoints'), config.checkpoint.keep, config)
        self.state, self.run, statistics, self.resumed = restore_or_init(config, workdir, mesh, data, self.checkpoints)
        self.first_step = self.run.step
        self.preprocessing, self.preprocessing_without_color = preprocessing_on_devices(config, mesh, statistics)
        watchdog.reset('the initial state')
        self.train_step = make_train_step(config, mesh)
        self.evaluator = Evaluator(config, mesh, data.validation)
        self.diagnostics = Diagnostics(config, mesh, self.preprocessing, self.intervals.stall_after, self.checkpoints)
        self.logger = MetricsLogger(config, workdir, mesh, data, self.run, self.schedule.total_steps, tracking)
        self.profiler = StepProfiler(tracking.profile, workdir)
        self.throughput = Throughput()
        self.metric_sum = MetricSum()  # metrics of the steps that are not logged yet
        self.batch: TrainBatch | None = None  # the last batch, on the devices
        self.last_metrics: Metrics | None = None  # metrics of the last step, on the devices

    def fit(self) -> int:
        """Trains until the run is done or preempted; returns the exit code.

        The order within an iteration matters: evaluate, checkpoint, read a batch, step, log. A checkpoint holds the
        evaluation at its step, so a resumed run neither repeats nor omits that evaluation. All processes check for a
        preemption at the same point, before the collectives of the next step.
        """
        log_start(self.config, self.mesh, self.data, self.schedule.total_steps)
        batches = prefetch_to_device(self.config, self.mesh, self.data.train, self.run.step)
        while True:
            is_best = not self.should_stop() and self.evaluation_due and self.evaluate_and_update_schedule()
            ending = self.done or self.stopping
            if ending or is_best or self.checkpoint_due:
                self.save_checkpoint()
            if ending:
                break
            self.profiler.on_step(self.run.step, self.state)
            self.take_step(batches)
            self.logger.log_step()
            if self.run.step % self.intervals.log_every == 0:
                self.log_training()
        self.profiler.close(self.state)
        return self.finish()

    @property
    def done(self) -> bool:
        """Whether all steps are taken, train.target_error was reached, or optimizer.stop_on_plateau ends the run."""
        ended = self.run.target_step is not None or self.run.ends_at_plateau(self.config.optimizer)
        return self.run.step >= self.schedule.total_steps or ended

    @property
    def evaluation_due(self) -> bool:
        """Whether the current step is due for an evaluation and has not been evaluated."""
        step = self.run.step
        due = self.done or (step > 0 and step % self.intervals.eval_every == 0)
        return due and step > self.run.last_evaluated_step

    @property
    def checkpoint_due(self) -> bool:
        """Whether this process has trained to a step that is a multiple of checkpoint.every."""
        return self.run.step % self.intervals.checkpoint_every == 0 and self.run.step > self.first_step

    def should_stop(self) -> bool:
        """Returns True once any process has received a preemption signal.

        Collective: all processes must call the method equally often. The method also resets the watchdog.
        """
        self.watchdog.reset(f'step {self.run.step}')
        self._sync_count += 1
        if not self.stopping:
            self.stopping = self.preemption.requested or distributed.reached_preemption_sync_point(self._sync_count)
        return self.stopping

    def take_step(self, batches: Iterator[TrainBatch]) -> None:
        """Takes one train step on the next batch, and adds its metrics and its time to the running sums."""
        start = time.perf_counter()
        # Drop the previous batch first: keeping it alive blocks the prefetch thread (input wait 5 % instead of 1 %).
        self.batch = None
        self.batch = next(batches)
        input_wait_secs = time.perf_counter() - start
        learning_rates = self.learning_rates.at(self.run.step, self.run.plateau.decays_taken)
        has_color = self.run.step < self.intervals.color_augmentation_until
        preprocessing = self.preprocessing if has_color else self.preprocessing_without_color
        arguments = self.state, self.batch, learning_rates, preprocessing
        first = self.run.step == self.first_step
        if first:
            compiled = self.train_step.lower(*arguments).compile()
            if jax.default_backend() == 'cpu':  # other backends use device memory, and may not report its size
                backend.reserve_step_memory(compiled.memory_analysis().temp_size_in_bytes)
            self.train_step = compiled
        self.state, metrics = self.train_step(*arguments)
        self.metric_sum.add(metrics)
        jax.block_until_ready(metrics if first else self.last_metrics)  # at most two steps are in flight
        self.last_metrics = metrics
        self.run = dataclasses.replace(self.run, step=self.run.step + 1)
        if not first:
            self.throughput.add(time.perf_counter() - start, input_wait_secs, self.config.train.batch_size)

    def learning_rate_at(self, step: int) -> float:
        """Returns the scheduled learning rate of `step`, counted from 0, with the plateau decays so far."""
        return self.schedule.learning_rate(step, self.run.plateau.decays_taken)

    def log_training(self) -> None:
        """Logs the mean metrics of the steps since the last log line, if there are any.

        At multiples of train.log_every, Diagnostics.check_window() also checks the metrics.

        Raises TrainingError: the loss is not finite, or training stalls and train.stall_action is 'stop'.
        """
        steps = self.metric_sum.count
        if self.batch is None or not steps:
            return
        start = time.perf_counter()
        sums = {name: float(value) for name, value in self.metric_sum.read().items()}
        self.throughput.add(time.perf_counter() - start)
        self.metric_sum = MetricSum()
        timing, step = self.throughput.end_interval(), self.run.step
        means = {name: value / steps for name, value in sums.items()}
        learning_rate = self.learning_rate_at(step - 1)
        self.diagnostics.check_finite(means['loss'], step, learning_rate)
        self.logger.log_training(step, means, learning_rate, timing)
        self.run = dataclasses.replace(self.run, window=self.run.window.add(sums, steps))
        if step % self.intervals.log_every == 0:
            self.run = self.diagnostics.check_window(self.run, self.state, self.batch['image'])

    def evaluate_and_update_schedule(self) -> bool:
        """Evaluates with one view and updates the plateau state. Returns whether the top-1 error is the lowest so far.

        Returns False if preempted. Raises TrainingError: a loss is not finite, or see log_training().
        """
        self.log_training()
        errors = self.evaluator.evaluate(1, self.state.for_inference(), self.preprocessing, self.should_stop)
        if errors is None:
            return False
        before, step = self.run.plateau, self.run.step
        self.diagnostics.check_finite(errors['loss'], step, self.learning_rate_at(step - 1))
        plateau = before.update(errors['top1_error'], self.config.optimizer)
        self.run = dataclasses.replace(self.run, last_evaluated_step=step, last_evaluation=errors, plateau=plateau)
        self.logger.log_validation(step, errors, self.learning_rate_at(step))
        if self.batch is not None:  # None: resumed at a step where an evaluation is due
            self.logger.log_layer_stats(step, self.diagnostics.layer_stats(self.state, self.batch['image']))
        self.logger.log_images(step, self.state.for_inference(), self.preprocessing)
        if plateau.decays_taken > before.decays_taken and self.config.optimizer.schedule == 'plateau':
            log(f'the validation error stopped improving: the learning rate is now {self.learning_rate_at(step):g}')
        if self.run.ends_at_plateau(self.config.optimizer):
            log(f'the validation error stopped improving after the last decay: the run ends at step {step}')
        return errors['top1_error'] < before.lowest_error

    def save_checkpoint(self) -> None:
        """Logs the steps since the last log line, then starts to write a checkpoint in the background.

        Raises:
          TrainingError: a parameter is not finite, or see log_training().
          CheckpointError: the previous checkpoint could not be written.
        """
        self.log_training()
        step = self.run.step
        # A run could not resume from a checkpoint with values that are not finite.
        self.diagnostics.check_params_finite(self.state.params, step, self.learning_rate_at(step - 1))
        rate = self.throughput.total.images_per_second or self.run.images_per_second
        self.run = dataclasses.replace(self.run, images_per_second=rate)
        errors = self.run.last_evaluation if self.run.last_evaluated_step == step else None
        self.checkpoints.save(self.state, self.run, errors['top1_error'] if errors else None)
        self.watchdog.reset(f'the checkpoint of step {step}')

    def finish(self) -> int:
        """Evaluates a finished run with eval.views views, writes result.json, and returns the exit code."""
        self.logger.progress.close()
        run, final_views = self.run, self.config.eval.views
        views = {'1': run.last_evaluation} if run.last_evaluation else {}
        preempted = not self.done or self.stopping
        if not preempted and final_views != 1:
            state = self.state.for_inference()
            errors = self.evaluator.evaluate(final_views, state, self.preprocessing, self.should_stop)
            preempted = errors is None
            if errors:
                views[str(final_views)] = errors
        try:
            self.checkpoints.close()
            self.watchdog.reset('the last checkpoint')
        finally:
            self.logger.close()
        write_result(self.config, self.workdir, self.data, run, views, preempted, state_digest(self.state))
        if preempted:
            log(f'stopped at step {run.step} of {self.schedule.total_steps}; run the same command again to resume')
        return EXIT_PREEMPTED if preempted else EXIT_DONE
