"""This project's compiled steps on random images in memory, called as in the training loop and in the evaluation."""

import ast
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from alexnet_jax.config import Config, ConfigError, apply_overrides, default_config, resolve
from alexnet_jax.shapes import LAYERS
from benchmarks.runner import fail

RATE = 0.01


def paper_config(batch_size: int, flags: list[str] | None = None, dtype: str = 'float32') -> Config:
    """Returns the configuration of `paper` on one device. Exits with 2 if one of the flags is invalid.

    Args:
      flags: overrides, each '--config.a.b=value'.
    """
    values: dict[str, Any] = {'train.batch_size': batch_size, 'model.dtype': dtype, 'mesh.data': 1}
    config = default_config()
    try:
        for flag in flags or ():
            if not (match := re.fullmatch(r'--config\.([\w.]+)=(.*)', flag)):
                raise ConfigError(f'{flag!r} is not a flag; an override is written --config.a.b=value')
            try:
                values[match[1]] = ast.literal_eval(match[2])
            except (SyntaxError, ValueError):
                values[match[1]] = match[2]
        apply_overrides(config, values)
        return resolve(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


class Project:
    """The steps of one configuration on its mesh. The caller must configure JAX before.

    Args:
      config: a resolved configuration.
    """

    def __init__(self, config: Config):
        import jax

        from alexnet_jax import augment, parallel
        from alexnet_jax.training.eval_step import make_eval_step
        from alexnet_jax.training.state import init_state
        from alexnet_jax.training.train_step import make_train_step

        self.config, self.mesh = config, parallel.make_mesh(config)
        random, data = np.random.default_rng(0), config.data
        batch_size, size, channels = config.train.batch_size, data.image_size, data.channels
        batch = {
            'image': random.integers(0, 256, (batch_size, size, size, channels), np.uint8),
            'label': random.integers(0, config.model.num_classes, batch_size, np.int32),
            'example_id': np.arange(batch_size, dtype=np.uint32),
        }
        sharding = parallel.batch_sharding(self.mesh, config.mesh.layout)
        self.batch = jax.block_until_ready(parallel.make_global_batch(sharding, batch))
        moments = {
            'mean_rgb': np.full(channels, 127.5),
            'mean_image': np.full((size, size, channels), 127.5),
            'eigenvalues': np.full(channels, 5e3),
            'eigenvectors': np.eye(channels),
        }
        self.preprocessing = parallel.replicate(self.mesh, augment.make_preprocess_params(moments, data))
        self.train_step = make_train_step(config, self.mesh)
        self.eval_step = make_eval_step(config, self.mesh, views=1)
        self.state = init_state(config, self.mesh)

    @property
    def train_arguments(self) -> tuple[Any, ...]:
        """Arguments of the train step: the state, which is donated, the batch, learning rates and preprocessing."""
        return self.state, self.batch, self.rates(RATE), self.preprocessing

    @property
    def eval_arguments(self) -> tuple[Any, ...]:
        """Arguments of the evaluation step."""
        return self.state, self.batch, self.preprocessing

    def rates(self, rate: float) -> dict[str, dict[str, np.float32]]:
        """Returns the same learning rate for all kernels and biases."""
        return {name: {kind: np.float32(rate) for kind in ('kernel', 'bias')} for name in LAYERS}

    def train(self) -> float:
        """Runs one training step to completion and returns its loss."""
        import jax

        self.state, metrics = jax.block_until_ready(self.train_step(*self.train_arguments))
        return float(metrics['loss'])

    def forward(self) -> float:
        """Runs one evaluation of the center view to completion and returns the sum of its losses."""
        return float(np.asarray(self.eval_step(*self.eval_arguments))[0])


def project_passes(config: Config) -> dict[str, Callable[[], Any]]:
    """Returns the passes of the project, and `check`, which returns the result of check.worst()."""
    from alexnet_jax.runtime import backend

    if config.cpu_tuning:
        backend.configure_cpu_backend()
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # AssertionError: the platform's package is not installed
        fail(f'jax finds no device for JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS")}; is its package installed?')
    project = Project(config)

    def check() -> tuple[str, float, float]:
        from benchmarks.check import differences, worst

        exact = config.model.precision == 'float32' or (
            config.model.dtype == 'float32' and jax.default_backend() == 'cpu'
        )
        return worst(differences(project), exact)

    return {'train': project.train, 'forward': project.forward, 'check': check}


def project_product(size: int, dtype: str) -> Callable[[], float]:
    """Returns a function that multiplies two `size` x `size` matrices."""
    import jax

    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda matrix: matrix @ matrix)
    return lambda: float(product(matrix)[0, 0])
