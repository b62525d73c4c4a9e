"""AlexNet on ImageNet (ILSVRC-2012): python launch.py --config=configs/imagenet.py[:PRESET] --config.data.data_dir=D

The first run prepares 262 GB in D, from imagenet2012 as TFDS has prepared it in D, or else from
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in D/downloads/manual.

PRESET          network and training                                published top-1 / top-5 error, views
paper           sections 3 to 5 of the paper as printed (default)   40.7 / 18.2 %, 10 (of krizhevsky2012)
krizhevsky2012  net #145, the source of the paper's tables          40.66 / 18.21 %, 10
half            net #145 on one GPU                                 39.17 / 18.23 %, 10 (ILSVRC-2010)
no_exchange     net #150: only fc8 reads both towers                41.83 / 19.33 %, 10
owt             cuda-convnet2's one-GPU net, 2014                   40.42 / 18.15 %, 10
caffe           BVLC's bvlc_alexnet                                 42.9 / 19.8 %, 1
caffenet        BVLC's bvlc_reference_caffenet                      42.6 / 19.6 %, 1
torchvision     torchvision's alexnet                               43.48 / 20.93 %, 1
modern          torchvision's alexnet with a later recipe           39.30 / 17.05 %, 1 (of a similar recipe)
bn_lars         AlexNet-BN with LARS, batches of 8,192              about 40 % (not verified)
d2l             "Dive into Deep Learning", on Fashion-MNIST         about 12 %, 1
cifar10_13pct   the four-layer net of section 3.3, on CIFAR-10      13 %, 10
cifar10_11pct   the same net with LRN                               11 %, 10

All errors are published results; none was run here. alexnet_jax/presets.py describes the presets.
Hardware and time: not measured; the authors' two GTX 580 GPUs took five to six days for 90 epochs.
"""

from alexnet_jax.config import ConfigError, preset_config
from alexnet_jax.presets import PRESETS


def get_config(preset: str = 'paper'):
    """Returns the settings of a published network."""
    if preset not in PRESETS:
        raise ConfigError(f'configs/imagenet.py:{preset}: no such preset; there are {", ".join(PRESETS)}')
    return preset_config(preset)
