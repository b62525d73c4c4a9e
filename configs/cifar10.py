"""The paper's network at a quarter of its width on CIFAR-10: 60,000 color images of 32 pixels, 10 classes.

    python launch.py --config=configs/cifar10.py

TFDS downloads the data (170 MB) in the first run and prepares them with TensorFlow (the extra `imagenet`). Hardware and
time: about 15 minutes on two CPU cores, estimated from the number of images. This config was not run here, because the
data could not be downloaded. The four-layer networks of section 3.3 of the paper (13 % error without LRN, 11 % with
LRN) are different networks; their presets are cifar10_13pct and cifar10_11pct.
"""

from alexnet_jax.config import default_config


def get_config():
    """Returns the settings for CIFAR-10."""
    config = default_config()
    config.model.widths = (32, 96, 160, 160, 96, 1024, 1024)
    config.model.num_classes = 10
    # As in quickstart.py: narrow layers need larger weights, otherwise activations shrink from layer to layer.
    config.model.kernel_std = (0.05, 0.05, 0.05, 0.05, 0.05, 0.03, 0.03, 0.03)
    config.data.source = 'tfds:cifar10'
    config.data.data_dir = 'data'
    config.data.validation_split = 'test'  # the published errors are those of the test images
    config.data.image_size = 104  # scaled up, because the kernels of conv1 are 11 pixels wide
    config.data.crop_size = 96
    config.train.epochs = 16.0
    config.train.log_every = '100 steps'
    config.optimizer.schedule = 'steps'
    config.optimizer.milestones = ('11 epochs', '14 epochs')
    config.train.stall_after = '1 epoch'
    config.eval.batch_size = 200
    return config
