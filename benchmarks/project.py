"""This project's compiled steps on random images in memory, called as the training loop and the evaluation do."""

from typing import Any

import numpy as np

from alexnet_jax.config import Config

RATE = 0.01


class Project:
    """The steps of one configuration on its mesh. JAX must be configured before.

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
        # parallel.replicate() may be missing in a checkout that presets.py compares with.
        everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        self.preprocessing = jax.device_put(augment.make_preprocess_params(moments, data), everywhere)
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
        from alexnet_jax.shapes import LAYERS

        return {name: {kind: np.float32(rate) for kind in ('kernel', 'bias')} for name in LAYERS}

    def train(self) -> float:
        """Runs one training step to completion and returns its loss."""
        import jax

        self.state, metrics = jax.block_until_ready(self.train_step(*self.train_arguments))
        return float(metrics['loss'])

    def forward(self) -> float:
        """Runs one evaluation of the center view to completion and returns the sum of its losses."""
        return float(np.asarray(self.eval_step(*self.eval_arguments))[0])
