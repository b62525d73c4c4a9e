"""The command that draws the paper's figures from runs and images.

    alexnet figures kernels CHECKPOINT                figure 3: the kernels of conv1
    alexnet figures maps CHECKPOINT PICTURE...        the feature maps of --layer for each picture
    alexnet figures neighbours CHECKPOINT PICTURE...  figure 4, right: the nearest training images
    alexnet figures confusion CHECKPOINT              which validation classes are confused with which
    alexnet figures network PRESET                    figure 2: a published network, or a CHECKPOINT's
    alexnet figures curves WORKDIR...                 loss, errors and learning rate of runs or a sweep

predict.py explains CHECKPOINT, PICTURE and --validation=8, and draws the left half of figure 4. A figure is saved as
WORKDIR/figures/KIND.png, the curves of several runs as curves.png, that of a preset as PRESET.png, or under the name
given by --out. `maps` makes one figure per picture; several are named KIND_1.png, KIND_2.png and so on.
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

from absl import app, flags, logging

from alexnet_jax.cli import check_output, parse_flags
from alexnet_jax.config import ConfigError
from alexnet_jax.data.dataset import DatasetError
from alexnet_jax.inference.images import ImageInput, expand_paths, load_images, sample_validation
from alexnet_jax.inference.trained_model import CheckpointRef, load_model, open_eval_dataset, parse_checkpoint_ref
from alexnet_jax.presets import PRESETS
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.console import log, log_error
from alexnet_jax.shapes import layer_table

# By kind: the arguments after it, the maximum number of names, and the flags besides --out.
KINDS: dict[str, tuple[str, float, tuple[str, ...]]] = {
    'kernels': ('CHECKPOINT', 1, ()),
    'maps': ('CHECKPOINT PICTURE...', math.inf, ('layer', 'validation', 'data_dir')),
    'neighbours': ('CHECKPOINT PICTURE...', math.inf, ('validation', 'data_dir')),
    'confusion': ('CHECKPOINT', 1, ('views', 'data_dir')),
    'network': ('PRESET|CHECKPOINT', 1, ()),
    'curves': ('WORKDIR...', math.inf, ()),
}


def check_kind(kind: str, names: list[str], given: Any) -> None:
    """Raises ConfigError: the kind of figure does not exist, or it takes other names or flags."""
    if kind not in KINDS:
        raise ConfigError(f'{kind!r} is no kind of figure; there are {", ".join(KINDS)}')
    wanted, most, own = KINDS[kind]
    if not 1 <= len(names) <= most:
        raise ConfigError(f'{kind} takes other names: alexnet figures {kind} {wanted}')
    for flag in ('layer', 'validation', 'views', 'data_dir'):
        if given[flag].present and flag not in own:
            raise ConfigError(f'--{flag}: {kind} has no such flag; leave it out')
    if 'validation' in own and len(names) == 1 and not given.validation:
        raise ConfigError('which pictures? Name files or folders behind the checkpoint, or --validation=8')


def check_layer(member: CheckpointRef, layer: str) -> None:
    """Raises ConfigError: the network has no such layer."""
    data = member.config.data
    names = [each.name for each in layer_table(member.config.model, data.crop_size, data.channels)]
    if layer not in names:
        raise ConfigError(f'--layer={layer}: no layer of {member.name}; it has {", ".join(names)}')


def out_path(out: str | None, workdir: str | None, name: str) -> str:
    """Returns the file to save a figure as: `out`, or `name`.png in the workdir's figures/ or the current directory.

    Raises ConfigError: the file cannot be written.
    """
    if out is None and workdir is not None:
        folder = os.path.join(os.path.expanduser(workdir), 'figures')
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ConfigError(f'{folder} cannot be made ({error.strerror}); name another place by --out') from None
        name = os.path.join(folder, name)
    path = check_output('out', out or f'{name}.png', ('.png', '.pdf'))
    assert path is not None
    return path


def readable(pictures: Iterable[ImageInput], unread: list[str]) -> Iterator[ImageInput]:
    """Yields the pictures that can be read. Logs the names of the others and appends them to `unread`."""
    for picture in pictures:
        if picture.problem:
            log_error(f'{picture.name}: {picture.problem}')
            unread.append(picture.name)
        else:
            yield picture


def save(figures: Iterable[Any], path: str, count: int = 1) -> None:
    """Saves a figure as `path`, or each of several with a number after the name. Prints the paths. Raises OSError."""
    from alexnet_jax.plots import style

    name, ending = os.path.splitext(path)
    for i, figure in enumerate(figures):
        file = path if count == 1 else f'{name}_{i + 1}{ending}'
        style.save(figure, file)
        print(file, flush=True)


def draw_settings(kind: str, names: list[str], out: str | None) -> None:
    """Draws the kinds that need no weights: `network` and `curves`. Raises ConfigError, OSError."""
    from alexnet_jax.figures import from_run

    if kind == 'curves':
        figure = from_run.plot_curves(from_run.find_runs(names))  # before out_path() creates a folder
        save([figure], out_path(out, names[0] if len(names) == 1 else None, kind))
    elif names[0] in PRESETS:
        path = out_path(out, None, names[0])
        save([from_run.plot_preset(names[0])], path)
    elif not os.path.exists(os.path.expanduser(names[0])):
        raise ConfigError(f'{names[0]}: no preset and no folder of a run; presets are {", ".join(PRESETS)}')
    else:
        member = parse_checkpoint_ref(names[0])
        path = out_path(out, member.workdir, kind)
        save([from_run.plot_network(member.config, member.name)], path)


def draw_weights(kind: str, names: list[str], given: Any) -> int:
    """Draws the other kinds. Returns the number of unreadable pictures. Raises ConfigError, DatasetError, OSError."""
    member, files = parse_checkpoint_ref(names[0]), expand_paths(names[1:])
    if kind == 'maps':
        check_layer(member, given.layer)
    path = out_path(given.out, member.workdir, kind)
    if member.config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    from alexnet_jax.figures import from_run
    from alexnet_jax.training.checkpointing import CheckpointError  # imports jax, so only after the flags

    try:
        if kind == 'kernels':
            save([from_run.plot_kernels(load_model(member))], path)
            return 0
        if kind == 'confusion':
            save([from_run.plot_confusion(member, open_eval_dataset([member], given.data_dir), int(given.views))], path)
            return 0
        return draw_pictures(kind, member, files, path, given)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def draw_pictures(kind: str, member: CheckpointRef, files: list[str], path: str, given: Any) -> int:
    """Draws `maps` and `neighbours`. Returns the number of unreadable pictures. Raises the errors of draw_weights()."""
    from alexnet_jax.figures import from_run
    from alexnet_jax.plots import neighbors

    store = open_eval_dataset([member], given.data_dir) if given.validation or kind == 'neighbours' else None
    network = load_model(member)
    of_store = sample_validation(store, given.validation) if store and given.validation else []
    unread: list[str] = []
    pictures = readable(itertools.chain(load_images(files, network.config.data, network.class_names), of_store), unread)
    count = len(files) + len(of_store)
    if store and kind == 'neighbours':
        shown = list(itertools.islice(pictures, neighbors.MAX_ROWS))
        save([from_run.plot_neighbors(network, store, shown)] if shown else [], path)
        log(f'{path}: {len(shown)} of {count} pictures')
    else:
        save(from_run.plot_feature_maps(network, pictures, given.layer, count), path, count)
    return len(unread)


def main(argv: list[str]) -> int:
    """Draws the figure of kind argv[1] from the names argv[2:]. Returns the exit code; reports an error in one line."""
    logging.set_verbosity(logging.ERROR)
    given, kind, names = flags.FLAGS, argv[1], argv[2:]
    try:
        check_kind(kind, names, given)
        if kind in ('network', 'curves'):
            draw_settings(kind, names, given.out)
            return 0
        return 1 if draw_weights(kind, names, given) else 0
    except ConfigError as error:
        log_error(str(error))
        return 2
    except (DatasetError, OSError) as error:
        log_error(str(error))
        return 1
    except KeyboardInterrupt:
        log_error('stopped')
        return 130


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'FILE.png or FILE.pdf to save the figure as.')
    flags.DEFINE_string('layer', 'conv1', 'Of `maps`: the layer.')
    flags.DEFINE_integer(
        'validation', 0, "Images of the run's validation data to draw besides, evenly spread.", lower_bound=0
    )
    flags.DEFINE_enum('views', '10', ['1', '10'], 'Of `confusion`: of each image its centre, or ten.')
    flags.DEFINE_string('data_dir', None, "Where the prepared data lie; by default the run's data.data_dir.")
    wanted = f'which figure? Name {", ".join(KINDS)}: alexnet figures KIND ...'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, most=math.inf))
