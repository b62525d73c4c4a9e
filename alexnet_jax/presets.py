"""The published networks as data: architecture, training recipe and published results of each `model.preset`.

`layers` has one row per layer; `settings` contains the fields of the configuration's `model` that concern the whole
network. `recipe` contains the settings outside `model` that differ from the defaults (section 5 of the paper), by
dotted name; `configs/imagenet.py:NAME` applies them. `published` contains the errors in percent that others reported
(None: unknown), and the numbers of parameters and of multiply-adds per image, computed from the layers.
"""

import dataclasses

from alexnet_jax.shapes import LayerSpec, Settings, layer_fields


@dataclasses.dataclass(frozen=True)
class Published:
    """Published errors in percent with the number of views and their source, and the size of the network."""

    top1_error: float | None
    top5_error: float | None
    views: int | None
    source: str
    parameters: int
    multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published network; the module's docstring describes the attributes."""

    layers: tuple[LayerSpec, ...]
    settings: Settings
    recipe: Settings
    published: Published

    @property
    def model(self) -> Settings:
        """The values of the `model` fields that are None in a configuration."""
        return layer_fields(self.layers) | self.settings


def _replace(layers: tuple[LayerSpec, ...], **changes: Settings) -> tuple[LayerSpec, ...]:
    """Returns `layers` with the fields `changes[name]` of the row `name` replaced."""
    return tuple(dataclasses.replace(row, **changes.get(row.name, {})) for row in layers)


def _replace_biases(layers: tuple[LayerSpec, ...], bias: float) -> tuple[LayerSpec, ...]:
    """Returns `layers` with the initial bias `bias` in place of every initial bias that is not 0."""
    return tuple(dataclasses.replace(row, bias_init=bias if row.bias_init else 0.0) for row in layers)


# Sections 3 to 5 of the paper as printed: two towers, ReLU, then normalization with the sum over 5 maps times 1e-4,
# then pooling; initial biases of 1 in conv2, conv4, conv5, fc6 and fc7. Only the color noise is that of the original
# program, because the printed formula gives noise that exceeds the range of pixels from 0 to 255. The paper's tables
# come from a different network, `krizhevsky2012`.
_PAPER = Preset(
    layers=(
        # The zeros of conv1 are after the image: the windows extend over the right and lower edges.
        LayerSpec('conv1', 96, 11, stride=4, padding=(0, 3), cross_tower=True, ops=('activation', 'lrn', 'pool')),
        LayerSpec('conv2', 256, 5, padding=(2, 2), ops=('activation', 'lrn', 'pool'), bias_init=1.0),
        LayerSpec('conv3', 384, 3, padding=(1, 1), cross_tower=True),
        LayerSpec('conv4', 384, 3, padding=(1, 1), bias_init=1.0),
        LayerSpec('conv5', 256, 3, padding=(1, 1), ops=('activation', 'pool'), bias_init=1.0),
        LayerSpec('fc6', 4096, cross_tower=True, bias_init=1.0),
        LayerSpec('fc7', 4096, cross_tower=True, dropout=True, bias_init=1.0),
        LayerSpec('fc8', 1000, cross_tower=True, dropout=True, ops=()),
    ),
    settings={
        'towers': 2,
        'activation': 'relu',
        'lrn': True,
        'lrn_size': 5,  # n
        'lrn_k': 2.0,
        'lrn_alpha': 1e-4,  # times the sum over the window, not its mean
        'lrn_beta': 0.75,
        'lrn_across_towers': False,
        'spatial_lrn_size': 5,
        'spatial_lrn_alpha': 1e-3 / 25,
        'overlapping_pool': True,  # windows of 3, stride 2; False: windows of 2
        'pool_ceil_mode': False,  # whether to pool a last window that extends over the edge
        'dropout': 0.5,
        'inverted_dropout': False,  # whether to scale kept units in training instead of at inference
        'initializer': 'normal',
    },
    recipe={},
    published=Published(
        40.7, 18.2, 10, 'table 2 of the paper (of net #145), ILSVRC-2012 validation', 60_965_224, 724_406_816
    ),
)

# Net #145 of the original program (layers-145.cfg), whose notes end with the errors of the paper's tables. Layer 1
# normalizes the signed outputs, then pools, then applies ReLU. Layer 2 has a second normalization over the 5 x 5 pixels
# around each pixel. The program divides alpha by the 5 maps, so the effective alpha is 2e-5. The kernels of conv3 to
# conv5 have an initial standard deviation of 0.03. The biases keep the learning rate 0.02. 32 consecutive images share
# a crop and a horizontal flip. The color noise is scaled by standard deviations, and the noisy image is divided by 1.1.
# The noise and the division end at epoch 67, and conv1's kernels continue at the learning rate 1e-5; from epoch 72,
# conv1 is frozen. The authors reduced the learning rate by hand at epochs 25, 51 and 79 of 91.
_KRIZHEVSKY2012 = Preset(
    layers=(
        LayerSpec('conv1', 96, 11, stride=4, padding=(0, 3), cross_tower=True, ops=('lrn', 'pool', 'activation')),
        LayerSpec('conv2', 256, 5, padding=(2, 2), ops=('activation', 'lrn', 'spatial_lrn', 'pool'), bias_init=1.0),
        LayerSpec('conv3', 384, 3, padding=(1, 1), cross_tower=True, kernel_std=0.03),
        LayerSpec('conv4', 384, 3, padding=(1, 1), kernel_std=0.03, bias_init=1.0),
        LayerSpec('conv5', 256, 3, padding=(1, 1), ops=('pool', 'activation'), kernel_std=0.03, bias_init=1.0),
        *_PAPER.layers[5:],
    ),
    settings=_PAPER.settings | {'lrn_alpha': 1e-4 / 5},
    recipe={
        'data.color': 'original',
        'data.color_augmentation_until': '67 epochs',
        'data.crop_group_size': 32,
        'data.mean_crop': 'center',
        'optimizer.schedule': 'steps',
        'optimizer.milestones': ('25 epochs', '51 epochs', '79 epochs'),
        'optimizer.bias_lr_multiplier': 2.0,
        'optimizer.bias_schedule': 'constant',
        'optimizer.lr_overrides': (
            ('conv1/kernel', '67 epochs', 1e-5),
            ('conv1/kernel', '72 epochs', 0.0),
            ('conv1/bias', '72 epochs', 0.0),
        ),
        'train.epochs': 91.0,
    },
    published=Published(40.664, 18.21, 10, 'layer-params-145.cfg, ILSVRC-2012 validation', 60_965_224, 724_406_816),
)

# The same net on one GPU (layers-145-half.cfg): half the kernels in conv1 to conv4, but full conv5 and dense layers, as
# in footnote 2 of the paper. The net was trained on ILSVRC-2010, where the net on two GPUs has 37.5 % and 17.0 %.
_HALF = Preset(
    layers=_replace(
        _KRIZHEVSKY2012.layers,
        conv1={'features': 48},
        conv2={'features': 128},
        conv3={'features': 192},
        conv4={'features': 192},
    ),
    settings=_KRIZHEVSKY2012.settings | {'towers': 1},
    recipe=_KRIZHEVSKY2012.recipe,
    published=Published(39.168, 18.229, 10, 'layer-params-145-half.cfg, ILSVRC-2010 test', 59_798_312, 391_514_384),
)

# Net #150: the towers are separate up to fc8. conv3, fc6 and fc7 have half the inputs.
_NO_EXCHANGE = Preset(
    layers=_replace(
        _KRIZHEVSKY2012.layers,
        conv3={'cross_tower': False},
        fc6={'cross_tower': False},
        fc7={'cross_tower': False},
    ),
    settings=_KRIZHEVSKY2012.settings,
    recipe=_KRIZHEVSKY2012.recipe,
    published=Published(41.83, 19.33, 10, 'notes to net #150, ILSVRC-2012 validation', 33_259_880, 622_383_648),
)

# The one-GPU net of cuda-convnet2 (2014), the basis of torchvision's: one tower, 64-192-384-256-256 maps,
# normalization of conv1's signed outputs. The learning rate decays from 0.01 to 0.01 / 250 in four equal parts of the
# run, and that of biases from 0.02 to 0.002 in two parts. Each image has its own random crop.
_OWT = Preset(
    layers=(
        LayerSpec('conv1', 64, 11, stride=4, padding=(0, 3), cross_tower=True, ops=('lrn', 'pool', 'activation')),
        LayerSpec('conv2', 192, 5, padding=(2, 2), ops=('activation', 'lrn', 'pool'), bias_init=1.0),
        LayerSpec('conv3', 384, 3, padding=(1, 1), cross_tower=True, kernel_std=0.03),
        LayerSpec('conv4', 256, 3, padding=(1, 1), kernel_std=0.03, bias_init=1.0),
        LayerSpec('conv5', 256, 3, padding=(1, 1), ops=('activation', 'pool'), kernel_std=0.03, bias_init=1.0),
        *_PAPER.layers[5:],
    ),
    settings=_KRIZHEVSKY2012.settings | {'towers': 1},
    recipe={
        'data.color': 'original',
        'optimizer.schedule': 'dexp',
        'optimizer.bias_schedule': 'dexp',
        'optimizer.bias_lr_multiplier': 2.0,
        'train.epochs': 90.0,
    },
    published=Published(
        40.42, 18.15, 10, 'TrainingExample.md of cuda-convnet2, ILSVRC-2012 validation', 61_100_840, 714_188_480
    ),
)

# BVLC's bvlc_alexnet for Caffe: images of 227 pixels and no padding, normalization with k = 1 and alpha / 5 over the
# maps of both towers, initial biases of 0.1 ("initialization to 1 gave flat loss"), initial standard deviations of
# 0.005 in fc6 and fc7, inverted dropout, no color noise. The batch size is 256. Biases have twice the learning rate and
# no weight decay.
_CAFFE = Preset(
    layers=_replace(
        _replace_biases(_PAPER.layers, 0.1),
        conv1={'padding': (0, 0)},
        fc6={'kernel_std': 0.005},
        fc7={'kernel_std': 0.005},
    ),
    settings=_PAPER.settings
    | {'lrn_k': 1.0, 'lrn_alpha': 1e-4 / 5, 'lrn_across_towers': True, 'inverted_dropout': True},
    recipe={
        'data.color': 'none',
        'data.crop_size': 227,
        'optimizer.schedule': 'steps',
        'optimizer.milestones': ('100000 steps', '200000 steps', '300000 steps', '400000 steps'),
        'optimizer.bias_lr_multiplier': 2.0,
        'train.batch_size': 256,
        'train.steps': 450_000,
    },
    published=Published(
        42.9, 19.8, 1, "Caffe's model zoo, iteration 360,000, ILSVRC-2012 validation", 60_965_224, 724_406_816
    ),
)

# BVLC's bvlc_reference_caffenet: as `caffe`, with pooling before normalization and initial biases of 1.
_CAFFENET = Preset(
    layers=_replace(
        _replace_biases(_CAFFE.layers, 1.0),
        conv1={'ops': ('activation', 'pool', 'lrn')},
        conv2={'ops': ('activation', 'pool', 'lrn')},
    ),
    settings=_CAFFE.settings,
    recipe=_CAFFE.recipe,
    published=Published(
        42.6, 19.6, 1, "Caffe's model zoo, iteration 310,000, ILSVRC-2012 validation", 60_965_224, 724_406_816
    ),
)

# torchvision's `alexnet`: the maps of `owt`, two zeros on each side of the image, no normalization, dropout before fc6
# and fc7, PyTorch's default initialization, pixels divided by their standard deviations. Training crops have random
# sizes and aspect ratios and are scaled to 224 pixels. torchvision crops the whole image, and this preset the central
# square that the prepared data set has.
_TORCHVISION = Preset(
    layers=_replace(
        _replace_biases(_OWT.layers, 0.0),
        conv1={'padding': (2, 2)},
        fc6={'dropout': True},
        fc8={'dropout': False},
    ),
    settings=_OWT.settings | {'lrn': False, 'inverted_dropout': True, 'initializer': 'torch_default'},
    recipe={
        'data.color': 'none',
        'data.crop_scale': (0.08, 1.0),
        'data.mean': 'channel',
        'data.std': (58.395, 57.12, 57.375),
        'optimizer.schedule': 'steps',
        'optimizer.milestones': ('30 epochs', '60 epochs'),
        'optimizer.weight_decay': 1e-4,
        'optimizer.decay_biases': True,
        'train.batch_size': 256,
    },
    published=Published(
        43.478, 20.934, 1, "torchvision's documentation, ILSVRC-2012 validation", 61_100_840, 714_188_480
    ),
)

# torchvision's network with parts of later recipes: cosine schedule after five epochs of warmup, label smoothing, mild
# mixup, and the average of the weights over about two epochs. CutMix and random erasing are off, because strong mixing
# raises the error of small networks in short runs. The published error is that of imgclsmob's AlexNet-b, the same
# network; its program offers label smoothing and mixup, but which parts that training used is not published.
_MODERN = Preset(
    layers=_TORCHVISION.layers,
    settings=_TORCHVISION.settings,
    recipe={name: value for name, value in _TORCHVISION.recipe.items() if name != 'optimizer.milestones'}
    | {
        'optimizer.schedule': 'cosine',
        'optimizer.warmup': '5 epochs',
        'train.label_smoothing': 0.1,
        'train.mixup': 0.2,
        'train.ema_decay': 0.9999,
    },
    published=Published(
        39.30, 17.05, 1, 'AlexNet-b of imgclsmob, whose exact recipe is not published', 61_100_840, 714_188_480
    ),
)

# "Dive into Deep Learning": one tower, gray images of Fashion-MNIST scaled to 224 pixels, one zero on each side, Xavier
# initialization, plain SGD. The book's readers report test errors of about 12 % after ten epochs.
_D2L = Preset(
    layers=_replace(_replace_biases(_PAPER.layers, 0.0), conv1={'padding': (1, 1)}, fc8={'features': 10}),
    settings=_PAPER.settings | {'towers': 1, 'lrn': False, 'inverted_dropout': True, 'initializer': 'glorot_uniform'},
    recipe={
        'data.source': 'tfds:fashion_mnist',
        'data.channels': 1,
        'data.image_size': 224,
        'data.crop': False,
        'data.flip': False,
        'data.color': 'none',
        'data.mean': 'none',
        'data.std': (255.0,),
        'optimizer.schedule': 'constant',
        'optimizer.momentum': 0.0,
        'optimizer.weight_decay': 0.0,
        'train.epochs': 10.0,
        'eval.views': 1,
    },
    published=Published(12.0, None, 1, "runs of the book's readers, Fashion-MNIST test", 46_764_746, 938_146_176),
)

# AlexNet-BN, the demonstration of LARS on large batches (nvcaffe). Batch normalization without scale and bias replaces
# response normalization, after pool1, pool2 and the ReLUs of conv3 and conv4; images of 227 pixels are divided by 256.
# Batch size 8,192, learning rate 10, trust coefficient 0.001, four epochs of warmup, then quadratic decay. LARS scales
# the weight decay too, as in the LARS paper but not in nvcaffe. The initialization is that of `caffe`; nvcaffe's biases
# are 0.01 and 0.1. The error is approximately that of the LARS paper's table and was not verified.
_BN_LARS = Preset(
    layers=_replace(
        _CAFFE.layers,
        conv1={'ops': ('activation', 'pool', 'batch_norm')},
        conv2={'ops': ('activation', 'pool', 'batch_norm')},
        conv3={'ops': ('activation', 'batch_norm')},
        conv4={'ops': ('activation', 'batch_norm')},
    ),
    settings=_CAFFE.settings,
    recipe={
        'data.color': 'none',
        'data.crop_size': 227,
        'data.std': (256.0,),
        'optimizer.schedule': 'poly',
        'optimizer.poly_power': 2.0,
        'optimizer.learning_rate': 10.0,
        'optimizer.trust_coefficient': 0.001,
        'optimizer.bias_lr_multiplier': 0.064,  # gives 0.64, usual for this batch size: LARS does not scale biases
        'optimizer.warmup': '600 steps',
        'train.batch_size': 8192,
        'train.epochs': 100.0,
    },
    published=Published(40.0, None, 1, 'You, Gitman, Ginsburg 2017, not verified', 60_965_224, 724_406_816),
)

# The four-layer nets of the paper's sections 3.1 and 3.3 (layers-conv-local-13pct.cfg and -11pct.cfg of cuda-convnet):
# crops of 24 of 32 pixels, two convolutions, two layers with separate weights at each pixel, and the logits. The second
# net has response normalization over 5 maps. Convolutions have no weight decay. The authors trained 300 epochs on four
# fifths of the images and 150 on all, then 10 each at a tenth and a hundredth of the learning rate.
_CIFAR10_13PCT = Preset(
    layers=(
        LayerSpec('conv1', 64, 5, padding=(2, 2), cross_tower=True, ops=('activation', 'pool'), kernel_std=0.0001),
        LayerSpec('conv2', 64, 5, padding=(2, 2), ops=('activation', 'pool')),
        LayerSpec('conv3', 32, 3, padding=(1, 1), cross_tower=True, locally_connected=True, kernel_std=0.04),
        LayerSpec('conv4', 32, 3, padding=(1, 1), locally_connected=True, kernel_std=0.04),
        LayerSpec('conv5', 0, 3, padding=(1, 1), ops=()),  # 0 features: the network has no such layer
        LayerSpec('fc6', 0, cross_tower=True),
        LayerSpec('fc7', 0, cross_tower=True, dropout=True),
        LayerSpec('fc8', 10, cross_tower=True, dropout=True, ops=()),
    ),
    settings=_PAPER.settings
    | {'towers': 1, 'lrn': False, 'lrn_k': 1.0, 'lrn_alpha': 1e-3 / 5, 'pool_ceil_mode': True, 'dropout': 0.0},
    recipe={
        'data.source': 'tfds:cifar10',
        'data.image_size': 32,
        'data.crop_size': 24,
        'data.color': 'none',
        'optimizer.learning_rate': 0.001,
        'optimizer.bias_lr_multiplier': 2.0,
        'optimizer.bias_schedule': 'constant',
        'optimizer.layer_weight_decay': (0.0, 0.0, 0.004, 0.004, 0.0, 0.0, 0.0, 0.004),
        'optimizer.schedule': 'steps',
        'optimizer.milestones': ('450 epochs', '460 epochs'),
        'train.epochs': 470.0,
    },
    published=Published(13.0, None, 10, 'section 3.3 of the paper, CIFAR-10 test', 1_116_490, 18_517_248),
)
_CIFAR10_11PCT = Preset(
    layers=_replace(
        _CIFAR10_13PCT.layers,
        conv1={'ops': ('activation', 'lrn', 'pool')},
        conv2={'ops': ('activation', 'lrn', 'pool')},
    ),
    settings=_CIFAR10_13PCT.settings | {'lrn': True},
    recipe=_CIFAR10_13PCT.recipe,
    published=Published(11.0, None, 10, 'section 3.3 of the paper, CIFAR-10 test', 1_116_490, 18_517_248),
)

PRESETS: dict[str, Preset] = {
    'paper': _PAPER,
    'krizhevsky2012': _KRIZHEVSKY2012,
    'half': _HALF,
    'no_exchange': _NO_EXCHANGE,
    'owt': _OWT,
    'caffe': _CAFFE,
    'caffenet': _CAFFENET,
    'torchvision': _TORCHVISION,
    'modern': _MODERN,
    'd2l': _D2L,
    'bn_lars': _BN_LARS,
    'cifar10_13pct': _CIFAR10_13PCT,
    'cifar10_11pct': _CIFAR10_11PCT,
}
