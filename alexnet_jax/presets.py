"""The published networks as data: what a `model.preset` stands for, field by field.

A preset fills the `model` fields that the configuration leaves empty (None), so single ones can be changed on top.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Section 3 of the paper as printed: ReLU, then normalisation, then pooling; 60,965,224 parameters.
    # Published errors on the ILSVRC-2012 validation set, ten views, one network: top-1 40.7 %, top-5 18.2 % (table 2).
    'paper': {
        'widths': (96, 256, 384, 384, 256, 4096, 4096),  # conv1..conv5, fc6, fc7
        'towers': 2,  # conv2, conv4 and conv5 see only the maps of their own GPU
        'num_classes': 1000,
        'activation': 'relu',
        'lrn': True,
        'lrn_size': 5,  # n
        'lrn_k': 2.0,
        'lrn_alpha': 1e-4,  # times the sum over the window, not its mean
        'lrn_beta': 0.75,
        'overlapping_pool': True,  # windows of 3, stride 2; otherwise windows of 2
        'dropout': 0.5,  # before fc7 and fc8: on the outputs of fc6 and fc7
        'kernel_std': (0.01,) * 8,
        'bias_init': (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    },
}
