"""Lists the fields of the schema with their meanings, and the values of a configuration.

`python -m alexnet_jax.config_help > docs/settings.md` writes the documentation of all fields. This module does not
import jax.
"""

import dataclasses
import difflib
import inspect
import math
import re
import typing

import ml_collections

from alexnet_jax.config import AUTO, Config, ConfigError, default_config, get_by_path, resolve
from alexnet_jax.config_schema import RENAMED, SETTINGS, UNKNOWN, Setting
from alexnet_jax.presets import PRESETS

_DOCUMENT = """\
# Settings

A line `config.group.field = VALUE` of a config file or the flag `--config.group.field=VALUE` sets a field. The value
`None` is allowed where the default is `None` and in the fields of `model` except `preset`, `dtype` and `precision`,
which then take the value of the preset: `--config.train.steps=None`, `--config.model.widths=None`. A duration is a text
such as `5 epochs`, `100 steps` or `1000 images`; a bare `100` counts steps.

| flag of `alexnet train` | output |
| --- | --- |
| `--help_config` | all fields with type, allowed values, default, the value of the command if it differs, and meaning |
| `--help_config=PATTERN` | the fields whose name or meaning contains PATTERN or matches it as a regular expression |
| `--print_config` | all values of the command, in the form of a config file |
| `--print_config=diff` | the values that differ from the defaults, as `config.group.field: default -> value` |

`python -m alexnet_jax.config_help > docs/settings.md` generates this page from
[config_schema.py](../alexnet_jax/config_schema.py). The defaults of `model` are those of the preset `paper`.
"""


def find_fields(pattern: str) -> list[str]:
    """Returns the names of the fields whose name, meaning or name of version 0.1 matches `pattern`, ignoring case.

    `pattern` is a part of the text or a regular expression; '' matches all fields. Raises ConfigError: no field
    matches.
    """
    old_names = {new: old for old, new in RENAMED.items()}
    texts = {
        field: f'config.{field}\n{setting.about.meaning}\nconfig.{old_names.get(field, field)}'
        for field, setting in SETTINGS.items()
    }
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except re.error:
        expression = re.compile(re.escape(pattern), re.IGNORECASE)
    found = [field for field, text in texts.items() if pattern.lower() in text.lower() or expression.search(text)]
    if not found:
        name = pattern.removeprefix('config.')
        by_last = {field.rsplit('.', 1)[-1]: field for field in [*SETTINGS, *RENAMED]}
        near = [by_last[last] for last in difflib.get_close_matches(name.rsplit('.', 1)[-1], by_last, 3, 0.6)]
        near = near or difflib.get_close_matches(name, SETTINGS, 3, 0.0)
        nearest = ', '.join(dict.fromkeys(f'config.{RENAMED.get(field, field)}' for field in near))
        raise ConfigError(f'--help_config: no field matches {pattern!r}; the nearest are {nearest}')
    return found


def describe(field: str, config: ml_collections.ConfigDict) -> str:
    """Returns two lines about `field`: type, allowed values, default and its value in `config`, then the meaning."""
    setting = SETTINGS[field]
    default, value = setting.default, get_by_path(config, field)
    shown = 'default'
    if setting.is_from_preset:
        preset = config.model.preset if config.model.preset in PRESETS else SETTINGS['model.preset'].default
        default = _of_preset(field, preset)
        shown = f'default of the preset {preset}'
    parts = [type_name(setting), allowed_values(setting), f'{shown}: {default!r}']
    if value != default and not (value is None and setting.is_from_preset):
        parts.append(f'this command: {value!r}')
    old = next((old for old, new in RENAMED.items() if new == field), None)
    renamed = f' (in version 0.1: config.{old})' if old else ''
    return f'config.{field}: {"; ".join(filter(None, parts))}\n    {setting.about.meaning}{renamed}'


def _of_preset(field: str, preset: str) -> object:
    return PRESETS[preset].model[field.removeprefix('model.')]


def type_name(setting: Setting) -> str:
    """Returns the type of a field, such as 'int or None' or 'tuple of 7 int'."""
    items = typing.get_args(setting.kind)
    item = items[0] if items else setting.kind
    if setting.about.is_duration:
        name = 'duration'
    elif typing.get_origin(item) is tuple:
        name = f'({", ".join(kind.__name__ for kind in typing.get_args(item))})'
    else:
        name = item.__name__
    if items:
        name = ' '.join(['tuple of', *filter(None, [' or '.join(map(str, setting.about.lengths))]), name])
    name = f'{name} or {AUTO}' if setting.about.accepts_auto else name
    return f'{name} or None' if setting.accepts_none and not setting.is_from_preset else name


def allowed_values(setting: Setting) -> str:
    """Returns the choices or the bounds of a field or of its items, such as 'relu | tanh' or '0 to 100', or ''."""
    least, greatest = setting.about.bounds or (-math.inf, math.inf)
    if setting.about.choices:
        values = ' | '.join(map(str, setting.about.choices))
    elif greatest < math.inf:
        values = f'{least} to {greatest}'
    else:
        values = f'from {least}' if least > -math.inf else ''
    return f'each {values}' if values and typing.get_args(setting.kind) else values


def values_of(config: Config) -> list[str]:
    """Returns one line per field of `config`, in the form of a config file: config.group.field = value."""
    return [f'config.{field} = {_value(config, field)!r}' for field in SETTINGS]


def _value(config: Config, field: str) -> object:
    """Returns the value of `field` in the form of a config file."""
    value = get_by_path(config, field)
    return AUTO if SETTINGS[field].about.accepts_auto and value == UNKNOWN else value


def changes_of(config: Config) -> list[str]:
    """Returns a line `config.group.field: default -> value` for each field that differs from the defaults.

    The defaults of `model` are those of the preset of `config`.
    """
    defaults = default_config()
    defaults.model.preset = config.model.preset
    before = resolve(defaults)
    lines = []
    for field, setting in SETTINGS.items():
        old = setting.default if field == 'model.preset' else get_by_path(before, field)
        new = _value(config, field)
        if new != old:
            lines.append(f'config.{field}: {old!r} -> {new!r}')
    return lines


def as_markdown() -> str:
    """Returns the content of docs/settings.md: a table of the fields of each group."""
    lines = [_DOCUMENT]
    groups = {'': Config} | {
        name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)
    }
    for group, kind in groups.items():
        fields = [field for field in SETTINGS if field.rpartition('.')[0] == group]
        if group:
            lines.append(f'\n## {group}\n\n{inspect.cleandoc(kind.__doc__ or "")}\n')
        lines.append('| field | type | default | values | meaning |\n| --- | --- | --- | --- | --- |')
        for field in fields:
            setting = SETTINGS[field]
            default = _of_preset(field, 'paper') if setting.is_from_preset else setting.default
            values = allowed_values(setting).replace(' | ', ', ')
            cells = [f'`{field}`', type_name(setting), f'`{default!r}`', values, setting.about.meaning]
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    print(as_markdown(), end='')
