"""The ablations of the paper and of the runs behind it, each with the published difference, on any data set here.

    python launch.py --config=configs/ablations.py:photos --sweep=all --sweep_jobs=2 --workdir=runs/ablations
    python -m alexnet_jax.report runs/ablations

DATA      base row                                              seeds   hardware and time
photos    configs/quickstart.py                                   5     two CPU cores; see docs/ablations.md

Published differences are those of ILSVRC, in percentage points, of networks forty times the size and more: a table made
with other data is read beside them, not against them.
"""

from alexnet_jax.sweep import Variant, seeds
from configs import quickstart

SEEDS = {'photos': 5}
NET_148 = 'net #148, without any normalisation, against #145; ILSVRC-2012 validation, ten views'
NET_147 = 'net #147 against #145; ILSVRC-2012 validation, ten views'
HALF = 'net #145 on one GPU against two; ILSVRC-2010 test, ten views; its conv5 is as wide as that of the whole'


def get_config(data: str = 'photos'):
    """Settings of the base row."""
    return {'photos': quickstart.get_config}[data]()


def sweep(data: str = 'photos') -> list[Variant]:
    """All rows with all seeds."""
    c1, c2, c3, c4, c5, f6, f7 = get_config(data).model.widths
    rows = [
        Variant('base'),
        Variant('no_lrn', {'model.lrn': False}, (1.37, 1.15), NET_148),
        Variant('no_overlap', {'model.overlapping_pool': False}, (0.39, 0.30), NET_147),
        Variant('no_dropout', {'model.dropout': 0.0}, note='the paper: "substantial overfitting", without a number'),
        Variant(
            'one_tower', {'model.towers': 1}, note='every layer sees all maps: 1.4 million parameters more in full size'
        ),
        Variant(
            'half',
            {'model.towers': 1, 'model.widths': (c1 // 2, c2 // 2, c3 // 2, c4 // 2, c5, f6, f7)},
            (1.70, 1.23),
            HALF,
        ),
        Variant(
            'tanh',
            {'model.activation': 'tanh'},
            note='at the learning rate of ReLU; the paper compares speed, not errors',
        ),
        Variant('no_color', {'data.color': 'none'}, (1.0, None), 'section 4.1 of the paper: "over 1 %"'),
    ]
    return seeds(rows, SEEDS[data])
