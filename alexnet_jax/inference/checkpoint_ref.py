"""CHECKPOINT arguments of commands. This module does not import jax.

A CHECKPOINT is WORKDIR (the newest checkpoint of the run in that folder), WORKDIR/best (the checkpoint with the lowest
validation error) or WORKDIR/checkpoints/STEP.
"""

import dataclasses
import os
from collections.abc import Mapping

import ml_collections

from alexnet_jax.config import Config, ConfigError, resolve
from alexnet_jax.runtime.workdir import read_config

CHECKPOINT_HELP = "a run's folder WORKDIR, WORKDIR/best or WORKDIR/checkpoints/STEP"


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """A reference to a checkpoint.

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
    if not _is_run(path):
        if last == 'best':
            workdir, selector = parent, last
        elif os.path.basename(parent) == 'checkpoints' and last.isdecimal():
            workdir, selector = os.path.dirname(parent), last
    if not os.path.isdir(workdir):
        raise ConfigError(f'{name}: there is no folder {workdir}; name {CHECKPOINT_HELP}')
    if not _is_run(workdir):
        raise ConfigError(f'{name}: {workdir} has no config.json; name {CHECKPOINT_HELP}')
    try:
        return CheckpointRef(name, workdir, selector, read_config(workdir))
    except ConfigError as error:
        raise ConfigError(f'{name}: its settings cannot be read: {error}') from None


def _is_run(folder: str) -> bool:
    # The checkpoints have the settings too, in case that config.json was lost.
    return any(os.path.exists(os.path.join(folder, name)) for name in ('config.json', 'checkpoints'))


def check_new(workdir: str) -> None:
    """Raises ConfigError if `workdir` exists and is not an empty folder."""
    path = os.path.expanduser(workdir)
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ConfigError(f'{workdir} already exists; name a new folder')


def with_overrides(config: Config, values: Mapping[str, object]) -> Config:
    """Returns `config` with the fields in `values` (by dotted name) replaced. Raises ConfigError: see resolve()."""
    settings = ml_collections.ConfigDict(config.to_dict())
    settings.update_from_flattened_dict(values)
    return resolve(settings)
