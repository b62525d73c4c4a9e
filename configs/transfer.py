"""Fine-tuning against training from scratch: 8 of the 16 photographs first, then the other 8 with few pictures each.

    python launch.py --config=configs/transfer.py:pretrain --sweep=all --sweep_jobs=2
    python launch.py --config=configs/transfer.py:rates --sweep=all --sweep_jobs=2
    python launch.py --config=configs/transfer.py --sweep=all --sweep_jobs=2 --workdir=runs/transfer
    alexnet report runs/transfer

The first sweep trains the network of the quickstart on the first 8 photographs, once per seed. The last sweep trains on
1, 5 and 50 patches of each of the other 8 photographs: `scratch` from random weights, `finetune` from the weights of
the first sweep with the same seed and ten times the learning rate in fc8, and `frozen` from the same weights with fixed
convolutions. All rows take the same number of steps. The validation images are those of the 8 photographs, whose
regions no training patch touches. The sweep `:rates` selected the learning rates with a separate seed; for `finetune`
the rate 0.01 had the lowest error there, but one of five runs with 1 patch diverged, so the rate is the next, 0.003.
Results, hardware and time are in docs/finetuning.md.
"""

from alexnet_jax import config_files
from alexnet_jax.sweep import Variant, seeds

SEEDS, PICTURES = 5, (1, 5, 50)
PRETRAINED = 'runs/transfer_pretrain/pretrain'  # where the first command writes
MULTIPLIERS = {'scratch': (), 'finetune': (('fc8', 10.0),), 'frozen': (('conv*', 0.0),)}
RATES = {'scratch': (0.003, 0.01, 0.03), 'finetune': (0.001, 0.003, 0.01), 'frozen': (0.003, 0.01)}
BEST_RATES = {'scratch': 0.003, 'finetune': 0.003, 'frozen': 0.01}


def get_config(part: str = 'target'):
    """Returns the settings of the sweep `part`: pretrain, rates or target."""
    config = config_files.call('quickstart', 'get_config')
    config.model.num_classes = 'auto'
    config.data.source = 'photos:first'
    if part != 'pretrain':
        config.data.source = 'photos:second'
        config.train.batch_size = 32
        config.train.steps = 400
        config.optimizer.milestones = ('300 steps',)
        config.train.stall_after = '10000 steps'
        config.eval.every = '200 steps'
        config.checkpoint.every = '400 steps'
        config.eval.views = 1
    return config


def sweep(part: str = 'target') -> list[Variant]:
    """Returns the runs of the sweep `part`: pretrain, rates or target."""
    if part == 'pretrain':
        return seeds([Variant('pretrain')], SEEDS)
    if part == 'rates':
        return [
            _variant(f'{method}_{pictures}_{rate}', method, pictures, rate, 100, weights=0)
            for pictures in (5, 50)
            for method, rates in RATES.items()
            for rate in rates
        ]
    return [
        _variant(f'{method}_{pictures}', method, pictures, rate, seed, weights=seed)
        for seed in range(SEEDS)
        for pictures in PICTURES
        for method, rate in BEST_RATES.items()
    ]


def _variant(name: str, method: str, pictures: int, rate: float, seed: int, weights: int) -> Variant:
    """Returns a run; `weights` is the seed of the first sweep whose weights it starts from, unless from scratch."""
    overrides: dict[str, object] = {
        'data.source': f'photos:second/{pictures}',
        'optimizer.learning_rate': rate,
        'optimizer.lr_multipliers': MULTIPLIERS[method],
    }
    if method != 'scratch':
        overrides['train.init'] = f'{PRETRAINED}/seed_{weights}'
    return Variant(name, overrides, seed=seed)
