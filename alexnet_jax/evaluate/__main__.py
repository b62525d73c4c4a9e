"""Evaluates one or more checkpoints on every validation image, with one view or the ten views of section 4.1.

    alexnet evaluate CHECKPOINT... [--views=10] [--weights=0.5,0.3,0.2 | --fit_weights] [--per_class]

CHECKPOINT is a run's folder WORKDIR (its newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP. The
probabilities of several checkpoints are averaged, as in the ensembles of table 2. Only one network at a time is on the
devices; the predictions of all networks, 4 bytes per image and class, are in main memory.
"""

import json
import math

import numpy as np
from absl import app, flags, logging

from alexnet_jax.cli import check_output, parse_flags
from alexnet_jax.config import ConfigError
from alexnet_jax.data import dataset
from alexnet_jax.evaluate.summary import as_text, ensemble_weights, predict, summarize
from alexnet_jax.inference.trained_model import CHECKPOINT_HELP, open_eval_dataset, parse_checkpoint_ref
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.console import log_error
from alexnet_jax.runtime.files import atomic_write


def main(argv: list[str]) -> int:
    """Evaluates the checkpoints argv[1:]; returns the exit code and logs an error as one line."""
    logging.set_verbosity(logging.ERROR)
    given, names = flags.FLAGS, argv[1:]
    try:
        weights = ensemble_weights(given.weights, given.fit_weights, len(names))
        path = check_output('predictions', given.predictions)
        members = [parse_checkpoint_ref(name) for name in names]
    except ConfigError as error:
        log_error(str(error))
        return 2
    if members[0].config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    from alexnet_jax.training.checkpointing import (
        CheckpointError,
    )  # imports jax, so it follows the validation of the flags

    views = int(given.views)
    try:
        store = open_eval_dataset(members, given.data_dir)
        steps, scores, labels = zip(*[predict(member, store, views) for member in members], strict=True)
        told = [{'checkpoint': name, 'step': step} for name, step in zip(names, steps, strict=True)]
        report, mixed = summarize(told, scores, labels[0], store.class_names, weights, given.per_class)
        if path is not None:
            names_array = np.array(store.class_names)
            with atomic_write(path, 'wb') as file:
                np.savez(
                    file, allow_pickle=False, probabilities=np.exp(mixed), labels=labels[0], class_names=names_array
                )
    except (ConfigError, CheckpointError) as error:
        log_error(str(error))
        return 2
    except (dataset.DatasetError, OSError) as error:
        log_error(str(error))
        return 1
    except KeyboardInterrupt:
        log_error('stopped')
        return 130
    report = {'views': views, **report}
    print(json.dumps(report) if given.json else as_text(report))
    return 0


if __name__ == '__main__':
    flags.DEFINE_enum(
        'views', '10', ['1', '10'], 'Of each image: its centre, or ten with the mean of their softmax outputs.'
    )
    flags.DEFINE_string('data_dir', None, "Where the prepared data lie; by default the first run's data.data_dir.")
    flags.DEFINE_list('weights', None, 'Of the checkpoints, in their order; by default they are equal.')
    flags.DEFINE_bool('fit_weights', False, 'Fit the weights on every second image, and report errors on the others.')
    flags.DEFINE_bool('per_class', False, 'Print a table of the classes as well.')
    flags.DEFINE_string('predictions', None, "FILE.npz to save the probabilities of all images in, the ensemble's.")
    flags.DEFINE_bool('json', False, 'Print one JSON object.')
    wanted = f'which checkpoint? Name {CHECKPOINT_HELP}: alexnet evaluate CHECKPOINT...'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, most=math.inf))
