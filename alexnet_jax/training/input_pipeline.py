"""The inputs of the train step on the devices: batches, preprocessing constants and learning rates."""

import collections
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from alexnet_jax import parallel
from alexnet_jax.augment import PreprocessParams, disable_color_augmentation, make_preprocess_params
from alexnet_jax.config import Config
from alexnet_jax.data import dataset, loader
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.workdir import (
    check_class_names,
    dataset_statistics_path,
    read_dataset_statistics,
    write_dataset_statistics,
)
from alexnet_jax.schedules import Schedule
from alexnet_jax.training.train_step import LearningRates, TrainBatch

PREFETCH_SIZE = 3  # batches that are read and transferred ahead


def prefetch_to_device(
    config: Config, mesh: parallel.Mesh, split: dataset.SplitReader, first_step: int
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


def load_dataset_statistics(workdir: str, data: dataset.PreparedDataset, resumed: bool) -> dict[str, np.ndarray]:
    """Returns the statistics for make_preprocess_params(): of the workdir if `resumed`, otherwise of the data set.

    The primary process writes the statistics and the class names of the data set to dataset_statistics.npz.

    Raises ConfigError: dataset_statistics.npz of a resumed run is corrupt, or has the class names in another order.
    """
    statistics = data.statistics
    if resumed and os.path.exists(dataset_statistics_path(workdir)):
        statistics, class_names = read_dataset_statistics(workdir)
        check_class_names(workdir, class_names, data.class_names)
    if distributed.is_primary_process():
        write_dataset_statistics(workdir, statistics, data.class_names)
    return statistics


def preprocessing_on_devices(
    config: Config, mesh: parallel.Mesh, statistics: dict[str, np.ndarray]
) -> tuple[PreprocessParams, PreprocessParams]:
    """Returns make_preprocess_params() on the devices, with and without color augmentation. Collective.

    A run transfers the constants only once: while a transfer of the mean image is pending, JAX on a CPU runs the step
    in another thread, see backend.configure_cpu_backend().
    """
    preprocessing = distributed.broadcast_from_primary(make_preprocess_params(statistics, config.data))
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
