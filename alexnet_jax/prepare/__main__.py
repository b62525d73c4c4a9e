"""Prepare a data set for training: square uint8 images in ArrayRecord files, and statistics of the training images.

    alexnet prepare --source=folder:DIR --data_dir=D [--image_size=256] [--encoding=jpeg] ... [--show]

Several processes write the data set as shards of 1,024 images, and the command moves the data set to its final path
once all shards are complete. If the command is killed, rerun the same command: it resumes with the missing shards. The
result is byte-identical for any number of processes. With --show the command prints the data card and writes nothing.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys

import tensorflow_datasets as tfds
from absl import flags

from alexnet_jax import cli
from alexnet_jax.config import ConfigError, read_class_names
from alexnet_jax.paths import check_current_folder
from alexnet_jax.prepare.describe import describe
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.prepare.writer import PrepareConfig, prepare
from alexnet_jax.runtime.console import make_stdout_optional


def main(argv: list[str]) -> int:
    """Prepares the data set that the flags specify; returns the exit code."""
    del argv
    check_current_folder('prepare')
    make_stdout_optional()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background jobs of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # data.open_or_prepare starts the command with a mask
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    given = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(PrepareConfig)}
    given['channels'] = int(given['channels'])
    given['class_names'] = tuple(read_class_names(given['class_names']) or ())
    settings, folders = PrepareConfig(**given), (flags.FLAGS.data_dir, flags.FLAGS.prepared_dir)
    if flags.FLAGS.json and not flags.FLAGS.show:
        raise ConfigError('--json: only --show prints its result as JSON; add --show')
    if flags.FLAGS.show:
        described = describe(settings, *folders)
        print(json.dumps(described.to_json()) if flags.FLAGS.json else '\n'.join(described.lines()))
        return 0
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints unknown sizes
        prepare(settings, *folders, flags.FLAGS.replace)
    return 0


if __name__ == '__main__':
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ['PYTHONSAFEPATH'] = '1'  # otherwise workers import modules of the current folder
    flags.DEFINE_string('source', 'photos', 'photos, tfds:NAME[:config], folder:DIR, idx:DIR, hf:DIR or wds:PATTERN.')
    flags.DEFINE_string(
        'data_dir', '~/tensorflow_datasets', 'Folder of the data sets of TFDS and of prepared data sets.'
    )
    flags.DEFINE_string(
        'prepared_dir', None, 'Folder of prepared data sets. Default: the folder `prepared` in --data_dir.'
    )
    flags.DEFINE_integer('image_size', 256, 'Side of the images in pixels.', lower_bound=8)
    flags.DEFINE_enum('channels', '3', ['1', '3'], 'Channels of the images: 3 for color, 1 for gray.')
    flags.DEFINE_enum('encoding', 'raw', ['raw', 'jpeg'], 'Encoding of the prepared images.')
    flags.DEFINE_list(
        'class_names',
        None,
        'Order of the classes, by name, or @FILE with one name per line. Default: the order of the source.',
    )
    flags.DEFINE_integer(
        'num_classes',
        None,
        'Number of classes that the source must have; 0: two or more. Default: any number.',
        lower_bound=0,
    )
    flags.DEFINE_float(
        'validation_fraction', 0.1, 'Fraction of the images to hold out if the source has no validation data.', 0.0, 1.0
    )
    flags.DEFINE_string(
        'validation_split',
        None,
        'Split of the source to validate on, such as test. Default: its validation split.',
    )
    flags.DEFINE_float('max_corrupt_fraction', 0.001, 'Maximum fraction of unreadable images.', 0.0, 1.0)
    flags.DEFINE_bool(
        'replace', False, 'Prepare the data set anew, and remove the existing one when the new one is complete.'
    )
    # The affinity contains only the cores that SLURM or a container assigns to this process.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    flags.DEFINE_integer('workers', cores, 'Number of processes.', lower_bound=1)
    flags.DEFINE_bool('show', False, 'Print splits, classes and sizes of the data set without preparing anything.')
    flags.DEFINE_bool('json', False, 'With --show: print one JSON object.')
    cli.run(main, usage_errors=(SourceError,), interrupted='stopped; rerun the same command to resume')
