"""Imports weights of other frameworks as a run, which the other commands can evaluate, plot and resume."""

import os

from absl import flags

from alexnet_jax.config import ConfigError
from alexnet_jax.convert import export
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef, check_new, parse_checkpoint_ref
from alexnet_jax.runtime.console import log
from alexnet_jax.weights import onnx_file
from alexnet_jax.weights.formats import WANTED, detect_format
from alexnet_jax.weights.weight_files import find_weights, read_weights

_ENDINGS = ('.pth', '.pt', '.bin', '.onnx', '.safetensors', '.caffemodel')  # of files of weights


def import_file(path: str, workdir: str, given: flags.FlagValues) -> None:
    """Creates the run `workdir` from the weights in `path`.

    Args:
      path: File of weights, see find_weights().
      workdir: Folder of the new run.
      given: Parsed flags.

    Raises:
      FormatError, ConfigError: See read_weights(); or `workdir` is not a new or empty folder.
      OSError, CheckpointError: Reading or writing failed.
    """
    from alexnet_jax.inference.trained_model import import_weights_as_run

    weights = read_weights(path, given.preset, given.mean, given.class_names, given.crop_size)
    import_weights_as_run(
        workdir, weights.config, weights.params, weights.batch_stats, weights.statistics, weights.class_names
    )
    model = weights.config.model
    widths = ', '.join(map(str, model.widths))
    log(f'{workdir}: {model.preset}, widths {widths}, {model.num_classes} classes')


def check_arguments(argv: list[str], given: flags.FlagValues) -> CheckpointRef | None:
    """Returns None if argv[1] is a file of weights, otherwise the checkpoint.

    Raises ConfigError, FormatError, OSError: the arguments or the file are unusable.
    """
    if len(argv) < 3:
        raise ConfigError('the destination is missing: name a new WORKDIR after a file, or a FILE after a checkpoint')
    file = find_weights(argv[1])
    if file is not None:
        check_new(argv[2])
        if os.path.splitext(argv[2])[1] in export.LIBRARIES:
            raise ConfigError(f'{argv[2]}: files are exported from runs; import {argv[1]} into a WORKDIR first')
        if detect_format(file) == 'onnx':
            onnx_file.check_installed(file)
        return None
    _refuse_other_folder(argv[1], os.path.expanduser(argv[1]))
    unused = next(
        (name for name in ('preset', 'mean', 'class_names', 'crop_size') if given[name].value is not None), None
    )
    if unused:
        raise ConfigError(f'--{unused}: has no effect when a checkpoint is exported; omit the flag')
    export.validate_target(argv[2])
    return parse_checkpoint_ref(argv[1])


def _refuse_other_folder(name: str, folder: str) -> None:
    """Raises ConfigError if `folder` has no run, but files of another program."""
    found = os.listdir(folder) if os.path.isdir(folder) else []
    if {'config.json', 'checkpoints'} & {*found}:
        return
    if 'saved_model.pb' in found:
        raise ConfigError(f"{name}: TensorFlow's SavedModel; {WANTED}")
    files = sorted(each for each in found if each.endswith(_ENDINGS))
    if files:
        raise ConfigError(f'{name}: a folder without a run; name a file of weights in it, such as {files[0]}')
