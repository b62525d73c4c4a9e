"""The paper's network at a quarter of its width on CIFAR-10: 60,000 colour images of 32 pixels, 10 classes.

    python launch.py --config=configs/cifar10.py

TFDS downloads the data (170 MB) at the first run, and prepares them with TensorFlow (the extra `imagenet`). Hardware
and time: about 15 minutes on two CPU cores, judging by the number of images; it was not run here, where nothing can be
downloaded. The four-layer networks of the paper's section 3.3 (13 % error without and 11 % with response
normalisation) are other networks than this.
"""

from alexnet_jax.config import default_config


def get_config():
    """Settings for CIFAR-10."""
    config = default_config()
    config.model.widths = (32, 96, 160, 160, 96, 1024, 1024)
    config.model.num_classes = 10
    # As in quickstart.py: narrow layers need larger weights, or the signal fades from layer to layer.
    config.model.kernel_std = (0.05, 0.05, 0.05, 0.05, 0.05, 0.03, 0.03, 0.03)
    config.data.source = 'tfds:cifar10'
    config.data.data_dir = 'data'
    config.data.image_size = 104  # scaled up, for the first layer's windows are 11 pixels wide
    config.data.crop_size = 96
    config.train.epochs = 16.0
    config.train.log_every = '100 steps'
    config.optimizer.schedule = 'steps'
    config.optimizer.milestones = ('11 epochs', '14 epochs')
    config.train.stall_after = '1 epoch'
    config.eval.batch_size = 200
    return config
