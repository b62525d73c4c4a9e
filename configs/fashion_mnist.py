"""The paper's network at a third of its width on Fashion-MNIST: 70,000 gray images of clothes, 10 classes, 28 pixels.

    python launch.py --config=configs/fashion_mnist.py
    python launch.py --config=configs/fashion_mnist.py --config.data.source=idx:/usr/share/datasets/fashion-mnist

With the first command TFDS downloads the data (30 MB) and prepares them with TensorFlow (the extra `imagenet`). The
second command reads the files of Debian's package dataset-fashion-mnist. Results, hardware and time are in the README.
"""

from alexnet_jax.config import default_config

# The names in TFDS; the IDX files have only numbers.
CLASSES = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')


def get_config():
    """Returns the settings for Fashion-MNIST."""
    config = default_config()
    config.model.widths = (32, 96, 160, 160, 96, 1024, 1024)
    config.model.num_classes = 10
    # As in quickstart.py: narrow layers need larger weights, otherwise activations shrink from layer to layer.
    config.model.kernel_std = (0.05, 0.05, 0.05, 0.05, 0.05, 0.03, 0.03, 0.03)
    # With crops of 68 pixels, pool5 gives 2 x 2 pixels with windows of 2, but only one pixel with windows of 3.
    config.model.overlapping_pool = False
    config.data.source = 'tfds:fashion_mnist'
    config.data.data_dir = 'data'
    config.data.validation_split = 'test'  # the published errors are those of the test images
    config.data.class_names = CLASSES
    config.data.channels = 1
    config.data.image_size = 76  # scaled up, because the kernels of conv1 are 11 pixels wide
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
