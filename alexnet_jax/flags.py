"""The flags that every command has: --config=FILE[:PRESET] and overrides --config.a.b=value, and their refusals."""

import inspect
import itertools
import os
import re
import runpy
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax.config import ConfigError, field_names, unknown_field
from alexnet_jax.monitor import complain
from alexnet_jax.sweep import Variant, check

QUICKSTART = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs', 'quickstart.py')

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'File with the settings, by default configs/quickstart.py; :NAME behind it names a preset.'
)


def parse_flags(argv: list[str]) -> list[str]:
    """Read the flags; where one is wrong, say so in one line and exit with 2."""
    files = [argument.split('=', 1)[1] for argument in argv if argument.lstrip('-').startswith('config=')]
    files += [value for argument, value in itertools.pairwise(argv) if argument in ('--config', '-config')]
    if not files:
        argv.insert(1, f'--config={QUICKSTART}')
    try:
        config = _load(files[-1] if files else QUICKSTART)
        _check_overrides(argv, config)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ConfigError(f'{rest[1]!r} is no flag; flags are written --name=value')
        return rest
    except flags.IllegalFlagValueError as error:
        sys.exit(refuse(_wrong_type(str(error), config)))
    except (flags.Error, ConfigError) as error:
        sys.exit(refuse(str(error)))


def _load(file: str) -> ConfigDict:
    """The settings in `file` (PATH or PATH:PRESET), without overrides. Raises ConfigError: there is no such file."""
    return _call(file, 'get_config')


def sweep_of(file: str) -> list[Variant]:
    """The sweep that the config `file` has. Raises ConfigError: it has none, or one that cannot be run."""
    variants = list(_call(file, 'sweep'))
    check(variants)
    return variants


def _call(file: str, name: str) -> Any:
    """What the function `name` in `file` (PATH or PATH:PRESET) returns."""
    path, *preset = file.split(':', 1)
    if not os.path.isfile(path):
        raise ConfigError(f'--config: there is no file {path!r}; for example --config=configs/imagenet.py')
    function = runpy.run_path(path).get(name)
    if function is None:
        raise ConfigError(f'--config: {path} has no function {name}')
    if preset and not inspect.signature(function).parameters:
        raise ConfigError(f'--config: {path} has no presets, so no :{preset[0]}')
    return function(*preset)


def _check_overrides(argv: list[str], config: ConfigDict) -> None:
    """Raise ConfigError where an override names a field that does not exist."""
    known = field_names(config)
    for argument in argv:
        override = re.match(r'--?(?:no)?config\.([^=]+)', argument)
        if override and override[1] not in known:
            raise unknown_field(override[1], known)


def _wrong_type(message: str, config: ConfigDict) -> str:
    """The flag library's message about a value in one line, and for a field of the config with the type it wants."""
    match = re.match(r'flag --(config\.([\w.]+))=(.*?): ', message)
    if not match:
        return ' '.join(message.split())
    *groups, name = match[2].split('.')
    for group in groups:
        config = config[group]
    return f'{match[1]}: {match[3]!r} is not {config.get_type(name).__name__}'


def refuse(reason: str) -> int:
    """Say in one line why a command is not begun; returns the exit code for that."""
    complain(reason)
    return 2
