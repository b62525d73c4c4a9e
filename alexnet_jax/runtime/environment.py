"""The software and hardware of a run, which environment.json records."""

import contextlib
import importlib.metadata
import os
import platform

import jax

from alexnet_jax.runtime.commands import recorded_command
from alexnet_jax.runtime.files import JsonObject


def environment() -> JsonObject:
    """Returns the content of environment.json: software and hardware of the run. JAX must be initialized.

    Keys: versions (by package), system, processor, devices (their kind), device_count (over all processes), processes,
    command, folder (in which the command was called).
    """
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        'versions': {'python': platform.python_version(), **versions},
        'system': platform.platform(),
        'processor': _processor(),
        'devices': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'processes': jax.process_count(),
        'command': recorded_command(),
        'folder': os.getcwd(),
    }


def _processor() -> str:
    """Returns the name of the processor and the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:  # exists on Linux
        name = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), name)
    return f'{name}, {os.cpu_count()} cores'
