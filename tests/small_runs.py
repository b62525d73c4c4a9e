"""Folders of runs with small networks of random weights, made without training."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax.config import apply_overrides, resolve
from alexnet_jax.data import dataset
from alexnet_jax.data.open_or_prepare import open_or_prepare
from alexnet_jax.inference import trained_model
from alexnet_jax.training.state import build_model
from configs.quickstart import get_config

# Two towers and few layers, for the compiler takes the longest.
SMALL = {
    'model.conv1_stride': 8,
    'model.widths': (8, 0, 0, 0, 16, 0, 32),
    'model.kernel_std': (0.15,) * 8,
    'model.conv_ops': ('activation lrn', '', '', '', 'activation pool'),
    'data.std': (64.0,),
    'eval.batch_size': 48,
}


def small_config(data_dir: str, **fields: Any) -> Any:
    """Of the photographs of the quickstart; `fields` by dotted name, with two underscores for a dot."""
    config = get_config()
    apply_overrides(config, SMALL | {'data.data_dir': data_dir})
    apply_overrides(config, {name.replace('__', '.'): value for name, value in fields.items()})
    return resolve(config)


def store_of(config: Any) -> dataset.PreparedDataset:
    store = open_or_prepare(config, preemption=None)
    assert store is not None
    return store


def make_run(workdir: Path, config: Any) -> str:
    """A run at step 0 with random weights, and the statistics of the photographs."""
    options = {'xla_backend_optimization_level': '2'}  # as in step.init_state()
    params, batch_statistics = jax.device_get(
        jax.jit(build_model(config)[1], compiler_options=options)(jax.random.key(3))
    )
    store = store_of(config)
    trained_model.import_weights_as_run(
        str(workdir), config, params, batch_statistics, store.statistics, store.class_names
    )
    return str(workdir)


def centre(image: np.ndarray, config: Any, statistics: dict[str, np.ndarray]) -> np.ndarray:
    """What the network sees of `image` (S, S, C) uint8 at a test, by NumPy."""
    far = config.data.image_size - config.data.crop_size
    rows = slice(far // 2, far // 2 + config.data.crop_size)
    mean = statistics['mean_image'].astype(np.float32)
    return (image[rows, rows].astype(np.float32) - mean[rows, rows]) / np.float32(config.data.std[0])
