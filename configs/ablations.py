"""Ablations of the paper and of the runs behind it, with the published differences, on one of three data sets.

    python launch.py --config=configs/ablations.py:photos --sweep=all --sweep_jobs=2 --workdir=runs/ablations
    alexnet report runs/ablations

DATA           base row                                     seeds   rows
photos         configs/quickstart.py                          5     LRN, overlap, dropout, towers, tanh, color
fashion_mnist  configs/fashion_mnist.py                       5     no overlap or color; plus depth, cross_tower, batch
imagenet       configs/imagenet.py:krizhevsky2012             1     all

Hardware and time: docs/ablations.md for `photos`, on two CPU cores. The other sweeps were not run here. One run of
`fashion_mnist` takes 15 to 18 minutes on two CPU cores; one run of `imagenet` takes as long as training the network.
cluster/slurm.sh runs the sweep as a SLURM array. Published differences are percentage points on ILSVRC, for networks
forty times larger than the small ones here, so the results on other data may differ.
"""

from alexnet_jax import config_files
from alexnet_jax.config import ConfigError, get_by_path
from alexnet_jax.presets import PRESETS
from alexnet_jax.sweep import Variant, seeds

BASES = {'photos': 'quickstart', 'fashion_mnist': 'fashion_mnist', 'imagenet': 'imagenet:krizhevsky2012'}
SEEDS = {'photos': 5, 'fashion_mnist': 5, 'imagenet': 1}
VALIDATION = 'ILSVRC-2012 validation, ten views'
MIDDLE = 'section 7 of the paper: "about 2 %" for any of the middle layers'


def get_config(data: str = 'photos'):
    """Returns the settings of the base row."""
    if data not in BASES:
        raise ConfigError(f'configs/ablations.py:{data}: no such data; there are {", ".join(BASES)}')
    return config_files.call(BASES[data], 'get_config')


def sweep(data: str = 'photos') -> list[Variant]:
    """Returns all rows with all seeds."""
    config = get_config(data)
    rows = _paper_rows(config)
    if data == 'fashion_mnist':
        rows = [row for row in rows if row.name not in ('no_color', 'no_overlap')]  # the base row has neither
    if data == 'imagenet':
        rows += _lrn_rows()
    if data != 'photos':
        rows += _depth_rows(config) + _cross_tower_rows() + _batch_rows(config, (256, 1024, 8192))
    return seeds(rows, SEEDS[data])


def _model(config, name):
    """Returns a field of `model`, from the preset if the configuration leaves it empty."""
    value = get_by_path(config, f'model.{name}')
    return PRESETS[config.model.preset].model[name] if value is None else value


def _paper_rows(config) -> list[Variant]:
    c1, c2, c3, c4, c5, f6, f7 = _model(config, 'widths')
    half = (c1 // 2, c2 // 2, c3 // 2, c4 // 2, c5, f6, f7)
    return [
        Variant('base'),
        Variant(
            'no_lrn',
            {'model.lrn': False},
            (1.37, 1.15),
            f'net #148 against #145, {VALIDATION}; both LRNs are removed',
        ),
        Variant('no_overlap', {'model.overlapping_pool': False}, (0.39, 0.30), f'net #147 against #145, {VALIDATION}'),
        Variant('no_dropout', {'model.dropout': 0.0}, note='the paper: "substantial overfitting", without a number'),
        Variant('one_tower', {'model.towers': 1}, note='every layer reads all feature maps, which needs more weights'),
        Variant(
            'half',
            {'model.towers': 1, 'model.widths': half},
            (1.70, 1.23),
            'net #145 on one GPU against two, ILSVRC-2010 test, ten views; conv5 keeps its full width',
        ),
        Variant(
            'tanh',
            {'model.activation': 'tanh', 'model.bias_init': (0.0,) * 8},
            note='biases of 0, because biases of 1 saturate tanh; the paper compares speeds, not errors',
        ),
        Variant('no_color', {'data.color': 'none'}, (1.0, None), 'section 4.1 of the paper: "over 1 %"'),
    ]


def _lrn_rows() -> list[Variant]:
    layer1, layer2, *others = PRESETS['krizhevsky2012'].model['conv_ops']
    return [
        Variant(
            'no_spatial_norm',
            {'model.conv_ops': (layer1, 'activation lrn pool', *others)},
            note='the second LRN of conv2 is removed; no run of the original isolates it',
        ),
        Variant(
            'no_layer2_norm',
            {'model.conv_ops': (layer1, 'activation pool', *others)},
            (-0.03, 0.02),
            f'net #167 against the mean of its siblings #169, #170, #171, {VALIDATION}',
        ),
        Variant(
            'lrn_after_pool',
            {'model.conv_ops': ('pool lrn activation', layer2, *others)},
            (0.11, 0.14),
            f'net #120 against #131, {VALIDATION}',
        ),
    ]


def _depth_rows(config) -> list[Variant]:
    widths = list(_model(config, 'widths'))

    def without(layer: int) -> tuple[int, ...]:
        return (*widths[:layer], 0, *widths[layer + 1 :])

    return [
        # Without conv3, conv4 reads both towers.
        Variant(
            'no_conv3',
            {'model.widths': without(2), 'model.cross_tower': ('conv4', 'fc6', 'fc7', 'fc8')},
            (2.0, None),
            MIDDLE,
        ),
        Variant('no_conv4', {'model.widths': without(3)}, (2.0, None), MIDDLE),
        Variant('no_conv5', {'model.widths': without(4)}, (2.0, None), MIDDLE),
        Variant('no_fc7', {'model.widths': without(6)}, note='the paper removed middle layers, not this one'),
    ]


def _cross_tower_rows() -> list[Variant]:
    return [
        Variant('no_exchange', {'model.cross_tower': ('fc8',)}, (1.17, 1.12), f'net #150 against #145, {VALIDATION}'),
        Variant(
            'exchange_at_conv4',
            {'model.cross_tower': ('conv4', 'fc6', 'fc7', 'fc8')},
            note='notes to nets #132 and #133: worse, without a number',
        ),
    ]


def _batch_rows(config, batch_sizes) -> list[Variant]:
    """Returns rows of larger batches, without and with LARS.

    Without LARS, the learning rate is proportional to the batch size. With LARS, it is proportional to the square root
    of the batch size, and 10 for 8,192 images.
    """
    rate, size = config.optimizer.learning_rate, config.train.batch_size
    rows = []
    for batch_size in batch_sizes:
        # The learning rates in lr_overrides are for the batch size of the base.
        scaled = {'train.batch_size': batch_size, 'optimizer.learning_rate': rate * batch_size / size}
        scaled['optimizer.lr_overrides'] = ()
        warmup = {} if batch_size <= 256 else {'optimizer.warmup': '5 epochs'}
        same = batch_size == 256
        rows.append(
            Variant(
                f'batch_{batch_size}',
                scaled | warmup,
                (0.0, 0.0) if same else None,
                'net #170 with batches of 256: "matches exactly"' if same else '',
            )
        )
        lars_rate = 10 * (batch_size / 8192) ** 0.5
        lars = {
            'optimizer.trust_coefficient': 0.001,
            'optimizer.learning_rate': lars_rate,
            # LARS does not scale biases: they keep the learning rate of the row without LARS.
            'optimizer.bias_schedule': 'same',
            'optimizer.bias_lr_multiplier': rate * batch_size / size / lars_rate,
            'optimizer.warmup': '5 epochs',
            'optimizer.schedule': 'poly',
            'optimizer.poly_power': 2.0,
        }
        rows.append(Variant(f'batch_{batch_size}_lars', scaled | lars))
    return rows
