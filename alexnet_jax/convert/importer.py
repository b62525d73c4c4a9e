"""Imports weights of other frameworks as a run, which the other commands can evaluate, plot and resume."""

import importlib.resources
import json
import math
import os
import re

import ml_collections
import numpy as np
from absl import flags
from jaxtyping import Float64

from alexnet_jax.config import Config, ConfigError, apply_overrides, check_class_names, preset_config, resolve, upgrade
from alexnet_jax.convert import caffe_file, export, safetensors_file, torch_file, weight_layouts
from alexnet_jax.convert.formats import FormatError, detect_format
from alexnet_jax.inference.checkpoint_ref import CHECKPOINT_HELP, CheckpointRef, check_new, parse_checkpoint_ref
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.shapes import layer_table

# Presets that can load weights of torchvision or Caffe.
IMPORTABLE_PRESETS = ('torchvision', 'caffe', 'caffenet', 'paper', 'krizhevsky2012', 'half', 'owt')
BY_NET_NAME = {'AlexNet': 'caffe', 'CaffeNet': 'caffenet'}
MEAN_RGB = (123.675, 116.28, 103.53)  # (0.485, 0.456, 0.406) of torchvision, in gray levels
MEAN_FORMS = "--mean=FILE, Caffe's .binaryproto or a .npy (C, H, W) with channels BGR, or --mean=R,G,B"
NATIVE_FORMAT = 'alexnet_jax'  # metadata field `format` of files that this project exports

Mean = Float64[np.ndarray, 's s 3'] | Float64[np.ndarray, ' 3']


def read_external(path: str, kind: str, preset: str | None) -> tuple[dict[str, weight_layouts.Weights], str]:
    """Reads a file of torchvision or Caffe weights.

    Args:
      path: File to read.
      kind: File format, see detect_format().
      preset: Preset of the network; None derives the preset from the file.

    Returns:
      The weights of each layer, and the preset.

    Raises:
      FormatError: The file is corrupt or has other layers.
      ConfigError: `preset` is None and the file does not identify its preset.
      OSError: The file is unreadable.
    """
    if kind != 'caffe':
        tensors = torch_file.read(path) if kind == 'torch' else safetensors_file.read(path)
        return weight_layouts.from_torchvision(tensors), preset or 'torchvision'
    name, blobs = caffe_file.read(path)
    if preset is None and name not in BY_NET_NAME:
        raise ConfigError(
            f'{path}: a Caffe network named {name!r}, whose kind is unknown; give --preset=caffe for one like'
            ' bvlc_alexnet, or --preset=caffenet for one like bvlc_reference_caffenet (pooling before normalization)'
        )
    return weight_layouts.from_caffe(blobs), preset or BY_NET_NAME[name]


def read_mean(text: str | None, preset: str) -> Mean:
    """Returns the mean of the training images from --mean=`text`, with RGB channels.

    If `text` is None, the mean is torchvision's, and `preset` must be torchvision.

    Raises ConfigError: the mean is missing or invalid.
    """
    if text is None:
        if preset == 'torchvision':
            return np.array(MEAN_RGB)
        raise ConfigError(
            f'--mean is missing: the file does not contain the mean that the preset {preset} subtracts;'
            f' give {MEAN_FORMS}'
        )
    if re.fullmatch(r'[-+.,\de\s]+', text):
        try:
            numbers = [float(number) for number in text.split(',')]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            raise ConfigError(f'--mean={text}: must be three numbers or a file; give {MEAN_FORMS}')
        return np.array(numbers)
    try:
        mean = caffe_file.read_mean(os.path.expanduser(text)).astype(np.float64)
    except (FormatError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f'--mean={text}: {reason}; give {MEAN_FORMS}') from None
    crop = preset_config(preset).data.crop_size
    channels, *sides = mean.shape
    if channels != 3 or len(set(sides)) > 1 or min(sides, default=crop) < crop:
        raise ConfigError(
            f'--mean={text}: its shape is {mean.shape}, but must be (3,) or (3, S, S) with S at least {crop}'
        )
    return np.moveaxis(mean[::-1], 0, -1)


def import_config(preset: str, widths: tuple[int, ...], mean: Mean) -> Config:
    """Returns the resolved config of `preset` for the `widths` of conv1 to fc8 and the shape of `mean`.

    Raises ConfigError: the config is invalid.
    """
    config = preset_config(preset)
    values = {'model.widths': widths[:7], 'model.num_classes': widths[7]}
    if mean.ndim == 1:
        values['data.mean'] = 'channel'
    else:
        values |= {'data.mean': 'image', 'data.image_size': len(mean)}
    apply_overrides(config, values)
    return resolve(config)


def statistics_from_mean(mean: Mean, config: Config) -> dict[str, np.ndarray]:
    """Returns data set statistics with this mean. The eigenvalues are zero, so training adds no color noise."""
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
    WordNet ids at the start of lines, as in Caffe's synset_words.txt, are removed unless two names would become equal.

    Raises ConfigError: the file is unreadable, or does not have `count` valid names.
    """
    if path is None:
        if count == 1000:
            try:  # importing tensorflow_datasets does not import TensorFlow
                ids = importlib.resources.files('tensorflow_datasets') / 'datasets/imagenet2012/labels.txt'
                return ids.read_text().split()
            except (ImportError, OSError):
                log('no ImageNet class names in tensorflow_datasets; the classes are numbered')
        return [f'class {label}' for label in range(count)]
    flag = f'--class_names={path}'
    try:
        with open(os.path.expanduser(path), encoding='utf-8') as file:
            names = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else 'not UTF-8'
        raise ConfigError(f'{flag}: {reason}; name a text file with one name per line') from None
    words = [re.sub(r'^n\d{8}\s+', '', name) for name in names]
    names = [word if words.count(word) == 1 else name for word, name in zip(words, names, strict=True)]
    if len(names) != count:
        raise ConfigError(f'{flag}: {len(names)} names; the network has {count} classes')
    check_class_names(names, flag)
    return names


def import_external(path: str, kind: str, workdir: str, given: flags.FlagValues) -> None:
    """Creates the run `workdir` from torchvision or Caffe weights in `path`. Raises the errors of import_file()."""
    from alexnet_jax.inference.trained_model import import_weights_as_run

    found, preset = read_external(path, kind, given.preset)
    mean, widths = read_mean(given.mean, preset), weight_layouts.widths(found)
    names = class_names(given.class_names, widths[-1])
    try:
        config = import_config(preset, widths, mean)
    except ConfigError as error:
        raise FormatError(f'it does not fit the preset {preset}: {error}') from None
    table = layer_table(config.model, config.data.crop_size, config.data.channels)
    maps = next(layer.pooled for layer in table if layer.name == 'conv5')
    progress = ProgressBar(f'convert {os.path.basename(path)}', len(table), 'layers')
    params = {}
    for layer in table:
        try:
            params[layer.name] = weight_layouts.parameters(layer, found.pop(layer.name), maps, kind == 'caffe')
        except FormatError as error:
            raise FormatError(f'it does not fit the preset {preset}: {error}') from None
        progress.update()
    progress.close()
    import_weights_as_run(workdir, config, params, {}, statistics_from_mean(mean, config), names)
    log(f'{workdir}: {preset}, widths {", ".join(map(str, widths[:7]))}, {widths[7]} classes')


def import_native(path: str, workdir: str, given: flags.FlagValues) -> None:
    """Creates the run `workdir` from a file that this project exported. Raises the errors of import_file()."""
    from alexnet_jax.inference.trained_model import import_weights_as_run

    if given.preset is not None or given.mean is not None:
        raise ConfigError(f'--{"mean" if given.preset is None else "preset"}: {path} contains its own; omit the flag')
    metadata = safetensors_file.read_metadata(path)
    try:
        config = resolve(ml_collections.ConfigDict(upgrade(json.loads(metadata['config']))))
        names = json.loads(metadata['class_names'])
        check_class_names(names)
        if len(names) != config.model.num_classes:
            raise ConfigError(f'{len(names)} names for {config.model.num_classes} classes')
    except (KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise FormatError(f'its metadata is unusable: {" ".join(str(error).split())[:200]}') from None
    if given.class_names is not None:
        names = class_names(given.class_names, config.model.num_classes)
    params, norms, statistics = weight_layouts.native(safetensors_file.read(path), config)
    import_weights_as_run(workdir, config, params, norms, statistics, names)
    log(f'{workdir}: {config.model.preset}, {config.model.num_classes} classes')


def import_file(path: str, kind: str, workdir: str, given: flags.FlagValues) -> None:
    """Creates the run `workdir` from the weights in `path`.

    Args:
      path: File of weights.
      kind: File format, see detect_format().
      workdir: Folder of the new run.
      given: Parsed flags.

    Raises:
      FormatError: `path` is not a valid file of weights, or does not match the preset.
      ConfigError: A flag is invalid, or `workdir` is not a new or empty folder.
      OSError, CheckpointError: Reading or writing failed.
    """
    log(f'{path}: {os.path.getsize(path):,} bytes, {kind}')
    if kind == 'safetensors' and safetensors_file.read_metadata(path).get('format') == NATIVE_FORMAT:
        import_native(path, workdir, given)
    else:
        import_external(path, kind, workdir, given)


def check_arguments(argv: list[str], given: flags.FlagValues) -> tuple[str, CheckpointRef | None]:
    """Returns (file format, None) if argv[1] is a file, otherwise ('', checkpoint).

    Raises ConfigError, FormatError, OSError: the arguments or the file are unusable.
    """
    if len(argv) < 3:
        raise ConfigError('the destination is missing: name a new WORKDIR after a file, or a FILE after a checkpoint')
    path = os.path.expanduser(argv[1])
    if os.path.isfile(path):
        check_new(argv[2])
        return detect_format(path), None
    if not os.path.exists(path) and os.path.basename(path) != 'best':
        raise ConfigError(f'{argv[1]}: there is no such file or folder; name a file of weights, or {CHECKPOINT_HELP}')
    unused = next((name for name in ('preset', 'mean', 'class_names') if given[name].value is not None), None)
    if unused:
        raise ConfigError(f'--{unused}: has no effect when a checkpoint is exported; omit the flag')
    export.validate_target(argv[2])
    return '', parse_checkpoint_ref(argv[1])
