"""Import weights of other frameworks as a run, or export a checkpoint to a file.

    alexnet convert FILE WORKDIR [--preset=NAME] [--mean=...] [--class_names=FILE]
    alexnet convert CHECKPOINT FILE

Import: FILE is torchvision's `alexnet` from PyTorch or a model hub (.pth, .safetensors), a .caffemodel of Caffe's
`bvlc_alexnet` or `bvlc_reference_caffenet`, or a .safetensors exported by this command; the content of FILE determines
the format. The arrays determine the widths and the number of classes. WORKDIR is a new folder, which receives a
checkpoint of step 0.
Export: CHECKPOINT is defined in trained.py. The extension of FILE selects the format, see export.py.
"""

import importlib.resources
import json
import math
import os
import re
from typing import Any

import ml_collections
import numpy as np
from absl import app, flags, logging

from alexnet_jax import export, startup
from alexnet_jax.command import parse_flags
from alexnet_jax.config import ConfigError, apply_overrides, check_class_names, preset_config, resolve
from alexnet_jax.formats import FormatError, caffe_file, layouts, recognise, safetensors_file, torch_file
from alexnet_jax.monitor import Progress, log, log_error
from alexnet_jax.shapes import layers
from alexnet_jax.trained import FORMS, check_new, create, find, load

# Presets that can load weights of torchvision or Caffe.
FOREIGN = ('torchvision', 'caffe', 'caffenet', 'paper', 'krizhevsky2012', 'half', 'owt')
BY_NET_NAME = {'AlexNet': 'caffe', 'CaffeNet': 'caffenet'}
MEAN_RGB = (123.675, 116.28, 103.53)  # (0.485, 0.456, 0.406) of torchvision, in gray levels
MEAN_FORMS = "--mean=FILE, Caffe's .binaryproto or a .npy (C, H, W) with channels BGR, or --mean=R,G,B"
OWN = 'alexnet_jax'  # metadata field `format` of files that this project exports


def read_foreign(path: str, kind: str, preset: str | None) -> tuple[dict[str, layouts.Weights], str]:
    """Reads a file of torchvision or Caffe weights.

    Args:
      path: File to read.
      kind: File format, see recognise().
      preset: Preset of the network; None derives the preset from the file.

    Returns:
      The weights of each layer, and the preset.

    Raises:
      FormatError: The file is corrupt or has other layers.
      ConfigError: `preset` is None and the file does not identify its preset.
    """
    if kind != 'caffe':
        tensors = torch_file.read(path) if kind == 'torch' else safetensors_file.read(path)
        return layouts.from_torchvision(tensors), preset or 'torchvision'
    name, blobs = caffe_file.read(path)
    if preset is None and name not in BY_NET_NAME:
        raise ConfigError(
            f'{path}: a network of the name {name!r}, which does not tell what it is; give --preset=caffe for one like'
            ' bvlc_alexnet, or --preset=caffenet for one like bvlc_reference_caffenet (pooling before normalisation)'
        )
    return layouts.from_caffe(blobs), preset or BY_NET_NAME[name]


def read_mean(text: str | None, preset: str) -> np.ndarray:
    """Returns the mean of the training images from --mean=`text`, (S, S, 3) or (3,) RGB, float64.

    If `text` is None, the preset torchvision has its own mean.

    Raises ConfigError: the mean is missing or invalid.
    """
    if text is None:
        if preset == 'torchvision':
            return np.array(MEAN_RGB)
        raise ConfigError(
            f'--mean: which? What the preset {preset} was trained with is not in the file; give {MEAN_FORMS}'
        )
    if re.fullmatch(r'[-+.,\de\s]+', text):
        try:
            numbers = [float(number) for number in text.split(',')]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            raise ConfigError(f'--mean={text}: not three numbers; give {MEAN_FORMS}')
        return np.array(numbers)
    try:
        mean = caffe_file.read_mean(os.path.expanduser(text)).astype(np.float64)
    except (FormatError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f'--mean={text}: {reason}; give {MEAN_FORMS}') from None
    crop = preset_config(preset).data.crop_size
    channels, *sides = mean.shape
    if channels != 3 or len(set(sides)) > 1 or min(sides, default=crop) < crop:
        raise ConfigError(f'--mean={text}: the shape {mean.shape}; (3, S, S) with S from {crop}, or (3,), is wanted')
    return np.moveaxis(mean[::-1], 0, -1)


def settings(preset: str, widths: tuple[int, ...], mean: np.ndarray) -> Any:
    """Returns the resolved config of `preset` with the `widths` of conv1 to fc8 and the `mean`. Raises ConfigError."""
    config = preset_config(preset)
    values = {'model.widths': widths[:7], 'model.num_classes': widths[7]}
    if mean.ndim == 1:
        values['data.mean'] = 'channel'
    else:
        values |= {'data.mean': 'image', 'data.image_size': len(mean)}
    apply_overrides(config, values)
    return resolve(config)


def statistics_from_mean(mean: np.ndarray, config: Any) -> dict[str, np.ndarray]:
    """Returns the fields of data/shards.statistics() if only the mean is known: zero eigenvalues, so no color noise."""
    size, channels = config.data.image_size, config.data.channels
    return {
        'mean_image': np.broadcast_to(mean, (size, size, channels)).copy(),
        'mean_rgb': mean.reshape(-1, channels).mean(0),
        'eigenvalues': np.zeros(channels),
        'eigenvectors': np.eye(channels),
        'class_counts': np.zeros(config.model.num_classes, np.int64),
    }


def class_names(path: str | None, count: int) -> list[str]:
    """Returns `count` class names from `path`, one name per line.

    If `path` is None, 1000 classes get the WordNet ids of ImageNet, and any other number of classes gets 'class 0', ...
    Lines in the format of Caffe's synset_words.txt lose their WordNet id, except lines with repeated words.

    Raises ConfigError: the file is unreadable or has other than `count` valid names.
    """
    if path is None:
        if count == 1000:
            try:  # importing tensorflow_datasets does not import TensorFlow
                ids = importlib.resources.files('tensorflow_datasets') / 'datasets/imagenet2012/labels.txt'
                return ids.read_text().split()
            except (ImportError, OSError):
                log('the names of ImageNet, which tensorflow_datasets brings, are not there; classes get numbers')
        return [f'class {label}' for label in range(count)]
    flag = f'--class_names={path}'
    try:
        with open(os.path.expanduser(path), encoding='utf-8') as file:
            names = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else 'not UTF-8'
        raise ConfigError(f'{flag}: {reason}; name a file of text with one name a line') from None
    words = [re.sub(r'^n\d{8}\s+', '', name) for name in names]
    names = [word if words.count(word) == 1 else name for word, name in zip(words, names, strict=True)]
    if len(names) != count:
        raise ConfigError(f'{flag}: {len(names)} names; the network has {count} classes')
    try:
        check_class_names(names)
    except ConfigError as error:
        raise ConfigError(f'{flag}: {str(error).partition(": ")[2]}') from None
    return names


def import_foreign(path: str, kind: str, workdir: str, given: Any) -> None:
    """Creates the run `workdir` from torchvision or Caffe weights in `path`. Raises the errors of import_file()."""
    found, preset = read_foreign(path, kind, given.preset)
    mean, widths = read_mean(given.mean, preset), layouts.widths(found)
    names = class_names(given.class_names, widths[-1])
    try:
        config = settings(preset, widths, mean)
    except ConfigError as error:
        raise FormatError(f'it does not fit the preset {preset}: {error}') from None
    table = layers(config.model, config.data.crop_size, config.data.channels)
    maps = next(layer.pooled for layer in table if layer.name == 'conv5')
    progress = Progress(f'convert {os.path.basename(path)}', len(table), 'layers')
    params = {}
    for layer in table:
        try:
            params[layer.name] = layouts.parameters(layer, found.pop(layer.name), maps, kind == 'caffe')
        except FormatError as error:
            raise FormatError(f'it does not fit the preset {preset}: {error}') from None
        progress.update()
    progress.close()
    create(workdir, config, params, {}, statistics_from_mean(mean, config), names)
    log(f'{workdir}: {preset}, widths {", ".join(map(str, widths[:7]))}, {widths[7]} classes')


def import_own(path: str, workdir: str, given: Any) -> None:
    """Creates the run `workdir` from a file that this project exported. Raises the errors of import_file()."""
    if given.preset is not None or given.mean is not None:
        raise ConfigError(f'--{"mean" if given.preset is None else "preset"}: {path} has its own; leave it out')
    metadata = safetensors_file.read_metadata(path)
    try:
        config = resolve(ml_collections.ConfigDict(json.loads(metadata['config'])))
        names = json.loads(metadata['class_names'])
        check_class_names(names)
        if len(names) != config.model.num_classes:
            raise ConfigError(f'{len(names)} names of {config.model.num_classes} classes')
    except (KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise FormatError(f'its metadata cannot be used: {" ".join(str(error).split())[:200]}') from None
    if given.class_names is not None:
        names = class_names(given.class_names, config.model.num_classes)
    params, norms, statistics = layouts.own(safetensors_file.read(path), config)
    create(workdir, config, params, norms, statistics, names)
    log(f'{workdir}: {config.model.preset}, {config.model.num_classes} classes')


def import_file(path: str, kind: str, workdir: str, given: Any) -> None:
    """Creates the run `workdir` from the weights in `path`.

    Args:
      path: File of weights.
      kind: File format, see recognise().
      workdir: Folder of the new run.
      given: Parsed flags.

    Raises:
      FormatError: `path` is not a valid file of weights, or does not match the preset.
      ConfigError: A flag is invalid, or `workdir` is not a new or empty folder.
      OSError, CheckpointError: Reading or writing failed.
    """
    log(f'{path}: {os.path.getsize(path):,} bytes, {kind}')
    if kind == 'safetensors' and safetensors_file.read_metadata(path).get('format') == OWN:
        import_own(path, workdir, given)
    else:
        import_foreign(path, kind, workdir, given)


def _check(argv: list[str], given: Any) -> tuple[str, Any]:
    """Returns (file format, None) if argv[1] is a file, or ('', Member). Raises ConfigError, FormatError, OSError."""
    if len(argv) < 3:
        raise ConfigError('where to? Name a new WORKDIR behind a file, or a FILE behind a checkpoint')
    path = os.path.expanduser(argv[1])
    if os.path.isfile(path):
        check_new(argv[2])
        return recognise(path), None
    if not os.path.exists(path) and os.path.basename(path) != 'best':
        raise ConfigError(f'{argv[1]}: there is no such file or folder; name a file of weights, or {FORMS}')
    unused = next((name for name in ('preset', 'mean', 'class_names') if given[name].value is not None), None)
    if unused:
        raise ConfigError(f'--{unused}: of no use where a checkpoint becomes a file; leave it out')
    export.check(argv[2])
    return '', find(argv[1])


def _refuse(name: str, error: Exception) -> int:
    """Logs `error` in one line; returns the exit code."""
    if isinstance(error, OSError):
        log_error(f'{error.filename or name}: {error.strerror or error}')
    else:
        log_error(f'{name}: {error}' if isinstance(error, FormatError) else str(error))
    return 1 if isinstance(error, FormatError | OSError) else 2


def main(argv: list[str]) -> int:
    """Converts argv[1] to argv[2]. Logs failures in one line; returns the exit code."""
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    try:
        kind, member = _check(argv, given)
    except (ConfigError, FormatError, OSError) as error:
        return _refuse(argv[1], error)
    if member is None or member.config.cpu_tuning:
        startup.configure_cpu_backend()
    startup.enable_compilation_cache()
    from alexnet_jax.checkpoint import CheckpointError  # imports jax, so only after flag parsing

    try:
        if kind:
            import_file(os.path.expanduser(argv[1]), kind, argv[2], given)
        else:
            export.write(load(member), argv[2])
    except (ConfigError, FormatError, CheckpointError, OSError) as error:
        return _refuse(argv[1], error)
    except KeyboardInterrupt:
        log_error('stopped')
        return 130
    return 0


if __name__ == '__main__':
    flags.DEFINE_enum('preset', None, FOREIGN, 'The network that FILE holds; by default what the file tells.')
    flags.DEFINE_string('mean', None, f'Of the training images; needed for networks of Caffe: {MEAN_FORMS}.')
    flags.DEFINE_string(
        'class_names',
        None,
        "File with one name a line, or Caffe's synset_words.txt; by default ImageNet's ids, or numbers.",
    )
    wanted = f'what to convert? Name a file of weights and a new folder, or a checkpoint and a file: {FORMS}'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, most=2))
