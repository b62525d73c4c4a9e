"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) in JAX: the paper's network, its training and its two-GPU split."""

__version__ = '0.2.0'
