"""What a run's folder says: whether it holds this run, its end, or another one."""

import json
import os
from typing import Any

import ml_collections

from alexnet_jax.config import ConfigError, field_names, field_value, resolve
from alexnet_jax.monitor import read_json

# What weights and the order of the data depend on; other settings may change when a run goes on.
_FIXED = (
    'seed',
    'data.source',
    'data.image_size',
    'data.channels',
    'data.encoding',
    'data.crop_size',
    'train.batch_size',
)


def check_same_run(config: Any, workdir: str, every_field: bool = False) -> None:
    """Raise ConfigError where the checkpoints in `workdir` belong to another network or another order of the data.

    Args:
      config: resolved.
      every_field: whether any other setting counts too, save where the data lie: a sweep's runs are what they are
        named after.
    """
    checkpoints = os.path.join(workdir, 'checkpoints')
    if not os.path.isdir(checkpoints) or not os.listdir(checkpoints):
        return
    before = read_json(os.path.join(workdir, 'config.json'))
    if before is None:
        raise ConfigError(f'--workdir: {workdir} has checkpoints but no readable config.json; name another one')
    old = ml_collections.ConfigDict(before)
    now = ml_collections.ConfigDict(json.loads(json.dumps(config.to_dict())))
    fields = [field for field in field_names(now) if field in _FIXED or field.startswith('model.')]
    if every_field:
        fields = [field for field in field_names(now) if field != 'data.data_dir']
    known = set(field_names(old))
    for field in fields:
        if field not in known:
            raise ConfigError(f'--workdir: {workdir} was begun with an older version; name another one')
        was, given = field_value(old, field), field_value(now, field)
        if was != given:
            raise ConfigError(
                f'config.{field}: {given!r}, but {workdir} was begun with {was!r}: give that, or another --workdir'
            )


def is_finished(config: Any, workdir: str) -> bool:
    """Whether `workdir` holds the end of just this run (`config` resolved); where the data lay does not count."""
    result, before = (read_json(os.path.join(workdir, name)) for name in ('result.json', 'config.json'))
    if result is None or before is None or result.get('status') != 'done':
        return False
    now = json.loads(json.dumps(config.to_dict()))
    return before | {'data': before.get('data', {}) | {'data_dir': now['data']['data_dir']}} == now


def read_config(workdir: str) -> ml_collections.FrozenConfigDict:
    """The resolved settings of the run in `workdir`. Raises ConfigError: there is none, or one of an older version."""
    written = read_json(os.path.join(workdir, 'config.json'))
    if written is None:
        raise ConfigError(f'{workdir}: no run, for it has no readable config.json')
    return resolve(ml_collections.ConfigDict(written))
