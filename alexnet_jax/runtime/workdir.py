"""Reads and writes the files of a workdir, and checks whether a run in the workdir can resume or is finished."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import zipfile
from pathlib import Path

import ml_collections
import numpy as np

from alexnet_jax.config import Config, ConfigError, field_names, get_by_path, resolve, upgrade
from alexnet_jax.runtime.console import log, summarize_exception
from alexnet_jax.runtime.files import JsonObject, atomic_write, read_json

# The weights and the order of the data depend on these fields; other fields may change when a run resumes.
RESUME_INVARIANT_FIELDS = (
    'seed',
    'data.source',
    'data.image_size',
    'data.channels',
    'data.encoding',
    'data.crop_size',
    'train.batch_size',
)
LOCATION_FIELDS = ('data.data_dir', 'data.prepared_dir')  # where the data are; no setting of the run

# Keys of result.json in runs of version 0.1.
RENAMED_RESULT_KEYS = {'goal_step': 'target_step', 'damaged_records': 'corrupt_records'}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message is one line with the folder, the cause and the remedy."""


def check_resumable(config: Config, workdir: str, every_field: bool = False) -> None:
    """Checks that a run with `config` can resume from the checkpoints in `workdir`, if there are any.

    Args:
      config: a resolved configuration.
      workdir: the folder of the run.
      every_field: compare all fields except LOCATION_FIELDS, as a sweep does, because the names of its runs state
        their settings.

    Raises ConfigError: the checkpoints belong to another network or another order of the data, or config.json is
      unreadable or from an older version.
    """
    checkpoints = os.path.join(workdir, 'checkpoints')
    if not os.path.isdir(checkpoints) or not os.listdir(checkpoints):
        return
    before = _read_settings(workdir)
    if before is None:
        raise ConfigError(f'--workdir: {workdir} has checkpoints but no readable config.json; use another --workdir')
    old = ml_collections.ConfigDict(before)
    now = ml_collections.ConfigDict(json.loads(json.dumps(config.to_dict())))
    fields = [field for field in field_names(now) if field in RESUME_INVARIANT_FIELDS or field.startswith('model.')]
    if every_field:
        fields = [field for field in field_names(now) if field not in LOCATION_FIELDS]
    known = set(field_names(old))
    for field in fields:
        if field not in known:
            raise ConfigError(f'--workdir: {workdir} was started with an older version; use another --workdir')
        was, given = get_by_path(old, field), get_by_path(now, field)
        if was != given:
            raise ConfigError(
                f'config.{field}: {given!r}, but {workdir} was started with {was!r}; use that or another --workdir'
            )


def is_finished(config: Config, workdir: str) -> bool:
    """Returns whether `workdir` contains a finished run with the resolved `config`; LOCATION_FIELDS may differ."""
    result, before = read_result_json(workdir), _read_settings(workdir)
    if result is None or before is None or result.get('status') != 'done':
        return False
    now = json.loads(json.dumps(config.to_dict()))
    places = {field.split('.')[1]: now['data'][field.split('.')[1]] for field in LOCATION_FIELDS}
    return before | {'data': before.get('data', {}) | places} == now


def _read_settings(workdir: str) -> JsonObject | None:
    """Returns the content of config.json with current field names, or None if the file is missing or unreadable."""
    written = read_json(os.path.join(workdir, 'config.json'))
    return None if written is None else upgrade(written)


def read_config(workdir: str) -> Config:
    """Returns the resolved configuration of the run in `workdir`.

    Raises ConfigError: config.json is missing, unreadable or from an older version.
    """
    written = _read_settings(workdir)
    if written is None:
        raise ConfigError(f'{workdir}: not a run, because it has no readable config.json')
    return resolve(ml_collections.ConfigDict(written))


def read_result_json(workdir: str) -> JsonObject | None:
    """Returns the content of result.json with current key names, or None if the file is missing or unreadable."""
    result = read_json(os.path.join(workdir, 'result.json'))
    return None if result is None else {RENAMED_RESULT_KEYS.get(key, key): value for key, value in result.items()}


def dataset_statistics_path(workdir: str) -> str:
    """Returns the path of dataset_statistics.npz, or of inputs.npz in a run of version 0.1."""
    path, old = (os.path.join(workdir, name) for name in ('dataset_statistics.npz', 'inputs.npz'))
    return old if os.path.exists(old) and not os.path.exists(path) else path


def write_dataset_statistics(workdir: str, statistics: dict[str, np.ndarray], class_names: list[str]) -> None:
    """Writes dataset_statistics.npz, so that the weights of the run can be used without its prepared data set.

    Args:
      workdir: the folder of the run.
      statistics: see prepare.shards.statistics().
      class_names: one name per label.
    """
    with atomic_write(os.path.join(workdir, 'dataset_statistics.npz'), 'wb') as file:
        np.savez(file, allow_pickle=False, class_names=np.array(class_names), **statistics)


def read_dataset_statistics(workdir: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the statistics and class names that write_dataset_statistics() wrote.

    Raises ConfigError: the file is missing or corrupt.
    """
    path = dataset_statistics_path(workdir)
    try:
        with np.load(path) as file:
            arrays = dict(file)
        return arrays, arrays.pop('class_names').tolist()
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f'{path} cannot be read ({summarize_exception(error)}); training in that folder writes the file'
        ) from None


def check_class_names(name: str, weights_names: list[str], data_names: list[str]) -> None:
    """Compares the class names of weights with those of the data, and logs a difference.

    Raises ConfigError: the names are the same but in another order, so predictions would get wrong labels.

    Args:
      name: name of the weights in the message.
      weights_names: class names of the weights, one per label.
      data_names: class names of the data, one per label.
    """
    if weights_names == data_names:
        return
    if sorted(weights_names) == sorted(data_names):
        label = next(i for i, pair in enumerate(zip(weights_names, data_names, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f'{name}: its classes are those of the data in another order: label {label} is {weights_names[label]!r},'
            f' but {data_names[label]!r} in the data; prepare the data with config.data.class_names in the order of the'
            ' weights'
        )
    log(
        f'{name}: its classes have other names than those of the data; the first is {weights_names[0]!r},'
        f' but {data_names[0]!r} in the data'
    )


def environment() -> JsonObject:
    """Returns the content of environment.json: software and hardware of the run. JAX must be initialized.

    Keys: versions (by package), system, processor, devices (their kind), device_count (over all processes), processes,
    command, folder (in which the command was called).
    """
    import jax

    root = re.escape(f'{Path(__file__).resolve().parents[2]}{os.sep}')
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        'versions': {'python': platform.python_version(), **versions},
        'system': platform.platform(),
        'processor': _processor(),
        'devices': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'processes': jax.process_count(),
        'command': [
            os.path.basename(sys.argv[0]),
            *(re.sub(f'(^|=){root}', r'\1', argument) for argument in sys.argv[1:]),
        ],
        'folder': os.getcwd(),
    }


def _processor() -> str:
    """Returns the name of the processor and the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:  # exists on Linux
        name = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), name)
    return f'{name}, {os.cpu_count()} cores'
