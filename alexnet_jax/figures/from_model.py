"""Figures of trained models: computes the data and passes them to the modules of plots/."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.config import ConfigError
from alexnet_jax.data.dataset import PreparedDataset
from alexnet_jax.evaluate.predictions import predict
from alexnet_jax.inference import feature_index
from alexnet_jax.inference.images import ImageInput
from alexnet_jax.inference.trained_model import TrainedModel
from alexnet_jax.plots import confusion, feature_maps, kernels, neighbors
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef
from alexnet_jax.training.eval_step import make_activation_fn

NEAREST = 6  # training images per row, as in the paper


def plot_kernels(model: TrainedModel) -> Figure:
    """Draws the kernels of conv1. Raises ConfigError: conv1 is locally connected."""
    if 'conv1' in model.config.model.locally_connected:
        raise ConfigError(f'{model.name}: conv1 has separate weights at each pixel, so it has no kernels to draw')
    return kernels.draw(np.asarray(model.state.params['conv1']['kernel']), model.config.model.towers)


def plot_feature_maps(model: TrainedModel, images: Iterable[ImageInput], layer: str, count: int) -> Iterator[Figure]:
    """Yields a figure of the feature maps of `layer` for the center crop of each image.

    Args:
      model: the model.
      images: readable images.
      layer: name of the layer.
      count: approximate number of images, for the batch size.
    """
    config = model.config
    activations = make_activation_fn(config, model.mesh, layer)
    shown, inputs = itertools.tee(images)
    outputs = model.predict_batches(activations, (image.pixels for image in inputs), model.batch_size(count))
    crop, margin = config.data.crop_size, (config.data.image_size - config.data.crop_size) // 2
    towers = 1 if layer == 'fc8' else config.model.towers
    for image, output in zip(shown, outputs, strict=False):
        center = image.pixels[margin : margin + crop, margin : margin + crop]
        yield feature_maps.draw(center, output if output.ndim == 3 else output[None, None], layer, towers)


def plot_neighbors(model: TrainedModel, prepared: PreparedDataset, images: Sequence[ImageInput]) -> Figure:
    """Draws the training images nearest to each of 1 to 50 `images`. Raises the errors of build_or_load_index()."""
    index = feature_index.build_or_load_index(model, prepared)
    queries = feature_index.extract_features(model, index, [image.pixels for image in images])
    rows = []
    for image, numbers, distances in zip(
        images, *feature_index.nearest_neighbors(index, queries, NEAREST), strict=True
    ):
        found = [
            (example, distance)
            for number, distance in zip(numbers.tolist(), distances.tolist(), strict=True)
            # Corrupt records, at an infinite distance, are among the nearest only if there are few others.
            if math.isfinite(distance) and (example := prepared.train[number]) is not None
        ]
        rows.append(
            neighbors.Neighbors(
                query=image.pixels,
                name=os.path.basename(image.name),
                images=[example['image'] for example, _ in found],
                labels=[prepared.class_names[example['label']] for example, _ in found],
                distances=[distance for _, distance in found],
                label=image.label,
            )
        )
    return neighbors.draw(rows)


def plot_confusion(ref: CheckpointRef, prepared: PreparedDataset, views: int) -> Figure:
    """Draws the confusions of the validation images. Raises the errors of evaluate.predictions.predict()."""
    _, scores, labels = predict(ref, prepared, views)
    return confusion.draw(confusion.count(scores, labels), prepared.class_names)
