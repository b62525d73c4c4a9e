"""Sections of the page that need weights: kernels of conv1, predictions, and neighbors in the last hidden layer."""

import os
import shlex

import numpy as np

from alexnet_jax.config import ConfigError, default_config
from alexnet_jax.data import dataset, split_reader
from alexnet_jax.inference import feature_index
from alexnet_jax.inference.trained_model import TrainedModel, load_model, open_eval_dataset
from alexnet_jax.metrics import top_k
from alexnet_jax.paths import is_url
from alexnet_jax.plots import kernels
from alexnet_jax.report.blocks import Block, Card, Figure, Section, pixel_picture
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.checkpoint_ref import parse_checkpoint_ref, with_data_folders
from alexnet_jax.runtime.workdir import CheckpointError

ABOUT_KERNELS: Block = (
    'remark',
    'As in figure 3 of the paper, each kernel is scaled from its minimum to its maximum. The saturation is the fraction'
    ' of the squared weights that is left without the mean over the channels: 0 is gray, 0.67 untrained, 1 color only.',
)
PREDICTED, QUERIES, NEAREST, TOP = 8, 5, 6, 5
_PROBED = 16  # validation images considered per image shown
_SHEET_PIXELS = 1000  # approximate minimum width of the kernels of a tower
_TITLES = ('Kernels of conv1', 'Predictions', 'Neighbors')

Example = tuple[int, split_reader.Example]  # index in the data set; its image and label


def model_sections(
    workdir: str, train_command: str, data_dir: str | None, neighbors: bool, prepared_dir: str | None = None
) -> list[Section]:
    """Returns the kernels, predictions and, if requested, neighbors. A sentence explains missing content.

    Args:
      workdir: the folder of the run.
      train_command: the command that trains in `workdir`.
      data_dir: the folder of the data sets.
      neighbors: whether to search for neighbors.
      prepared_dir: the folder of the prepared data sets. If both folders are None, they are those of the run.
    """
    try:
        network = read_network(workdir)
    except (ConfigError, CheckpointError) as error:
        why = f'{error}. `{train_command}` trains the network.'
        return [(title, [('missing', why)]) for title in _TITLES]
    sections: list[Section] = [(_TITLES[0], [*kernel_figures(network), ABOUT_KERNELS])]
    try:
        prepared = _open_dataset(network, data_dir, prepared_dir)
        shown = choose(prepared.validation, PREDICTED)
        sections.append((_TITLES[1], predictions(network, shown)))
        if neighbors:
            sections.append((_TITLES[2], nearest(network, prepared, shown[:QUERIES])))
        else:
            sections.append((_TITLES[2], [('missing', 'Omitted because of `--noneighbors`.')]))
    except (ConfigError, CheckpointError, split_reader.DatasetError, SystemExit) as error:
        exited = isinstance(error, SystemExit)
        why = 'The images could not be prepared; the log has the reason' if exited else str(error)
        sections += [(title, [('missing', f'{why}.')]) for title in _TITLES[len(sections) :]]
    return sections


def read_network(workdir: str) -> TrainedModel:
    """Loads the newest weights of the run in `workdir`. Raises ConfigError, CheckpointError: they cannot be read."""
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        raise ConfigError(f'{workdir} has no checkpoints')
    member = parse_checkpoint_ref(workdir)
    if member.config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    return load_model(member)


def kernel_figures(network: TrainedModel) -> list[Block]:
    """Returns each tower's kernels of conv1 as in figure 3 of the paper, with their color saturation."""
    kernel: np.ndarray = np.asarray(network.state.params['conv1']['kernel'])
    towers = network.config.model.towers
    if 'conv1' in network.config.model.locally_connected:
        return [('missing', 'conv1 is locally connected: its weights differ from pixel to pixel and are not shown.')]
    figures: list[Block] = []
    parts = np.split(kernel, towers, -1)
    for i, (part, saturation) in enumerate(zip(parts, kernels.saturation(kernel, towers), strict=True), 1):
        tower = f'tower {i}: ' if towers > 1 else ''
        color = f', color saturation {saturation:.2f}' if network.config.data.channels > 1 else ''
        words = f'{tower}{part.shape[-1]} kernels at step {network.step:,}{color}'
        pixels = np.rint(255 * kernels.grid(part)).astype(np.uint8)
        times = max(1, _SHEET_PIXELS // pixels.shape[1])
        pixels = pixels.repeat(times, 0).repeat(times, 1)
        picture = pixel_picture(pixels, f'kernels of conv1, {words}', max_pixels=max(pixels.shape))
        figures.append(('figure', Figure(picture, words[0].upper() + words[1:])))
    return figures


def _open_dataset(network: TrainedModel, data_dir: str | None, prepared_dir: str | None) -> dataset.PreparedDataset:
    """Opens the run's prepared data set.

    Raises ConfigError: the data set is missing. Raises the errors of open_eval_dataset().
    """
    data = with_data_folders(network.config, data_dir, prepared_dir).data
    directory = dataset.dataset_dir(data.data_dir, data, data.prepared_dir)
    if not is_url(directory) and not os.path.isdir(directory):
        defaults = default_config().data
        names = [
            name for name in dataset.MANIFEST_FIELDS[:-1] if name == 'source' or getattr(data, name) != defaults[name]
        ]
        names += [name for name in ('data_dir', 'prepared_dir') if getattr(data, name) is not None]
        settings = {name: getattr(data, name) for name in names}
        prepare = shlex.join(['alexnet', 'prepare', *(f'--{name}={value}' for name, value in settings.items())])
        raise ConfigError(
            f'The images are missing: {directory} does not exist. Prepare them with `{prepare}`, or name their folder'
            ' with `--data_dir`'
        )
    return open_eval_dataset([parse_checkpoint_ref(network.workdir)], data_dir, prepared_dir)


def choose(split: split_reader.SplitReader, count: int) -> list[Example]:
    """Returns `count` images of `split` with indices. The choice is fixed and covers as many classes as possible."""
    examples_by_class: dict[int, list[Example]] = {}
    for place, example in split_reader.evenly_spaced(split, _PROBED * count):
        examples_by_class.setdefault(int(example['label']), []).append((place, example))
    labels = sorted(examples_by_class)
    if len(labels) > count:
        labels = [labels[i] for i in np.linspace(0, len(labels) - 1, count).astype(int)]
    rounds = max((len(examples_by_class[label]) for label in labels), default=0)
    ordered = [
        examples_by_class[label][i] for i in range(rounds) for label in labels if i < len(examples_by_class[label])
    ]
    return ordered[:count]


def predictions(network: TrainedModel, shown: list[Example]) -> list[Block]:
    """Returns the images of `shown` with their most probable classes, as in the left half of figure 4 of the paper."""
    from alexnet_jax.training.eval_step import make_predict_step

    views, names = network.config.eval.views, network.class_names
    step = make_predict_step(network.config, network.mesh, views)
    images = [example['image'] for _, example in shown]
    log_probs = network.predict_batches(step, images, network.batch_size(len(images)))
    cards = []
    for (place, example), row in zip(shown, log_probs, strict=True):
        label = names[example['label']]
        # A network whose loss diverged may predict NaN.
        bars = [(name, round(100 * p) if p == p else 0) for name, p in top_k(np.exp(row), names, TOP)]
        picture = pixel_picture(example['image'], f'validation image {place} of class {label}')
        cards.append(Card(picture, label, bars=bars))
    about = (
        f'{len(cards)} validation images, spread over the classes and the same for every network on this data set.'
        f' Below each image are its class and the {TOP} most probable classes with {views} view{"s" * (views > 1)}'
        ' (✓: correct).'
    )
    return [('remark', about), ('cards', cards)]


def nearest(network: TrainedModel, prepared: dataset.PreparedDataset, shown: list[Example]) -> list[Block]:
    """Returns the images of `shown` with their nearest training images, as in the right half of figure 4 of the paper.

    Raises ConfigError, DatasetError: see feature_index.build_or_load_index().
    """
    names, index = network.class_names, feature_index.build_or_load_index(network, prepared)
    queries = feature_index.extract_features(network, index, [example['image'] for _, example in shown])
    about = (
        f'Each group starts with a validation image, followed by the {NEAREST} training images with the nearest'
        f' {index.layer} features and their Euclidean distances. A frame marks images of the same class.'
    )
    blocks: list[Block] = [('remark', about)]
    found = feature_index.nearest_neighbors(index, queries, NEAREST)
    for (place, query), numbers, distances in zip(shown, *found, strict=True):
        label = names[query['label']]
        picture = pixel_picture(query['image'], f'validation image {place} of class {label}')
        cards = [Card(picture, label, 'query')]
        for where, distance in zip(numbers.tolist(), distances.tolist(), strict=True):
            example = prepared.train[where]
            if example is not None:
                name = names[example['label']]
                picture = pixel_picture(example['image'], f'training image {where} of class {name}')
                cards.append(Card(picture, name, f'{distance:.4g}', framed=name == label))
        blocks.append(('small_cards', cards))
    return blocks
