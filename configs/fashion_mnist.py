"""The paper's network at a quarter of its width on Fashion-MNIST: 70,000 grey images of clothes, 10 classes."""

from alexnet_jax.config import default_config

CLASSES = ('T-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot')


def get_config():
    """Settings for Fashion-MNIST."""
    config = default_config()
    config.model.widths = (24, 64, 96, 96, 64, 1024, 1024)
    config.model.num_classes = 10
    # As in quickstart.py: narrow layers need larger weights, or the signal fades from layer to layer.
    config.model.kernel_std = (0.05, 0.05, 0.05, 0.05, 0.05, 0.03, 0.03, 0.03)
    config.data.source = 'tfds:fashion_mnist'
    config.data.data_dir = 'data'
    config.data.class_names = CLASSES
    config.data.channels = 1
    config.data.image_size = 72
    config.data.crop_size = 64
    config.data.color = 'none'
    config.train.batch_size = 128
    config.train.epochs = 16.0
    config.train.log_every = '100 steps'
    config.optimizer.schedule = 'steps'
    config.optimizer.drops = ('10 epochs', '13 epochs', '15 epochs')
    config.eval.batch_size = 200
    return config
