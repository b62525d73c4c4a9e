"""The inputs of the train step on the devices: batches, preprocessing constants and learning rates."""

import collections
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from alexnet_jax import parallel
from alexnet_jax.augment import PreprocessParams, disable_color_augmentation, make_preprocess_params
from alexnet_jax.config import Config, ConfigError, shown_classes
from alexnet_jax.data import dataset, loader, split_reader
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.workdir import (
    DatasetStatisticsError,
    check_class_names,
    dataset_statistics_path,
    has_untrained_import,
    read_dataset_statistics,
    statistics_belong_to,
    statistics_digest,
    write_dataset_statistics,
)
from alexnet_jax.schedules import Schedule
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.train_step import LearningRates, TrainBatch, balanced_class_weights

PREFETCH_SIZE = 3  # batches that are read and transferred ahead


def prefetch_to_device(
    config: Config, mesh: parallel.Mesh, split: split_reader.SplitReader, first_step: int
) -> Iterator[TrainBatch]:
    """Yields batches on the devices from `first_step` on; a thread prefetches PREFETCH_SIZE batches."""
    sharding = parallel.batch_sharding(mesh, config.mesh.layout)
    shard_index, shard_count = parallel.process_shard(sharding)
    batches = loader.training_batches(
        split,
        seed=config.seed,
        batch_size=config.train.batch_size,
        first_step=first_step,
        threads=config.data.reader_threads,
        shard_index=shard_index,
        shard_count=shard_count,
    )

    def fetch() -> TrainBatch:
        return jax.block_until_ready(parallel.make_global_batch(sharding, next(batches)))

    with ThreadPoolExecutor(1) as reader:
        ahead = collections.deque(reader.submit(fetch) for _ in range(PREFETCH_SIZE))
        while True:
            yield ahead.popleft().result()
            ahead.append(reader.submit(fetch))


def load_dataset_statistics(
    config: Config,
    workdir: str,
    data: dataset.PreparedDataset,
    run: RunState | None,
    of_weights: dict[str, np.ndarray] | None,
) -> dict[str, np.ndarray]:
    """Returns the statistics for make_preprocess_params(): of the workdir, or of the data set in a new run.

    A run that starts from weights, imported ones or those of train.init, has the mean of the weights, and the other
    statistics of the data set.

    If dataset_statistics.npz cannot be read, and `run` has the statistics of the data set, the file is written again.
    The primary process writes the statistics and the class names of the data set to dataset_statistics.npz.

    Args:
      config: the configuration.
      workdir: the folder of the run.
      data: the prepared data set.
      run: the progress in the checkpoint; None in a new run.
      of_weights: the statistics of the weights of train.init in a new run; None without train.init.

    Raises ConfigError: dataset_statistics.npz of a resumed run is corrupt, is not that of the run, or has the class
      names in another order; or the file cannot be written.
    """
    statistics = data.statistics if of_weights is None else _with_mean_of(of_weights, config, data.statistics)
    is_import = run is not None and has_untrained_import(workdir)
    if run is not None:
        path = dataset_statistics_path(workdir)
        try:
            statistics, class_names = read_dataset_statistics(workdir, None if is_import else config)
            if not statistics_belong_to(workdir, statistics, run.statistics_digest):
                raise DatasetStatisticsError(f'{path} is of another run')
            check_class_names(workdir, workdir, class_names, data.class_names)
        except DatasetStatisticsError as error:
            # Earlier versions saved no digest. Imported weights have a mean of their own, and no fingerprint.
            known = run.statistics_digest or (run.dataset_fingerprint and statistics_digest(data.statistics))
            if known != statistics_digest(data.statistics):
                raise ConfigError(
                    f'{error}, and the prepared data set has other statistics; copy the file to the folder again, or'
                    ' use another --workdir'
                ) from None
            log(f'{error}; it is written again from the prepared data set, which has the images of the run')
    if is_import:
        statistics = _with_mean_of(statistics, config, data.statistics)
    if not statistics['class_counts'].any():  # of imported weights
        statistics = statistics | {'class_counts': data.statistics['class_counts']}
    if config.data.class_weights == 'balanced':
        _log_class_weights(statistics['class_counts'], data.class_names)
    if distributed.is_primary_process():
        try:
            digest_of_import = run.statistics_digest if run is not None and is_import else None
            write_dataset_statistics(workdir, statistics, data.class_names, digest_of_import)
        except OSError as error:
            raise ConfigError(f'--workdir: {workdir} cannot be used: {error}') from None
    return statistics


def _with_mean_of(
    of_weights: dict[str, np.ndarray], config: Config, of_data: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the statistics `of_data` with the mean `of_weights`.

    Without data.mean='image', the weights were trained on images of any size, and the mean image repeats the mean RGB.

    Raises ConfigError: the mean image has another size than data.image_size.
    """
    size, mean_image, mean_rgb = config.data.image_size, of_weights['mean_image'], of_weights['mean_rgb']
    if config.data.mean != 'image':
        mean_image = np.broadcast_to(mean_rgb, (size, size, len(mean_rgb))).copy()
    if len(mean_image) != size:
        raise ConfigError(
            f'config.data.image_size: {size}, but the mean image of the weights has {len(mean_image)} pixels; use'
            f' {len(mean_image)}'
        )
    return of_data | {'mean_image': mean_image, 'mean_rgb': mean_rgb}


def _log_class_weights(class_counts: np.ndarray, class_names: list[str]) -> None:
    weights = balanced_class_weights(class_counts)
    used = np.flatnonzero(class_counts)
    least, most = used[np.argmin(weights[used])], used[np.argmax(weights[used])]
    log(
        f'config.data.class_weights=balanced: {weights[least]:.3g} ({class_names[least]}) to {weights[most]:.3g}'
        f' ({class_names[most]})'
    )
    empty = [name for name, count in zip(class_names, class_counts, strict=True) if not count]
    if empty:
        log(f'config.data.class_weights: 0 for the classes without training images: {shown_classes(empty)}')


def preprocessing_on_devices(
    config: Config, mesh: parallel.Mesh, statistics: dict[str, np.ndarray]
) -> tuple[PreprocessParams, PreprocessParams]:
    """Returns make_preprocess_params() on the devices, with and without color augmentation. Collective.

    With data.class_weights, the constants include the weights of the classes.

    A run transfers the constants only once: while a transfer of the mean image is pending, JAX on a CPU runs the step
    in another thread, see backend.configure_cpu_backend().
    """
    params = make_preprocess_params(statistics, config.data)
    if config.data.class_weights == 'balanced':
        params['class_weights'] = balanced_class_weights(statistics['class_counts'])
    preprocessing = distributed.broadcast_from_primary(params)
    return parallel.replicate(mesh, preprocessing), parallel.replicate(mesh, disable_color_augmentation(preprocessing))


class DeviceLearningRates:
    """Transfers the learning rates of the train step to the devices when they change."""

    def __init__(self, mesh: parallel.Mesh, schedule: Schedule):
        self.mesh, self.schedule = mesh, schedule
        self.host_rates: dict[str, dict[str, float]] = {}
        self.device_rates: LearningRates = {}

    def at(self, step: int, decays_taken: int) -> LearningRates:
        """Returns the learning rates of `step`; see Schedule.learning_rate_tree() for the arguments."""
        rates = self.schedule.learning_rate_tree(step, decays_taken)
        if rates != self.host_rates:
            self.host_rates = rates
            self.device_rates = parallel.replicate(self.mesh, jax.tree.map(np.float32, rates))
        return self.device_rates
