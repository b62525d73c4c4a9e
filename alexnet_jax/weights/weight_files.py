"""Reads a file of weights as a network: its settings, parameters, preprocessing and class names.

The command `convert` makes a run from a NetworkWeights, `--init` starts a run from one, and load() predicts with one.
"""

import dataclasses
import importlib.resources
import json
import math
import os
import re

import ml_collections
import numpy as np
from jaxtyping import Float64

from alexnet_jax.config import Config, ConfigError, apply_overrides, check_class_names, preset_config, resolve, upgrade
from alexnet_jax.paths import shown
from alexnet_jax.runtime.checkpoint_ref import CHECKPOINT_HELP, HUB_WEIGHTS, is_hub_folder
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.shapes import Settings, layer_table
from alexnet_jax.weights import caffe_file, onnx_file, onnx_network, safetensors_file, torch_file, weight_layouts
from alexnet_jax.weights.formats import FormatError, detect_format
from alexnet_jax.weights.weight_layouts import Parameters

# Presets that can load weights of torchvision, ONNX or Caffe.
IMPORTABLE_PRESETS = ('torchvision', 'modern', 'caffe', 'caffenet', 'paper', 'krizhevsky2012', 'half', 'owt')
BY_NET_NAME = {'AlexNet': 'caffe', 'CaffeNet': 'caffenet'}
MEAN_RGB = (123.675, 116.28, 103.53)  # (0.485, 0.456, 0.406) of torchvision, in gray levels
MEAN_FORMS = "--mean=FILE, Caffe's .binaryproto or a .npy (C, H, W) with channels BGR, or --mean=R,G,B"
NATIVE_FORMAT = 'alexnet_jax'  # metadata field `format` of files that this project exports


@dataclasses.dataclass(frozen=True)
class NetworkWeights:
    """A network without a run.

    Attributes:
      config: resolved configuration; `model` and the preprocessing in `data` are those of the weights.
      params: float32 parameters, as in training.state.TrainState.
      batch_stats: float32 running means and variances of batch normalization; {} without batch normalization.
      statistics: statistics of the training images, see prepare.shards.statistics().
      class_names: one name per label.
    """

    config: Config
    params: Parameters
    batch_stats: Parameters
    statistics: dict[str, np.ndarray]
    class_names: list[str]


Mean = Float64[np.ndarray, 's s 3'] | Float64[np.ndarray, ' 3']


@dataclasses.dataclass(frozen=True)
class External:
    """The content of a file of another framework.

    Attributes:
      layers: the weights of each layer.
      preset: the preset of the network.
      settings: settings that differ from those of the preset, by dotted name, besides the widths.
      is_bgr: whether the input channels of conv1 are BGR.
    """

    layers: dict[str, weight_layouts.Weights]
    preset: str
    settings: Settings
    is_bgr: bool


def read_external(path: str, kind: str, preset: str | None, crop_size: int | None = None) -> External:
    """Reads a file of torchvision, ONNX or Caffe weights.

    Args:
      path: File to read.
      kind: File format, see detect_format().
      preset: Preset of the network; None derives the preset from the file.
      crop_size: Height and width of the images in place of those in the file, which must be ONNX.

    Raises:
      FormatError: The file is corrupt or has other layers.
      ConfigError: `preset` is None and the file does not identify its preset; or `crop_size` has no effect.
      OSError: The file is unreadable.
    """
    if kind == 'onnx':
        try:
            return _read_onnx(onnx_file.read(path), preset, crop_size)
        except (FormatError, ConfigError):
            raise
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            what = ' '.join(str(error).split())[:80]
            raise FormatError(f'corrupt: an operator or array is incomplete ({type(error).__name__}: {what})') from None
    if crop_size is not None:
        raise ConfigError(f'--crop_size={crop_size}: {path} is no ONNX file; omit the flag')
    if kind != 'caffe':
        tensors = torch_file.read(path) if kind == 'torch' else safetensors_file.read(path)
        return External(weight_layouts.from_torchvision(tensors), preset or 'torchvision', {}, False)
    name, blobs = caffe_file.read(path)
    if preset is None and name not in BY_NET_NAME:
        raise ConfigError(
            f'{path}: a Caffe network named {name!r}, whose kind is unknown; give --preset=caffe for one like'
            ' bvlc_alexnet, or --preset=caffenet for one like bvlc_reference_caffenet (pooling before normalization)'
        )
    return External(weight_layouts.from_caffe(blobs), preset or BY_NET_NAME[name], {}, True)


def _read_onnx(file: onnx_file.OnnxFile, preset: str | None, crop_size: int | None) -> External:
    """Returns the network of an ONNX file. Raises FormatError: it is none of IMPORTABLE_PRESETS, or not `preset`."""
    network = onnx_network.find_network(file, [preset] if preset else IMPORTABLE_PRESETS, crop_size)
    layers = {name: layer.weights for name, layer in network.layers.items()}
    is_bgr = network.preset in BY_NET_NAME.values()
    size = network.settings.get('data.crop_size')
    if is_bgr:
        log(f"{network.preset}: conv1 is taken to read blue, green, red, as in Caffe's networks")
    if is_bgr and crop_size is None and size is not None:
        own = preset_config(network.preset).data.crop_size
        log(f'the network takes {size} pixels; --crop_size={own} imports it for the {own} pixels of Caffe')
    return External(layers, network.preset, network.settings, is_bgr)


def read_mean(text: str | None, preset: str, crop_size: int | None = None) -> Mean:
    """Returns the mean of the training images from --mean=`text`, with RGB channels.

    If `text` is None, the mean is torchvision's, and `preset` must be torchvision or modern, whose network is the same.
    A mean image has at least `crop_size` pixels; None stands for that of `preset`.

    Raises ConfigError: the mean is missing or invalid.
    """
    if text is None:
        if preset in ('torchvision', 'modern'):
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
    crop = crop_size or preset_config(preset).data.crop_size
    channels, *sides = mean.shape
    if channels != 3 or len(set(sides)) > 1 or min(sides, default=crop) < crop:
        raise ConfigError(
            f'--mean={text}: its shape is {mean.shape}, but must be (3,) or (3, S, S) with S at least {crop}'
        )
    return np.moveaxis(mean[::-1], 0, -1)


def import_config(preset: str, widths: tuple[int, ...], mean: Mean, settings: Settings) -> Config:
    """Returns the resolved config of `preset` with `settings` for the `widths` of conv1 to fc8 and the shape of `mean`.

    Raises ConfigError: the config is invalid.
    """
    config = preset_config(preset)
    values = settings | {'model.widths': widths[:7], 'model.num_classes': widths[7]}
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


def _read_external(
    path: str, kind: str, preset: str | None, mean: str | None, names: str | None, crop_size: int | None
) -> NetworkWeights:
    """Reads weights of torchvision, ONNX or Caffe. Raises the errors of read_weights()."""
    file = read_external(path, kind, preset, crop_size)
    preset, found = file.preset, file.layers
    mean_of_images = read_mean(mean, preset, file.settings.get('data.crop_size'))
    widths = weight_layouts.widths(found)
    labels = class_names(names, widths[-1])
    try:
        config = import_config(preset, widths, mean_of_images, file.settings)
    except ConfigError as error:
        raise FormatError(f'it does not fit the preset {preset}: {error}') from None
    table = layer_table(config.model, config.data.crop_size, config.data.channels)
    maps = next(layer.pooled for layer in table if layer.name == 'conv5')
    progress = ProgressBar(f'read {os.path.basename(path)}', len(table), 'layers')
    params = {}
    for layer in table:
        try:
            params[layer.name] = weight_layouts.parameters(layer, found.pop(layer.name), maps, file.is_bgr)
        except FormatError as error:
            raise FormatError(f'it does not fit the preset {preset}: {error}') from None
        progress.update()
    progress.close()
    return NetworkWeights(config, params, {}, statistics_from_mean(mean_of_images, config), labels)


def _read_native(path: str, metadata: dict[str, str], kind: str, names: str | None) -> NetworkWeights:
    """Reads a file that this project exported, with its `metadata`. Raises the errors of read_weights()."""
    try:
        config = resolve(ml_collections.ConfigDict(upgrade(json.loads(metadata['config']))))
        labels = json.loads(metadata['class_names'])
        check_class_names(labels)
        if len(labels) != config.model.num_classes:
            raise ConfigError(f'{len(labels)} names for {config.model.num_classes} classes')
    except (KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise FormatError(f'its metadata is unusable: {" ".join(str(error).split())[:200]}') from None
    if names is not None:
        labels = class_names(names, config.model.num_classes)
    if kind == 'onnx':
        arrays = weight_layouts.from_own_onnx(onnx_file.read_arrays(path), config)
        if config.data.mean == 'image' and config.data.image_size > config.data.crop_size:
            log(f'{path} has the mean image of the center crop only; around the crop, it is continued from the edge')
    else:
        arrays = safetensors_file.read(path)
    return NetworkWeights(config, *weight_layouts.native(arrays, config), labels)


def read_weights(
    path: str,
    preset: str | None = None,
    mean: str | None = None,
    class_names: str | None = None,
    crop_size: int | None = None,
) -> NetworkWeights:
    """Reads a file of weights of this project, PyTorch, ONNX or Caffe; its content determines the format.

    Args:
      path: the file.
      preset: preset of the network, one of IMPORTABLE_PRESETS; None derives the preset from the file.
      mean: mean of the training images, see read_mean().
      class_names: file with one class name per line, see class_names().
      crop_size: height and width of the images in pixels, for an ONNX file; None: those in the file.

    Raises:
      FormatError: `path` is not a valid file of weights, or does not match the preset; the message lacks the path.
      ConfigError: another argument is invalid, or `path` contains what it gives; or onnx is not installed.
      OSError: the file is unreadable.
    """
    kind = detect_format(path)
    log(f'{path}: {os.path.getsize(path):,} bytes, {kind}')
    readers = {'safetensors': safetensors_file.read_metadata, 'onnx': onnx_file.read_metadata}
    metadata = readers[kind](path) if kind in readers else {}
    if metadata.get('format') != NATIVE_FORMAT:
        return _read_external(path, kind, preset, mean, class_names, crop_size)
    for flag, value in {'preset': preset, 'mean': mean, 'crop_size': crop_size}.items():
        if value is not None:
            raise ConfigError(f'--{flag}: {path} contains its own; omit the flag')
    return _read_native(path, metadata, kind, class_names)


def find_weights(name: str) -> str | None:
    """Returns the file of weights that the argument `name` of a user stands for, or None if it stands for another path.

    `name` is a file, or a folder that contains model.safetensors, as model hubs have it. Returns None for another
    folder, and for a path that parse_checkpoint_ref() may read as a checkpoint.

    Raises ConfigError: there is nothing of this name.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return path
    parent, last = os.path.split(path)
    if not os.path.exists(path) and last != 'best' and os.path.basename(parent) != 'checkpoints':
        raise ConfigError(
            f'{shown(name)}: there is no such file or folder; name a file of weights, or {CHECKPOINT_HELP}'
        )
    return os.path.join(path, HUB_WEIGHTS) if is_hub_folder(path) else None
