"""Fine-tuning of trained weights on images of one's own, after Caffe's recipe for Flickr Style.

    python launch.py --config=configs/finetune.py --init=alexnet-owt-7be5be79.pth --config.data.source=folder:pictures
    python launch.py --config=configs/finetune.py:caffenet --init=runs/caffenet --config.data.source=folder:pictures

The preset after the colon is the network of the weights, torchvision by default. The recipe is that of
models/finetune_flickr_style (solver.prototxt, train_val.prototxt) in Caffe, which starts from bvlc_reference_caffenet
and replaces fc8: learning rate 0.001, fc8 ten times as fast, biases twice as fast as kernels, weight decay 0.0005
without biases, batches of 50 images, crops and flips, and a learning rate divided by 10 after each fifth of the run.
Caffe's 100,000 steps are 62.5 epochs of its 80,000 images; here the lengths are epochs, so that they fit any data set.
The number of classes is that of the data. Hardware and time depend on the data; docs/finetuning.md explains the steps.
"""

from alexnet_jax.config import ConfigError, preset_config
from alexnet_jax.presets import PRESETS


def get_config(preset: str = 'torchvision'):
    """Returns the settings for weights of the network `preset`."""
    if preset not in PRESETS:
        raise ConfigError(f'configs/finetune.py:{preset}: no such preset; there are {", ".join(PRESETS)}')
    config = preset_config(preset)
    config.model.num_classes = 'auto'
    config.data.source = 'folder:pictures'
    config.data.data_dir = 'data'
    config.data.color = 'none'
    config.data.crop_scale = None
    config.data.random_erasing = 0.0
    config.train.label_smoothing = config.train.mixup = config.train.cutmix = config.train.ema_decay = 0.0
    config.train.batch_size = 50
    config.train.epochs = 62.5
    config.train.steps = None
    config.train.stall_after = '10 epochs'
    config.optimizer.learning_rate = 0.001
    config.optimizer.lr_multipliers = (('fc8', 10.0),)
    config.optimizer.lr_overrides = ()
    config.optimizer.bias_lr_multiplier = 2.0
    config.optimizer.bias_schedule = 'same'
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.layer_weight_decay = None
    config.optimizer.decay_biases = False
    config.optimizer.trust_coefficient = 0.0
    config.optimizer.warmup = '0 steps'
    config.optimizer.schedule = 'steps'
    config.optimizer.milestones = ('12.5 epochs', '25 epochs', '37.5 epochs', '50 epochs')
    return config
