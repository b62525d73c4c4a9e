"""The parts of a modern training recipe: each added to a base, all together, and all except one, on two data sets.

    python launch.py --config=configs/modern.py:photos --sweep=all --sweep_jobs=2 --workdir=runs/modern
    alexnet report runs/modern

DATA       base row                          seeds   rows
photos     configs/quickstart.py             5       base, + each of 7 parts, all, all - each of 7 parts
imagenet   configs/imagenet.py:torchvision   1       the same; the base has crops of 224 out of 256 pixels

Hardware and time: docs/ablations.md for `photos`, on two CPU cores. The sweep on ImageNet was not run here. The
strengths of the parts are common values for ImageNet and milder ones for `photos`, whose runs have 1,600 steps; they
were chosen before the runs, and not by their results.
"""

from alexnet_jax import config_files
from alexnet_jax.config import ConfigError
from alexnet_jax.sweep import Variant, seeds

BASES = {'photos': 'quickstart', 'imagenet': 'imagenet:torchvision'}
SEEDS = {'photos': 5, 'imagenet': 1}
# By data set and part: the fields that the part sets.
PARTS: dict[str, dict[str, dict[str, object]]] = {
    'photos': {
        'cosine': {'optimizer.schedule': 'cosine'},
        'label_smoothing': {'train.label_smoothing': 0.1},
        # At least a quarter of the image: 36 of 72 pixels are scaled up to 64, whereas 0.08 would be 20 pixels.
        'resized_crop': {'data.crop_scale': (0.25, 1.0)},
        'mixup': {'train.mixup': 0.2},
        'cutmix': {'train.cutmix': 1.0},
        'random_erasing': {'data.random_erasing': 0.25},
        # The average is over about 100 steps, one epoch of the run.
        'ema': {'train.ema_decay': 0.99},
    },
    'imagenet': {
        'cosine': {'optimizer.schedule': 'cosine', 'optimizer.warmup': '5 epochs'},
        'label_smoothing': {'train.label_smoothing': 0.1},
        'resized_crop': {'data.crop_scale': (0.08, 1.0)},
        'mixup': {'train.mixup': 0.2},
        'cutmix': {'train.cutmix': 1.0},
        'random_erasing': {'data.random_erasing': 0.1},
        # The average is over about 10,000 steps, two epochs of the run.
        'ema': {'train.ema_decay': 0.9999},
    },
}
# imgclsmob's AlexNet-b, 39.30 and 17.05 %, against torchvision's 43.478 and 20.934 %.
PUBLISHED = (-4.18, -3.88)
SOURCE = (
    'AlexNet-b of imgclsmob against torchvision, the same network, ILSVRC-2012 validation, one view; which parts of the'
    ' recipe were used is not published'
)


def get_config(data: str = 'photos'):
    """Returns the settings of the base row."""
    if data not in BASES:
        raise ConfigError(f'configs/modern.py:{data}: no such data; there are {", ".join(BASES)}')
    config = config_files.call(BASES[data], 'get_config')
    config.data.crop_scale = None
    return config


def sweep(data: str = 'photos') -> list[Variant]:
    """Returns all rows with all seeds."""
    get_config(data)
    parts = PARTS[data]
    rows = [Variant('base'), *(Variant(name, fields) for name, fields in parts.items())]
    rows.append(Variant('all', _together(parts), PUBLISHED, SOURCE))
    for name in parts:
        others = {other: fields for other, fields in parts.items() if other != name}
        rows.append(Variant(f'all_without_{name}', _together(others)))
    return seeds(rows, SEEDS[data])


def _together(parts: dict[str, dict[str, object]]) -> dict[str, object]:
    return {field: value for fields in parts.values() for field, value in fields.items()}
