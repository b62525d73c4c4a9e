"""Prepare a data set once for training: write square uint8 images in ArrayRecord and training set statistics.

    alexnet prepare --source=folder:DIR --data_dir=D [--image_size=256] [--encoding=jpeg] ...

Several processes write a store as shards of 1,024 images, and the command moves the store to its final path once all
shards are complete. If the command is killed, rerun the same command: it resumes with the missing shards. The result is
byte-identical for any number of processes.
"""

import contextlib
import dataclasses
import io
import os
import signal
import sys

import tensorflow_datasets as tfds
from absl import app, flags, logging

from alexnet_jax.cli import parse_flags
from alexnet_jax.config import ConfigError
from alexnet_jax.data.dataset import DatasetError
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.prepare.writer import PrepareConfig, prepare
from alexnet_jax.runtime.console import log_error


def main(argv: list[str]) -> None:
    """Runs the command. Errors exit with one line and code 2 (source or flag), 1 (failure) or 130 (interrupt)."""
    del argv
    logging.set_verbosity(logging.ERROR)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore SIGINT in background jobs of scripts
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    given = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(PrepareConfig)}
    given['source'] = given['source'].rstrip('/')  # tab completion of a folder name adds a slash
    given['channels'], given['class_names'] = int(given['channels']), tuple(given['class_names'] or ())
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints unknown sizes
            prepare(PrepareConfig(**given), flags.FLAGS.data_dir)
    except (SourceError, ConfigError) as error:
        log_error(str(error))
        sys.exit(2)
    except (DatasetError, OSError) as error:
        log_error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        log_error('stopped; the same command goes on with what is missing')
        sys.exit(130)


if __name__ == '__main__':
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    flags.DEFINE_string('source', 'photos', "'photos', 'tfds:NAME[:config]', 'folder:DIR' or 'idx:DIR'.")
    flags.DEFINE_string('data_dir', '~/tensorflow_datasets', 'Where data sets and prepared stores lie.')
    flags.DEFINE_integer('image_size', 256, 'Pixels a side.', lower_bound=8)
    flags.DEFINE_enum('channels', '3', ['1', '3'], '3, or 1 for grey.')
    flags.DEFINE_enum('encoding', 'raw', ['raw', 'jpeg'], 'Of the images in the store.')
    flags.DEFINE_list('class_names', None, 'In place of those of the source.')
    flags.DEFINE_float('validation_fraction', 0.1, 'Held out where the source has no split to validate on.', 0.0, 1.0)
    flags.DEFINE_float('max_corrupt_fraction', 0.001, 'Share of the images that may be unreadable.', 0.0, 1.0)
    # Only the cores that SLURM or a container assigns, not all cores of the machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    flags.DEFINE_integer('workers', cores, 'Processes.', lower_bound=1)
    app.run(main, flags_parser=parse_flags)
