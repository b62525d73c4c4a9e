"""The settings of an experiment as frozen, hashable dataclasses, one per group of fields.

The dataclasses are the schema: config.default_config() makes the editable form from their fields and defaults,
config_checks.py checks their choices and bounds, and config_help.py lists them with their meanings. This module imports
neither jax nor numpy.
"""

import dataclasses
import math
import operator
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, TypeVar


class ConfigError(ValueError):
    """A setting is invalid; the message is one line with the field, its value and the nearest valid value."""


UNKNOWN = 0  # model.num_classes if it is auto, until the number of classes of the data is known

CONVOLUTIONS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5')
DENSE = ('fc6', 'fc7', 'fc8')

# The keys of presets.PRESETS.
PRESET_NAMES = (
    'paper',
    'krizhevsky2012',
    'half',
    'no_exchange',
    'owt',
    'caffe',
    'caffenet',
    'torchvision',
    'modern',
    'd2l',
    'bn_lars',
    'cifar10_13pct',
    'cifar10_11pct',
)

Choices = tuple[str, ...] | tuple[int, ...]
Bounds = tuple[float, float]
Default = TypeVar('Default')


@dataclasses.dataclass(frozen=True)
class About:
    """What the schema says about a field besides its type and its default.

    Attributes:
      meaning: one phrase.
      choices: all allowed values; for a tuple, of each item; empty if other values are allowed.
      bounds: minimum and maximum; for a tuple, of each item.
      lengths: allowed numbers of items of a tuple; empty if there is no limit.
      is_duration: whether the text, or each item of the tuple, is a duration; see duration_in_steps().
      accepts_auto: whether the text 'auto' is allowed, which stands for UNKNOWN.
    """

    meaning: str
    choices: Choices = ()
    bounds: Bounds | None = None
    lengths: tuple[int, ...] = ()
    is_duration: bool = False
    accepts_auto: bool = False


def about(
    meaning: str,
    choices: Choices = (),
    bounds: Bounds | None = None,
    lengths: tuple[int, ...] = (),
    is_duration: bool = False,
    accepts_auto: bool = False,
) -> Mapping[str, About]:
    """Returns the metadata of a dataclass field; see About for the arguments."""
    return {'about': About(meaning, choices, bounds, lengths, is_duration, accepts_auto)}


def setting(
    default: Default,
    meaning: str,
    choices: Choices = (),
    bounds: Bounds | None = None,
    lengths: tuple[int, ...] = (),
    is_duration: bool = False,
) -> Default:
    """Returns a dataclass field with the default `default`; see About for the other arguments."""
    return field(default=default, metadata=about(meaning, choices, bounds, lengths, is_duration))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network of section 3 of the paper. Fields without a default take the value of the `preset`.

    Per-layer fields have one value per layer, conv1 to fc8 (`conv_ops` and `kernel_sizes`: conv1 to conv5; `widths`:
    conv1 to fc7, because `num_classes` is the width of fc8).
    """

    preset: str = setting('paper', 'the published network that gives the other fields their defaults', PRESET_NAMES)
    widths: tuple[int, ...] = field(
        metadata=about('feature maps or units of conv1 to fc7; 0 removes the layer', bounds=(0, math.inf), lengths=(7,))
    )
    kernel_sizes: tuple[int, ...] = field(
        metadata=about('height and width of the kernels of conv1 to conv5', bounds=(1, math.inf), lengths=(5,))
    )
    conv1_stride: int = field(metadata=about('stride of conv1 in pixels', bounds=(1, 64)))
    conv1_padding: tuple[int, int] = field(
        metadata=about(
            'zeros (before, after) the rows and columns, such as (0, 3) for 224 pixels or (0, 0) for 227',
            bounds=(0, math.inf),
            lengths=(2,),
        )
    )
    locally_connected: tuple[str, ...] = field(
        metadata=about('convolutions with separate weights at each pixel', CONVOLUTIONS)
    )
    towers: int = field(metadata=about('number of towers', bounds=(1, 64)))
    cross_tower: tuple[str, ...] = field(
        metadata=about(
            'layers that read the features of all towers; the others read only their own', (*CONVOLUTIONS[1:], *DENSE)
        )
    )
    num_classes: int = field(
        metadata=about(
            'number of classes, the width of fc8; auto: that of the data', bounds=(2, 10**6), accepts_auto=True
        )
    )
    activation: str = field(metadata=about('the nonlinearity', ('relu', 'tanh')))
    conv_ops: tuple[str, ...] = field(
        metadata=about(
            'operations after each of conv1 to conv5, in order, such as "activation lrn pool"; there are activation,'
            ' lrn, spatial_lrn, batch_norm, pool and ceil_pool, which pools a last window that extends over the edge'
        )
    )
    lrn: bool = field(metadata=about('local response normalization; False removes it from conv_ops'))
    lrn_size: int = field(metadata=about('number of feature maps in a window of LRN, n; odd', bounds=(1, 63)))
    # At 0, LRN of a pixel with zero activations would be 0 / 0.
    lrn_k: float = field(metadata=about('constant k of LRN', bounds=(1e-6, 1e6)))
    lrn_alpha: float = field(
        metadata=about('factor of the sum of squares over the window of LRN, not of their mean', bounds=(0, 1e6))
    )
    lrn_beta: float = field(metadata=about('exponent of LRN', bounds=(0, 10)))
    lrn_across_towers: bool = field(metadata=about('whether a window of LRN extends over the next tower'))
    spatial_lrn_size: int = field(metadata=about('side of the windows of spatial_lrn; odd', bounds=(1, 63)))
    spatial_lrn_alpha: float = field(
        metadata=about('factor of the sum of squares over the window of spatial_lrn', bounds=(0, 1e6))
    )
    overlapping_pool: bool = field(metadata=about('True: windows of 3 with stride 2; False: windows of 2'))
    pool_ceil_mode: bool = field(metadata=about('whether to pool a last window that extends over the edge'))
    dropout: float = field(metadata=about('probability of dropout', bounds=(0, 0.95)))
    dropout_on_inputs_of: tuple[str, ...] = field(metadata=about('the dense layers whose inputs are dropped', DENSE))
    inverted_dropout: bool = field(metadata=about('whether to scale kept units in training instead of at inference'))
    initializer: str = field(
        metadata=about(
            'distribution of the initial kernels; normal: with the standard deviations kernel_std',
            ('normal', 'glorot_uniform', 'he_normal', 'torch_default'),
        )
    )
    kernel_std: tuple[float, ...] = field(
        metadata=about('standard deviations of the initial kernels, conv1 to fc8', bounds=(0, math.inf), lengths=(8,))
    )
    bias_init: tuple[float, ...] = field(
        metadata=about('initial biases, conv1 to fc8', bounds=(-math.inf, math.inf), lengths=(8,))
    )
    dtype: str = setting('float32', 'dtype of convolutions and matrix products', ('float32', 'bfloat16'))
    precision: str = setting(
        'default',
        'rounding of the operands of float32 convolutions and matrix products; see docs/devices.md',
        ('default', 'tensorfloat32', 'float32'),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and their augmentation (section 4.1 of the paper)."""

    source: str = setting(
        'tfds:imagenet2012', 'photos[:HALF], tfds:NAME[:config], folder:DIR, idx:DIR, hf:DIR or wds:PATTERN'
    )
    data_dir: str = setting(
        '~/tensorflow_datasets', 'folder of the prepared and TFDS data sets; gs://... can only be read'
    )
    prepared_dir: str | None = setting(
        None, 'folder of the prepared data sets; None: the folder `prepared` in data_dir'
    )
    image_size: int = setting(256, 'side of the images in the prepared data set, in pixels', bounds=(8, 4096))
    channels: int = setting(3, '3: gray images get three equal channels; 1: color images become gray', (1, 3))
    encoding: str = setting(
        'raw', 'encoding of the prepared images; jpeg takes an eighth to a sixth of the space', ('raw', 'jpeg')
    )
    class_names: tuple[str, ...] | None = setting(
        None,
        'order of the classes of the source, by name, or names for classes that are only numbered; @FILE: one a line',
    )
    validation_fraction: float = setting(
        0.1, 'fraction of the training images to hold out if the source has no validation split', bounds=(0, 1)
    )
    validation_split: str | None = setting(
        None, 'split of the source to validate on, such as test; None: its validation split, never its test split'
    )
    max_corrupt_fraction: float = setting(
        0.001, 'maximum fraction of unreadable images in preparation, and of corrupt records in training', bounds=(0, 1)
    )
    crop_size: int = setting(224, "side of the network's input, in pixels; at most image_size")
    crop: bool = setting(True, 'random crops in training; False: center crops')
    flip: bool = setting(True, 'random horizontal flips in training')
    crop_scale: tuple[float, ...] | None = setting(
        None,
        'training crops of random size, scaled to crop_size: minimum and maximum area / area of the image; None: crops'
        ' of crop_size',
        bounds=(1e-4, math.inf),
        lengths=(2,),
    )
    crop_aspect_ratio: tuple[float, ...] = setting(
        (3 / 4, 4 / 3),
        'minimum and maximum width / height of the crops of crop_scale',
        bounds=(0.1, math.inf),
        lengths=(2,),
    )
    random_erasing: float = setting(
        0.0, 'probability that a random rectangle of a training input becomes 0', bounds=(0, 1)
    )
    crop_group_size: int = setting(
        1, 'consecutive images that share a crop and a flip; 32 in the original program', bounds=(1, 2**20)
    )
    color: str = setting('original', 'color noise in training; see augment.py', ('none', 'original', 'fb', 'paper'))
    color_augmentation_until: str | None = setting(
        None, 'time at which color noise ends, such as 67 epochs; None: never', is_duration=True
    )
    mean: str = setting('image', 'the mean of the training images to subtract', ('image', 'channel', 'none'))
    mean_crop: str = setting(
        'matching', 'crop of the mean image; matching: the crop of the image', ('matching', 'center')
    )
    std: tuple[float, ...] = setting(
        (1.0,),
        'inputs are (pixels - mean) / std; one number, or one per channel',
        bounds=(1e-6, math.inf),
        lengths=(1, 3),
    )
    class_weights: str = setting(
        'none',
        'factors of the training loss; balanced: images / (classes * images of the class)',
        ('none', 'balanced'),
    )
    reader_threads: int = setting(2, 'number of threads that read and decode images', bounds=(1, 256))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule (section 5 of the paper) and the learning-rate schedule."""

    learning_rate: float = setting(0.01, 'learning rate at the start', bounds=(0, 100))
    momentum: float = setting(0.9, 'factor of the velocity in each step', bounds=(0, 0.9999))
    weight_decay: float = setting(5e-4, 'weight decay of the kernels', bounds=(0, 1))
    layer_weight_decay: tuple[float, ...] | None = setting(
        None, 'weight decay of each layer, conv1 to fc8; replaces weight_decay', bounds=(0, math.inf), lengths=(8,)
    )
    decay_biases: bool = setting(False, 'apply weight decay to biases too')
    trust_coefficient: float = setting(0.0, 'trust coefficient of LARS; 0: no LARS', bounds=(0, 10))
    schedule: str = setting(
        'plateau',
        'learning-rate schedule; see docs/training.md',
        ('plateau', 'steps', 'dexp', 'poly', 'cosine', 'constant'),
    )
    bias_lr_multiplier: float = setting(1.0, 'learning rate of biases / learning rate of kernels', bounds=(0, 100))
    bias_schedule: str = setting(
        'same', 'learning-rate schedule of biases; same: as kernels', ('same', 'dexp', 'constant')
    )
    lr_overrides: tuple[tuple[str, str, float], ...] = setting(
        (),
        "(parameter, start time, learning rate) of single parameters, such as (('conv1/kernel', '67 epochs', 1e-5),)",
    )
    lr_multipliers: tuple[tuple[str, float], ...] = setting(
        (),
        "(pattern, factor of the learning rate) of layers or parameters, such as (('conv*', 0.0), ('fc8', 10.0));"
        ' 0 freezes; the last match counts',
    )
    warmup: str = setting('0 steps', 'duration of the linear warmup of the learning rate from 0', is_duration=True)
    decay_factor: float = setting(10.0, 'each decay divides the learning rate by this number', bounds=(1, 1e6))
    milestones: tuple[str, ...] = setting(
        ('25 epochs', '51 epochs', '79 epochs'), "times of the decays of schedule 'steps'", is_duration=True
    )
    patience: int = setting(
        3, "evaluations without a new lowest error before a decay; for schedule 'plateau'", bounds=(1, 10**6)
    )
    max_decays: int = setting(3, "maximum number of decays; for schedule 'plateau'", bounds=(0, 100))
    stop_on_plateau: bool = setting(False, "end the run at the plateau after the last decay; for schedule 'plateau'")
    dexp_factor: float = setting(
        250.0, "first learning rate / last learning rate; for schedule 'dexp'", bounds=(1, 1e9)
    )
    dexp_parts: int = setting(
        4, "number of equal parts of the run with one learning rate each; for schedule 'dexp'", bounds=(2, 1000)
    )
    bias_dexp_factor: float = setting(10.0, "like dexp_factor, for bias_schedule 'dexp'", bounds=(1, 1e9))
    bias_dexp_parts: int = setting(2, "like dexp_parts, for bias_schedule 'dexp'", bounds=(2, 1000))
    poly_power: float = setting(
        2.0, "exponent of the remaining fraction of the run; for schedule 'poly'", bounds=(0, 100)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the run, its batches, and the conditions that end the run early."""

    batch_size: int = setting(128, 'global batch size, over all devices', bounds=(1, 2**24))
    grad_accum_steps: int = setting(
        1, 'gradient accumulation: number of micro-batches per step on each device', bounds=(1, 2**24)
    )
    remat: bool = setting(False, 'rematerialization: recompute convolutions in the backward pass to save memory')
    epochs: float = setting(90.0, 'length of the run in epochs', bounds=(0, 10**6))
    steps: int | None = setting(None, 'length of the run in steps; replaces epochs, unless None', bounds=(0, 2**31 - 1))
    init: str | None = setting(
        None, 'weights to start from: the folder of a run, one of its checkpoints, or a file that convert reads'
    )
    label_smoothing: float = setting(
        0.0, 'probability mass that the target distribution spreads evenly over all classes', bounds=(0, 0.99)
    )
    mixup: float = setting(0.0, 'parameter of the beta distribution of mixup; 0: no mixup', bounds=(0, 100))
    cutmix: float = setting(0.0, 'parameter of the beta distribution of CutMix; 0: no CutMix', bounds=(0, 100))
    ema_decay: float = setting(
        0.0,
        'decay per step of the exponential moving average of the weights, which is evaluated; 0: none',
        bounds=(0, 0.999999),
    )
    log_every: str = setting('50 steps', 'interval of the log lines of training', is_duration=True)
    target_error: float = setting(
        0.0, 'the run ends when the mean top-1 training error over log_every is lower; 0: never', bounds=(0, 1)
    )
    stall_after: str = setting('5000 steps', 'time from which the loss is compared with ln(classes)', is_duration=True)
    stall_action: str = setting('warn', 'reaction to a stalled loss', ('warn', 'stop'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the validation images."""

    every: str = setting('1 epoch', 'interval of the evaluations', is_duration=True)
    views: int = setting(10, 'views of the final evaluation; earlier evaluations use the center view', (1, 10))
    batch_size: int = setting(
        128, 'images per batch, rounded up to a multiple of the number of batch shards', bounds=(1, 2**24)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: str = setting('1 epoch', 'interval of the checkpoints', is_duration=True)
    keep: int = setting(1, 'number of newest checkpoints to keep; the best is also kept', bounds=(1, 10**6))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh `data` x `model`, and what is sharded over it; see docs/devices.md."""

    layout: str = setting('towers', 'what is sharded; see docs/devices.md', ('towers', 'data', 'hybrid'))
    data: int = setting(-1, 'devices along the data-parallel axis; -1: number of all devices / model')
    model: int = setting(
        1, 'devices along the axis that shards the towers, or in hybrid the dense layers', bounds=(1, 4096)
    )
    shard_optimizer: bool = setting(False, 'shard the velocity buffers and their update over the data axis')
    grad_allreduce_dtype: str = setting(
        'auto',
        'dtype of gradients in communication; auto: float32, but bfloat16 for gradients that cuDNN returns in bfloat16',
        ('auto', 'float32', 'bfloat16'),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Time limits of runs with several processes, in seconds."""

    initialization_timeout: int = setting(
        300, 'seconds for all processes to connect, after the prepared data set is ready', bounds=(1, 10**6)
    )
    heartbeat_timeout: int = setting(
        15, 'a process without a heartbeat for so many seconds is lost, and the others exit', bounds=(1, 10**6)
    )
    watchdog_timeout: int = setting(
        600,
        'a process without a step, evaluated batch or checkpoint for so many seconds exits',
        bounds=(1, 10**6),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of an experiment, validated: what config.resolve() returns."""

    seed: int = setting(0, 'seed of weights, batches, augmentation and dropout', bounds=(0, 2**32 - 1))
    cpu_tuning: bool = setting(
        True, 'use an XLA flag and allocator settings that make a CPU faster; see runtime/backend.py'
    )
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    distributed: DistributedConfig

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as nested dicts, the content of config.json."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of the schema.

    Attributes:
      kind: its type, without None; a generic type for a tuple.
      default: its default; None if `is_from_preset`.
      is_from_preset: whether its default is the value of the preset.
      about: see About.
    """

    kind: Any
    default: Any
    is_from_preset: bool
    about: About

    @property
    def accepts_none(self) -> bool:
        """Whether the value may be None in a config file or on the command line."""
        return self.default is None


def _settings(group: type, prefix: str = '') -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    kinds = typing.get_type_hints(group)
    for each in dataclasses.fields(group):
        kind = kinds[each.name]
        if dataclasses.is_dataclass(kind):
            found |= _settings(kinds[each.name], f'{prefix}{each.name}.')
            continue
        is_from_preset = each.default is dataclasses.MISSING
        default = None if is_from_preset else each.default
        kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
        found[prefix + each.name] = Setting(kind, default, is_from_preset, each.metadata['about'])
    return found


SETTINGS = _settings(Config)  # all fields by dotted name


_DURATION = re.compile(r'(\d{1,12}(?:\.\d{1,12})?)\s*(steps?|epochs?|images?)?')


def duration_in_steps(duration: str, *, batch_size: int, examples: int) -> int:
    """Converts `duration` ('5 epochs', '100 steps', '1000 images' or '100') to whole steps.

    A positive duration is at least one step. Raises ConfigError: the text has another form.
    """
    match = _DURATION.fullmatch(duration.strip())
    if not match:
        raise ConfigError(f"{duration!r} is no duration; write for example '5 epochs', '100 steps' or '1000 images'")
    count, unit = float(match[1]), (match[2] or 'steps').rstrip('s')
    steps = count * {'step': 1, 'epoch': examples / batch_size, 'image': 1 / batch_size}[unit]
    return max(1, round(steps)) if count else 0


def total_steps(train: TrainConfig, examples: int) -> int:
    """Returns the length of the run in steps, for a training set of `examples` images."""
    if train.steps is not None:
        return train.steps
    return duration_in_steps(f'{train.epochs:f} epochs', batch_size=train.batch_size, examples=examples)


def get_by_path(config: object, field: str) -> Any:
    """Returns the value of the field with the dotted name `field` of `config`, a Config or a ConfigDict."""
    return operator.attrgetter(field)(config)


# Maps the field names of version 0.1 to the current names, for runs of that version and overrides by an old name.
RENAMED = {
    'model.exchange': 'model.cross_tower',
    'model.unshared': 'model.locally_connected',
    'model.after_conv': 'model.conv_ops',
    'model.spatial_norm_size': 'model.spatial_lrn_size',
    'model.spatial_norm_alpha': 'model.spatial_lrn_alpha',
    'model.pool_overhang': 'model.pool_ceil_mode',
    'model.dropout_before': 'model.dropout_on_inputs_of',
    'data.max_bad': 'data.max_corrupt_fraction',
    'data.crop_chunk': 'data.crop_group_size',
    'data.color_until': 'data.color_augmentation_until',
    'data.mean_window': 'data.mean_crop',
    'data.divisor': 'data.std',
    'data.threads': 'data.reader_threads',
    'optimizer.weight_decays': 'optimizer.layer_weight_decay',
    'optimizer.bias_decay': 'optimizer.decay_biases',
    'optimizer.layer_rates': 'optimizer.lr_overrides',
    'optimizer.divisor': 'optimizer.decay_factor',
    'optimizer.drops': 'optimizer.milestones',
    'optimizer.max_drops': 'optimizer.max_decays',
    'optimizer.power': 'optimizer.poly_power',
    'train.micro_batches': 'train.grad_accum_steps',
    'train.goal_error': 'train.target_error',
    'mesh.gradient_dtype': 'mesh.grad_allreduce_dtype',
    'distributed.start_timeout': 'distributed.initialization_timeout',
    'distributed.progress_timeout': 'distributed.watchdog_timeout',
}
RENAMED_VALUES = {
    'model.initializer': {'xavier': 'glorot_uniform', 'he': 'he_normal', 'torch': 'torch_default'},
    'data.mean_crop': {'window': 'matching', 'centre': 'center'},
}
