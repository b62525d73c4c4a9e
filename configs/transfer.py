"""Fine-tuning against training from scratch: 8 of the 16 photographs first, then the other 8 with few pictures each.

    python launch.py --config=configs/transfer.py:pretrain --sweep=all
    python launch.py --config=configs/transfer.py --sweep=all
    alexnet report runs/transfer

The first sweep trains the network of the quickstart on the first 8 photographs, once per seed. The second sweep trains
on 1, 5 and 50 patches of each of the other 8 photographs: `scratch` from random weights, `finetune` from the weights of
the first sweep with the same seed, and `frozen` from the same weights with fixed convolutions. All rows take the same
number of steps. The validation images are those of the 8 photographs, which no training patch touches. Results,
hardware and time are in docs/finetuning.md.
"""

from alexnet_jax import config_files
from alexnet_jax.sweep import Variant, seeds

SEEDS, PICTURES = 5, (1, 5, 50)
PRETRAINED = 'runs/transfer_pretrain/pretrain'  # where the first command writes
METHODS: dict[str, dict[str, object]] = {
    'scratch': {},
    'finetune': {'optimizer.lr_multipliers': (('fc8', 10.0),), 'optimizer.learning_rate': 0.001},
    'frozen': {'optimizer.lr_multipliers': (('conv*', 0.0),)},
}


def get_config(part: str = 'target'):
    """Returns the settings of the first sweep for `pretrain`, otherwise those of the second sweep."""
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
    """Returns the runs of the first sweep for `pretrain`, otherwise those of the second sweep."""
    if part == 'pretrain':
        return seeds([Variant('pretrain')], SEEDS)
    return [
        Variant(
            f'{method}_{pictures}',
            overrides
            | {'data.source': f'photos:second/{pictures}'}
            | ({} if method == 'scratch' else {'train.init': f'{PRETRAINED}/seed_{seed}'}),
            seed=seed,
        )
        for seed in range(SEEDS)
        for pictures in PICTURES
        for method, overrides in METHODS.items()
    ]
