"""Finds configuration files and calls their functions: files of this package by name, any other file by path."""

import inspect
import os
import runpy
from typing import Any

from alexnet_jax.config import ConfigError

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_INSTALLED = os.path.join(_PACKAGE, 'configs')
# An installed package contains the folder; in a checkout, and in an editable installation of one, it is beside it.
FOLDER = _INSTALLED if os.path.isdir(_INSTALLED) else os.path.join(os.path.dirname(_PACKAGE), 'configs')


def find(config: str) -> str:
    """Returns the path of `config` (PATH or NAME, either with :PRESET), the preset still behind it.

    Raises ConfigError: there is neither a file of that path nor a configuration of that name in this package.
    """
    file, *preset = config.split(':', 1)
    if os.path.isfile(file):
        return config
    path = os.path.join(FOLDER, f'{file}.py')
    if os.path.basename(file) == file and os.path.isfile(path):
        return ':'.join([path, *preset])
    names = sorted(name.removesuffix('.py') for name in os.listdir(FOLDER) if name.endswith('.py'))
    name = os.path.basename(file).removesuffix('.py')
    hint = f'; did you mean --config={":".join([name, *preset])}?' if name in names else '.'
    raise ConfigError(f'--config: there is no file {file!r}{hint} This package has {", ".join(names)}')


def name_of(config: str) -> str:
    """Returns the name by which find() finds the path `config` of a file of this package; other paths as they are."""
    file, *preset = config.split(':', 1)
    name = os.path.basename(file).removesuffix('.py')
    return ':'.join([name, *preset]) if file == os.path.join(FOLDER, f'{name}.py') else config


def call(config: str, function: str) -> Any:
    """Returns what `function` of the configuration file `config` returns, called with the preset where there is one.

    Raises ConfigError: there is no such file, no such function in it, or the function takes no preset.
    """
    file, *preset = find(config).split(':', 1)
    found = runpy.run_path(file).get(function)
    if found is None:
        raise ConfigError(f'--config: {file} has no function {function}')
    if preset and not inspect.signature(found).parameters:
        raise ConfigError(f'--config: {file} has no presets, so no :{preset[0]}')
    return found(*preset)
