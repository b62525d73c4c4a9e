"""Classify pictures with a trained network, as in the left half of the paper's figure 4.

    alexnet predict CHECKPOINT PICTURE... [--views=10] [--top=5] [--json] [--figure=FILE.png]

CHECKPOINT is a run's folder WORKDIR (its newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP. PICTURE is a
file in any format that `prepare` reads, or a folder, which stands for all files below the folder. The command scales,
crops and normalizes pictures like the images of the run. If the folder that contains a picture has the name of a class,
the folder name is the true label. If pictures are unreadable, the command reports them, classifies the others, and
exits with code 1. --validation=8 also classifies about 8 images of the run's validation data.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from absl import app, flags, logging

from alexnet_jax import startup
from alexnet_jax.command import check_output, parse_flags
from alexnet_jax.config import ConfigError
from alexnet_jax.data import pipeline
from alexnet_jax.ensemble import best
from alexnet_jax.monitor import Progress, log, log_error
from alexnet_jax.pictures import Picture, of_files, of_validation, picture_files
from alexnet_jax.trained import FORMS, Network, find, load, store_of

MAX_FIGURE_IMAGES, BARS = 24, 5  # pictures in the figure, and the maximum number of classes per picture


def predict_pictures(
    network: Network, pictures: Iterable[Picture], views: int, batch_size: int
) -> Iterator[tuple[Picture, np.ndarray | None]]:
    """Yields each picture, in order, with its probabilities (classes,) float32, or with None if it is unreadable."""
    from alexnet_jax.step import make_predict_step

    step, pictures = make_predict_step(network.config, network.mesh, views), iter(pictures)
    while batch := list(itertools.islice(pictures, batch_size)):
        pixels = [picture.pixels for picture in batch if not picture.problem]
        scores = network.rows(step, pixels, batch_size)
        for picture in batch:
            yield picture, None if picture.problem else np.exp(next(scores))


def as_text(told: dict[str, Any]) -> str:
    """Formats the predictions of one picture, from told_of(), as text."""
    label = '' if told['label'] is None else f' (true label: {told["label"]})'
    lines = [f'  {row["probability"]:>7.2%}  {row["class"]}' for row in told['top']]
    return '\n'.join([f'{told["file"]}{label}', *lines])


def told_of(picture: Picture, probabilities: np.ndarray | None, class_names: list[str], top: int) -> dict[str, Any]:
    """Returns the --json record of one picture: file, label, and the `top` classes with probabilities or an error."""
    if probabilities is None:
        return {'file': picture.name, 'label': picture.label, 'error': picture.problem}
    rows = [{'class': name, 'probability': value} for name, value in best(probabilities, class_names, top)]
    return {'file': picture.name, 'label': picture.label, 'top': rows}


def _predict(network: Network, pictures: Iterable[Picture], count: int, given: Any) -> int:
    """Prints the predictions of the `count` pictures, draws the first ones, and returns the number of unreadable ones.

    Raises OSError: the figure cannot be written.
    """
    progress = Progress('predict', count, 'pictures')
    drawn: list[tuple[Picture, dict[str, Any]]] = []
    unread = 0
    for picture, probabilities in predict_pictures(network, pictures, int(given.views), network.batch_size(count)):
        told = told_of(picture, probabilities, network.class_names, given.top)
        progress.update()
        if probabilities is None:
            unread += 1
            log_error(f'{picture.name}: {picture.problem}')
        elif len(drawn) < MAX_FIGURE_IMAGES:
            drawn.append((picture, told))
        if given.json or probabilities is not None:
            print(json.dumps(told) if given.json else as_text(told), flush=True)
    progress.close()
    if given.figure and drawn:
        from alexnet_jax.figures import predictions, style

        shown = [
            predictions.Prediction(
                image=picture.pixels,
                name=os.path.basename(picture.name),
                label=picture.label,
                top=[(row['class'], row['probability']) for row in told['top'][:BARS]],
            )
            for picture, told in drawn
        ]
        style.save(predictions.draw(shown), given.figure)
        log(f'{given.figure}: {len(drawn)} of {count - unread} pictures')
    if unread:
        log_error(f'{unread} of {count} pictures could not be read')
    return unread


def main(argv: list[str]) -> int:
    """Classifies the pictures argv[2:] with the network argv[1], and returns the exit code."""
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    try:
        if len(argv) < 3 and not given.validation:
            raise ConfigError('which pictures? Name files or folders behind the checkpoint, or --validation=8')
        given.figure = check_output('figure', given.figure, ('.png', '.pdf'))
        member, files = find(argv[1]), picture_files(argv[2:])
    except ConfigError as error:
        log_error(str(error))
        return 2
    if member.config.cpu_tuning:
        startup.configure_cpu_backend()
    startup.enable_compilation_cache()
    from alexnet_jax.checkpoint import CheckpointError  # imported after flag checks, because the module imports jax

    try:
        store = store_of([member], given.data_dir) if given.validation else None
        of_store = of_validation(store, given.validation) if store else []
        network = load(member, store)
        log(f'{network.name}: step {network.step}, {len(network.class_names)} classes')
        pictures = itertools.chain(of_files(files, network.config.data, network.class_names), of_store)
        return 1 if _predict(network, pictures, len(files) + len(of_store), given) else 0
    except (ConfigError, CheckpointError) as error:
        log_error(str(error))
        return 2
    except (pipeline.DatasetError, OSError) as error:
        log_error(str(error))
        return 1
    except KeyboardInterrupt:
        log_error('stopped')
        return 130


if __name__ == '__main__':
    flags.DEFINE_enum(
        'views', '10', ['1', '10'], 'Of each picture: its centre, or ten with the mean of their softmax outputs.'
    )
    flags.DEFINE_integer('top', 5, 'Classes to tell.', lower_bound=1)
    flags.DEFINE_integer(
        'validation', 0, "Images of the run's validation data to look at besides, evenly spread.", lower_bound=0
    )
    flags.DEFINE_string('data_dir', None, "Where the prepared data lie; by default the run's data.data_dir.")
    flags.DEFINE_bool('json', False, 'Print one JSON object a picture and line.')
    flags.DEFINE_string('figure', None, f'FILE.png or FILE.pdf to draw the first {MAX_FIGURE_IMAGES} pictures in.')
    wanted = f'which network and pictures? Name {FORMS}: alexnet predict CHECKPOINT PICTURE...'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, most=math.inf))
