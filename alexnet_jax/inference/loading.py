"""The functions load() and create() of the package: trained and new networks in Python."""

import dataclasses
import difflib
import importlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np

from alexnet_jax.config import (
    UNKNOWN,
    Config,
    ConfigError,
    apply_overrides,
    check_choice,
    check_class_names,
    preset_config,
    resolve,
)
from alexnet_jax.inference.forward import as_integer
from alexnet_jax.inference.trained_model import TrainedModel, load_model, place_weights, with_mesh
from alexnet_jax.paths import is_url, shown
from alexnet_jax.runtime.console import log, summarize_exception
from alexnet_jax.training.checkpointing import state_digest
from alexnet_jax.training.state import init_state
from alexnet_jax.weights.formats import FormatError
from alexnet_jax.weights.weight_files import (
    IMPORTABLE_PRESETS,
    MEAN_RGB,
    NetworkWeights,
    find_weights,
    read_weights,
    statistics_from_mean,
)

HUB = 'hf://'  # before the name ORG/NAME of a repository of the Hugging Face Hub


def load(
    source: str | os.PathLike[str],
    *,
    preset: str | None = None,
    mean: str | os.PathLike[str] | Sequence[float] | None = None,
    class_names: str | os.PathLike[str] | Sequence[str] | None = None,
    crop_size: int | None = None,
) -> TrainedModel:
    """Loads a trained network onto the available devices.

    Args:
      source: the folder RUN of a run (its newest checkpoint), RUN/best or RUN/checkpoints/STEP; a file of weights
        (.pth, .safetensors, .caffemodel, .onnx); a folder of a model hub with model.safetensors; or hf://ORG/NAME, a
        repository of the Hugging Face Hub, which is downloaded if huggingface_hub is installed.
      preset: preset of the network in a file of another program; None derives the preset from the file.
      mean: mean of the training images, required for networks of Caffe: a file (.binaryproto or .npy), or three numbers
        for R, G and B in gray levels.
      class_names: names of the classes of a file: a list, or a text file with one name per line. Default: the names in
        the file, otherwise the WordNet ids of ImageNet for 1000 classes, otherwise numbers.
      crop_size: height and width of the images of an ONNX file in pixels; None: those in the file.

    Raises:
      ConfigError: there is no such source, or an argument does not fit the source.
      FormatError: the file has no usable weights. OSError: the file is unreadable.
      CheckpointError: the checkpoint of the run is unreadable.

    >>> import alexnet_jax, tempfile
    >>> from alexnet_jax.convert import export
    >>> file = f'{tempfile.mkdtemp()}/small.safetensors'
    >>> small = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}
    >>> export.write(alexnet_jax.create('torchvision', num_classes=2, settings=small), file)
    >>> network = alexnet_jax.load(file, class_names=['cat', 'dog'])
    >>> network.config.model.preset, network.class_names
    ('torchvision', ['cat', 'dog'])
    >>> alexnet_jax.load('small.pht')
    Traceback (most recent call last):
    alexnet_jax.config_schema.ConfigError: small.pht: there is no such file or folder; name a file of weights, ...
    """
    name = _local_path(source)
    file = find_weights(name)
    if file is None:
        given = {'preset': preset, 'mean': mean, 'class_names': class_names, 'crop_size': crop_size}
        return _load_run(name, [key for key, value in given.items() if value is not None])
    weights = _read_file(name, file, preset, _mean_text(mean), class_names, crop_size)
    config, mesh = with_mesh(weights.config)
    state = place_weights(config, mesh, weights.params, weights.batch_stats)
    digest = state_digest(state)
    return TrainedModel(
        name, '', 0, digest, config, mesh, state.for_inference(), weights.statistics, weights.class_names
    )


def _read_file(
    name: str,
    file: str,
    preset: str | None,
    mean: str | None,
    class_names: str | os.PathLike[str] | Sequence[str] | None,
    crop_size: int | None,
) -> NetworkWeights:
    """Reads the weights in `file`, which the caller called `name`; the arguments and errors are those of load()."""
    if preset not in (None, *IMPORTABLE_PRESETS):
        near = difflib.get_close_matches(str(preset), IMPORTABLE_PRESETS, 1, 0.0)[0]
        every = ', '.join(IMPORTABLE_PRESETS)
        raise ConfigError(f'preset: {preset!r} is not one of {every}; the nearest is {near!r}')
    if not isinstance(class_names, Iterable | os.PathLike | None):
        raise ConfigError(f'class_names: {class_names!r} is neither a list of names nor a file; give a name per class')
    is_list = class_names is not None and not isinstance(class_names, str | os.PathLike)
    names_file = None if class_names is None or is_list else os.fspath(cast(str, class_names))
    try:
        weights = read_weights(file, preset, mean, names_file, crop_size)
    except FormatError as error:
        raise FormatError(f'{name}: {error}') from None
    except ConfigError as error:  # names the flags of `alexnet convert`
        text = re.sub(r'--(preset|mean|class_names|crop_size)\b', r'\1', str(error))
        raise ConfigError(text.replace('omit the flag', 'omit the argument')) from None
    if not is_list:
        return weights
    names = list(cast(Sequence[str], class_names))
    check_class_names(names, 'class_names')
    if len(names) != len(weights.class_names):
        raise ConfigError(f'class_names: {len(names)} names; the network has {len(weights.class_names)} classes')
    return dataclasses.replace(weights, class_names=names)


def _load_run(name: str, given: list[str]) -> TrainedModel:
    """Returns the network of the run or checkpoint `name`; `given` are the arguments for files that the caller gave."""
    if given:
        raise ConfigError(
            f'{given[0]}: has no effect for {shown(name)}, which is not a file of weights; omit the argument'
        )
    return load_model(os.path.expanduser(name))


def _local_path(source: str | os.PathLike[str]) -> str:
    """Returns the path of `source`, after the download of a repository. Raises ConfigError: see load()."""
    if not isinstance(source, str | os.PathLike) or not isinstance(name := os.fspath(source), str):
        raise ConfigError(
            f'source: {type(source).__name__} is not a path; give a file of weights or the folder of a run'
        )
    if not name:
        raise ConfigError('source: the path is empty; give a file of weights or the folder of a run')
    if not is_url(name):
        return name
    repository = name.removeprefix(HUB)
    if not name.startswith(HUB):
        raise ConfigError(f'{shown(name)}: URLs are not read; download the file and give its path, or hf://ORG/NAME')
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repository):
        raise ConfigError(f'{shown(name)}: is not of the form hf://ORG/NAME; write for example hf://org/alexnet')
    try:
        hub = importlib.import_module('huggingface_hub')
    except ImportError:
        raise ConfigError(
            f'{name}: huggingface_hub is not installed; run pip install huggingface_hub, or hf download {repository}'
            ' --local-dir DIR on another machine, and load DIR'
        ) from None
    try:
        folder = str(hub.snapshot_download(repository, allow_patterns=['*.safetensors', '*.json']))
    except Exception as error:  # the library raises many types, for example without a network
        raise ConfigError(f'{name}: the download failed ({summarize_exception(error)}); check the name') from None
    if find_weights(folder) is None:
        raise ConfigError(f'{name}: the repository has no model.safetensors; download a file of weights and load it')
    return folder


def _mean_text(mean: str | os.PathLike[str] | Sequence[float] | None) -> str | None:
    """Returns `mean` in the form of --mean of `alexnet convert`. Raises ConfigError: it has another type."""
    if mean is None or isinstance(mean, str | os.PathLike):
        return None if mean is None else os.fspath(mean)
    try:
        return ','.join(repr(float(number)) for number in mean)
    except (TypeError, ValueError):
        what = ' '.join(repr(mean).split())[:80]
        raise ConfigError(f'mean: {what} is neither a file nor three numbers; give (R, G, B) or a path') from None


def create(
    preset: str = 'paper',
    *,
    num_classes: int | None = None,
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
) -> TrainedModel:
    """Returns a new network with random weights: those of a new run with the same preset, settings and seed.

    There are no statistics of training images, so the mean is that of torchvision for ImageNet: 123.675, 116.28, 103.53
    for R, G and B, and their mean for networks of one channel. The class names are 'class 0', 'class 1', ...

    Args:
      preset: a key of PRESETS.
      num_classes: number of classes; None: that of the preset.
      seed: seed of the weights, from 0.
      settings: other settings by dotted name, such as {'data.image_size': 227}, see docs/settings.md.

    Raises ConfigError: an argument is invalid; the message names the nearest preset or setting.

    >>> import alexnet_jax
    >>> small = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}
    >>> network = alexnet_jax.create('torchvision', num_classes=3, seed=1, settings=small)
    >>> network
    <TrainedModel torchvision: preset torchvision, 3 classes, step 0>
    >>> network.module.conv1.kernel.shape
    (11, 11, 3, 8)
    >>> alexnet_jax.create('cafe')
    Traceback (most recent call last):
    alexnet_jax.config_schema.ConfigError: config.model.preset: 'cafe' is not one of ...; the nearest is 'caffe'
    """
    config, mesh = with_mesh(_new_config(preset, num_classes, seed, {} if settings is None else settings))
    mean = np.array(MEAN_RGB if config.data.channels == 3 else [np.mean(MEAN_RGB)])
    if config.data.mean != 'none':
        log(f'{preset}: the mean is {", ".join(f"{value:g}" for value in mean)}, that of ImageNet')
    state = init_state(config, mesh)
    return TrainedModel(
        name=preset,
        workdir='',
        step=0,
        digest=state_digest(state),
        config=config,
        mesh=mesh,
        state=state.for_inference(),
        statistics=statistics_from_mean(mean, config),
        class_names=[f'class {label}' for label in range(config.model.num_classes)],
    )


def _new_config(preset: str, num_classes: int | None, seed: int, settings: Mapping[str, object]) -> Config:
    """Returns the resolved configuration of create(). Raises ConfigError: an argument is invalid."""
    check_choice('model.preset', str(preset))
    if not isinstance(settings, Mapping) or not all(isinstance(field, str) for field in settings):
        raise ConfigError(f"settings: {settings!r} is not a dict by name; give for example {{'model.lrn': False}}")
    if 'model.preset' in settings:
        raise ConfigError("settings: 'model.preset' is not among them; give it first, as in create('caffe')")
    values: dict[str, object] = {'seed': seed, **settings}
    if num_classes is not None:
        values['model.num_classes'] = num_classes
    numbers = {field: as_integer(values.get(field)) for field in ('seed', 'model.num_classes')}  # also those of NumPy
    editable = preset_config(preset)
    apply_overrides(editable, values | {field: number for field, number in numbers.items() if number is not None})
    config = resolve(editable)
    if config.model.num_classes == UNKNOWN:
        raise ConfigError('num_classes: a new network has no data that determine it; give a number')
    return config
