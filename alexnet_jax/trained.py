"""A trained network read from its run's folder, or put into one: what predictions, figures and exports begin with.

A CHECKPOINT of a command line is the folder WORKDIR of a run (its newest checkpoint), WORKDIR/best (the one with the
lowest validation error) or WORKDIR/checkpoints/STEP. Nothing is changed there, so a run may be going on in it.
"""

import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from alexnet_jax.config import ConfigError, resolve
from alexnet_jax.data import pipeline
from alexnet_jax.data.store import open_or_prepare
from alexnet_jax.monitor import Preemption, write_json
from alexnet_jax.run_folder import check_names, read_config, read_inputs, write_inputs

FORMS = "a run's folder WORKDIR, WORKDIR/best or WORKDIR/checkpoints/STEP"


@dataclasses.dataclass(frozen=True)
class Member:
    """A network that a command line names.

    Attributes:
      name: what the command line calls it.
      workdir: the folder of its run.
      which: of the run's checkpoints, 'newest', 'best' or a step.
      config: that of the run, resolved.
    """

    name: str
    workdir: str
    which: str
    config: Any


def find(name: str) -> Member:
    """What `name`, a CHECKPOINT of the command line, stands for. Raises ConfigError: it is not of a known run."""
    path = os.path.abspath(os.path.expanduser(name))
    workdir, which = path, 'newest'
    parent, last = os.path.split(path)
    if not os.path.exists(os.path.join(path, 'config.json')):
        if last == 'best':
            workdir, which = parent, last
        elif os.path.basename(parent) == 'checkpoints' and last.isdecimal():
            workdir, which = os.path.dirname(parent), last
    if not os.path.isdir(workdir):
        raise ConfigError(f'{name}: there is no folder {workdir}; name {FORMS}')
    if not os.path.exists(os.path.join(workdir, 'config.json')):
        raise ConfigError(f'{name}: {workdir} has no config.json; name {FORMS}')
    try:
        return Member(name, workdir, which, read_config(workdir))
    except ConfigError as error:
        raise ConfigError(f'{name}: its config.json cannot be used: {error}') from None


def step_of(member: Member) -> int:
    """The step that `member` stands for at the moment. Raises ConfigError, or CheckpointError: there is none."""
    from alexnet_jax.checkpoint import checkpoint_metrics

    errors = checkpoint_metrics(os.path.join(member.workdir, 'checkpoints'))
    if not errors:
        raise ConfigError(f'{member.name}: {member.workdir} has no checkpoint; train there first')
    there = f'there are those of steps {", ".join(map(str, errors))}'
    if member.which == 'newest':
        return max(errors)
    if member.which == 'best':
        measured = {step: error for step, error in errors.items() if error is not None}
        if not measured:
            raise ConfigError(f'{member.name}: no checkpoint has a validation error; {there}')
        return min(measured, key=lambda step: measured[step])
    if int(member.which) not in errors:
        raise ConfigError(f'{member.name}: there is no such checkpoint; {there}')
    return int(member.which)


def read(member: Member, abstract_state: Any) -> Any:
    """Returns its checkpoint, see checkpoint.restore_checkpoint().

    Raises ConfigError, or CheckpointError: it cannot be read.
    """
    from alexnet_jax.checkpoint import CheckpointError, restore_checkpoint

    while True:
        step = step_of(member)
        path = os.path.join(member.workdir, 'checkpoints', str(step))
        restored, problem = restore_checkpoint(path, abstract_state)
        if restored is not None:
            return restored
        # A run that goes on there may have put another one in its place meanwhile.
        if step_of(member) == step:
            raise CheckpointError(f'{member.name}: checkpoint {path} is damaged ({problem}); name another one')


def changed(config: Any, values: dict[str, Any]) -> Any:
    """`config`, resolved, with other `values` by dotted name."""
    settings = ml_collections.ConfigDict(config.to_dict())
    settings.update_from_flattened_dict(values)
    return resolve(settings)


def _with_mesh(config: Any) -> tuple[Any, Any]:
    """`config` and its mesh, where that fits the devices there are; otherwise all devices share out the images."""
    import jax

    from alexnet_jax import parallel

    try:
        return config, parallel.make_mesh(config)
    except ConfigError:
        all_data = {'mesh.layout': 'data', 'mesh.data': -1, 'mesh.model': 1, 'train.batch_size': jax.device_count()}
        config = changed(config, all_data)
        return config, parallel.make_mesh(config)


def store_of(members: Sequence[Member], data_dir: str | None) -> pipeline.Store:
    """The images that all members were trained with, their mean and class names; prepared now where they are missing.

    For weights from elsewhere they are those that the first member's settings name.

    Raises:
      ConfigError, CheckpointError: they were trained with different ones, or with others than are prepared.
      DatasetError, SystemExit, see open_or_prepare().
      KeyboardInterrupt: stopped while preparing.
    """
    # Of settings, class names and images in the store, validation images among them; None: weights from elsewhere.
    fingerprints = [(member, read(member, None).progress['store']) for member in members]
    first, fingerprint = next((pair for pair in fingerprints if pair[1] is not None), (members[0], None))
    for member, other in fingerprints:
        if other not in (fingerprint, None):
            theirs, own = first.config.data, member.config.data
            differ = [name for name in pipeline.SETTINGS if own[name] != theirs[name]]
            why = ', '.join(f'data.{name}={own[name]!r} and not {theirs[name]!r}' for name in differ)
            raise ConfigError(
                f'{member.name}: trained with other classes or images than {first.name}'
                f' ({why or "the same settings, but another store"}); evaluate it by itself'
            )
    data_dir = data_dir or first.config.data.data_dir
    with Preemption() as preemption:
        store = open_or_prepare(changed(first.config, {'data.data_dir': data_dir}), preemption)
    if store is None:
        raise KeyboardInterrupt
    for member, other in fingerprints:
        if other is None:
            check_names(member.name, read_inputs(member.workdir)[1], store.class_names)
    if fingerprint not in (store.fingerprint, None):
        raise ConfigError(
            f'{first.name}: the images prepared in {data_dir} are not those it was trained with; name their --data_dir'
        )
    return store


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network on the devices.

    Attributes:
      name, workdir: see Member.
      step: of its checkpoint.
      digest: of its weights, see checkpoint.state_digest().
      config: of its run, resolved, with a mesh that fits the devices there are.
      mesh: see parallel.make_mesh().
      state: step.TrainState, laid out on the mesh.
      statistics: of the training images, see data/shards.statistics().
      class_names: one a label.
    """

    name: str
    workdir: str
    step: int
    digest: str
    config: Any
    mesh: Any
    state: Any
    statistics: dict[str, np.ndarray]
    class_names: list[str]

    @property
    def preprocessing(self) -> dict[str, np.ndarray]:
        """See augment.preprocessing()."""
        from alexnet_jax.augment import preprocessing

        return preprocessing(self.statistics, self.config.data)

    @property
    def sharding(self) -> Any:
        """Of the rows of a batch, see parallel.batch_sharding()."""
        from alexnet_jax import parallel

        return parallel.batch_sharding(self.mesh, self.config.mesh.layout)

    def batch_size(self, images: int) -> int:
        """Rows of a batch for so many images: eval.batch_size at most, a multiple of the parts that devices take."""
        from alexnet_jax import parallel

        parts = parallel.num_batch_shards(self.sharding)
        return math.ceil(min(self.config.eval.batch_size, max(images, 1)) / parts) * parts

    def rows(self, compiled: Callable, images: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
        """What `compiled` gives for each of `images` (S, S, C) uint8, in their order; a batch at a time is read.

        compiled: (state, images, preprocessing) -> (B, ...), as step.make_predict_step() and make_activation_fn().
        """
        from alexnet_jax import parallel

        preprocessing, images = self.preprocessing, iter(images)
        while batch := list(itertools.islice(images, batch_size)):
            filled = np.stack(batch + [np.zeros_like(batch[0])] * (batch_size - len(batch)))
            outputs = compiled(self.state, parallel.make_global_batch(self.sharding, filled), preprocessing)
            yield from np.asarray(outputs)[: len(batch)]


def load(member: Member, store: pipeline.Store | None = None) -> Network:
    """Read the weights of `member` onto the devices there are.

    Args:
      store: of store_of(); its statistics and names stand in where a run of an earlier version has not kept them.

    Raises:
      ConfigError: its folder lacks something, or there is no such checkpoint.
      CheckpointError: it cannot be read.
    """
    from alexnet_jax.step import abstract_state

    if store is not None and not os.path.exists(os.path.join(member.workdir, 'inputs.npz')):
        statistics, class_names = store.statistics, store.class_names
    else:
        statistics, class_names = read_inputs(member.workdir)
    config, mesh = _with_mesh(member.config)
    # Whole, with the velocities: only so does the fingerprint tell whether it is damaged.
    restored = read(member, abstract_state(config, mesh))
    return Network(
        name=member.name,
        workdir=member.workdir,
        step=int(restored.state.step),
        digest=restored.progress['state_digest'],
        config=config,
        mesh=mesh,
        state=restored.state,
        statistics=statistics,
        class_names=class_names,
    )


def create(
    workdir: str,
    config: Any,
    params: dict[str, dict[str, np.ndarray]],
    batch_statistics: dict[str, dict[str, np.ndarray]],
    statistics: dict[str, np.ndarray],
    class_names: list[str],
) -> None:
    """Make `workdir` the folder of a run that stands at step 0 with the weights `params`; whole or not at all.

    Args:
      config: resolved.
      params, batch_statistics: as in step.TrainState, float32; running means and variances, {} without.
      statistics, class_names: see Network.

    Raises:
      ConfigError: there is something at `workdir`, or it cannot be written.
      CheckpointError: the disk is full.
    """
    import jax
    import jax.numpy as jnp

    from alexnet_jax import parallel
    from alexnet_jax.checkpoint import Checkpointer
    from alexnet_jax.step import TrainState, abstract_state

    check_new(workdir)
    aside = f'{os.path.abspath(os.path.expanduser(workdir))}.{os.getpid()}.tmp'
    try:
        one_device = changed(config, {'mesh.layout': 'data', 'mesh.data': 1, 'mesh.model': 1})
        abstract = abstract_state(one_device, parallel.make_mesh(one_device))
        velocities = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract.opt_state)
        state = TrainState(jnp.zeros((), jnp.int32), params, velocities, batch_statistics)
        state = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), state, abstract)
        os.makedirs(aside)
        checkpoints = Checkpointer(os.path.join(aside, 'checkpoints'), keep=1)
        checkpoints.save(state, {'step': 0, 'store': None}, None)
        checkpoints.close()
        write_inputs(aside, statistics, class_names)
        write_json(os.path.join(aside, 'config.json'), config.to_dict())
        os.rename(aside, os.path.expanduser(workdir))
    except OSError as error:
        raise ConfigError(f'{workdir} cannot be written: {error.strerror}; name another folder') from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_new(workdir: str) -> None:
    """Raise ConfigError where there is something at `workdir` already."""
    path = os.path.expanduser(workdir)
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ConfigError(f'{workdir} is there already; name a new folder')
