"""Figures of runs and networks: reads or computes the data and passes it to the drawing modules."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.config import Config, ConfigError, preset_config, resolve
from alexnet_jax.data.dataset import PreparedDataset
from alexnet_jax.evaluate.summary import predict
from alexnet_jax.inference import feature_index
from alexnet_jax.inference.images import ImageInput
from alexnet_jax.inference.trained_model import CheckpointRef, TrainedModel
from alexnet_jax.plots import confusion, curves, feature_maps, kernels, neighbors, network
from alexnet_jax.sweep.results import ReportError, read_sweep

NEAREST = 6  # training images per row, as in the paper


def plot_preset(name: str) -> Figure:
    """Draws the published network `name` for images of its preset's size."""
    return plot_network(resolve(preset_config(name)), name)


def plot_network(config: Config, title: str) -> Figure:
    """Draws the network of a resolved configuration."""
    return network.draw(config.model, config.data.crop_size, config.data.channels, title)


def find_runs(names: Iterable[str]) -> dict[str, str]:
    """Returns run folders by their paths relative to the common parent. A sweep stands for its runs that have metrics.

    Raises ConfigError: a sweep cannot be read, or none of its runs has begun.
    """
    folders = []
    for folder in map(os.path.abspath, map(os.path.expanduser, names)):
        if not os.path.exists(os.path.join(folder, 'sweep.json')):
            folders.append(folder)
            continue
        try:
            sweep = read_sweep(folder)
        except ReportError as error:
            raise ConfigError(str(error)) from None
        runs = [os.path.join(folder, run['directory']) for run in sweep['runs']]
        begun = [run for run in runs if os.path.exists(os.path.join(run, 'metrics.jsonl')) and curves.read_metrics(run)]
        if not begun:
            raise ConfigError(f'{folder}: no run of this sweep has started; wait for one')
        folders += begun
    above = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    return {os.path.relpath(folder, above): folder for folder in folders}


def plot_curves(runs: dict[str, str]) -> Figure:
    """Draws the metrics of run folders by name. Raises ConfigError: a run has none."""
    read = {name: curves.read_metrics(folder) for name, folder in runs.items()}
    for name, lines in read.items():
        if not lines:
            raise ConfigError(f'{runs[name]}: its metrics.jsonl is still empty; wait for a line, or omit this run')
    return curves.draw(read)


def plot_kernels(trained: TrainedModel) -> Figure:
    """Draws the kernels of conv1. Raises ConfigError: conv1 does not share its weights between pixels."""
    if 'conv1' in trained.config.model.locally_connected:
        raise ConfigError(f'{trained.name}: conv1 has separate weights at each pixel, so it has no kernels to draw')
    return kernels.draw(np.asarray(trained.state.params['conv1']['kernel']), trained.config.model.towers)


def plot_feature_maps(
    trained: TrainedModel, pictures: Iterable[ImageInput], layer: str, count: int
) -> Iterator[Figure]:
    """Yields a figure of the feature maps of `layer` for the center crop of each picture.

    Args:
      pictures: pictures that could be read.
      count: their approximate number, for the batch size.
    """
    from alexnet_jax.training.eval_step import make_activation_fn

    config = trained.config
    step = make_activation_fn(config, trained.mesh, layer)
    shown, seen = itertools.tee(pictures)
    outputs = trained.predict_batches(step, (picture.pixels for picture in seen), trained.batch_size(count))
    crop, far = config.data.crop_size, (config.data.image_size - config.data.crop_size) // 2
    towers = 1 if layer == 'fc8' else config.model.towers
    for picture, output in zip(shown, outputs, strict=False):
        center = picture.pixels[far : far + crop, far : far + crop]
        yield feature_maps.draw(center, output if output.ndim == 3 else output[None, None], layer, towers)


def plot_neighbors(trained: TrainedModel, store: PreparedDataset, pictures: Sequence[ImageInput]) -> Figure:
    """Draws the training images nearest to each of 1 to 50 `pictures`. Raises the errors of build_or_load_index()."""
    index = feature_index.build_or_load_index(trained, store)
    queries = feature_index.extract_features(trained, index, [picture.pixels for picture in pictures])
    rows = []
    for picture, numbers, distances in zip(
        pictures, *feature_index.nearest_neighbors(index, queries, NEAREST), strict=True
    ):
        whole = np.isfinite(distances)  # corrupt records appear only if there are few others
        found = [store.train[int(number)] for number in numbers[whole]]
        rows.append(
            neighbors.Neighbors(
                query=picture.pixels,
                name=os.path.basename(picture.name),
                images=[example['image'] for example in found],
                labels=[store.class_names[example['label']] for example in found],
                distances=distances[whole].tolist(),
                label=picture.label,
            )
        )
    return neighbors.draw(rows)


def plot_confusion(member: CheckpointRef, store: PreparedDataset, views: int) -> Figure:
    """Draws the confusions of the validation images. Raises the errors of evaluate.predict()."""
    _, scores, labels = predict(member, store, views)
    return confusion.draw(confusion.count(scores, labels), store.class_names)
