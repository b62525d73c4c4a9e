"""Evaluate one or more checkpoints on every validation image, with one view or the ten views of section 4.1.

    alexnet evaluate CHECKPOINT... [--views=10] [--weights=0.5,0.3,0.2 | --fit_weights] [--per_class]

CHECKPOINT is a run's folder WORKDIR (its newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP. The
probabilities of several checkpoints are averaged, as in the ensembles of table 2. The devices hold one
model at a time; main memory holds the predictions of all models, 4 bytes per image and class.
"""

import json
import math

import numpy as np
from absl import flags

from alexnet_jax import cli
from alexnet_jax.evaluate.summary import as_text, ensemble_weights, summarize
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.checkpoint_ref import CHECKPOINT_HELP, parse_checkpoint_ref
from alexnet_jax.runtime.files import atomic_write


def main(argv: list[str]) -> int:
    """Evaluates the checkpoints argv[1:]; returns the exit code."""
    given, names = flags.FLAGS, argv[1:]
    weights = ensemble_weights(given.weights, given.fit_weights, len(names))
    path = cli.check_output('predictions', given.predictions)
    refs = [parse_checkpoint_ref(name) for name in names]
    if refs[0].config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    from alexnet_jax.evaluate.predictions import predict
    from alexnet_jax.inference.trained_model import open_eval_dataset

    views = int(given.views)
    prepared = open_eval_dataset(refs, given.data_dir, given.prepared_dir)
    steps, scores, labels = zip(*[predict(ref, prepared, views) for ref in refs], strict=True)
    checkpoints = [{'checkpoint': name, 'step': step} for name, step in zip(names, steps, strict=True)]
    report, mixed = summarize(checkpoints, scores, labels[0], prepared.class_names, weights, given.per_class)
    if path is not None:
        arrays = {'probabilities': np.exp(mixed), 'labels': labels[0], 'class_names': np.array(prepared.class_names)}
        with atomic_write(path, 'wb') as file:
            np.savez(file, allow_pickle=False, **arrays)
    report = {'views': views, **report}
    print(json.dumps(report) if given.json else as_text(report))
    return 0


if __name__ == '__main__':
    flags.DEFINE_enum(
        'views', '10', ['1', '10'], 'Views per image: its center, or ten, whose softmax outputs are averaged.'
    )
    flags.DEFINE_string('data_dir', None, "Folder of the prepared data sets. Default: the first run's data.data_dir.")
    flags.DEFINE_string('prepared_dir', None, 'Folder of the prepared data sets. Default: `prepared` in data.data_dir.')
    flags.DEFINE_list('weights', None, 'Weights of the checkpoints, in their order. Default: equal weights.')
    flags.DEFINE_bool('fit_weights', False, 'Fit the weights on every second image and report errors on the others.')
    flags.DEFINE_bool('per_class', False, 'Also print a table of the classes.')
    flags.DEFINE_string('predictions', None, 'FILE.npz to which the (ensemble) probabilities of all images are saved.')
    flags.DEFINE_bool('json', False, 'Print one JSON object.')
    cli.run(
        main,
        missing=f'no checkpoint is given; name {CHECKPOINT_HELP}: alexnet evaluate CHECKPOINT...',
        max_arguments=math.inf,
    )
