"""Oxford Flowers: 1,020 training and 1,020 validation images, 102 classes, from torchvision's weights or from scratch.

    python launch.py --config=configs/flowers102.py
    python launch.py --config=configs/flowers102.py --init=runs/torchvision
    python launch.py --config=configs/flowers102.py:scratch

The first command starts from torchvision's file alexnet-owt-7be5be79.pth in the current folder, with the recipe of
configs/finetune.py; --init names another file or run. So few images cannot train 58 million weights well from scratch;
the last command shows that. TFDS downloads the data (330 MB) in the first run and prepares them with TensorFlow (the
extra `imagenet`). This config was not run here, because neither the data nor the weights could be downloaded.
Hardware and time: about an hour on two CPU cores, estimated from the speed of the step in docs/benchmarks.md.
"""

from alexnet_jax import config_files
from alexnet_jax.config import ConfigError, default_config


def get_config(start: str = 'torchvision'):
    """Returns the settings for Oxford Flowers 102; `start` is torchvision or scratch."""
    if start not in ('torchvision', 'scratch'):
        raise ConfigError(f'configs/flowers102.py:{start}: no such start; there are torchvision and scratch')
    config = _from_scratch() if start == 'scratch' else config_files.call('finetune', 'get_config')
    if start == 'torchvision':
        config.train.init = 'alexnet-owt-7be5be79.pth'
    config.model.num_classes = 102
    config.data.source = 'tfds:oxford_flowers102'
    config.data.data_dir = 'data'
    config.eval.every = '2 epochs'
    config.eval.batch_size = 64
    config.checkpoint.every = '10 epochs'
    return config


def _from_scratch():
    """Returns the paper's network and training with the settings of a small data set."""
    config = default_config()
    # With the paper's biases of 1 and weights of 0.01 the loss can stay at ln(102) for thousands of steps, and an epoch
    # has 16 steps.
    config.model.kernel_std = (0.01, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01)
    config.model.bias_init = (0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0)
    config.train.batch_size = 64
    config.train.epochs = 100.0
    config.optimizer.patience = 10
    config.train.stall_after = '20 epochs'
    return config
