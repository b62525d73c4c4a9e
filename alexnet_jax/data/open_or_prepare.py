"""Opens the prepared data set of a run; a child process prepares the data set if it is missing."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

from etils import epath

from alexnet_jax.config import UNKNOWN, Config, ConfigError, check_num_classes, shown_classes
from alexnet_jax.data import dataset
from alexnet_jax.data.earlier_versions import check_labels, doubt_of_labels, doubt_of_validation, find_earlier
from alexnet_jax.data.inventory import describe_change
from alexnet_jax.data.manifest import Manifest, load_manifest
from alexnet_jax.data.prepare_command import PrepareSettings, prepare_flags, replace_command
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.paths import is_url
from alexnet_jax.runtime.commands import child_command, child_environment
from alexnet_jax.runtime.console import is_primary, log, summarize_exception
from alexnet_jax.runtime.preemption import PreemptionHandler, preemption_signals_blocked


def open_or_prepare(
    config: Config, preemption: PreemptionHandler, trained_on: str | None = None
) -> dataset.PreparedDataset | None:
    """Opens the data set of `config.data`, after its preparation if it is missing; returns None if preempted meanwhile.

    If several processes share a disk, one prepares the data set and the others wait, see prepare.writer.prepare(). One
    line in the log says if the source has changed since the preparation.

    Args:
      config: the configuration of the run.
      preemption: the handler of the signals.
      trained_on: fingerprint of the data set on which the run was trained. A data set with this fingerprint is opened
        whatever its source, which may have been moved or changed since.

    Raises:
      ConfigError: the data set is unreachable or corrupt, or has other settings or another number of classes.
      DatasetError: a signal ended the child process.
      SystemExit: the child process failed and printed the reason.
    """
    data = config.data
    folders = data.data_dir, data.prepared_dir
    of_run = find_trained_on(data, *folders, trained_on) if trained_on else None
    if of_run is not None:
        settings = dataclasses.replace(data, source=of_run[1])
        return open_verified(of_run[0], settings, *folders, config.model.num_classes)
    directory = find_prepared(data, *folders)
    if directory is None:
        # Prepare in a child process, because TensorFlow should not share a process with JAX.
        command = child_command('prepare', *prepare_flags(data, *folders))
        command.append(f'--num_classes={config.model.num_classes}')
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
            raise DatasetError(f'preparing {data.source} was ended by {name}; rerun the same command to resume')
        if process.returncode:
            sys.exit(process.returncode)  # the child process printed the reason
        directory = find_prepared(data, *folders, is_verified=True)
        assert directory is not None
        choices = []  # the child process logged them
    else:
        choices = _choices(directory)
    # The number of classes of a trained network differs only if the data set was replaced, which the caller reports.
    prepared = open_verified(directory, data, *folders, None if trained_on else config.model.num_classes)
    if config.model.num_classes == UNKNOWN:
        log(f'config.model.num_classes=auto: {len(prepared.class_names)} classes')
    return dataclasses.replace(prepared, choices=choices)


def _choices(directory: str) -> list[str]:
    """Returns the choices that `alexnet prepare` logged when it prepared the data set in `directory`."""
    manifest = load_manifest(directory)
    lines = [f'{len(manifest.class_names):,} classes in this order: {shown_classes(manifest.class_names)}']
    if manifest.validation_fraction is not None:
        lines.append(f'the validation images are held out, {manifest.validation_fraction:.1%} of the training images')
    return lines + manifest.notes


def find_trained_on(
    settings: PrepareSettings, data_dir: str, prepared_dir: str | None, fingerprint: str
) -> tuple[str, str] | None:
    """Returns the folder of the data set with `fingerprint`, on which a run was trained, and its source, or None.

    The log says if an earlier version prepared it in a way that this version refuses.
    """
    found = dataset.find_by_fingerprint(settings, data_dir, prepared_dir, fingerprint)
    if found is None:
        return None
    directory, manifest = found
    doubt = doubt_of_labels(manifest, settings) if manifest.version == 1 else None
    if doubt is not None:
        command = replace_command(settings, data_dir, prepared_dir)
        log(f'the run was trained on {directory}, but {doubt}; to train anew, use another --workdir, after: {command}')
    _log_validation(directory, manifest, settings, data_dir, prepared_dir)
    return directory, manifest.source


def _log_validation(
    directory: str, manifest: Manifest, settings: PrepareSettings, data_dir: str, prepared_dir: str | None
) -> None:
    """Logs if an earlier version chose the validation images of a data set in another way."""
    doubt = doubt_of_validation(manifest, settings) if manifest.version == 1 else None
    if doubt is not None:
        command = replace_command(settings, data_dir, prepared_dir)
        log(f'{directory}: an earlier version {doubt}; for a new run this command prepares it anew: {command}')


def find_prepared(
    settings: PrepareSettings, data_dir: str, prepared_dir: str | None, is_verified: bool = False
) -> str | None:
    """Returns the folder of the prepared data set; None if the command `alexnet prepare` must look for it.

    A data set of an earlier version is used where it is if it has the absolute path of the source or, with
    `is_verified`, if the command has compared its relative path and its images with the source.

    Raises ConfigError: a URL cannot be reached, or see earlier_versions.check_labels().
    """
    directory = dataset.dataset_dir(data_dir, settings, prepared_dir)
    if is_prepared(directory):
        return directory
    earlier = find_earlier(settings, data_dir, prepared_dir)
    if earlier is None or not (earlier.is_same_path or is_verified):
        return None
    check_labels(earlier, settings, data_dir, prepared_dir)
    _log_validation(earlier.directory, earlier.manifest, settings, data_dir, prepared_dir)
    return earlier.directory


def open_verified(
    directory: str, settings: PrepareSettings, data_dir: str, prepared_dir: str | None, num_classes: int | None
) -> dataset.PreparedDataset:
    """Opens the data set in `directory`, and logs whether its source has changed since the preparation.

    Raises ConfigError: see dataset.open_prepared() and config.check_num_classes().
    """
    dataset.read_manifest(directory, settings, replace_command(settings, data_dir, prepared_dir))
    prepared = dataset.open_prepared(directory, settings)
    change = describe_source_change(directory, settings, data_dir, prepared_dir) if is_primary() else None
    try:
        check_num_classes(num_classes, f'the data set prepared from {settings.source}', prepared.class_names)
    except ConfigError as error:
        if change is None and load_manifest(directory).version == 1:
            command = replace_command(settings, data_dir, prepared_dir)
            change = f'if the source has changed since {directory} was prepared, prepare it anew: {command}'
        raise ConfigError(f'{error}; {change}' if change else str(error)) from None
    if change:
        log(f'the prepared data set is used as it is, but {change}')
    return prepared


def describe_source_change(
    directory: str, settings: PrepareSettings, data_dir: str, prepared_dir: str | None
) -> str | None:
    """Returns a line that says how the source has changed since the data set in `directory` was prepared.

    Returns None if it has not changed or cannot be read.
    """
    recorded = None if is_url(directory) else load_manifest(directory).inventory
    change = describe_change(recorded, os.path.dirname(directory))
    if change is None:
        return None
    command = replace_command(settings, data_dir, prepared_dir)
    return (
        f'{settings.source} has changed since {directory} was prepared from it ({change});'
        f' to prepare it anew: {command}'
    )


def is_prepared(directory: str) -> bool:
    """Returns whether there is a prepared data set in `directory`. Raises ConfigError: a URL cannot be reached."""
    try:
        return epath.Path(directory).exists()
    except Exception as error:  # depends on the library that reads gs://
        raise ConfigError(
            f'config.data.data_dir: {directory} cannot be reached: {summarize_exception(error)}'
        ) from None
