"""The prepared data of a run: opened, or made first by a process of its own."""

import csv
import io
import signal
import subprocess
import sys
import time
from typing import Any

from etils import epath

from alexnet_jax.command import child_command, child_environment
from alexnet_jax.config import ConfigError
from alexnet_jax.data import pipeline
from alexnet_jax.monitor import Preemption, summarize_exception


def open_or_prepare(config: Any, preemption: Preemption) -> pipeline.Store | None:
    """The prepared store of `config.data`, made now where it is missing; None when preempted meanwhile.

    Where several processes on a disk miss it one makes it and the others wait, see prepare.prepare().

    Raises:
      ConfigError: it is damaged, or has other classes than the network.
      DatasetError: preparing was killed.
      SystemExit: preparing failed, and said why.
    """
    data = config.data
    directory = pipeline.dataset_dir(data.data_dir, data)
    if not _exists(directory):
        # A process of its own, for TensorFlow should not share one with jax.
        names = ('source', 'data_dir', 'image_size', 'channels', 'encoding', 'validation_fraction', 'max_bad')
        command = child_command('prepare', *(f'--{name}={data[name]}' for name in names))
        if data.class_names:
            line = io.StringIO()
            csv.writer(line, lineterminator='').writerow(data.class_names)  # a name may hold a comma
            command.append(f'--class_names={line.getvalue()}')
        process = subprocess.Popen(command, env=child_environment())
        while process.poll() is None:
            if preemption.requested:
                process.terminate()
            time.sleep(0.1)
        if preemption.requested:
            return None
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            raise pipeline.DatasetError(
                f'preparing {data.source} was ended by {name}; the same command goes on with it'
            )
        if process.returncode:
            sys.exit(process.returncode)  # it said why
    store = pipeline.open_store(directory, data)
    if len(store.class_names) != config.model.num_classes:
        classes = len(store.class_names)
        raise ConfigError(
            f'config.model.num_classes: {config.model.num_classes}, but {data.source} has {classes} classes;'
            f' the nearest is {classes}'
        )
    return store


def _exists(directory: str) -> bool:
    try:
        return epath.Path(directory).exists()
    except Exception as error:  # of whichever library reads gs://
        raise ConfigError(
            f'config.data.data_dir: {directory} cannot be reached: {summarize_exception(error)}'
        ) from None
