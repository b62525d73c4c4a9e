"""Figure 1 of the paper: epochs until a four-layer network reaches a given training error, with ReLU and with tanh.

    python launch.py --config=configs/relu_tanh.py:rates --sweep=all --sweep_jobs=2 --workdir=runs/relu_tanh_rates
    python launch.py --config=configs/relu_tanh.py --sweep=all --sweep_jobs=2 --workdir=runs/relu_tanh
    python docs/draw_relu_tanh.py runs/relu_tanh

The network is the paper's (preset cifar10_13pct) at half its width and with a stride of 2 in its first layer. It trains
on the 60,000 images of Fashion-MNIST, because CIFAR-10 could not be downloaded here. As in the paper, there is no
regularization, and each activation has its fastest learning rate. The sweep of `:rates` selects this rate by training
for one epoch with a separate seed. docs/ablations.md has the learning rates, results, hardware and time.
"""

import dataclasses

from alexnet_jax.config import preset_config
from alexnet_jax.sweep import Variant, grid, seeds

RATES = (0.003, 0.01, 0.03, 0.1)


def get_config(part: str = 'seeds'):
    """Returns the settings of both rows, except for activation and learning rate."""
    config = preset_config('cifar10_13pct')
    config.model.conv1_stride = 2
    config.model.widths = (32, 32, 32, 32, 0, 0, 0)
    config.model.kernel_std = (0.05, 0.05, 0.05, 0.05, 0.01, 0.01, 0.01, 0.05)
    config.data.source = 'idx:/usr/share/datasets/fashion-mnist'
    config.data.data_dir = 'data'
    config.data.channels = 1
    config.data.image_size = config.data.crop_size = 28
    config.data.crop = config.data.flip = False
    config.data.std = (64.0,)  # pixels are about 1, so that tanh is not saturated at the start
    config.optimizer.layer_weight_decay = None
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = 'constant'
    config.train.target_error = 0.0 if part == 'rates' else 0.1
    config.train.epochs = 1.0 if part == 'rates' else 20.0
    config.train.log_every = '0.1 epochs'
    config.train.stall_after = '1 epoch'
    config.eval.every = '100 epochs'
    config.eval.views = 1
    config.eval.batch_size = 200
    return config


def sweep(part: str = 'seeds') -> list[Variant]:
    """Returns both activations with five seeds, or with the candidate learning rates."""
    if part == 'rates':
        variants = grid({'model.activation': ('relu', 'tanh'), 'optimizer.learning_rate': RATES})
        return [dataclasses.replace(variant, seed=100) for variant in variants]
    rows = [
        Variant('relu', {'optimizer.learning_rate': 0.03}),
        Variant('tanh', {'model.activation': 'tanh', 'optimizer.learning_rate': 0.03}),
    ]
    return seeds(rows, 5)
