"""Opens the prepared data set of a run; a child process prepares the data set if it is missing."""

import csv
import io
import signal
import subprocess
import sys
import time

from etils import epath

from alexnet_jax.config import UNKNOWN, Config, ConfigError, check_num_classes
from alexnet_jax.data import dataset
from alexnet_jax.runtime.commands import child_command, child_environment
from alexnet_jax.runtime.console import log, summarize_exception
from alexnet_jax.runtime.preemption import PreemptionHandler, preemption_signals_blocked


def open_or_prepare(config: Config, preemption: PreemptionHandler) -> dataset.PreparedDataset | None:
    """Opens the data set of `config.data`, after its preparation if it is missing; returns None if preempted meanwhile.

    If several processes share a disk, one prepares the data set and the others wait, see prepare.writer.prepare().

    Raises:
      ConfigError: the data set is unreachable or corrupt, or has other settings or another number of classes.
      DatasetError: a signal ended the child process.
      SystemExit: the child process failed and printed the reason.
    """
    data = config.data
    directory = dataset.dataset_dir(data.data_dir, data, data.prepared_dir)
    if not is_prepared(directory):
        # Prepare in a child process, because TensorFlow should not share a process with JAX.
        names = (
            'source',
            'data_dir',
            'image_size',
            'channels',
            'encoding',
            'validation_fraction',
            'max_corrupt_fraction',
        )
        command = child_command('prepare', *(f'--{name}={getattr(data, name)}' for name in names))
        for name in ('prepared_dir', 'validation_split'):
            if getattr(data, name) is not None:
                command.append(f'--{name}={getattr(data, name)}')
        command.append(f'--num_classes={config.model.num_classes}')
        if data.class_names:
            line = io.StringIO()
            csv.writer(line, lineterminator='').writerow(data.class_names)  # a name may contain a comma
            command.append(f'--class_names={line.getvalue()}')
        with preemption_signals_blocked():
            process = subprocess.Popen(command, env=child_environment())
        while process.poll() is None:
            if preemption.requested:
                process.terminate()
                process.wait()
            time.sleep(0.1)
        if preemption.requested:
            return None
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            raise dataset.DatasetError(f'preparing {data.source} was ended by {name}; rerun the same command to resume')
        if process.returncode:
            sys.exit(process.returncode)  # the child process printed the reason
    prepared = dataset.open_prepared(directory, data)
    check_num_classes(config.model.num_classes, f'the data set prepared from {data.source}', prepared.class_names)
    if config.model.num_classes == UNKNOWN:
        log(f'config.model.num_classes=auto: {len(prepared.class_names)} classes')
    return prepared


def is_prepared(directory: str) -> bool:
    """Returns whether there is a prepared data set in `directory`. Raises ConfigError: a URL cannot be reached."""
    try:
        return epath.Path(directory).exists()
    except Exception as error:  # depends on the library that reads gs://
        raise ConfigError(
            f'config.data.data_dir: {directory} cannot be reached: {summarize_exception(error)}'
        ) from None
