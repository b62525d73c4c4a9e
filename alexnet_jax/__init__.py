"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) in JAX: the paper's network, its training and its two-GPU split.

Importing this package imports no library. The first access to one of these names imports the module that defines it:

    AlexNet         the network, model.AlexNet
    PRESETS         the published networks and their training, presets.PRESETS
    default_config  all settings with their defaults, config.default_config
    load_model      loads a checkpoint, as in load_model('runs/quickstart'), inference.trained_model.load_model
"""

import sys

# `python -m alexnet_jax.COMMAND` puts the current folder first in sys.path; a file there named like a module of Python
# or of a library, such as random.py, would replace the module. While the interpreter looks for COMMAND, argv[0] is -m.
if sys.argv[:1] == ['-m'] and not sys.flags.safe_path:
    module = sys.orig_argv[-len(sys.argv)].removeprefix('-m')
    if module.partition('.')[0] == __name__:
        folder = sys.path.pop(0)
        if __path__ == [f'{folder}/{__name__}']:  # in a checkout, spawned processes find this package there
            sys.path.append(folder)
        del folder
    del module

import importlib
from typing import Any

__version__ = '0.2.0'

_MODULES = {
    'AlexNet': 'alexnet_jax.model',
    'PRESETS': 'alexnet_jax.presets',
    'default_config': 'alexnet_jax.config',
    'load_model': 'alexnet_jax.inference.trained_model',
}


def __getattr__(name: str) -> Any:
    """Returns the attribute `name` of the module that defines it. Raises AttributeError: there is no such name."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
