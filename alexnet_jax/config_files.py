"""Finds config files by path, or by name for those of this package, and calls their functions."""

import inspect
import os
import runpy
from typing import Any

from alexnet_jax.config import ConfigError

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_INSTALLED = os.path.join(_PACKAGE, 'configs')
# The folder is in an installed package; in a checkout and its editable installation it is beside the package.
FOLDER = _INSTALLED if os.path.isdir(_INSTALLED) else os.path.join(os.path.dirname(_PACKAGE), 'configs')


def find(config: str) -> str:
    """Returns PATH[:PRESET] for `config`, which is PATH[:PRESET] or NAME[:PRESET].

    Raises ConfigError: there is neither a file PATH nor a config NAME in this package.
    """
    file, *preset = config.split(':', 1)
    if os.path.isfile(file):
        return config
    if preset and os.path.isfile(config):
        raise ConfigError(f'--config: {config!r} contains a colon, which would begin the name of a preset; rename it')
    path = os.path.join(FOLDER, f'{file}.py')
    if os.path.basename(file) == file and os.path.isfile(path):
        return ':'.join([path, *preset])
    names = sorted(name.removesuffix('.py') for name in os.listdir(FOLDER) if name.endswith('.py'))
    name = os.path.basename(file).removesuffix('.py')
    hint = f'; did you mean --config={":".join([name, *preset])}?' if name in names else '.'
    raise ConfigError(f'--config: there is no file {file!r}{hint} The configs of this package are {", ".join(names)}')


def name_of(config: str) -> str:
    """Returns NAME[:PRESET] for `config`, PATH[:PRESET], if this package has the file, otherwise the absolute path."""
    file, *preset = config.split(':', 1)
    file, name = os.path.abspath(file), os.path.basename(file).removesuffix('.py')
    return ':'.join([name if file == os.path.join(FOLDER, f'{name}.py') else file, *preset])


def call(config: str, function: str) -> Any:
    """Calls `function` of the config file `config`, with the preset if `config` names one, and returns the result.

    Raises ConfigError: the file or its function does not exist, or the function takes no preset.
    """
    file, *preset = find(config).split(':', 1)
    found = runpy.run_path(file).get(function)
    if found is None:
        raise ConfigError(f'--config: {file} has no function {function}')
    if preset and not inspect.signature(found).parameters:
        raise ConfigError(f'--config: {file} has no presets; leave out :{preset[0]}')
    return found(*preset)
