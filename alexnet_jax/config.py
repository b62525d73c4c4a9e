"""The configuration of an experiment: schema with defaults, validation, and parsing of durations.

This module does not import jax, so an invalid setting is reported at once.
"""

import difflib
import math
import re
from typing import Any

import ml_collections
from ml_collections import config_dict

from alexnet_jax.presets import PRESETS
from alexnet_jax.shapes import CONVOLUTIONS, DENSE, LAYERS, layers, ops_after


class ConfigError(ValueError):
    """A setting is invalid; the message is one line with the field, its value and the nearest valid value."""


def default_config() -> ml_collections.ConfigDict:
    """Returns the complete schema; the defaults train the paper's network on ImageNet as in section 5 of the paper.

    resolve() fills the fields of `model` that are None from `model.preset`. Durations are text: '5 epochs',
    '100 steps' or '1000 images'; a bare '100' counts steps.
    """
    return ml_collections.ConfigDict(
        {
            'seed': 0,
            'cpu_tuning': True,  # use an XLA flag and allocator settings that make a CPU faster; see startup.py
            'model': {
                'preset': 'paper',
                'widths': config_dict.placeholder(tuple),
                'kernel_sizes': config_dict.placeholder(tuple),
                'conv1_stride': config_dict.placeholder(int),
                # (before, after): (0, 3) for 224 pixels, (0, 0) for 227, (2, 2)
                'conv1_padding': config_dict.placeholder(tuple),
                'unshared': config_dict.placeholder(tuple),
                'towers': config_dict.placeholder(int),
                'exchange': config_dict.placeholder(tuple),
                'num_classes': config_dict.placeholder(int),
                'activation': config_dict.placeholder(str),  # relu | tanh
                'after_conv': config_dict.placeholder(tuple),
                'lrn': config_dict.placeholder(bool),
                'lrn_size': config_dict.placeholder(int),
                'lrn_k': config_dict.placeholder(float),
                'lrn_alpha': config_dict.placeholder(float),
                'lrn_beta': config_dict.placeholder(float),
                'lrn_across_towers': config_dict.placeholder(bool),
                'spatial_norm_size': config_dict.placeholder(int),
                'spatial_norm_alpha': config_dict.placeholder(float),
                'overlapping_pool': config_dict.placeholder(bool),
                'pool_overhang': config_dict.placeholder(bool),
                'dropout': config_dict.placeholder(float),
                'dropout_before': config_dict.placeholder(tuple),
                'inverted_dropout': config_dict.placeholder(bool),
                'initializer': config_dict.placeholder(str),  # normal (kernel_std) | xavier | he | torch
                'kernel_std': config_dict.placeholder(tuple),
                'bias_init': config_dict.placeholder(tuple),
                'dtype': 'float32',  # dtype of convolutions and matrix products: float32 | bfloat16
            },
            'data': {
                'source': 'tfds:imagenet2012',  # photos | tfds:NAME[:config] | folder:DIR | idx:DIR
                'data_dir': '~/tensorflow_datasets',  # prepared stores and TFDS datasets; gs://... for reading
                'image_size': 256,  # image side in the prepared store, in pixels
                'channels': 3,  # 3: gray images get three equal channels; 1: color images become gray
                'encoding': 'raw',  # encoding of the store: raw | jpeg (an eighth to a sixth of the size)
                'class_names': config_dict.placeholder(tuple),  # replace the class names of the source
                'validation_fraction': 0.1,  # of the training images, held out if the source has no validation split
                'max_bad': 0.001,  # maximum fraction of unreadable images in preparation, or of corrupt records
                'crop_size': 224,  # side of the network's input, in pixels
                'crop': True,  # random crops in training; False: center crops
                'flip': True,  # random horizontal flips in training
                'crop_chunk': 1,  # consecutive images that share a crop position and a flip; 32 in the original program
                'color': 'original',  # color noise: none | original | fb | paper; see augment.py
                'color_until': config_dict.placeholder(str),  # time at which color noise ends, such as '67 epochs'
                'mean': 'image',  # the mean to subtract: image | channel | none
                'mean_window': 'window',  # crop the mean image at the image's crop position (window) or center (centre)
                'divisor': (1.0,),  # inputs are (pixels - mean) / divisor; one number, or one per channel
                'threads': 2,  # number of threads that read and decode images
            },
            'optimizer': {
                'learning_rate': 0.01,
                'momentum': 0.9,
                'weight_decay': 5e-4,
                'weight_decays': config_dict.placeholder(tuple),  # one per layer, conv1 to fc8; replaces weight_decay
                'bias_decay': False,  # apply weight decay to biases too
                'trust_coefficient': 0.0,  # trust coefficient of LARS; 0: no LARS
                'schedule': 'plateau',  # plateau | steps | dexp | poly | constant
                'bias_lr_multiplier': 1.0,
                'bias_schedule': 'same',  # learning-rate schedule of biases: same (as kernels) | dexp | constant
                # (parameter, start time, learning rate), such as (('conv1/kernel', '67 epochs', 1e-5),)
                'layer_rates': (),
                'warmup': '0 steps',  # duration of the linear warmup from 0
                'divisor': 10.0,  # each drop divides the learning rate by this number
                'drops': ('25 epochs', '51 epochs', '79 epochs'),  # milestones of schedule 'steps'
                'patience': 3,  # evaluations without a new lowest error before a drop; for schedule 'plateau'
                'max_drops': 3,  # for schedule 'plateau'
                'dexp_factor': 250.0,  # first learning rate / last learning rate; for schedule 'dexp'
                'dexp_parts': 4,  # number of equal parts of the run with one learning rate each; for schedule 'dexp'
                'bias_dexp_factor': 10.0,  # like dexp_factor, for bias_schedule 'dexp'
                'bias_dexp_parts': 2,  # like dexp_parts, for bias_schedule 'dexp'
                'power': 2.0,  # exponent of the remaining fraction of the run; for schedule 'poly'
            },
            'train': {
                'batch_size': 128,  # global batch size, over all devices
                'micro_batches': 1,  # gradient accumulation: micro-batches per step on each device
                'remat': False,  # rematerialization: recompute convolutions in the backward pass to save memory
                'epochs': 90.0,
                'steps': config_dict.placeholder(int),  # replaces epochs, unless None
                'log_every': '50 steps',
                'goal_error': 0.0,  # end when the mean top-1 training error of log_every steps is lower; 0: never
                'stall_after': '5000 steps',  # time from which the loss is compared with ln(classes)
                'stall_action': 'warn',  # reaction to a stalled loss: warn | stop
            },
            'eval': {
                'every': '1 epoch',
                'views': 10,  # 1 | 10, for the final evaluation; earlier evaluations use the center view
                'batch_size': 128,  # rounded up to a multiple of the number of batch shards
            },
            'checkpoint': {'every': '1 epoch', 'keep': 1},  # keep: number of newest ones; the best is also kept
            'mesh': {
                'layout': 'towers',  # towers | data | hybrid; see docs/devices.md
                'data': -1,  # devices along the data-parallel axis; -1: number of all devices / `model`
                'model': 1,  # devices along the axis that shards the towers, or in `hybrid` the dense layers
                'shard_optimizer': False,  # shard the velocity buffers and their update over `data`
                'gradient_dtype': 'float32',  # dtype of gradients in communication between devices: float32 | bfloat16
            },
            'distributed': {  # seconds
                'start_timeout': 300,  # limit for all processes to connect, counted from when the data store is ready
                'heartbeat_timeout': 15,  # a process without a heartbeat for this long is lost, and the others exit
                'progress_timeout': 600,  # a process without a step, evaluated batch or checkpoint for this long exits
            },
        }
    )


def preset_config(name: str) -> ml_collections.ConfigDict:
    """Returns the configuration of a published network and its training; `name` is a key of presets.PRESETS."""
    config = default_config()
    config.model.preset = name
    apply_overrides(config, PRESETS[name].recipe)
    return config


_CHOICES = {
    'model.preset': tuple(PRESETS),
    'model.activation': ('relu', 'tanh'),
    'model.initializer': ('normal', 'xavier', 'he', 'torch'),
    'model.dtype': ('float32', 'bfloat16'),
    'data.channels': (1, 3),
    'data.encoding': ('raw', 'jpeg'),
    'data.color': ('none', 'original', 'fb', 'paper'),
    'data.mean': ('image', 'channel', 'none'),
    'data.mean_window': ('window', 'centre'),
    'optimizer.schedule': ('plateau', 'steps', 'dexp', 'poly', 'constant'),
    'optimizer.bias_schedule': ('same', 'dexp', 'constant'),
    'train.stall_action': ('warn', 'stop'),
    'eval.views': (1, 10),
    'mesh.layout': ('towers', 'data', 'hybrid'),
    'mesh.gradient_dtype': ('float32', 'bfloat16'),
}

_DURATION = re.compile(r'(\d{1,12}(?:\.\d{1,12})?)\s*(steps?|epochs?|images?)?')


def duration_in_steps(duration: str, *, batch_size: int, examples: int) -> int:
    """Converts `duration` ('5 epochs', '100 steps', '1000 images' or '100') to whole steps.

    A duration above zero gives at least one step. Raises ConfigError: the text has another form.
    """
    match = _DURATION.fullmatch(duration.strip())
    if not match:
        raise ConfigError(f"{duration!r} is no duration; write for example '5 epochs', '100 steps' or '1000 images'")
    count, unit = float(match[1]), (match[2] or 'steps').rstrip('s')
    steps = count * {'step': 1, 'epoch': examples / batch_size, 'image': 1 / batch_size}[unit]
    return max(1, round(steps)) if count else 0


def total_steps(config: ml_collections.ConfigDict, examples: int) -> int:
    """Returns the length of the run in steps, for a training set of `examples` images."""
    if config.train.steps is not None:
        return config.train.steps
    return duration_in_steps(f'{config.train.epochs:f} epochs', batch_size=config.train.batch_size, examples=examples)


def resolve(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
    """Validates `config`, fills the `model` fields that are None from the preset, and returns a frozen copy.

    Raises ConfigError: a field is unknown or missing, has the wrong type or value, or contradicts another field.
    """
    _check_fields(config, default_config(), '')
    config = ml_collections.ConfigDict(config.to_dict())
    _check_choice(config, 'model.preset')
    with config.unlocked():
        for name, value in PRESETS[config.model.preset].model.items():
            if config.model[name] is None:
                config.model[name] = value
        config.data.source = config.data.source.rstrip('/')  # the shell's completion of a folder name adds a slash
    for field in _CHOICES:
        _check_choice(config, field)
    _check_ranges(config)
    _check_model(config)
    _check_durations(config)
    check_mesh(config, config.mesh.data, config.mesh.model)
    return ml_collections.FrozenConfigDict(config)


def unknown_field(field: str, known: list[str]) -> ConfigError:
    """Returns the error for the unknown `field`, which names the nearest of the `known` fields (dotted names)."""
    last = field.rsplit('.', 1)[-1]
    by_last = {name.rsplit('.', 1)[-1]: name for name in known}
    near = difflib.get_close_matches(field, known, 1, 0.75) or [
        by_last[name] for name in difflib.get_close_matches(last, by_last, 1, 0.7)
    ]
    near = near or difflib.get_close_matches(field, known, 1, 0.0)
    return ConfigError(f'config.{field}: no such field; the nearest is config.{near[0]}')


def field_names(config: Any, prefix: str = '') -> list[str]:
    """Returns the dotted names of all leaves of `config`, each after `prefix`."""
    names: list[str] = []
    for name, value in config.items():
        is_group = isinstance(value, ml_collections.ConfigDict)
        names += field_names(value, f'{prefix}{name}.') if is_group else [prefix + name]
    return names


def get_by_path(config: Any, field: str) -> Any:
    """Returns the value of the field with the dotted name `field`."""
    for name in field.split('.'):
        config = config[name]
    return config


def apply_overrides(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
    """Sets fields of `config` in place, by dotted name. Raises ConfigError: a field is unknown or the type is wrong."""
    known = field_names(config)
    for field, value in values.items():
        if field not in known:
            raise unknown_field(field, known)
        *groups, name = field.split('.')
        group = get_by_path(config, '.'.join(groups)) if groups else config
        try:
            group[name] = value
        except (TypeError, ValueError) as error:
            raise ConfigError(f'config.{field}: {value!r}: {error}') from None


def _check_fields(config: Any, schema: Any, prefix: str) -> None:
    known = field_names(default_config())
    for name, value in config.items():
        field = prefix + name
        if name not in schema:
            raise unknown_field(field, known)
        expected = schema.get_type(name)
        if isinstance(schema[name], ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise ConfigError(f'config.{field}: {value!r} is no group of fields')
            _check_fields(value, schema[name], field + '.')
            continue
        missing_allowed = schema[name] is None
        accepted = (int, float) if expected is float else (tuple, list) if expected is tuple else expected
        is_bool_for_number = isinstance(value, bool) and expected is not bool
        if not (value is None and missing_allowed) and (not isinstance(value, accepted) or is_bool_for_number):
            raise ConfigError(f'config.{field}: {value!r} is {type(value).__name__}, not {expected.__name__}')
    for name in schema:
        if name not in config:
            raise ConfigError(f'config.{prefix}{name}: missing; start from alexnet_jax.config.default_config()')


def _check_choice(config: Any, field: str) -> None:
    group, name = field.split('.')
    value, choices = config[group][name], _CHOICES[field]
    if value not in choices:
        near: Any
        if isinstance(value, str):
            near = difflib.get_close_matches(value, [str(choice) for choice in choices], 1, 0.0)[0]
        else:
            near = min(choices, key=lambda choice: abs(choice - value))
        every = ', '.join(map(str, choices))
        raise ConfigError(f'config.{field}: {value!r} is not one of {every}; the nearest is {near!r}')


def _check_ranges(config: Any) -> None:
    bounds = {  # field: (minimum, maximum)
        'seed': (0, 2**32 - 1),
        'model.dropout': (0, 0.95),
        'model.towers': (1, 64),
        'model.num_classes': (2, 10**6),
        'model.conv1_stride': (1, 64),
        'model.lrn_size': (1, 63),
        'model.spatial_norm_size': (1, 63),
        'model.spatial_norm_alpha': (0, 1e6),
        'model.lrn_k': (1e-6, 1e6),  # at 0, LRN of a pixel with zero activations would be 0 / 0
        'model.lrn_alpha': (0, 1e6),
        'model.lrn_beta': (0, 10),
        'data.image_size': (8, 4096),
        'data.validation_fraction': (0, 1),
        'data.max_bad': (0, 1),
        'data.crop_chunk': (1, 2**20),
        'data.threads': (1, 256),
        'optimizer.learning_rate': (0, 100),
        'optimizer.momentum': (0, 0.9999),
        'optimizer.weight_decay': (0, 1),
        'optimizer.bias_lr_multiplier': (0, 100),
        'optimizer.divisor': (1, 1e6),
        'optimizer.patience': (1, 10**6),
        'optimizer.max_drops': (0, 100),
        'optimizer.power': (0, 100),
        'optimizer.trust_coefficient': (0, 10),
        'optimizer.dexp_factor': (1, 1e9),
        'optimizer.dexp_parts': (2, 1000),
        'optimizer.bias_dexp_factor': (1, 1e9),
        'optimizer.bias_dexp_parts': (2, 1000),
        'train.batch_size': (1, 2**24),
        'train.micro_batches': (1, 2**24),
        'train.epochs': (0, 10**6),
        'train.goal_error': (0, 1),
        'eval.batch_size': (1, 2**24),
        'checkpoint.keep': (1, 10**6),
        'mesh.model': (1, 4096),
        'distributed.start_timeout': (1, 10**6),
        'distributed.heartbeat_timeout': (1, 10**6),
        'distributed.progress_timeout': (1, 10**6),
    }
    if config.train.steps is not None:
        bounds['train.steps'] = (0, 2**31 - 1)
    for field, (least, greatest) in bounds.items():
        value = get_by_path(config, field)
        if not least <= value <= greatest:
            near = greatest if value > greatest else least
            raise ConfigError(f'config.{field}: {value} is outside {least} to {greatest}; the nearest is {near}')
    check_class_names(config.data.class_names or ())
    source = config.data.source
    if source != 'photos' and not re.fullmatch(r'tfds:[\w/]+(:[\w.-]+)?|(folder|idx):.+', source):
        raise ConfigError(
            f"config.data.source: {source!r} is not 'photos', 'tfds:NAME[:config]', 'folder:DIR' or 'idx:DIR';"
            " for example 'tfds:imagenet2012'"
        )


def check_class_names(names: Any) -> None:
    """Raises ConfigError unless `names` are distinct, printable, nonempty texts without blanks around them."""
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or name != name.strip() or not name:
            raise ConfigError(f'config.data.class_names: {name!r} is no printable text without blanks around it')
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ConfigError(f'config.data.class_names: {twice!r} is there twice')


def _check_model(config: Any) -> None:
    model, data = config.model, config.data
    _check_lists(config)
    if data.crop_size > data.image_size:
        raise ConfigError(
            f'config.data.crop_size: {data.crop_size} is larger than data.image_size={data.image_size};'
            f' the nearest is {data.image_size}'
        )
    for i in range(5):
        if model.widths[i] and (i or model.towers > 1):
            _check_divides(f'config.model.widths (conv{i + 1})', model.widths[i], 'model.towers', model.towers)
    if _smallest_side(config, data.crop_size) < 1:
        least = next((size for size in range(data.crop_size, 4096) if _smallest_side(config, size) >= 1), None)
        if least is None:
            raise ConfigError(f'config.model.kernel_sizes: {model.kernel_sizes!r} are larger than images may be')
        field = 'crop_size' if least <= data.image_size else 'image_size'
        raise ConfigError(f'config.data.{field}: {data[field]} leaves nothing after pool5; the nearest is {least}')
    for field in ('lrn_size', 'spatial_norm_size'):
        if model[field] % 2 == 0:
            raise ConfigError(f'config.model.{field}: {model[field]} is even; the nearest is {model[field] + 1}')
    for layer in ('fc6', 'fc7', 'fc8'):
        width = (*model.widths, model.num_classes)[LAYERS.index(layer)]
        if width and layer not in model.exchange:
            _check_divides(f'config.model.widths ({layer})', width, 'model.towers', model.towers)


def _smallest_side(config: Any, crop_size: int) -> int:
    """Returns the smallest side of the network's feature maps, in pixels."""
    table = layers(config.model, crop_size, config.data.channels)
    return min(side for layer in table for side in (*layer.output[:-1], *layer.pooled[:-1]))


def _check_lists(config: Any) -> None:
    """Validates the lists of numbers and of names: their lengths and items."""
    whole, number = (int,), (int, float)
    lists: dict[str, tuple[tuple[int, ...], Any, float]] = {  # (allowed lengths, item types, minimum)
        'model.widths': ((7,), whole, 0),
        'model.kernel_sizes': ((5,), whole, 1),
        'model.conv1_padding': ((2,), whole, 0),
        'model.kernel_std': ((8,), number, 0),
        'model.bias_init': ((8,), number, -math.inf),
        'data.divisor': ((1, config.data.channels), number, 1e-6),
        'optimizer.weight_decays': ((8,), number, 0),
    }
    for field, (lengths, kinds, least) in lists.items():
        values = get_by_path(config, field)
        if values is None:
            continue
        if len(values) not in lengths:
            wanted = 'one a layer' if len(lengths) == 1 and lengths[0] > 2 else 'no more and no less'
            needed = ' or '.join(str(length) for length in lengths)
            raise ConfigError(f'config.{field}: {len(values)} values; {needed} are needed, {wanted}')
        for value in values:
            if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value < math.inf:
                what = f'a whole number from {least}' if kinds is whole else f'a number from {least}'
                raise ConfigError(f'config.{field}: {value!r} is not {what}')
    names = {
        'model.unshared': CONVOLUTIONS,
        'model.exchange': LAYERS[1:],
        'model.dropout_before': DENSE,
    }
    for field, known in names.items():
        for name in get_by_path(config, field):
            if name not in known:
                raise ConfigError(f'config.{field}: {name!r} is not one of {", ".join(known)}')
    _check_steps(config.model)
    if not config.model.widths[0]:
        raise ConfigError('config.model.widths: conv1 cannot be left out, so its width is 1 at least')


_STEPS = ('activation', 'lrn', 'spatial_norm', 'batch_norm', 'pool')


def _check_steps(model: Any) -> None:
    if len(model.after_conv) != 5:
        raise ConfigError(f'config.model.after_conv: {len(model.after_conv)} texts; 5 are needed, one a convolution')
    for text in model.after_conv:
        steps = text.split() if isinstance(text, str) else [text]
        for i, step in enumerate(steps):
            if step not in _STEPS or step in steps[:i]:
                raise ConfigError(f'config.model.after_conv: {text!r} is no order of some of {", ".join(_STEPS)}')


def _check_divides(field: str, value: int, by_field: str, by: int) -> None:
    if value % by or value < by:
        near = max(by, round(value / by) * by)
        raise ConfigError(f'{field}: {value} is not divisible by {by_field}={by}; the nearest is {near}')


def _check_durations(config: Any) -> None:
    durations = {
        'train.log_every': config.train.log_every,
        'train.stall_after': config.train.stall_after,
        'eval.every': config.eval.every,
        'checkpoint.every': config.checkpoint.every,
        'optimizer.warmup': config.optimizer.warmup,
    }
    if config.data.color_until is not None:
        durations['data.color_until'] = config.data.color_until
    durations |= {f'optimizer.drops[{i}]': drop for i, drop in enumerate(config.optimizer.drops)}
    for i, entry in enumerate(config.optimizer.layer_rates):
        names = [f'{layer}/{kind}' for layer in LAYERS for kind in ('kernel', 'bias')]
        is_entry = isinstance(entry, tuple | list) and len(entry) == 3 and entry[0] in names
        is_rate = is_entry and isinstance(entry[2], int | float) and not isinstance(entry[2], bool)
        if not is_rate or not 0 <= entry[2] <= 100:
            raise ConfigError(
                f'config.optimizer.layer_rates: {entry!r} is no parameter, time and rate,'
                " such as ('conv1/kernel', '67 epochs', 1e-5)"
            )
        durations[f'optimizer.layer_rates[{i}]'] = entry[1]
    for field, duration in durations.items():
        try:
            steps = duration_in_steps(str(duration), batch_size=1, examples=1)
        except ConfigError as error:
            raise ConfigError(f'config.{field}: {error}') from None
        if steps == 0 and field != 'optimizer.warmup':
            raise ConfigError(f"config.{field}: {duration!r} is no time at all; the nearest is '1 step'")


def check_mesh(config: Any, data: int, model: int) -> None:
    """Raises ConfigError if batch, towers or widths do not divide evenly over a mesh of `data` x `model` devices.

    If `data` is -1 (not yet known), the function skips the checks of the batch size.
    """
    layout, towers, widths = config.mesh.layout, config.model.towers, config.model.widths
    if layout == 'data' and model != 1:
        raise ConfigError(
            f"config.mesh.model: {model} with mesh.layout='data', which has no model axis; the nearest is 1"
        )
    if layout == 'towers' and towers % model:
        near = max(size for size in range(1, towers + 1) if size <= model and towers % size == 0)
        raise ConfigError(f'config.mesh.model: {model} does not divide model.towers={towers}; the nearest is {near}')
    table = {layer.name: layer for layer in layers(config.model, config.data.crop_size, config.data.channels)}
    if layout == 'hybrid' and not set(DENSE) <= set(table) & set(config.model.exchange):
        raise ConfigError(
            "config.mesh.layout: 'hybrid' needs fc6, fc7 and fc8, and all in model.exchange; the nearest is 'towers'"
        )
    has_lrn = any('lrn' in ops_after(config.model, name) for name in CONVOLUTIONS)
    if model > 1 and layout == 'towers' and has_lrn and config.model.lrn_across_towers:
        raise ConfigError(f'config.mesh.model: {model} with model.lrn_across_towers; the nearest is 1')
    inputs = table['fc6'].kernel[0] if 'fc6' in table else model
    if layout == 'hybrid' and inputs % model:
        near = max(size for size in range(1, model) if inputs % size == 0)
        raise ConfigError(
            f'config.mesh.model: {model} does not divide the {inputs} inputs of fc6; the nearest is {near}'
        )
    for layer, width in (('fc6', widths[5]), ('fc7', widths[6])):
        if width:
            _check_divides(f'config.model.widths ({layer})', width, 'mesh.model', model)
    classes = config.model.num_classes
    if layout != 'hybrid' and classes % model:
        near = max(size for size in range(1, model) if classes % size == 0)
        raise ConfigError(
            f'config.mesh.model: {model} does not divide model.num_classes={classes}; the nearest is {near}'
        )
    if data == 0 or data < -1:
        raise ConfigError(f'config.mesh.data: {data} devices; the nearest is 1 (or -1 for all there are)')
    if data != -1:
        by, parts = ('mesh.data x mesh.model', data * model) if layout == 'hybrid' else ('mesh.data', data)
        _check_divides('config.train.batch_size', config.train.batch_size, by, parts)
        images, count = config.train.batch_size // parts, config.train.micro_batches
        if images % count:
            near = min(
                (size for size in range(1, images + 1) if images % size == 0), key=lambda size: abs(size - count)
            )
            raise ConfigError(
                f'config.train.micro_batches: {count} does not divide the {images} images of train.batch_size that'
                f' each device has; the nearest is {near}'
            )
