"""Loads a trained network from the workdir of a run, or creates a workdir from weights.

A CHECKPOINT on a command line is the workdir of a run, WORKDIR (its newest checkpoint), WORKDIR/best (the checkpoint
with the lowest validation error) or WORKDIR/checkpoints/STEP. Loading changes no file there, so the run may still be
training.
"""

import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from alexnet_jax.config import Config, ConfigError, resolve
from alexnet_jax.data import dataset
from alexnet_jax.data.open_or_prepare import open_or_prepare
from alexnet_jax.runtime.files import write_json
from alexnet_jax.runtime.preemption import PreemptionHandler
from alexnet_jax.runtime.workdir import (
    check_class_names,
    dataset_statistics_path,
    read_config,
    read_dataset_statistics,
    write_dataset_statistics,
)

if TYPE_CHECKING:
    from alexnet_jax.augment import PreprocessParams

CHECKPOINT_HELP = "a run's folder WORKDIR, WORKDIR/best or WORKDIR/checkpoints/STEP"


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that is named on a command line.

    Attributes:
      name: the CHECKPOINT argument as given.
      workdir: absolute path of the run's folder.
      selector: the checkpoint to use: 'newest', 'best' or a step as text.
      config: the resolved configuration of the run.
    """

    name: str
    workdir: str
    selector: str
    config: Config


def parse_checkpoint_ref(name: str) -> CheckpointRef:
    """Parses the CHECKPOINT argument `name`. Raises ConfigError: there is no run with a usable config.json."""
    path = os.path.abspath(os.path.expanduser(name))
    workdir, selector = path, 'newest'
    parent, last = os.path.split(path)
    if not os.path.exists(os.path.join(path, 'config.json')):
        if last == 'best':
            workdir, selector = parent, last
        elif os.path.basename(parent) == 'checkpoints' and last.isdecimal():
            workdir, selector = os.path.dirname(parent), last
    if not os.path.isdir(workdir):
        raise ConfigError(f'{name}: there is no folder {workdir}; name {CHECKPOINT_HELP}')
    if not os.path.exists(os.path.join(workdir, 'config.json')):
        raise ConfigError(f'{name}: {workdir} has no config.json; name {CHECKPOINT_HELP}')
    try:
        return CheckpointRef(name, workdir, selector, read_config(workdir))
    except ConfigError as error:
        raise ConfigError(f'{name}: its config.json is unusable: {error}') from None


def resolve_step(member: CheckpointRef) -> int:
    """Returns the step of the checkpoint that `member` currently refers to.

    Raises ConfigError: there is no such checkpoint. Raises CheckpointError: the checkpoints cannot be listed.
    """
    from alexnet_jax.training.checkpointing import checkpoint_metrics

    errors = checkpoint_metrics(os.path.join(member.workdir, 'checkpoints'))
    if not errors:
        raise ConfigError(f'{member.name}: {member.workdir} has no checkpoint; train there first')
    there = f'the checkpoints are those of steps {", ".join(map(str, errors))}'
    if member.selector == 'newest':
        return max(errors)
    if member.selector == 'best':
        measured = {step: error for step, error in errors.items() if error is not None}
        if not measured:
            raise ConfigError(f'{member.name}: no checkpoint has a validation error; {there}')
        return min(measured, key=lambda step: measured[step])
    if int(member.selector) not in errors:
        raise ConfigError(f'{member.name}: there is no such checkpoint; {there}')
    return int(member.selector)


def restore(member: CheckpointRef, abstract_state: Any) -> Any:
    """Restores the checkpoint of `member`, see checkpointing.restore_checkpoint().

    Raises ConfigError: there is no such checkpoint. Raises CheckpointError: the checkpoint is corrupt.
    """
    from alexnet_jax.training.checkpointing import CheckpointError, restore_checkpoint

    while True:
        step = resolve_step(member)
        path = os.path.join(member.workdir, 'checkpoints', str(step))
        restored, problem = restore_checkpoint(path, abstract_state)
        if restored is not None:
            return restored
        # A run that is still training may have replaced the checkpoint in the meantime.
        if resolve_step(member) == step:
            raise CheckpointError(f'{member.name}: checkpoint {path} is corrupt ({problem}); name another checkpoint')


def with_overrides(config: Config, values: dict[str, Any]) -> Config:
    """Returns `config`, resolved again, with the `values` (by dotted name) replaced."""
    settings = ml_collections.ConfigDict(config.to_dict())
    settings.update_from_flattened_dict(values)
    return resolve(settings)


def _with_mesh(config: Config) -> tuple[Config, Any]:
    """Returns `config` and its mesh; falls back to pure data parallelism if that mesh does not fit the devices."""
    import jax

    from alexnet_jax import parallel

    try:
        return config, parallel.make_mesh(config)
    except ConfigError:
        all_data = {'mesh.layout': 'data', 'mesh.data': -1, 'mesh.model': 1, 'train.batch_size': jax.device_count()}
        config = with_overrides(config, all_data)
        return config, parallel.make_mesh(config)


def open_eval_dataset(members: Sequence[CheckpointRef], data_dir: str | None) -> dataset.PreparedDataset:
    """Returns the data set that all members were trained on; prepares it if it is missing.

    If all members have imported weights, the configuration of the first member names the data set.

    Args:
      members: the networks.
      data_dir: replaces data.data_dir of the configuration, unless None.

    Raises:
      ConfigError: the members were trained on different data, or not on the prepared data.
      CheckpointError: a checkpoint cannot be read.
      DatasetError, SystemExit: see open_or_prepare().
      KeyboardInterrupt: SIGTERM or SIGINT arrived during preparation.
    """
    # A fingerprint covers the settings, the class names and all images of a data set; None: imported weights.
    fingerprints = [(member, restore(member, None).run_state.dataset_fingerprint) for member in members]
    first, fingerprint = next((pair for pair in fingerprints if pair[1] is not None), (members[0], None))
    for member, other in fingerprints:
        if other not in (fingerprint, None):
            theirs, own = first.config.data, member.config.data
            differ = [name for name in dataset.MANIFEST_FIELDS if getattr(own, name) != getattr(theirs, name)]
            why = ', '.join(f'data.{name}={getattr(own, name)!r} and not {getattr(theirs, name)!r}' for name in differ)
            raise ConfigError(
                f'{member.name}: trained with other classes or images than {first.name}'
                f' ({why or "the same settings, but other images"}); evaluate it separately'
            )
    data_dir = data_dir or first.config.data.data_dir
    with PreemptionHandler() as preemption:
        store = open_or_prepare(with_overrides(first.config, {'data.data_dir': data_dir}), preemption)
    if store is None:
        raise KeyboardInterrupt
    for member, other in fingerprints:
        if other is None:
            check_class_names(member.name, read_dataset_statistics(member.workdir)[1], store.class_names)
    if fingerprint not in (store.fingerprint, None):
        raise ConfigError(
            f'{first.name}: was trained with other images than those prepared in {data_dir};'
            ' name their folder with --data_dir'
        )
    return store


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained network on the devices.

    Attributes:
      name, workdir: see CheckpointRef.
      step: step of the checkpoint.
      digest: digest of the state, see checkpointing.state_digest().
      config: resolved configuration of the run, with a mesh that fits the available devices.
      mesh: see parallel.make_mesh().
      state: training.state.TrainState, sharded over the mesh.
      statistics: statistics of the training images, see prepare.shards.statistics().
      class_names: one name per label.
    """

    name: str
    workdir: str
    step: int
    digest: str
    config: Config
    mesh: Any
    state: Any
    statistics: dict[str, np.ndarray]
    class_names: list[str]

    @property
    def preprocessing(self) -> 'PreprocessParams':
        """The preprocessing arrays of the network, see augment.make_preprocess_params()."""
        from alexnet_jax.augment import make_preprocess_params

        return make_preprocess_params(self.statistics, self.config.data)

    @property
    def sharding(self) -> Any:
        """Sharding of the rows of a batch, see parallel.batch_sharding()."""
        from alexnet_jax import parallel

        return parallel.batch_sharding(self.mesh, self.config.mesh.layout)

    def batch_size(self, images: int) -> int:
        """Returns the smaller of eval.batch_size and `images`, rounded up to a multiple of the batch shards."""
        from alexnet_jax import parallel

        parts = parallel.num_batch_shards(self.sharding)
        return math.ceil(min(self.config.eval.batch_size, max(images, 1)) / parts) * parts

    def predict_batches(
        self, compiled: Callable, images: Iterable[np.ndarray], batch_size: int
    ) -> Iterator[np.ndarray]:
        """Yields the output row of `compiled` for each image, in order; `images` is consumed one batch at a time.

        Args:
          compiled: (state, images, preprocessing) -> (B, ...), such as make_predict_step() or
            make_activation_fn() returns.
          images: (S, S, C) uint8 each.
          batch_size: rows per call of `compiled`; the last batch is padded with zeros.
        """
        from alexnet_jax import parallel

        preprocessing, images = self.preprocessing, iter(images)
        while batch := list(itertools.islice(images, batch_size)):
            filled = np.stack(batch + [np.zeros_like(batch[0])] * (batch_size - len(batch)))
            outputs = compiled(self.state, parallel.make_global_batch(self.sharding, filled), preprocessing)
            yield from np.asarray(outputs)[: len(batch)]


def load_model(member: CheckpointRef, store: dataset.PreparedDataset | None = None) -> TrainedModel:
    """Loads the checkpoint of `member` onto the available devices.

    Args:
      member: the network.
      store: see open_eval_dataset(); supplies the statistics and class names if the workdir has no
        dataset_statistics.npz.

    Raises:
      ConfigError: there is no such checkpoint, or dataset_statistics.npz is missing or corrupt.
      CheckpointError: the checkpoint cannot be read.
    """
    from alexnet_jax.training.state import abstract_state

    if store is not None and not os.path.exists(dataset_statistics_path(member.workdir)):
        statistics, class_names = store.statistics, store.class_names
    else:
        statistics, class_names = read_dataset_statistics(member.workdir)
    config, mesh = _with_mesh(member.config)
    # The velocities are restored too, because the digest that detects corruption covers them.
    restored = restore(member, abstract_state(config, mesh))
    return TrainedModel(
        name=member.name,
        workdir=member.workdir,
        step=restored.run_state.step,
        digest=restored.state_digest,
        config=config,
        mesh=mesh,
        state=restored.state,
        statistics=statistics,
        class_names=class_names,
    )


def import_weights_as_run(
    workdir: str,
    config: Config,
    params: dict[str, dict[str, np.ndarray]],
    batch_statistics: dict[str, dict[str, np.ndarray]],
    statistics: dict[str, np.ndarray],
    class_names: list[str],
) -> None:
    """Atomically creates the workdir of a run at step 0 with the weights `params` and zero velocities.

    Args:
      workdir: the folder to create.
      config: a resolved configuration.
      params: float32, as in TrainState.
      batch_statistics: float32 running means and variances, as in TrainState; {} without batch normalization.
      statistics, class_names: see TrainedModel.

    Raises:
      ConfigError: `workdir` is not empty, or cannot be written.
      CheckpointError: the checkpoint cannot be written, for example on a full disk.
    """
    import jax
    import jax.numpy as jnp

    from alexnet_jax import parallel
    from alexnet_jax.training.checkpointing import Checkpointer
    from alexnet_jax.training.run_state import RunState
    from alexnet_jax.training.state import TrainState, abstract_state

    check_new(workdir)
    aside = f'{os.path.abspath(os.path.expanduser(workdir))}.{os.getpid()}.tmp'
    try:
        one_device = with_overrides(config, {'mesh.layout': 'data', 'mesh.data': 1, 'mesh.model': 1})
        abstract = abstract_state(one_device, parallel.make_mesh(one_device))
        velocities = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract.opt_state)
        state: TrainState = TrainState(jnp.zeros((), jnp.int32), params, velocities, batch_statistics)
        state = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), state, abstract)
        os.makedirs(aside)
        checkpoints = Checkpointer(os.path.join(aside, 'checkpoints'), keep=1)
        checkpoints.save(state, RunState(), None)
        checkpoints.close()
        write_dataset_statistics(aside, statistics, class_names)
        write_json(os.path.join(aside, 'config.json'), config.to_dict())
        os.rename(aside, os.path.expanduser(workdir))
    except OSError as error:
        raise ConfigError(f'{workdir} cannot be written: {error.strerror}; name another folder') from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_new(workdir: str) -> None:
    """Raises ConfigError unless `workdir` does not exist or is an empty folder."""
    path = os.path.expanduser(workdir)
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ConfigError(f'{workdir} already exists; name a new folder')
