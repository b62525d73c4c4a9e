"""The weights that train.init names: their settings, and which layers of the network they fit, without jax."""

import functools
import os
import re

from alexnet_jax.config import Config, ConfigError, get_by_path
from alexnet_jax.paths import is_url
from alexnet_jax.runtime.checkpoint_files import checkpoint_steps
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef, parse_checkpoint_ref
from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.workdir import (
    PREPROCESSING_FIELDS,
    is_started,
    read_dataset_statistics,
    with_preprocessing_of,
)
from alexnet_jax.shapes import CONVOLUTIONS, LayerShape, layer_table
from alexnet_jax.weights.formats import FormatError
from alexnet_jax.weights.weight_files import NetworkWeights, find_weights, read_weights

# Fields of `model` that change what the layers compute and leave the shapes of the weights, and the operation without
# which the field has no effect.
_FUNCTION_FIELDS = {
    'activation': 'activation',
    'conv1_stride': None,
    'conv1_padding': None,
    'lrn_size': 'lrn',
    'lrn_k': 'lrn',
    'lrn_alpha': 'lrn',
    'lrn_beta': 'lrn',
    'lrn_across_towers': 'lrn',
    'spatial_lrn_size': 'spatial_lrn',
    'spatial_lrn_alpha': 'spatial_lrn',
    'overlapping_pool': 'pool',
    'pool_ceil_mode': 'pool',
    'inverted_dropout': None,
}


def open_source(init: str) -> str | CheckpointRef:
    """Returns the file or the checkpoint that `init`, the value of train.init, names.

    Raises ConfigError: there is no such file and no such checkpoint.
    """
    if is_url(init):
        raise ConfigError(f'config.train.init: {init} is a URL; download the file and name its path')
    try:
        file = find_weights(init)
    except ConfigError as error:
        raise ConfigError(f'config.train.init: {error}') from None
    if file is not None:
        return file
    try:
        ref = parse_checkpoint_ref(init)
    except ConfigError as error:
        raise ConfigError(f'config.train.init: {error}, a file of weights or a folder with model.safetensors') from None
    steps = checkpoint_steps(os.path.join(ref.workdir, 'checkpoints'))
    if not steps or (ref.selector.isdecimal() and int(ref.selector) not in steps):
        known = f'the checkpoints are those of steps {", ".join(map(str, steps))}' if steps else 'train there first'
        raise ConfigError(f'config.train.init: {init}: {ref.workdir} has no such checkpoint; {known}')
    return ref


@functools.lru_cache(1)
def read_file(path: str) -> NetworkWeights:
    """Returns the weights in the file `path`; a cache, which the caller should clear, avoids a second reading.

    Raises ConfigError: the file cannot be read, is not a file of weights, or lacks the mean of its training images.
    """
    try:
        return read_weights(path)
    except FormatError as error:
        raise ConfigError(f'config.train.init: {path}: {error}') from None
    except ConfigError as error:
        raise ConfigError(
            f'config.train.init: {path} does not suffice: convert it first with alexnet convert {path} RUN --mean=...,'
            f' then --init=RUN ({error})'
        ) from None
    except OSError as error:
        raise ConfigError(f'config.train.init: {path} cannot be read: {error.strerror}') from None


def read_settings(init: str) -> NetworkWeights:
    """Returns the weights that `init` names; for a run, without `params` and `batch_stats`.

    Raises ConfigError: see open_source() and read_file(), or the files of the run cannot be read.
    """
    source = open_source(init)
    if isinstance(source, str):
        return read_file(source)
    try:
        statistics, class_names = read_dataset_statistics(source.workdir, source.config)
    except ConfigError as error:
        raise ConfigError(f'config.train.init: {init}: {error}') from None
    return NetworkWeights(source.config, {}, {}, statistics, class_names)


def with_settings_of_init(config: Config, workdir: str, is_logged: bool = True) -> Config:
    """Returns `config` with the preprocessing of the weights of train.init, unless a run in `workdir` has begun.

    With `is_logged`, logs a line for each setting that is replaced, and for each setting with which the layers compute
    another function with the same weights.

    Raises ConfigError: see read_settings(), or no convolution has the shapes of the weights, or the mean image has
      another size than the images.
    """
    init = config.train.init
    if init is None or is_started(workdir):
        return config
    weights = read_settings(init)
    given, config = config, with_preprocessing_of(weights.config, config)
    _check_fits(init, weights.config, config)
    size, wanted = len(weights.statistics['mean_image']), config.data.image_size
    if config.data.mean == 'image' and size != wanted:
        raise ConfigError(
            f'config.data.image_size: {wanted}, but the mean image of {init} has {size} pixels; use'
            f' --config.data.image_size={size}'
        )
    lines = [
        f'config.{field}: {get_by_path(given, field)} -> {get_by_path(config, field)}, as in {init}'
        for field in (*PREPROCESSING_FIELDS, 'data.crop_size')
        if get_by_path(given, field) != get_by_path(config, field)
    ]
    for line in lines + _other_functions(init, weights.config, config) if is_logged else ():
        log(line)
    return config


def misfits(weights: Config, config: Config) -> dict[str, str]:
    """Returns the layers of the network of `config` that do not fit the network of `weights`, and why."""
    theirs = {row.name: row for row in _table(weights)}
    return {row.name: why for row in _table(config) if (why := _misfit(row, theirs.get(row.name)))}


def describe_fit(weights: NetworkWeights, config: Config, class_names: list[str]) -> list[str]:
    """Returns a line for each layer of a network for `class_names` that does not take its weights as they are."""
    unfit = misfits(weights.config, config)
    lines = [f'{name} is drawn anew: {why}' for name, why in unfit.items()]
    of_classes = '' if 'fc8' in unfit else order_of_classes(weights.class_names, class_names)[1]
    return lines + [of_classes] * bool(of_classes)


def order_of_classes(of_weights: list[str], of_data: list[str]) -> tuple[list[int] | None, str]:
    """Returns the label in the weights of each class of the data, and a line about it, which may be empty.

    Both lists have one name per label and the same length. Weights of numbered classes, 'class 0' and so on, count as
    weights for the classes of the data. Returns None instead of the labels if the weights are for other classes.
    """
    in_order = list(range(len(of_data)))
    if of_weights == of_data:
        return in_order, ''
    if sorted(of_weights) == sorted(of_data):
        order = [of_weights.index(name) for name in of_data]
        return order, 'fc8 is taken, with its columns in the order of the classes of the data'
    if all(re.fullmatch(r'class \d+', name) for name in of_weights):
        return in_order, 'fc8 is taken: the weights only number their classes, which are taken for those of the data'
    label = next(i for i, name in enumerate(of_data) if name != of_weights[i])
    return None, (
        f'fc8 is drawn anew, because the weights are for other classes: label {label} is {of_data[label]!r} in the data'
        f' and {of_weights[label]!r} in the weights'
    )


def _table(config: Config) -> list[LayerShape]:
    return layer_table(config.model, config.data.crop_size, config.data.channels)


def _misfit(row: LayerShape, theirs: LayerShape | None) -> str:
    """Returns why the weights `theirs` do not fit the layer `row`, or ''."""
    if theirs is None:
        return f'kernel {row.kernel}, but the weights have no such layer'
    for kind in ('kernel', 'bias'):
        if getattr(row, kind) != getattr(theirs, kind):
            return f'{kind} {getattr(row, kind)}, but {getattr(theirs, kind)} in the weights'
    return ''


def _check_fits(init: str, weights: Config, config: Config) -> None:
    """Raises ConfigError if the weights fit no convolution of the network."""
    unfit = misfits(weights, config)
    if any(row.name not in unfit for row in _table(config) if row.name in CONVOLUTIONS):
        return
    preset, widths = weights.model.preset, weights.model.widths
    raise ConfigError(
        f'config.train.init: {init} fits no convolution of this network (conv1: {unfit["conv1"]}); its weights are of'
        f" the preset {preset} with --config.model.widths='{widths}'; use these, or --config=finetune:{preset}"
    )


def _other_functions(init: str, weights: Config, config: Config) -> list[str]:
    """Returns a line for each setting with which a layer that fits computes another function than the weights had."""
    unfit, theirs = misfits(weights, config), {row.name: row.spec for row in _table(weights)}
    lines: list[str] = []
    used: set[str] = set()
    for row in _table(config):
        used.update(row.spec.ops)
        if row.name not in unfit and row.spec.ops != theirs[row.name].ops:
            ops, before = (' '.join(each.ops) or 'no operation' for each in (row.spec, theirs[row.name]))
            lines.append(f'{row.name} is followed by {ops}, but by {before} in {init}')
    for name, operation in _FUNCTION_FIELDS.items():
        given, before = getattr(config.model, name), getattr(weights.model, name)
        if given != before and (operation is None or operation in used):
            lines.append(f'config.model.{name}: {given}, but {before} in {init}, so the layers compute other functions')
    return lines
