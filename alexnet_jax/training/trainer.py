"""The training loop: evaluate, checkpoint, read a batch, step, log; resumes from the newest checkpoint."""

import collections
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import parallel
from alexnet_jax.augment import disable_color_augmentation, make_preprocess_params
from alexnet_jax.config import Config, ConfigError, duration_in_steps, field_names, get_by_path, total_steps
from alexnet_jax.data import dataset, loader
from alexnet_jax.data.open_or_prepare import open_or_prepare
from alexnet_jax.runtime import backend, distributed
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.runtime.files import write_json
from alexnet_jax.runtime.preemption import PreemptionHandler, Watchdog
from alexnet_jax.runtime.workdir import (
    check_class_names,
    environment,
    read_dataset_statistics,
    write_dataset_statistics,
)
from alexnet_jax.schedules import learning_rate, learning_rate_tree, plateau_init, plateau_next
from alexnet_jax.training.checkpointing import Checkpointer, CheckpointError, state_digest
from alexnet_jax.training.eval_step import make_eval_step, make_layer_stats_fn
from alexnet_jax.training.evaluation import evaluate
from alexnet_jax.training.metric_sum import MetricSum
from alexnet_jax.training.metrics_file import JsonlWriter
from alexnet_jax.training.profiler import StepProfiler
from alexnet_jax.training.state import abstract_state, init_state
from alexnet_jax.training.trackers import CompositeTracker, SamplePredictions, TrackingConfig
from alexnet_jax.training.train_step import make_train_step

EXIT_DONE, EXIT_ERROR, EXIT_PREEMPTED = 0, 1, 75


PREFETCH_SIZE = 3  # batches that are read and transferred ahead
STALL_MARGIN = 0.02  # a loss above ln(classes) - STALL_MARGIN counts as guessing
EMPTY_WINDOW = {'loss': 0.0, 'top1_error': 0.0, 'steps': 0}


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line with the cause and a remedy."""


def train_and_evaluate(config: Config, workdir: str, group: dict[str, Any] | None, wanted: TrackingConfig) -> int:
    """Trains `config` (resolved) to the end in `workdir`, from the newest checkpoint if there is one.

    Writes config.json, environment.json, inputs.npz, metrics.jsonl, layers.jsonl, checkpoints/ and result.json.

    Args:
      group: the processes of the run, see processes.start(). After an exception the joined processes still wait for
        one another, so the caller must end this process with processes.hard_exit().
      wanted: dashboards and profile to write besides the log; the same on all processes.

    Returns:
      The exit code: 0, or 75 after SIGTERM or Ctrl-C. With 75 a checkpoint is written if training had begun. A
      preemption before all processes have joined ends this process with 75 and does not return.

    Raises:
      ConfigError: mesh, data, settings and processes do not match, or `workdir` cannot be used.
      TrainingError: the loss or the weights are not finite, or training stalls and train.stall_action is 'stop'.
      DatasetError: the process that prepared the data was killed, or too many records are damaged.
      CheckpointError: no checkpoint can be read, or one cannot be written, for example because the disk is full.
      DistributedInitError: the other processes did not join.
    """
    with PreemptionHandler() as preemption:
        try:
            os.makedirs(workdir, exist_ok=True)
        except OSError as error:
            raise ConfigError(f'--workdir: {workdir} cannot be used: {error}') from None
        if group is None:
            parallel.make_mesh(config)  # raises ConfigError for an invalid mesh before the data are prepared
        # Before the processes join, because preparing may take hours and no process should wait that long for another.
        store = open_or_prepare(config, preemption)
        if store is None:
            log('stopped while preparing the data; the same command goes on with that')
            return EXIT_PREEMPTED
        if not distributed.initialize(group, config.distributed, preemption):
            log('stopped before all processes had met; the same command begins again')
            distributed.hard_exit(EXIT_PREEMPTED)
        with Watchdog(config.distributed.watchdog_timeout) as watchdog, distributed.workdir_lock(workdir):
            mesh = parallel.make_mesh(config)
            _check_same(config, store)
            if distributed.is_primary_process():
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(workdir, 'result.json'))  # written by a shorter run that this run continues
                write_json(os.path.join(workdir, 'config.json'), config.to_dict())
                write_json(os.path.join(workdir, 'environment.json'), environment())
            part = Trainer(config, workdir, mesh, store, preemption, watchdog, wanted)
            try:
                code = part.fit()
            except Exception:
                if jax.process_count() == 1:  # other processes may never reach this point
                    part.flush_checkpoints()
                raise
            jax.distributed.shutdown()
            return code


def _check_same(config: Config, store: dataset.PreparedDataset) -> None:
    """Raises ConfigError if settings or data differ between processes; `data_dir` may differ between hosts."""
    settings = {f'config.{field}': get_by_path(config, field) for field in field_names(config)}
    del settings['config.data.data_dir']
    settings['the images in the store'] = store.fingerprint
    distributed.assert_equal_across_processes(settings)


@jax.jit
def all_finite(params: Any) -> Any:
    """Returns one bool per parameter: whether all values are finite. A sum would take a CPU four times as long."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


@dataclasses.dataclass
class Throughput:
    """Training throughput: seconds of training, the part of them spent waiting for input, and images processed."""

    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        """Throughput, or 0 if nothing was timed."""
        return self.images / self.seconds if self.images else 0.0


class Trainer:
    """The part of one process in a run: compiled steps, input pipeline, train state and progress."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: Any,
        store: dataset.PreparedDataset,
        preemption: PreemptionHandler,
        watchdog: Watchdog,
        wanted: TrackingConfig,
    ):
        self.config, self.workdir, self.mesh, self.store = config, workdir, mesh, store
        self.preemption, self.watchdog = preemption, watchdog
        self.batch_sharding = parallel.batch_sharding(mesh, config.mesh.layout)
        self.share, self.shares = parallel.process_shard(self.batch_sharding)
        parts = parallel.num_batch_shards(self.batch_sharding)
        self.eval_batch_size = math.ceil(config.eval.batch_size / parts) * parts
        self._sync_count, self.stop = 0, False
        self.examples = len(store.train)
        self.total = total_steps(config.train, self.examples)
        self.color_augmentation_until = (
            math.inf
            if config.data.color_augmentation_until is None
            else self.to_steps(config.data.color_augmentation_until)
        )
        self.train_step = make_train_step(config, mesh)
        self.eval_steps = {views: make_eval_step(config, mesh, views) for views in {1, config.eval.views}}
        self.layer_report = make_layer_stats_fn(config, mesh)
        self.checkpoints = Checkpointer(os.path.join(workdir, 'checkpoints'), config.checkpoint.keep)
        stopping_criteria = [config.train.target_error, str(config.train.stall_after), config.train.stall_action]
        # evaluated: the step of the last evaluation; errors: the result of that evaluation.
        self.progress: dict[str, Any] = {'step': 0, 'evaluated': -1, 'errors': None, 'plateau': plateau_init()}
        self.progress |= {'images_per_second': 0.0, 'store': store.fingerprint}
        # window: sums over the steps since the last multiple of log_every.
        self.progress |= {
            'window': EMPTY_WINDOW,
            'stopping_criteria': stopping_criteria,
            'target_step': None,
            'stalled_step': None,
        }
        restored = self.checkpoints.restore(abstract_state(config, mesh))
        if restored:
            self.state, self.progress = restored[0], self.progress | restored[1]
            if self.progress['store'] not in (store.fingerprint, None):  # None: weights from elsewhere
                raise ConfigError(
                    f'config.data: the prepared images are not those that {workdir} was begun with; put those back, or'
                    ' name another --workdir'
                )
            self.progress['store'] = store.fingerprint
            # New criteria invalidate the results of the old ones.
            if self.progress['stopping_criteria'] != stopping_criteria:
                self.progress |= {'stopping_criteria': stopping_criteria, 'target_step': None, 'stalled_step': None}
            log(f'resuming {workdir} at step {self.step} of {self.total}')
        else:
            self.state = init_state(config, mesh)
        statistics = self.load_dataset_statistics(bool(restored))
        prepared = distributed.broadcast_from_primary(make_preprocess_params(statistics, config.data))
        # Transferred only once: while a transfer of the mean image is pending, JAX runs the step on a CPU in another
        # thread, see startup.configure_cpu_backend().
        self.preprocessing = parallel.replicate(mesh, prepared)
        self.colorless = parallel.replicate(mesh, disable_color_augmentation(prepared))
        watchdog.reset('the first state')
        metrics, layers = (
            os.path.join(workdir, name) if distributed.is_primary_process() else None
            for name in ('metrics.jsonl', 'layers.jsonl')
        )
        evaluated = self.progress['evaluated']
        self.dashboards = CompositeTracker(wanted, workdir, self.step, config, distributed.is_primary_process())
        self.samples = SamplePredictions(config, mesh, store.validation) if wanted.pictures else None
        self.profile = StepProfiler(wanted.profile, workdir)
        self.metrics = JsonlWriter(metrics, {'train': self.step, 'validation': evaluated}, [self.dashboards.line])
        self.layers = JsonlWriter(layers, {'layers': evaluated}, [self.dashboards.line])
        self.batch: Any = None  # the last batch, on the devices
        self.totals = MetricSum()  # metrics of the steps not yet logged
        self.last_metrics: Any = None  # metrics of the last step, on the devices
        # Training only, without the first step of the process, which includes compilation.
        self.timed, self.timed_since_line = Throughput(), Throughput()
        self.note = ''
        self.rates: Any = None  # learning rates of the last step, by layer
        self.device_learning_rates: Any = None  # the same learning rates on the devices
        self.log_every = self.to_steps(config.train.log_every)
        self.first_step = self.step
        self.bar = ProgressBar('train', self.total, 'steps', done=self.step)

    def load_dataset_statistics(self, goes_on: bool) -> dict[str, np.ndarray]:
        """Returns the statistics for preprocessing(): on a resume from inputs.npz if present, otherwise from the store.

        The primary process writes them, with the class names of the store, to inputs.npz.
        """
        statistics, names = self.store.statistics, self.store.class_names
        if goes_on and os.path.exists(os.path.join(self.workdir, 'inputs.npz')):
            statistics, own = read_dataset_statistics(self.workdir)
            check_class_names(self.workdir, own, names)
        if distributed.is_primary_process():
            write_dataset_statistics(self.workdir, statistics, names)
        return statistics

    @property
    def step(self) -> int:
        """Number of train steps taken so far, including those before a resume."""
        return self.progress['step']

    @property
    def done(self) -> bool:
        """Whether all steps are taken or train.target_error was reached."""
        return self.step >= self.total or self.progress['target_step'] is not None

    def to_steps(self, duration: str) -> int:
        """Converts a duration such as '5 epochs' to train steps of this run."""
        return duration_in_steps(str(duration), batch_size=self.config.train.batch_size, examples=self.examples)

    def should_stop(self) -> bool:
        """Returns True once any process has received SIGTERM or SIGINT.

        A collective: every process must call it equally often. It also resets the watchdog.
        """
        self.watchdog.reset(f'step {self.step}')
        self._sync_count += 1
        if not self.stop:
            self.stop = self.preemption.requested or distributed.reached_preemption_sync_point(self._sync_count)
        return self.stop

    def fit(self) -> int:
        """Runs the training loop to its end or until it is preempted; returns the exit code.

        The order within an iteration matters: evaluate, checkpoint, read the batch, take the step, log.
        """
        config = self.config
        eval_every, save_every = self.to_steps(config.eval.every), self.to_steps(config.checkpoint.every)
        log(
            f'{config.data.source}: {self.examples} training and {len(self.store.validation)} validation images;'
            f' {jax.process_count()} processes, mesh data={self.mesh.shape["data"]}, model={self.mesh.shape["model"]};'
            f' {self.total} steps of {config.train.batch_size} images'
        )
        batches = self.prefetch_to_device()
        while True:
            evaluation_due = self.done or (self.step > 0 and self.step % eval_every == 0)
            evaluation_due = evaluation_due and self.step > self.progress['evaluated']
            improved = False
            if not self.should_stop() and evaluation_due:
                self.log_training()
                improved = self.validate()
            stopping = self.done or self.stop
            if stopping or improved or (self.step % save_every == 0 and self.step > self.first_step):
                self.save()
            if stopping:
                break
            self.profile.at(self.step, self.state)
            self.train_one(batches)
            self.bar.update(note=self.note)
            if self.step % self.log_every == 0:
                self.log_training()
        self.profile.end(self.state)
        self.bar.close()
        return self.finish()

    def prefetch_to_device(self) -> Iterator[Any]:
        """Yields batches on the devices; a thread reads and transfers the next ones while a step is computed."""
        config = self.config
        batches = loader.training_batches(
            self.store.train,
            seed=config.seed,
            batch_size=config.train.batch_size,
            first_step=self.step,
            threads=config.data.reader_threads,
            share=self.share,
            shares=self.shares,
        )

        def fetch():
            return jax.block_until_ready(parallel.make_global_batch(self.batch_sharding, next(batches)))

        with ThreadPoolExecutor(1) as reader:
            ahead = collections.deque(reader.submit(fetch) for _ in range(PREFETCH_SIZE))
            while True:
                yield ahead.popleft().result()
                ahead.append(reader.submit(fetch))

    def train_one(self, batches: Iterator[Any]) -> None:
        """Takes one train step on the next batch, and adds its metrics and its time to the running sums."""
        start = time.perf_counter()
        # Drop the previous batch first: keeping it alive blocks the prefetch thread (input wait 5 % instead of 1 %).
        self.batch = None
        batch = self.batch = next(batches)
        waited = time.perf_counter() - start
        self.update_learning_rates()
        make_preprocess_params = self.preprocessing if self.step < self.color_augmentation_until else self.colorless
        arguments = self.state, batch, self.device_learning_rates, make_preprocess_params
        first = self.step == self.first_step
        if first:
            self.train_step = self.train_step.lower(*arguments).compile()
            if jax.default_backend() == 'cpu':  # other backends use device memory, and may not report its size
                backend.reserve_step_memory(self.train_step.memory_analysis().temp_size_in_bytes)
        self.state, metrics = self.train_step(*arguments)
        self.totals.add(metrics)
        jax.block_until_ready(metrics if first else self.last_metrics)  # at most two steps are in flight
        self.last_metrics = metrics
        self.progress['step'] += 1
        if not first:
            self.time(time.perf_counter() - start, waited, steps=1)

    def time(self, seconds: float, waited: float, steps: int) -> None:
        """Adds `seconds`, `waited` of them for input, and the images of `steps` to both throughput counters."""
        for timed in (self.timed, self.timed_since_line):
            timed.seconds += seconds
            timed.waited += waited
            timed.images += steps * self.config.train.batch_size

    @property
    def decays_taken(self) -> int:
        """Number of drops so far of the schedule 'plateau'; counted under every schedule."""
        return int(self.progress['plateau']['decays_taken'])

    def update_learning_rates(self) -> None:
        """Transfers the learning rates of the next step to the devices if they differ from those of the last step."""
        rates = learning_rate_tree(self.config, self.step, self.examples, self.decays_taken)
        if rates != self.rates:
            self.rates, self.device_learning_rates = (
                rates,
                parallel.replicate(self.mesh, jax.tree.map(np.float32, rates)),
            )

    def learning_rate_at(self, step: int) -> float:
        """Returns the scheduled learning rate of `step`, counted from 0, with the plateau drops so far."""
        return learning_rate(self.config, step, self.examples, self.decays_taken)

    def log_training(self) -> None:
        """Logs the mean metrics of the steps since the last line, if there are any.

        Raises TrainingError: the loss is not finite, or see check_progress().
        """
        steps = self.totals.count
        if not steps:
            return
        start = time.perf_counter()
        sums = {name: float(value) for name, value in self.totals.read().items()}
        self.time(time.perf_counter() - start, 0.0, steps=0)
        self.totals = MetricSum()
        means = {name: value / steps for name, value in sums.items()}
        rate = self.learning_rate_at(self.step - 1)
        timed, self.timed_since_line = self.timed_since_line, Throughput()
        self.check_finite(means['loss'])
        self.metrics.write(
            step=self.step,
            split='train',
            **means,
            learning_rate=rate,
            images_per_second=timed.images_per_second,
            input_wait=timed.waited / timed.seconds,
        )
        self.note = (
            f'loss {means["loss"]:.4f}  top-1 error {means["top1_error"]:.1%}  learning rate {rate:.2g}'
            f'  {timed.images_per_second:.1f} images/s  input wait {timed.waited / timed.seconds:.1%}'
        )
        self.bar.log_line(self.note)
        window = self.progress['window']
        self.progress['window'] = {name: window[name] + (sums | {'steps': steps})[name] for name in window}
        if self.step % self.log_every == 0:
            self.check_progress()

    def check_progress(self) -> None:
        """Checks the means over the last `log_every` steps against train.target_error and for a stall.

        Raises TrainingError: training stalls and train.stall_action is 'stop'.
        """
        window, train = self.progress['window'], self.config.train
        self.progress['window'] = EMPTY_WINDOW
        loss, error = window['loss'] / window['steps'], window['top1_error'] / window['steps']
        if error < train.target_error and self.progress['target_step'] is None:
            self.progress['target_step'] = self.step
            log(
                f'step {self.step}: the training error of {error:.2%} is below'
                f' train.target_error={train.target_error:g}'
            )
        chance = math.log(self.config.model.num_classes)
        first = self.progress['stalled_step'] is None and self.step >= self.to_steps(train.stall_after)
        if first and loss > chance - STALL_MARGIN:
            self.progress['stalled_step'] = self.step
            message = self.stall_message(loss)
            if train.stall_action == 'stop':
                raise TrainingError(message)
            log(message)

    def stall_message(self, loss: float) -> str:
        """Returns one line: the loss equals that of guessing, the likely cause, and settings to try."""
        classes = self.config.model.num_classes
        dead = {name: values[-1] for name, values in self.layer_stats().items()}
        worst = max(dead, key=lambda name: dead[name])
        cause = 'the images make no difference to the logits, for weights are too small or units saturated'
        if dead[worst] > 0.5:
            cause = f'{dead[worst]:.0%} of the units of {worst} are dead'
        return (
            f'stalled: at step {self.step} the loss is {loss:.4f}, that of guessing among {classes} classes is'
            f' ln({classes}) = {math.log(classes):.4f}; likely {cause}: try config.model.bias_init with 0.1 in place of'
            ' 1, config.optimizer.warmup, another config.model.kernel_std or config.optimizer.learning_rate, or'
            f' another config.seed than {self.config.seed}'
        )

    def layer_stats(self) -> dict[str, list[float]]:
        """Returns the values of step.make_layer_stats_fn() on the last batch, by layer."""
        report = self.layer_report(self.state, self.batch['image'], self.preprocessing)
        return {name: [float(value) for value in values] for name, values in jax.device_get(report).items()}

    def log_layer_stats(self) -> None:
        """Logs the mean |weight|, mean |update| and dead-unit fraction by layer, as cuda-convnet did at each test."""
        if self.batch is None:  # resumed at a step where an evaluation is due
            return
        names = ('kernel', 'kernel_update', 'bias', 'bias_update', 'dead')
        report = self.layer_stats()
        table = {layer: dict(zip(names, values, strict=True)) for layer, values in report.items()}
        self.layers.write(step=self.step, split='layers', **table)
        ratios = [f'{layer} {row["kernel_update"] / max(row["kernel"], 1e-30):.1e}' for layer, row in table.items()]
        dead = [f'{layer} {row["dead"]:.0%}' for layer, row in table.items() if row['dead'] >= 0.005]
        log(f'update/weight: {"  ".join(ratios)}; dead units: {"  ".join(dead) or "none"}')

    def log_images(self) -> None:
        """Shows the conv1 kernels and predictions for some validation images on the dashboards, if any."""
        if self.samples is None:
            return
        scores = self.samples.scores(self.state, self.preprocessing)
        kernel = distributed.gather_to_host(self.state.params['conv1']['kernel'])
        model, class_names = self.config.model, self.store.class_names
        shared = (
            None if 'conv1' in model.locally_connected else kernel
        )  # locally_connected kernels differ at each pixel
        self.dashboards.pictures(self.step, shared, model.towers, self.samples.examples, scores, class_names)

    def check_finite(self, value: float) -> None:
        """Raises TrainingError if `value`, the loss or a sum of weights, is infinite or NaN."""
        if not math.isfinite(value):
            self.flush_checkpoints()
            raise TrainingError(
                f'the loss or the weights are {value} at step {self.step}: lower config.optimizer.learning_rate'
                f' ({self.learning_rate_at(self.step - 1):g}) or raise config.optimizer.warmup; {self.workdir} can be'
                f' resumed from step {self.checkpoints.manager.latest_step() or 0}'
            )

    def measure(self, views: int) -> dict[str, float] | None:
        """Returns the result of evaluate() on the validation images with `views` views, or None if preempted."""
        config = self.config
        batches = loader.validation_batches(
            self.store.validation,
            batch_size=self.eval_batch_size,
            threads=config.data.reader_threads,
            share=self.share,
            shares=self.shares,
        )
        return evaluate(
            self.eval_steps[views],
            self.state,
            batches,
            self.preprocessing,
            self.batch_sharding,
            what=f'evaluate, {views} view{"s" * (views > 1)}',
            total=math.ceil(len(self.store.validation) / self.eval_batch_size),
            stop=self.should_stop,
        )

    def validate(self) -> bool:
        """Evaluates with one view and updates the plateau state. Returns whether top-1 error is the lowest so far.

        Returns False if preempted. Raises TrainingError: the validation loss is not finite.
        """
        errors = self.measure(1)
        if errors is None:
            return False
        self.check_finite(errors['loss'])
        plateau = self.progress['plateau']
        self.progress |= {'evaluated': self.step, 'errors': errors}
        self.progress['plateau'] = plateau_next(plateau, errors['top1_error'], self.config.optimizer)
        shown = {name: errors[name] for name in ('loss', 'top1_error', 'top5_error')}
        self.metrics.write(step=self.step, split='validation', **shown, learning_rate=self.learning_rate_at(self.step))
        log(
            f'step {self.step}/{self.total}  validation: loss {errors["loss"]:.4f}'
            f'  top-1 {errors["top1_error"]:.2%}  top-5 {errors["top5_error"]:.2%}'
            f'  ({errors["examples"]} images, 1 view)'
        )
        self.log_layer_stats()
        self.log_images()
        dropped = self.progress['plateau']['decays_taken'] > plateau['decays_taken']
        if dropped and self.config.optimizer.schedule == 'plateau':
            log(f'the error stopped improving: learning rate now {self.learning_rate_at(self.step):g}')
        return errors['top1_error'] < plateau['lowest_error']

    def save(self) -> None:
        """Logs, then writes a checkpoint in the background.

        Raises:
          TrainingError: a parameter is not finite, or see log_training().
          CheckpointError: the previous checkpoint could not be written.
        """
        self.log_training()
        finite = jax.tree.leaves(jax.device_get(all_finite(self.state.params)))
        for leaf, is_finite in zip(jax.tree.leaves(self.state.params), finite, strict=True):
            if not is_finite:  # a run cannot resume from such a checkpoint
                self.check_finite(float(jnp.sum(jnp.abs(leaf))))
        self.progress['images_per_second'] = self.timed.images_per_second or self.progress['images_per_second']
        measured = self.progress['errors'] if self.progress['evaluated'] == self.step else None
        self.checkpoints.save(self.state, self.progress, measured and measured['top1_error'])
        self.watchdog.reset(f'the checkpoint of step {self.step}')

    def flush_checkpoints(self) -> None:
        """Waits for the checkpoint in progress before another error ends training; ignores CheckpointError."""
        with contextlib.suppress(CheckpointError):
            self.checkpoints.wait()

    def finish(self) -> int:
        """Writes result.json and returns the exit code.

        After the last step a final evaluation with eval.views views comes first; if preempted, the file has the errors
        of the last evaluation.
        """
        views = {'1': self.progress['errors']} if self.progress['errors'] else {}
        preempted = not self.done or self.stop
        if not preempted and self.config.eval.views != 1:
            errors = self.measure(self.config.eval.views)
            preempted = errors is None
            if errors:
                views[str(self.config.eval.views)] = errors
        final = views.get(str(self.config.eval.views)) or self.progress['errors'] or {}
        self.checkpoints.close()
        self.watchdog.reset('the last checkpoint')
        for output in (self.metrics, self.layers, self.dashboards):
            output.close()
        damages = self.store.train.corrupt_mask(), self.store.validation.corrupt_mask()
        result = {
            'status': 'preempted' if preempted else 'done',
            'step': self.step,
            'target_step': self.progress['target_step'],
            'stalled_step': self.progress['stalled_step'],
            'evaluated': self.progress['evaluated'],
            'top1_error': final.get('top1_error'),
            'top5_error': final.get('top5_error'),
            'views': views,
            'images_per_second': self.timed.images_per_second or self.progress['images_per_second'],
            'corrupt_records': sum(distributed.count_set_on_any_process(damage) for damage in damages),
            'state_digest': state_digest(self.state),
        }
        if distributed.is_primary_process():
            write_json(os.path.join(self.workdir, 'result.json'), result)
        if preempted:
            log(f'stopped at step {self.step} of {self.total}; the same command continues')
        return EXIT_PREEMPTED if preempted else EXIT_DONE
