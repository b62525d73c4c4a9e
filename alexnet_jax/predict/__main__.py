"""Classify pictures with a trained network, as in the left half of the paper's figure 4.

    alexnet predict CHECKPOINT PICTURE... [--views=10] [--top=5] [--json] [--figure=FILE.png]

CHECKPOINT is a run's folder WORKDIR (its newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP. PICTURE is a
file in any format that `prepare` reads, or a folder, which stands for all files below the folder. The command scales,
crops and normalizes pictures like the images of the run. If the folder that contains a picture has the name of a class,
the folder name is the true label. If pictures are unreadable, the command reports them, classifies the others, and
exits with code 1. --validation=8 also classifies about 8 images of the run's validation data.
"""

import itertools
import math

from absl import app, flags, logging

from alexnet_jax.cli import check_output, parse_flags
from alexnet_jax.config import ConfigError
from alexnet_jax.data import dataset
from alexnet_jax.inference.images import expand_paths, load_images, sample_validation
from alexnet_jax.inference.trained_model import CHECKPOINT_HELP, load_model, open_eval_dataset, parse_checkpoint_ref
from alexnet_jax.predict.classify import MAX_FIGURE_IMAGES, classify
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.console import log, log_error


def main(argv: list[str]) -> int:
    """Classifies the pictures argv[2:] with the network argv[1], and returns the exit code."""
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    try:
        if len(argv) < 3 and not given.validation:
            raise ConfigError('which pictures? Name files or folders behind the checkpoint, or --validation=8')
        given.figure = check_output('figure', given.figure, ('.png', '.pdf'))
        member, files = parse_checkpoint_ref(argv[1]), expand_paths(argv[2:])
    except ConfigError as error:
        log_error(str(error))
        return 2
    if member.config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    from alexnet_jax.training.checkpointing import (
        CheckpointError,
    )  # imported after flag checks, because the module imports jax

    try:
        store = open_eval_dataset([member], given.data_dir) if given.validation else None
        of_store = sample_validation(store, given.validation) if store else []
        network = load_model(member, store)
        log(f'{network.name}: step {network.step}, {len(network.class_names)} classes')
        pictures = itertools.chain(load_images(files, network.config.data, network.class_names), of_store)
        return 1 if classify(network, pictures, len(files) + len(of_store), given) else 0
    except (ConfigError, CheckpointError) as error:
        log_error(str(error))
        return 2
    except (dataset.DatasetError, OSError) as error:
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
    wanted = f'which network and pictures? Name {CHECKPOINT_HELP}: alexnet predict CHECKPOINT PICTURE...'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, most=math.inf))
