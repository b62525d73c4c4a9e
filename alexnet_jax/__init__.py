"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) in JAX: the paper's network, its training and its two-GPU split.

Importing this package imports no library. The first access to one of these names imports the module that defines it:

    load            loads a trained network, as in load('runs/quickstart'), inference.loading.load
    create          makes a new network, as in create('paper', num_classes=10), inference.loading.create
    TrainedModel    the class of their results, inference.trained_model.TrainedModel
    AlexNet         the network as a Flax NNX module, model.AlexNet
    PRESETS         the published networks and their training, presets.PRESETS
    default_config  all settings with their defaults, config.default_config
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of _MODULES, for type checkers and editors
    from alexnet_jax.config import default_config
    from alexnet_jax.inference.loading import create, load
    from alexnet_jax.inference.trained_model import TrainedModel
    from alexnet_jax.model import AlexNet
    from alexnet_jax.presets import PRESETS

__version__ = '0.2.0'

__all__ = ['PRESETS', 'AlexNet', 'TrainedModel', 'create', 'default_config', 'load']

_MODULES = {
    'AlexNet': 'alexnet_jax.model',
    'PRESETS': 'alexnet_jax.presets',
    'TrainedModel': 'alexnet_jax.inference.trained_model',
    'create': 'alexnet_jax.inference.loading',
    'default_config': 'alexnet_jax.config',
    'load': 'alexnet_jax.inference.loading',
}


if not TYPE_CHECKING:  # otherwise type checkers accept any name

    def __getattr__(name: str) -> Any:
        """Returns the attribute `name` of the module that defines it. Raises AttributeError: there is no such name."""
        if name not in _MODULES:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
