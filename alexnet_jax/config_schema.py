"""The settings of an experiment as frozen, hashable dataclasses, one per group of fields.

The dataclasses are the schema: config.default_config() makes the editable form from their fields and defaults. This
module imports neither jax nor numpy.
"""

import dataclasses
import operator
import re
from typing import Any


class ConfigError(ValueError):
    """A setting is invalid; the message is one line with the field, its value and the nearest valid value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network of section 3 of the paper. Fields without a default take the value of the `preset`.

    Per-layer fields have one value per layer, conv1 to fc8 (`conv_ops` and `kernel_sizes`: conv1 to conv5; `widths`:
    conv1 to fc7, because `num_classes` is the width of fc8).
    """

    preset: str = 'paper'  # a key of presets.PRESETS
    widths: tuple[int, ...]  # feature maps or units; 0 removes the layer
    kernel_sizes: tuple[int, ...]
    conv1_stride: int
    conv1_padding: tuple[int, int]  # (before, after), such as (0, 3) for 224 pixels or (0, 0) for 227
    locally_connected: tuple[str, ...]  # convolutions with separate weights at each pixel
    towers: int
    cross_tower: tuple[str, ...]  # layers that read the features of all towers; the others read only their own
    num_classes: int
    activation: str  # relu | tanh
    conv_ops: tuple[str, ...]  # operations after each convolution, in order: activation lrn spatial_lrn batch_norm pool
    lrn: bool  # local response normalization; False removes the operation from `conv_ops`
    lrn_size: int  # n
    lrn_k: float
    lrn_alpha: float  # multiplies the sum of squares over the window, not the mean
    lrn_beta: float
    lrn_across_towers: bool
    spatial_lrn_size: int
    spatial_lrn_alpha: float
    overlapping_pool: bool  # True: windows of 3 with stride 2; False: windows of 2
    pool_ceil_mode: bool  # whether to pool a last window that extends over the edge
    dropout: float
    dropout_on_inputs_of: tuple[str, ...]  # the layers whose inputs are dropped
    inverted_dropout: bool  # whether to scale kept units in training instead of at inference
    initializer: str  # normal (kernel_std) | glorot_uniform | he_normal | torch_default
    kernel_std: tuple[float, ...]
    bias_init: tuple[float, ...]
    dtype: str = 'float32'  # dtype of convolutions and matrix products: float32 | bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and their augmentation (section 4.1 of the paper)."""

    source: str = 'tfds:imagenet2012'  # photos | tfds:NAME[:config] | folder:DIR | idx:DIR
    data_dir: str = '~/tensorflow_datasets'  # prepared and TFDS data sets; gs://... for reading
    prepared_dir: str | None = None  # prepared data sets; None: the folder `prepared` in data_dir
    image_size: int = 256  # image side in the prepared data set, in pixels
    channels: int = 3  # 3: gray images get three equal channels; 1: color images become gray
    encoding: str = 'raw'  # encoding of the prepared images: raw | jpeg (an eighth to a sixth of the size)
    class_names: tuple[str, ...] | None = None  # replace the class names of the source
    validation_fraction: float = 0.1  # of the training images, held out if the source has no validation split
    max_corrupt_fraction: float = 0.001  # of unreadable images in preparation, or of corrupt records
    crop_size: int = 224  # side of the network's input, in pixels
    crop: bool = True  # random crops in training; False: center crops
    flip: bool = True  # random horizontal flips in training
    crop_group_size: int = 1  # consecutive images that share a crop and a flip; 32 in the original program
    color: str = 'original'  # color noise: none | original | fb | paper; see augment.py
    color_augmentation_until: str | None = None  # time at which color noise ends, such as '67 epochs'
    mean: str = 'image'  # the mean to subtract: image | channel | none
    mean_crop: str = 'matching'  # crop of the mean image: that of the image (matching) | center
    std: tuple[float, ...] = (1.0,)  # inputs are (pixels - mean) / std; one number, or one per channel
    reader_threads: int = 2  # number of threads that read and decode images


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule (section 5 of the paper) and the learning-rate schedule."""

    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    layer_weight_decay: tuple[float, ...] | None = None  # one per layer, conv1 to fc8; replaces weight_decay
    decay_biases: bool = False  # apply weight decay to biases too
    trust_coefficient: float = 0.0  # trust coefficient of LARS; 0: no LARS
    schedule: str = 'plateau'  # plateau | steps | dexp | poly | constant
    bias_lr_multiplier: float = 1.0
    bias_schedule: str = 'same'  # learning-rate schedule of biases: same (as kernels) | dexp | constant
    # (parameter, start time, learning rate), such as (('conv1/kernel', '67 epochs', 1e-5),)
    lr_overrides: tuple[tuple[str, str, float], ...] = ()
    warmup: str = '0 steps'  # duration of the linear warmup from 0
    decay_factor: float = 10.0  # each decay divides the learning rate by this number
    milestones: tuple[str, ...] = ('25 epochs', '51 epochs', '79 epochs')  # times of the decays of schedule 'steps'
    patience: int = 3  # evaluations without a new lowest error before a decay; for schedule 'plateau'
    max_decays: int = 3  # for schedule 'plateau'
    dexp_factor: float = 250.0  # first learning rate / last learning rate; for schedule 'dexp'
    dexp_parts: int = 4  # number of equal parts of the run with one learning rate each; for schedule 'dexp'
    bias_dexp_factor: float = 10.0  # like dexp_factor, for bias_schedule 'dexp'
    bias_dexp_parts: int = 2  # like dexp_parts, for bias_schedule 'dexp'
    poly_power: float = 2.0  # exponent of the remaining fraction of the run; for schedule 'poly'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the run, its batches, and the conditions that end the run early."""

    batch_size: int = 128  # global batch size, over all devices
    grad_accum_steps: int = 1  # gradient accumulation: micro-batches per step on each device
    remat: bool = False  # rematerialization: recompute convolutions in the backward pass to save memory
    epochs: float = 90.0
    steps: int | None = None  # replaces epochs, unless None
    log_every: str = '50 steps'
    target_error: float = 0.0  # end when the mean top-1 training error over log_every steps is below; 0: never
    stall_after: str = '5000 steps'  # time from which the loss is compared with ln(classes)
    stall_action: str = 'warn'  # reaction to a stalled loss: warn | stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the validation images."""

    every: str = '1 epoch'
    views: int = 10  # 1 | 10, for the final evaluation; earlier evaluations use the center view
    batch_size: int = 128  # rounded up to a multiple of the number of batch shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: str = '1 epoch'
    keep: int = 1  # number of newest checkpoints; the best is also kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh `data` x `model`, and what is sharded over it; see docs/devices.md."""

    layout: str = 'towers'  # towers | data | hybrid
    data: int = -1  # devices along the data-parallel axis; -1: number of all devices / `model`
    model: int = 1  # devices along the axis that shards the towers, or in `hybrid` the dense layers
    shard_optimizer: bool = False  # shard the velocity buffers and their update over `data`
    grad_allreduce_dtype: str = 'float32'  # dtype of gradients in communication: float32 | bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Time limits of runs with several processes, in seconds."""

    initialization_timeout: int = 300  # for all processes to connect, after the prepared data set is ready
    heartbeat_timeout: int = 15  # a process without a heartbeat for this long is lost, and the others exit
    watchdog_timeout: int = 600  # a process without a step, evaluated batch or checkpoint for this long exits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of an experiment, validated: what config.resolve() returns."""

    seed: int = 0
    cpu_tuning: bool = True  # use an XLA flag and allocator settings that make a CPU faster; see runtime/backend.py
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
