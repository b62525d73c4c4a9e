"""Run folders of small networks with random weights, written without training."""

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

# Few layers, because compiling takes most of the time.
SMALL = {
    'model.conv1_stride': 8,
    'model.widths': (8, 0, 0, 0, 16, 0, 32),
    'model.kernel_std': (0.15,) * 8,
    'model.conv_ops': ('activation lrn', '', '', '', 'activation pool'),
    'data.std': (64.0,),
    'eval.batch_size': 48,
}


def small_config(data_dir: str, **fields: Any) -> Any:
    """Returns the quickstart with a small network. Two underscores in the name of a field stand for a dot."""
    config = get_config()
    apply_overrides(config, SMALL | {'data.data_dir': data_dir})
    apply_overrides(config, {name.replace('__', '.'): value for name, value in fields.items()})
    return resolve(config)


def open_dataset(config: Any) -> dataset.PreparedDataset:
    data = open_or_prepare(config, preemption=None)
    assert data is not None
    return data


def make_run(workdir: Path, config: Any) -> str:
    """Writes a run at step 0 with random weights and the statistics of its training set; returns `workdir`."""
    options = {'xla_backend_optimization_level': '2'}  # as in training.state.init_state()
    params, batch_statistics = jax.device_get(
        jax.jit(build_model(config)[1], compiler_options=options)(jax.random.key(3))
    )
    data = open_dataset(config)
    trained_model.import_weights_as_run(
        str(workdir), config, params, batch_statistics, data.statistics, data.class_names
    )
    return str(workdir)


def center_crop(image: np.ndarray, config: Any, statistics: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the preprocessed center crop of `image` (S, S, C) uint8, computed by NumPy."""
    margin = config.data.image_size - config.data.crop_size
    rows = slice(margin // 2, margin // 2 + config.data.crop_size)
    mean = statistics['mean_image'].astype(np.float32)
    return (image[rows, rows].astype(np.float32) - mean[rows, rows]) / np.float32(config.data.std[0])
