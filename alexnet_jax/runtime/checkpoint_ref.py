"""CHECKPOINT arguments of commands. This module does not import jax.

A CHECKPOINT is WORKDIR (the newest checkpoint of the run in that folder), WORKDIR/best (the checkpoint with the lowest
validation error) or WORKDIR/checkpoints/STEP, or a link to one of them.
"""

import dataclasses
import os
import shlex
from collections.abc import Mapping

import ml_collections

from alexnet_jax.config import Config, ConfigError, resolve
from alexnet_jax.paths import check_folder, check_path, check_run_path, check_writable, is_url, shown
from alexnet_jax.runtime.workdir import RUN_FILES, read_config

HUB_WEIGHTS = 'model.safetensors'  # the weights in a folder of a model hub
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
    if is_url(name):
        raise ConfigError(f'{name}: checkpoints are not read from URLs; copy the folder of the run to a local disk')
    path = check_run_path(shown(name), name)
    workdir, selector = _split(path)
    if not _is_run(workdir) and os.path.islink(path):
        workdir, selector = _split(check_run_path(shown(name), os.path.realpath(path)))
    if os.path.isfile(path):
        raise ConfigError(
            f'{name}: is a file and no run; if it has weights, make a run of them with'
            f' alexnet convert {shlex.quote(name)} WORKDIR'
        )
    if not os.path.isdir(workdir):
        raise ConfigError(f'{name}: there is no folder {workdir}; name {CHECKPOINT_HELP}')
    if is_hub_folder(workdir):
        raise ConfigError(
            f'{name}: {workdir} has weights for a model hub and is no run; make a run of it with'
            f' alexnet convert {shlex.quote(workdir)} WORKDIR'
        )
    if not _is_run(workdir):
        raise ConfigError(f'{name}: has no config.json; name {CHECKPOINT_HELP}')
    try:
        return CheckpointRef(name, workdir, selector, read_config(workdir))
    except ConfigError as error:
        raise ConfigError(f'{name}: its settings cannot be read: {error}') from None


def is_hub_folder(folder: str) -> bool:
    """Returns whether `folder` has weights for a model hub: model.safetensors, and no file of a run but config.json.

    Both kinds of folders have a config.json, and users export weights into the folder of a run.
    """
    names = {'checkpoints', *RUN_FILES} - {'config.json'}
    is_run = any(os.path.lexists(os.path.join(folder, name)) for name in names)
    return os.path.isfile(os.path.join(folder, HUB_WEIGHTS)) and not is_run


def _is_run(folder: str) -> bool:
    # The checkpoints have the settings too, in case that config.json was lost.
    return any(os.path.exists(os.path.join(folder, name)) for name in ('config.json', 'checkpoints'))


def _split(path: str) -> tuple[str, str]:
    """Returns the folder of the run and the selector of the checkpoint `path`, see CheckpointRef."""
    parent, last = os.path.split(path)
    if not _is_run(path):
        if last == 'best':
            return parent, last
        if os.path.basename(parent) == 'checkpoints' and last.isdecimal():
            return os.path.dirname(parent), last
    return path, 'newest'


def check_new(workdir: str) -> None:
    """Raises ConfigError if `workdir` exists and is not an empty folder, or cannot be created."""
    if is_url(workdir):
        raise ConfigError(f'{workdir}: runs are written to a local disk, not to a URL; name a new folder')
    path = check_folder(workdir, check_run_path(workdir, workdir))
    if os.path.lexists(path) and os.listdir(path):
        raise ConfigError(f'{workdir} already exists; name a new folder')
    check_path(workdir, path, suffix='.0000000000.tmp')  # its name during the conversion
    check_writable(workdir, os.path.dirname(path))


def with_overrides(config: Config, values: Mapping[str, object]) -> Config:
    """Returns `config` with the fields in `values` (by dotted name) replaced. Raises ConfigError: see resolve()."""
    settings = ml_collections.ConfigDict(config.to_dict())
    settings.update_from_flattened_dict(values)
    return resolve(settings)


def with_data_folders(config: Config, data_dir: str | None, prepared_dir: str | None) -> Config:
    """Returns `config` with the given folders of data, or unchanged if both are None. Raises ConfigError."""
    if data_dir is None and prepared_dir is None:
        return config
    return with_overrides(
        config, {'data.data_dir': data_dir or config.data.data_dir, 'data.prepared_dir': prepared_dir}
    )
