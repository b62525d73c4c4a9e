"""AlexNet on ImageNet (ILSVRC-2012): python launch.py --config=configs/imagenet.py[:PRESET] --config.data.data_dir=D

Put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into D/downloads/manual; the first run prepares 252 GB in D.

PRESET      network and training                               published top-1 / top-5 error, ten views
paper       sections 3 to 5 of the paper as printed (default)  40.7 / 18.2 % (ILSVRC-2012 validation; not run here)

Hardware and time: any; the authors' two GTX 580 took five to six days for 90 epochs.
"""

from alexnet_jax.config import ConfigError, default_config
from alexnet_jax.presets import PRESETS


def get_config(preset: str = 'paper'):
    """Settings of one of the published networks."""
    if preset not in PRESETS:
        raise ConfigError(f'configs/imagenet.py:{preset}: no such preset; there are {", ".join(PRESETS)}')
    config = default_config()
    config.model.preset = preset
    return config
