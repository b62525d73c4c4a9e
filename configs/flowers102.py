"""The paper's network from scratch on Oxford Flowers: 1,020 training and 1,020 validation images, 102 classes.

    python launch.py --config=configs/flowers102.py

TFDS downloads the data (330 MB) in the first run and prepares them with TensorFlow (the extra `imagenet`). This
config was not run here, because the data could not be downloaded. So few images cannot train 58 million weights well
from scratch; the config is an example of a small data set of large images.
Hardware and time: about an hour on two CPU cores, estimated from the speed of the step in docs/benchmarks.md.
"""

from alexnet_jax.config import default_config


def get_config():
    """Returns the settings for Oxford Flowers 102."""
    config = default_config()
    config.model.num_classes = 102
    # With the paper's biases of 1 and weights of 0.01 the loss can stay at ln(102) for thousands of steps, and an epoch
    # has 16 steps.
    config.model.kernel_std = (0.01, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01)
    config.model.bias_init = (0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0)
    config.data.source = 'tfds:oxford_flowers102'
    config.data.data_dir = 'data'
    config.train.batch_size = 64
    config.train.epochs = 100.0
    config.optimizer.patience = 10
    config.train.stall_after = '20 epochs'
    config.eval.every = '2 epochs'
    config.eval.batch_size = 64
    config.checkpoint.every = '10 epochs'
    return config
