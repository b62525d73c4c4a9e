"""Predictions of a checkpoint for all validation images."""

import math

import numpy as np
from jaxtyping import Float32, Int32

from alexnet_jax import parallel
from alexnet_jax.data.dataset import PreparedDataset
from alexnet_jax.data.loader import validation_batches
from alexnet_jax.inference.trained_model import load_model
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.training.eval_step import make_predict_step


def predict(
    ref: CheckpointRef, prepared: PreparedDataset, views: int
) -> tuple[int, Float32[np.ndarray, 'n classes'], Int32[np.ndarray, ' n']]:
    """Predicts the classes of the validation images with the model of a checkpoint; skips corrupt records.

    Raises ConfigError, CheckpointError, DatasetError: see trained_model.load_model() and split_reader.SplitReader.

    Returns:
      The step of the checkpoint, and the log probabilities and labels in the order of the images. The probabilities are
      means over 1 or 10 `views` (section 4.1).
    """
    model = load_model(ref, prepared)
    log(f'{ref.name}: step {model.step}; mesh data={model.mesh.shape["data"]}, model={model.mesh.shape["model"]}')
    predict_step = make_predict_step(model.config, model.mesh, views)
    preprocessing, images = model.preprocessing, len(prepared.validation)
    batch_size = model.batch_size(images)
    threads = model.config.data.reader_threads
    name = f'evaluate {ref.name}, {views} view{"s" * (views > 1)}'
    progress = ProgressBar(name, math.ceil(images / batch_size), 'batches')
    scores, labels = [], []
    for batch in validation_batches(prepared.validation, batch_size=batch_size, threads=threads):
        inputs, counted = parallel.make_global_batch(model.sharding, batch['image']), batch['label'] >= 0
        scores.append(np.asarray(predict_step(model.state, inputs, preprocessing))[counted])
        labels.append(batch['label'][counted])
        progress.update()
    progress.close()
    return model.step, np.concatenate(scores), np.concatenate(labels)
