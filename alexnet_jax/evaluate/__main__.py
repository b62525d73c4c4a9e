"""Evaluate one or more checkpoints on labeled images, with one view or the ten views of section 4.1.

    alexnet evaluate CHECKPOINT... [--views=10] [--weights=0.5,0.3,0.2 | --fit_weights] [--per_class]
    alexnet evaluate CHECKPOINT... --source=folder:DIR [--split=test] [--classes=FILE] [--real_labels=FILE] ...
    alexnet evaluate CHECKPOINT --corruptions=DIR [--clean_error=0.43]

CHECKPOINT is a run's folder WORKDIR (its newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP. The
probabilities of several checkpoints are averaged, as in the ensembles of table 2. The devices hold one
model at a time; main memory holds the predictions of all models, 4 bytes per image and class.

The images are the validation images of the first run; with --source or --split they are other images, whose classes are
matched with those of the run by WordNet id or name, and the results are kept in WORKDIR/evaluations.
"""

import json
import math
from collections.abc import Sequence

import numpy as np
from absl import flags

from alexnet_jax import cli
from alexnet_jax.config import ConfigError
from alexnet_jax.evaluate.summary import as_text, ensemble_weights, summarize
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.checkpoint_ref import CHECKPOINT_HELP, CheckpointRef, parse_checkpoint_ref
from alexnet_jax.runtime.files import JsonObject, atomic_write


def main(argv: list[str]) -> int:
    """Evaluates the checkpoints argv[1:]; returns the exit code."""
    given, names = flags.FLAGS, argv[1:]
    is_elsewhere = given.source is not None or given.split is not None
    _check_flags(given, is_elsewhere, len(names))
    weights = ensemble_weights(given.weights, given.fit_weights, len(names))
    path = cli.check_output('predictions', given.predictions)
    refs = [parse_checkpoint_ref(name) for name in names]
    if refs[0].config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    views = int(given.views)
    if given.corruptions is not None:
        return _evaluate_corruptions(refs[0], given, views)
    if is_elsewhere:
        from alexnet_jax.evaluate.elsewhere import evaluate_elsewhere, request_of

        report, arrays = evaluate_elsewhere(
            refs, request_of(given, refs[0]), views, weights, given.per_class, path is not None
        )
    else:
        report, arrays = _evaluate_validation(refs, given, views, weights)
    if path is not None:
        with atomic_write(path, 'wb') as file:
            np.savez(file, allow_pickle=False, **arrays)
    report = {'views': views, **report}
    print(json.dumps(report) if given.json else as_text(report))
    return 0


def _evaluate_validation(
    refs: list[CheckpointRef], given: flags.FlagValues, views: int, weights: Sequence[float] | None
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Evaluates the checkpoints on the validation images of the first run; returns the report and the predictions."""
    from alexnet_jax.evaluate.own_data import check_own_data
    from alexnet_jax.evaluate.predictions import predict
    from alexnet_jax.inference.trained_model import open_eval_dataset

    check_own_data(refs, given.data_dir, given.prepared_dir)
    prepared = open_eval_dataset(refs, given.data_dir, given.prepared_dir)
    steps, scores, labels = zip(*[predict(ref, prepared, views) for ref in refs], strict=True)
    checkpoints = [{'checkpoint': ref.name, 'step': step} for ref, step in zip(refs, steps, strict=True)]
    report, mixed = summarize(checkpoints, scores, labels[0], prepared.class_names, weights, given.per_class)
    arrays = {'probabilities': np.exp(mixed), 'labels': labels[0], 'class_names': np.array(prepared.class_names)}
    return report, arrays


def _evaluate_corruptions(ref: CheckpointRef, given: flags.FlagValues, views: int) -> int:
    """Evaluates a checkpoint on the sets of ImageNet-C and prints the errors; returns the exit code."""
    from alexnet_jax.evaluate.corruptions import corruptions_as_text
    from alexnet_jax.evaluate.elsewhere import evaluate_corruptions, request_of

    report = evaluate_corruptions(ref, request_of(given, ref), given.corruptions, views, given.clean_error)
    print(json.dumps(report) if given.json else corruptions_as_text(report))
    return 0


def _check_flags(given: flags.FlagValues, is_elsewhere: bool, members: int) -> None:
    """Raises ConfigError: flags contradict each other."""
    if given.corruptions is not None:
        others = ('source', 'split', 'real_labels', 'per_class', 'predictions', 'weights', 'fit_weights')
        extra = next((name for name in others if given[name].present), None)
        if extra is not None:
            raise ConfigError(f'--corruptions: takes no --{extra}; omit one of them')
        if members > 1:
            raise ConfigError('--corruptions: name one checkpoint; the sets are evaluated for one network')
    needs_other_data = ('classes', 'class_numbers', 'all_classes', 'real_labels')
    extra = next((name for name in needs_other_data if given[name].present), None)
    if extra is not None and not is_elsewhere and given.corruptions is None:
        raise ConfigError(f'--{extra}: is for other images than those of the run; name them with --source or --split')
    if given.clean_error is not None and given.corruptions is None:
        raise ConfigError('--clean_error: is for --corruptions; omit it')
    if given.prepared_dir is not None and (is_elsewhere or given.corruptions is not None):
        raise ConfigError('--prepared_dir: other images than those of the run are not prepared; omit the flag')
    if given.classes is not None and given.class_numbers:
        raise ConfigError('--class_numbers: --classes names the numbers; omit one of them')
    if given.fit_weights and given.real_labels is not None:
        raise ConfigError('--fit_weights: needs one right label per image; omit it, or --real_labels')


if __name__ == '__main__':
    flags.DEFINE_enum(
        'views', '10', ['1', '10'], 'Views per image: its center, or ten, whose softmax outputs are averaged.'
    )
    flags.DEFINE_string(
        'source',
        None,
        'Other images to evaluate on: folder:DIR, tfds:NAME[:config], hf:DIR, wds:PATTERN, idx:DIR or photos.',
    )
    flags.DEFINE_string(
        'split', None, "Split of --source, or of the run's source. Default: its validation split, or its only split."
    )
    flags.DEFINE_string(
        'classes',
        None,
        'FILE with the names of the classes 0, 1, ..., one per line; or with the name of a class in the data, a tab and'
        ' its name in the run per line.',
    )
    flags.DEFINE_bool('class_numbers', False, 'The classes of the data are numbers, the labels of the run.')
    flags.DEFINE_bool('all_classes', False, 'Rank all classes of the run, also those that the data does not have.')
    flags.DEFINE_string(
        'real_labels', None, 'FILE.json with several right labels per image: real.json of ReaL, or {file: [classes]}.'
    )
    flags.DEFINE_string(
        'corruptions', None, 'DIR with the sets CORRUPTION/SEVERITY of ImageNet-C, or tfds:imagenet2012_corrupted.'
    )
    flags.DEFINE_float(
        'clean_error', None, 'With --corruptions: top-1 error without corruption. Default: that of the run.', 0.0, 1.0
    )
    flags.DEFINE_string(
        'data_dir',
        None,
        "Folder of the data sets of TFDS and of prepared ones. Default: the first run's data.data_dir.",
    )
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
        usage_errors=(SourceError,),
    )
