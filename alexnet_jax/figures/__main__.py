"""Draw the paper's figures from runs and images.

    alexnet figures kernels CHECKPOINT             figure 3: the kernels of conv1
    alexnet figures maps CHECKPOINT IMAGE...       the feature maps of --layer for each image
    alexnet figures neighbors CHECKPOINT IMAGE...  figure 4, right: the nearest training images
    alexnet figures confusion CHECKPOINT           which validation classes are confused with which
    alexnet figures network PRESET|CHECKPOINT      figure 2: a published network, or the network of a checkpoint
    alexnet figures curves WORKDIR...              loss, errors and learning rate of runs or a sweep

`alexnet predict --help` explains CHECKPOINT, IMAGE and --validation=8; --figure of that command draws the left half of
figure 4. --out sets the file name of a figure. The default is WORKDIR/figures/KIND.png; for the curves of several runs
it is curves.png, and for a preset PRESET.png, in the current folder. `maps` draws one figure per image; several figures
are named KIND_1.png, KIND_2.png and so on.
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from absl import flags

from alexnet_jax import cli
from alexnet_jax.config import ConfigError
from alexnet_jax.inference.images import ImageInput, expand_paths, load_images, sample_validation
from alexnet_jax.presets import PRESETS
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef, parse_checkpoint_ref
from alexnet_jax.runtime.console import log, log_error, make_stdout_optional
from alexnet_jax.shapes import layer_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By kind of figure: its arguments, their maximum number, and its flags besides --out.
KINDS: dict[str, tuple[str, float, tuple[str, ...]]] = {
    'kernels': ('CHECKPOINT', 1, ()),
    'maps': ('CHECKPOINT IMAGE...', math.inf, ('layer', 'validation', 'data_dir', 'prepared_dir')),
    'neighbors': ('CHECKPOINT IMAGE...', math.inf, ('validation', 'data_dir', 'prepared_dir')),
    'confusion': ('CHECKPOINT', 1, ('views', 'data_dir', 'prepared_dir')),
    'network': ('PRESET|CHECKPOINT', 1, ()),
    'curves': ('WORKDIR...', math.inf, ()),
}


def check_kind(kind: str, names: list[str], given: flags.FlagValues) -> None:
    """Raises ConfigError if the kind of figure does not exist or takes other names or flags."""
    if kind == 'neighbours':  # its name in version 0.1
        raise ConfigError(f'{kind} was renamed to neighbors')
    if kind not in KINDS:
        raise ConfigError(f'{kind!r} is not a kind of figure; the kinds are {", ".join(KINDS)}')
    arguments, maximum, own_flags = KINDS[kind]
    if not 1 <= len(names) <= maximum:
        raise ConfigError(f'{kind} takes other arguments: alexnet figures {kind} {arguments}')
    for flag in ('layer', 'validation', 'views', 'data_dir', 'prepared_dir'):
        if given[flag].present and flag not in own_flags:
            raise ConfigError(f'--{flag}: {kind} does not have this flag; leave it out')
    if 'validation' in own_flags and len(names) == 1 and not given.validation:
        raise ConfigError('no image is given; name files or folders after the checkpoint, or set --validation=8')


def check_layer(ref: CheckpointRef, layer: str) -> None:
    """Raises ConfigError if the network of the run has no such layer."""
    data = ref.config.data
    names = [each.name for each in layer_table(ref.config.model, data.crop_size, data.channels)]
    if layer not in names:
        raise ConfigError(f'--layer={layer}: {ref.name} has no such layer; its layers are {", ".join(names)}')


def out_path(out: str | None, workdir: str | None, name: str) -> str:
    """Returns `out`, the file to save a figure as; if None, `name`.png in `workdir`/figures or the current folder.

    Raises ConfigError: the file cannot be written.
    """
    if out is None and workdir is not None:
        folder = os.path.join(os.path.expanduser(workdir), 'figures')
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ConfigError(f'{folder} cannot be created ({error.strerror}); set --out to another file') from None
        name = os.path.join(folder, name)
    path = cli.check_output('out', out or f'{name}.png', ('.png', '.pdf'))
    assert path is not None
    return path


def readable(images: Iterable[ImageInput], unreadable: list[str]) -> Iterator[ImageInput]:
    """Yields the images that can be read. Logs the names of the others and appends them to `unreadable`."""
    for image in images:
        if image.problem:
            log_error(f'{image.name}: {image.problem}')
            unreadable.append(image.name)
        else:
            yield image


def save(figures: Iterable['Figure'], path: str, count: int = 1) -> None:
    """Saves one figure as `path`, or `count` figures with a number after the name; prints the paths.

    Raises OSError: a figure cannot be written.
    """
    from alexnet_jax.plots import style  # imports matplotlib

    name, ending = os.path.splitext(path)
    for i, figure in enumerate(figures):
        file = path if count == 1 else f'{name}_{i + 1}{ending}'
        style.save(figure, file)
        print(file, flush=True)


def draw_without_weights(kind: str, names: list[str], out: str | None) -> None:
    """Draws a figure of kind `network` or `curves`. Raises ConfigError, OSError."""
    from alexnet_jax.figures import from_run  # imports matplotlib

    if kind == 'curves':
        figure = from_run.plot_curves(from_run.find_runs(names))  # before out_path() creates a folder
        save([figure], out_path(out, names[0] if len(names) == 1 else None, kind))
    elif names[0] in PRESETS:
        path = out_path(out, None, names[0])
        save([from_run.plot_preset(names[0])], path)
    elif not os.path.exists(os.path.expanduser(names[0])):
        raise ConfigError(f'{names[0]}: neither a preset nor a run; the presets are {", ".join(PRESETS)}')
    else:
        ref = parse_checkpoint_ref(names[0])
        path = out_path(out, ref.workdir, kind)
        save([from_run.plot_network(ref.config, ref.name)], path)


def draw_with_weights(kind: str, names: list[str], given: flags.FlagValues) -> int:
    """Draws a figure of another kind. Returns the number of unreadable images.

    Raises ConfigError, CheckpointError, DatasetError, OSError.
    """
    ref, files = parse_checkpoint_ref(names[0]), expand_paths(names[1:])
    if kind == 'maps':
        check_layer(ref, given.layer)
    path = out_path(given.out, ref.workdir, kind)
    if ref.config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    from alexnet_jax.figures import from_model
    from alexnet_jax.inference.trained_model import load_model, open_eval_dataset

    if kind == 'kernels':
        save([from_model.plot_kernels(load_model(ref))], path)
        return 0
    if kind == 'confusion':
        prepared = open_eval_dataset([ref], given.data_dir, given.prepared_dir)
        save([from_model.plot_confusion(ref, prepared, int(given.views))], path)
        return 0
    return draw_images(kind, ref, files, path, given)


def draw_images(kind: str, ref: CheckpointRef, files: list[str], path: str, given: flags.FlagValues) -> int:
    """Draws `maps` or `neighbors`. Returns and raises the same as draw_with_weights()."""
    from alexnet_jax.figures import from_model
    from alexnet_jax.inference.trained_model import load_model, open_eval_dataset
    from alexnet_jax.plots import neighbors

    folders = given.data_dir, given.prepared_dir
    prepared = open_eval_dataset([ref], *folders) if given.validation or kind == 'neighbors' else None
    model = load_model(ref)
    sampled = sample_validation(prepared, given.validation) if prepared and given.validation else []
    unreadable: list[str] = []
    inputs = itertools.chain(load_images(files, model.config.data, model.class_names), sampled)
    images, count = readable(inputs, unreadable), len(files) + len(sampled)
    if prepared and kind == 'neighbors':
        shown = list(itertools.islice(images, neighbors.MAX_ROWS))
        save([from_model.plot_neighbors(model, prepared, shown)] if shown else [], path)
        log(f'{path}: {len(shown)} of {count} images')
    else:
        save(from_model.plot_feature_maps(model, images, given.layer, count), path, count)
    return len(unreadable)


def main(argv: list[str]) -> int:
    """Draws the figure of kind argv[1] from the names argv[2:]; returns the exit code, 1 if an image is unreadable."""
    given, kind, names = flags.FLAGS, argv[1], argv[2:]
    make_stdout_optional()
    check_kind(kind, names, given)
    if kind in ('network', 'curves'):
        draw_without_weights(kind, names, given.out)
        return 0
    return 1 if draw_with_weights(kind, names, given) else 0


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'FILE.png or FILE.pdf to save the figure as.')
    flags.DEFINE_string('layer', 'conv1', 'Layer for `maps`.')
    flags.DEFINE_integer(
        'validation', 0, "Number of evenly spaced images of the run's validation data to draw too.", lower_bound=0
    )
    flags.DEFINE_enum('views', '10', ['1', '10'], 'Views per image for `confusion`: its center, or ten.')
    flags.DEFINE_string('data_dir', None, "Folder of the prepared data sets. Default: the run's data.data_dir.")
    flags.DEFINE_string('prepared_dir', None, 'Folder of the prepared data sets. Default: `prepared` in data.data_dir.')
    cli.run(
        main,
        missing=f'no figure is given; name {", ".join(KINDS)}: alexnet figures KIND ...',
        max_arguments=math.inf,
    )
