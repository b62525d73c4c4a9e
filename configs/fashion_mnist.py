"""The paper's network at a third of its width on Fashion-MNIST: 70,000 grey images of clothes, 10 classes, 28 pixels.

    python launch.py --config=configs/fashion_mnist.py
    python launch.py --config=configs/fashion_mnist.py --config.data.source=idx:/usr/share/datasets/fashion-mnist

The first lets TFDS download the data (30 MB) and prepare them with TensorFlow (the extra `imagenet`); the second reads
the files of Debian's package dataset-fashion-mnist. Results, hardware and time are in the README.
"""

from alexnet_jax.config import default_config

CLASSES = ('T-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot')


def get_config():
    """Settings for Fashion-MNIST."""
    config = default_config()
    config.model.widths = (32, 96, 160, 160, 96, 1024, 1024)
    config.model.num_classes = 10
    # As in quickstart.py: narrow layers need larger weights, or the signal fades from layer to layer.
    config.model.kernel_std = (0.05, 0.05, 0.05, 0.05, 0.05, 0.03, 0.03, 0.03)
    # At 68 pixels windows of 2 leave 2 x 2 pixels after pool5, windows of 3 just one.
    config.model.overlapping_pool = False
    config.data.source = 'tfds:fashion_mnist'
    config.data.data_dir = 'data'
    config.data.class_names = CLASSES
    config.data.channels = 1
    config.data.image_size = 76  # scaled up, for the first layer's windows are 11 pixels wide
    config.data.crop_size = 68
    config.data.color = 'none'
    config.train.batch_size = 128
    config.train.epochs = 18.0
    config.train.log_every = '100 steps'
    config.optimizer.learning_rate = 0.02
    config.optimizer.schedule = 'poly'
    config.optimizer.poly_power = 1.0
    config.train.stall_after = '1 epoch'
    config.eval.batch_size = 200
    return config
