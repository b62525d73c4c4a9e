"""Sections of the page that need weights: kernels of conv1, predictions, and neighbors in the last hidden layer."""

import os
import shlex
from typing import Any

import numpy as np

from alexnet_jax.config import ConfigError, default_config
from alexnet_jax.data import dataset
from alexnet_jax.inference import feature_index
from alexnet_jax.inference.trained_model import TrainedModel, load_model, open_eval_dataset, parse_checkpoint_ref
from alexnet_jax.metrics import top_k
from alexnet_jax.plots import kernels
from alexnet_jax.report import html
from alexnet_jax.runtime import backend

PREDICTED, QUERIES, NEAREST, TOP = 8, 5, 6, 5
_PROBED = 16  # validation images considered per image shown
_WIDE = 1000  # approximate minimum width of a kernel sheet, in pixels
_TITLES = ('Kernels of conv1', 'Predictions', 'Neighbours')

Example = tuple[int, dict[str, Any]]  # its number in the store; its image and label


def sections(workdir: str, command: str, data_dir: str | None, neighbours: bool) -> list[str]:
    """Returns the kernels, predictions and, if requested, neighbors. Missing content is explained in a sentence.

    Args:
      command: the command that trains in `workdir`.
      data_dir: the folder of the prepared images; None: the one in the run's settings.
      neighbours: whether to search for neighbors.
    """
    try:
        network = read_network(workdir)
    except ConfigError as error:
        why = html.paragraph(f'{error}. `{command}` makes what is missing.', 'missing')
        return [html.section(title, why) for title in _TITLES]
    parts = [html.section(_TITLES[0], *kernel_sheets(network), about_kernels())]
    try:
        store = _open_store(network, data_dir)
        shown = choose(store.validation, PREDICTED)
        parts.append(html.section(_TITLES[1], *predictions(network, shown)))
        if not neighbours:
            why = html.paragraph('Left out by `--noneighbours`; the same command without it finds them.', 'missing')
            return [*parts, html.section(_TITLES[2], why)]
        parts.append(html.section(_TITLES[2], *nearest(network, store, shown[:QUERIES])))
    except (ConfigError, dataset.DatasetError) as error:
        why = html.paragraph(f'{error}.', 'missing')
        parts += [html.section(title, why) for title in _TITLES[len(parts) :]]
    return parts


def read_network(workdir: str) -> TrainedModel:
    """Loads the newest weights of the run in `workdir`. Raises ConfigError: they cannot be read."""
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        raise ConfigError(f'{workdir} has no checkpoints')
    member = parse_checkpoint_ref(workdir)
    if member.config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    from alexnet_jax.training.checkpointing import CheckpointError  # imports jax, so only after the settings above

    try:
        return load_model(member)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def kernel_sheets(network: TrainedModel) -> list[str]:
    """Returns each tower's kernels of conv1 as in figure 3 of the paper, with their color saturation."""
    kernel: np.ndarray = np.asarray(network.state.params['conv1']['kernel'])
    towers = network.config.model.towers
    if 'conv1' in network.config.model.locally_connected:
        return [html.paragraph('conv1 has other weights at each pixel, so there are no kernels to show.', 'missing')]
    figures = []
    for i, (part, share) in enumerate(
        zip(np.split(kernel, towers, -1), kernels.saturation(kernel, towers), strict=True)
    ):
        name = f'tower {i + 1}: ' if towers > 1 else ''
        colour = f', colour saturation {share:.2f}' if network.config.data.channels > 1 else ''
        words = f'{name}{part.shape[-1]} kernels at step {network.step:,}{colour}'
        pixels = np.rint(255 * kernels.grid(part)).astype(np.uint8)
        times = max(1, _WIDE // pixels.shape[1])
        png = html.as_png(pixels.repeat(times, 0).repeat(times, 1))
        figures.append(html.sheet(png, f'kernels of conv1, {words}', words[0].upper() + words[1:]))
    return figures


def about_kernels() -> str:
    """Explains the kernel sheets."""
    return html.paragraph(
        'As figure 3 of the paper: each kernel from its own least weight to its greatest. Saturation is the share of'
        ' the weights\u2019 energy that the channels do not have in common: 0 is grey, 0.67 untrained, 1 colours only.',
        'quiet',
    )


def _open_store(network: TrainedModel, data_dir: str | None) -> dataset.PreparedDataset:
    """Opens the store of the run's images. Raises ConfigError: they are not prepared, or differ from the run's."""
    data = network.config.data
    directory = dataset.dataset_dir(data_dir or data.data_dir, data)
    if '://' not in directory and not os.path.isdir(directory):
        defaults = default_config().data
        names = [
            name for name in dataset.MANIFEST_FIELDS[:-1] if name == 'source' or getattr(data, name) != defaults[name]
        ]
        settings = {name: getattr(data, name) for name in names} | {'data_dir': data_dir or data.data_dir}
        made_by = ['alexnet', 'prepare', *(f'--{name}={value}' for name, value in settings.items())]
        raise ConfigError(
            f'The images are not prepared here, for there is no {directory}: `{shlex.join(made_by)}` makes them, or'
            ' `--data_dir` names where they lie'
        )
    from alexnet_jax.training.checkpointing import CheckpointError

    try:
        return open_eval_dataset([parse_checkpoint_ref(network.workdir)], data_dir)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def choose(split: Any, count: int) -> list[Example]:
    """Returns `count` images of `split` with their numbers: the same ones each time, of as many classes as possible."""
    by_class: dict[int, list[Example]] = {}
    for place, example in dataset.evenly_spaced(split, _PROBED * count):
        by_class.setdefault(int(example['label']), []).append((place, example))
    labels = sorted(by_class)
    if len(labels) > count:
        labels = [labels[i] for i in np.linspace(0, len(labels) - 1, count).astype(int)]
    rounds = max((len(by_class[label]) for label in labels), default=0)
    ordered = [by_class[label][i] for i in range(rounds) for label in labels if i < len(by_class[label])]
    return ordered[:count]


def predictions(network: TrainedModel, shown: list[Example]) -> list[str]:
    """Returns the images of `shown` with their most probable classes, as in the left half of figure 4 of the paper."""
    from alexnet_jax.training.eval_step import make_predict_step

    views, names = network.config.eval.views, network.class_names
    step = make_predict_step(network.config, network.mesh, views)
    images = [example['image'] for _, example in shown]
    scores = network.predict_batches(step, images, network.batch_size(len(images)))
    each = []
    for (place, example), score in zip(shown, scores, strict=True):
        label = names[example['label']]
        image = html.photograph(example['image'], f'validation image {place} of class {label}')
        each.append(html.card(image, label, below=html.bars(top_k(np.exp(score), names, TOP), label)))
    about = (
        f'{len(each)} validation images, the same ones for every network on these data and spread over the classes;'
        f' below each its class, and the likeliest classes by {views} view{"s" * (views > 1)} (\u2713: right).'
    )
    return [html.paragraph(about, 'quiet'), html.cards(each)]


def nearest(network: TrainedModel, store: dataset.PreparedDataset, shown: list[Example]) -> list[str]:
    """Returns the images of `shown` with their nearest training images, as in the right half of figure 4 of the paper.

    Raises ConfigError, DatasetError: see features.index_of().
    """
    names, index = network.class_names, feature_index.build_or_load_index(network, store)
    queries = feature_index.extract_features(network, index, [example['image'] for _, example in shown])
    rows = []
    for (place, query), numbers, distances in zip(
        shown, *feature_index.nearest_neighbors(index, queries, NEAREST), strict=True
    ):
        label = names[query['label']]
        image = html.photograph(query['image'], f'validation image {place} of class {label}')
        each = [html.card(image, label, 'the picture')]
        for where, distance in zip(numbers.tolist(), distances.tolist(), strict=True):
            example = store.train[where]
            if example is not None:
                other = names[example['label']]
                image = html.photograph(example['image'], f'training image {where} of class {other}')
                each.append(html.card(image, other, f'{distance:.4g}', same=other == label))
        rows.append(html.cards(each, small=True))
    about = (
        f'Validation images, and behind each the {NEAREST} training images whose {index.layer} is nearest to its own,'
        ' with their Euclidean distances; those of its own class have a frame.'
    )
    return [html.paragraph(about, 'quiet'), *rows]
