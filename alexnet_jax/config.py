"""Configuration: the editable form of the settings, overrides by dotted name, and resolve(), which validates them.

Config files, flags and overrides edit a ConfigDict. resolve() converts the ConfigDict to a Config once, at the start of
a command. This module does not import jax, so that a command reports an invalid setting without delay.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence

import ml_collections
from ml_collections import config_dict

# Other modules import all names of the configuration from this one.
from alexnet_jax.config_checks import (  # noqa: F401
    check,
    check_accepts_none,
    check_choice,
    check_class_names,
    check_mesh,
    check_num_classes,
    shown_classes,
)
from alexnet_jax.config_schema import (  # noqa: F401
    RENAMED,
    RENAMED_VALUES,
    SETTINGS,
    UNKNOWN,
    Config,
    ConfigError,
    DataConfig,
    DistributedConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    duration_in_steps,
    get_by_path,
    total_steps,
)
from alexnet_jax.paths import absolute_path, absolute_source
from alexnet_jax.presets import PRESETS

AUTO = 'auto'  # the editable form of UNKNOWN


def default_config() -> ml_collections.ConfigDict:
    """Returns all settings; the defaults train the paper's network on ImageNet as in section 5 of the paper.

    config_schema.py describes the fields. resolve() fills the fields of `model` that are None from `model.preset`.
    Durations are text: '5 epochs', '100 steps' or '1000 images'; a bare '100' counts steps.
    """
    return ml_collections.ConfigDict(_editable(Config, None))


def _editable(kind: object, default: object) -> object:
    """Returns the editable form of a field of type `kind`: a dict for a dataclass, a placeholder without a default."""
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if 'about' in field.metadata and field.metadata['about'].accepts_auto:
                kinds[field.name] = object  # a number or a text
        return {field.name: _editable(kinds[field.name], field.default) for field in dataclasses.fields(kind)}
    if default is None or default is dataclasses.MISSING:
        return config_dict.placeholder(typing.get_origin(kind) or kind)
    return default


def preset_config(name: str) -> ml_collections.ConfigDict:
    """Returns the configuration of a published network and its training; `name` is a key of presets.PRESETS."""
    config = default_config()
    config.model.preset = name
    apply_overrides(config, PRESETS[name].recipe)
    return config


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Validates `config`, fills the `model` fields that are None from the preset, and returns a frozen copy.

    Raises ConfigError: a field is unknown or missing, has the wrong type or value, or contradicts another field.
    """
    _check_fields(config, default_config(), '')
    values = config.to_dict()
    check_choice('model.preset', values['model']['preset'])
    preset = PRESETS[values['model']['preset']].model
    values['model'] |= {name: value for name, value in preset.items() if values['model'][name] is None}
    if values['model']['num_classes'] == AUTO:
        values['model']['num_classes'] = UNKNOWN
    values['data']['class_names'] = read_class_names(values['data']['class_names'])
    # Absolute paths, so that other commands find the data from any folder, and different folders have different names.
    values['data']['source'] = absolute_source('config.data.source', values['data']['source'])
    for name in ('data_dir', 'prepared_dir'):
        if values['data'][name] is not None:
            values['data'][name] = absolute_path(f'config.data.{name}', values['data'][name])
    if values['train']['init'] is not None:
        values['train']['init'] = absolute_path('config.train.init', values['train']['init'])
    for name, kind in typing.get_type_hints(Config).items():
        if isinstance(values[name], dict):
            values[name] = kind(**{field: _as_tuple(value) for field, value in values[name].items()})
    resolved = Config(**values)
    check(resolved)
    return resolved


def with_num_classes(config: Config, num_classes: int) -> Config:
    """Returns `config` with the number of classes of the data if model.num_classes is auto, otherwise `config`.

    Raises ConfigError: the number is not allowed, or does not fit the mesh.
    """
    if config.model.num_classes != UNKNOWN:
        return config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=num_classes))
    check(config)
    return config


def read_class_names(names: Sequence[str] | None) -> Sequence[str] | None:
    """Returns the class names in FILE if `names` is ('@FILE',), otherwise `names`.

    FILE is a text with one name per line, or dataset_statistics.npz of a run. Raises ConfigError: it cannot be read, or
    `names` is any other single name.
    """
    if names is None or len(names) != 1:
        return names
    if not str(names[0]).startswith('@'):
        raise ConfigError(
            f'config.data.class_names: {names[0]!r} is one name, and at least 2 classes are needed; write'
            " ('cats','dogs'), or @FILE for a file with one name per line"
        )
    path = os.path.expanduser(names[0][1:])
    try:
        if path.endswith('.npz'):
            import numpy as np

            with np.load(path) as arrays:
                return tuple(map(str, arrays['class_names'].tolist()))
        with open(path, encoding='utf-8-sig') as file:
            return tuple(line.strip() for line in file if line.strip())
    except Exception as error:  # NumPy and zipfile raise many types for a corrupt file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise ConfigError(
            f'config.data.class_names: {path} cannot be read ({reason}); name a text file with one class per line'
        ) from None


def _as_tuple(value: object) -> object:
    """Converts lists, which JSON and config files contain, to tuples."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def upgrade(written: Mapping[str, object]) -> dict[str, object]:
    """Returns the content of a config.json with current field names and values.

    The names and values of version 0.1 are replaced. Fields that the version of the file did not have take their
    defaults.
    """
    values = {name: dict(group) if isinstance(group, dict) else group for name, group in written.items()}
    for old, new in RENAMED.items():
        (group, old_name), new_name = old.split('.'), new.split('.')[1]
        fields = values.get(group)
        if isinstance(fields, dict) and old_name in fields and new_name not in fields:
            fields[new_name] = fields.pop(old_name)
    for field, renamed in RENAMED_VALUES.items():
        group, name = field.split('.')
        fields = values.get(group)
        if isinstance(fields, dict) and fields.get(name) in tuple(renamed):
            fields[name] = renamed[fields[name]]
    model = values.get('model')
    if isinstance(model, dict) and isinstance(model.get('conv_ops'), list):
        model['conv_ops'] = [str(text).replace('spatial_norm', 'spatial_lrn') for text in model['conv_ops']]
    if isinstance(model, dict):
        for name, default in default_config().to_dict().items():
            written_group = values.setdefault(name, default)
            if isinstance(default, dict) and isinstance(written_group, dict):
                values[name] = default | written_group
    return values


def unknown_field(field: str, known: list[str]) -> ConfigError:
    """Returns the error for the unknown `field`; the message names its new name or the nearest `known` field."""
    if field in RENAMED:
        return ConfigError(f'config.{field} was renamed to config.{RENAMED[field]}')
    last = field.rsplit('.', 1)[-1]
    by_last = {name.rsplit('.', 1)[-1]: name for name in known}
    near = (
        difflib.get_close_matches(field, known, 1, 0.75)
        or [by_last[name] for name in difflib.get_close_matches(last, by_last, 1, 0.7)]
        or difflib.get_close_matches(field, known, 1, 0.0)
    )
    return ConfigError(f'config.{field}: no such field; the nearest is config.{near[0]}')


def field_names(config: Config | ml_collections.ConfigDict) -> list[str]:
    """Returns the dotted names of all fields of `config`."""
    names: list[str] = []
    for name, value in config.to_dict().items():
        names += [f'{name}.{field}' for field in value] if isinstance(value, dict) else [name]
    return names


def apply_overrides(config: ml_collections.ConfigDict, values: Mapping[str, object]) -> None:
    """Sets fields of `config` in place, by dotted name. Raises ConfigError: a field is unknown or the type is wrong."""
    known = field_names(config)
    for field, value in values.items():
        if field not in known:
            raise unknown_field(field, known)
        *groups, name = field.split('.')
        group = get_by_path(config, '.'.join(groups)) if groups else config
        try:
            group[name] = value
        except TypeError:
            raise ConfigError(
                f'config.{field}: {value!r} is {type(value).__name__}, not {SETTINGS[field].kind.__name__}'
            ) from None
        except ValueError as error:
            raise ConfigError(f'config.{field}: {value!r}: {error}') from None


def _check_fields(config: ml_collections.ConfigDict, schema: ml_collections.ConfigDict, prefix: str) -> None:
    known = field_names(default_config())
    for name, value in config.items():
        field = prefix + name
        if name not in schema:
            raise unknown_field(field, known)
        expected = schema.get_type(name)
        if isinstance(schema[name], ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise ConfigError(f'config.{field}: {value!r} must be a group of fields')
            _check_fields(value, schema[name], field + '.')
            continue
        missing_allowed = schema[name] is None
        if SETTINGS[field].about.accepts_auto:
            if value == AUTO:
                continue
            if value == UNKNOWN:
                raise ConfigError(f'config.{field}: {value!r} is neither {AUTO} nor a number from 2')
            expected = SETTINGS[field].kind
        accepted = (int, float) if expected is float else (tuple, list) if expected is tuple else expected
        is_bool_for_number = isinstance(value, bool) and expected is not bool
        if not (value is None and missing_allowed) and (not isinstance(value, accepted) or is_bool_for_number):
            allowed = f'{expected.__name__}{f" or {AUTO}" * SETTINGS[field].about.accepts_auto}'
            raise ConfigError(f'config.{field}: {value!r} is {type(value).__name__}, not {allowed}')
    for name in schema:
        if name not in config:
            raise ConfigError(f'config.{prefix}{name}: missing; start from alexnet_jax.config.default_config()')
