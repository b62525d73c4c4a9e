"""The paper's network at a quarter of its width learns from which of 16 photographs a patch comes.

    python launch.py        (this is the default config; `make demo` runs it)

The images are patches of photographs in scikit-image, so nothing is downloaded. Validation patches come from regions
that no training patch touches.
"""

from alexnet_jax.config import default_config


def get_config():
    """Returns the settings of the quickstart."""
    config = default_config()
    config.model.widths = (24, 64, 96, 96, 64, 1024, 1024)
    config.model.num_classes = 16
    # Units with a quarter of the inputs need larger weights, otherwise activations shrink from layer to layer.
    config.model.kernel_std = (0.05, 0.05, 0.05, 0.05, 0.05, 0.03, 0.03, 0.03)
    config.data.source = 'photos'
    config.data.data_dir = 'data'
    config.data.image_size = 72
    config.data.crop_size = 64
    config.train.batch_size = 64
    config.train.epochs = 16.0
    config.train.log_every = '50 steps'
    config.optimizer.schedule = 'steps'
    config.optimizer.milestones = ('11 epochs', '14 epochs', '15 epochs')
    config.train.stall_after = '3 epochs'
    config.eval.batch_size = 200
    return config
