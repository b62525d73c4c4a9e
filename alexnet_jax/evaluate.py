"""Evaluates one or more checkpoints on every validation image, with one view or the ten views of section 4.1.

    alexnet evaluate CHECKPOINT... [--views=10] [--weights=0.5,0.3,0.2 | --fit_weights] [--per_class]

CHECKPOINT is a run's folder WORKDIR (its newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP. The
probabilities of several checkpoints are averaged, as in the ensembles of table 2. Only one network at a time is on the
devices; the predictions of all networks, 4 bytes per image and class, are in main memory.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from alexnet_jax import ensemble, startup
from alexnet_jax.command import check_output, parse_flags
from alexnet_jax.config import ConfigError
from alexnet_jax.data import pipeline
from alexnet_jax.monitor import Progress, atomic_write, log, log_error
from alexnet_jax.trained import FORMS, Member, find, load, store_of

FITTED, REPORTED = slice(0, None, 2), slice(1, None, 2)  # of the validation images, for --fit_weights


def evaluate(
    eval_step: Callable,
    state: Any,
    batches: Iterable[dict[str, np.ndarray]],
    preprocessing: dict[str, np.ndarray],
    sharding: Any,
    *,
    what: str,
    total: int,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Evaluates a network on `batches`.

    Args:
      eval_step: see step.make_eval_step().
      state: step.TrainState, sharded over the mesh.
      batches: this process's rows of each batch, see data/pipeline.validation_batches().
      preprocessing: see augment.preprocessing().
      sharding: sharding of the rows of a batch, see parallel.batch_sharding().
      what: label of the progress bar.
      total: number of batches, for the progress bar.
      stop: called before each batch; True aborts the evaluation.

    Returns:
      The means over all images, loss, top1_error and top5_error (0 to 1), and the number of images, examples; None if
      `stop` returned True.
    """
    import jax

    from alexnet_jax import parallel
    from alexnet_jax.totals import MetricSum

    totals, previous = MetricSum(), None
    progress = Progress(what, total, 'batches')
    for batch in batches:
        if stop():
            progress.close()
            return None
        sums = eval_step(state, parallel.make_global_batch(sharding, batch), preprocessing)
        totals.add(sums)
        jax.block_until_ready(previous)  # keeps at most two batches in flight
        previous = sums
        progress.update()
    progress.close()
    loss, top1_error, top5_error, examples = totals.read().tolist()
    means = {'loss': loss, 'top1_error': top1_error, 'top5_error': top5_error}
    return {name: value / examples for name, value in means.items()} | {'examples': int(examples)}


def predict(member: Member, store: pipeline.Store, views: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Predicts the validation images with the network `member`; skips records that are corrupt on disk.

    Raises ConfigError, CheckpointError, DatasetError: see trained.load() and data/pipeline.Split.

    Returns:
      The checkpoint's step, log probabilities (N, classes) float32 and labels (N,) int32, in the order of the images.
      The probabilities are means over `views`, 1 or 10 (section 4.1).
    """
    from alexnet_jax import parallel
    from alexnet_jax.step import make_predict_step

    network = load(member, store)
    config, mesh = network.config, network.mesh
    log(f'{member.name}: step {network.step}; mesh data={mesh.shape["data"]}, model={mesh.shape["model"]}')
    predict_step = make_predict_step(config, mesh, views)
    preprocessing = network.preprocessing
    scores, labels = [], []
    what = f'evaluate {member.name}, {views} view{"s" * (views > 1)}'
    batch_size = network.batch_size(len(store.validation))
    progress = Progress(what, math.ceil(len(store.validation) / batch_size), 'batches')
    batches = pipeline.validation_batches(store.validation, batch_size=batch_size, threads=config.data.threads)
    for batch in batches:
        images, counted = parallel.make_global_batch(network.sharding, batch['image']), batch['label'] >= 0
        scores.append(np.asarray(predict_step(network.state, images, preprocessing))[counted])
        labels.append(batch['label'][counted])
        progress.update()
    progress.close()
    return network.step, np.concatenate(scores), np.concatenate(labels)


def summarise(
    members: Sequence[dict[str, Any]],
    scores: Sequence[np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    weights: Sequence[float] | None,
    per_class: bool = False,
) -> tuple[dict[str, Any], np.ndarray]:
    """Computes the report that --json prints, without `views`, and the ensemble's scores (N, classes) for all images.

    Args:
      members: entries to copy into the report of each member, such as its name.
      scores: log probabilities (N, classes) float32 of each member.
      labels: (N,) int32.
      class_names: one name per label.
      weights: weights of the members, with sum 1; None fits the weights on images 0, 2, 4, ... and reports errors on
        the remaining images.
      per_class: add the errors of each class to the report.
    """
    reported = slice(None)
    if weights is None:
        weights = ensemble.fit_weights([member[FITTED] for member in scores], labels[FITTED]).tolist()
        reported = REPORTED
    mixed = ensemble.mixture(scores, weights)
    own = [ensemble.figures(member[reported], labels[reported]) for member in scores]
    report: dict[str, Any] = {
        'images': len(labels[reported]),
        'fitted_on': len(labels) - len(labels[reported]),
        'members': [
            {**member, **figures, 'weight': weight}
            for member, figures, weight in zip(members, own, weights, strict=True)
        ],
    }
    if len(members) > 1:
        report['mean'] = {name: float(np.mean([figures[name] for figures in own])) for name in own[0]}
        report['ensemble'] = ensemble.figures(mixed[reported], labels[reported])
    if per_class:
        report['classes'] = ensemble.by_class(mixed[reported], labels[reported], class_names)
    return report, mixed


def as_text(report: dict[str, Any]) -> str:
    """Formats the report, with `views`, as text tables."""
    rows = [(f'{member["checkpoint"]}, step {member["step"]}', member) for member in report['members']]
    together = {'mean of members': 'mean', 'ensemble': 'ensemble'}
    rows += [(label, report[name]) for label, name in together.items() if name in report]
    width = max(len(label) for label, _ in rows)
    views = f'{report["views"]} view{"s" * (report["views"] > 1)}'
    lines = [f'{report["images"]:,} validation images, {views}']
    if report['fitted_on']:
        lines[0] += f': every second one; the weights were fitted on the other {report["fitted_on"]:,}'
    lines += ['', f'{"":<{width}}{"loss":>10}{"top-1 error":>14}{"top-5 error":>14}{"weight":>10}']
    for label, figures in rows:
        weight = f'{figures["weight"]:>10.4f}' if 'weight' in figures else ''
        lines.append(f'{label:<{width}}{figures["loss"]:>10.4f}{_percents(figures)}{weight}')
    return '\n'.join(lines + _class_lines(report.get('classes', [])))


def _percents(figures: dict[str, Any]) -> str:
    errors = (figures['top1_error'], figures['top5_error'])
    return ''.join(f'{"" if error is None else f"{error:.2%}":>14}' for error in errors)


def _class_lines(classes: list[dict[str, Any]]) -> list[str]:
    """Formats the rows of ensemble.by_class() as lines of a table; returns [] without rows."""
    if not classes:
        return []
    width = max(len('class'), *(len(row['name']) for row in classes))
    header = f'{"class":<{width}}{"images":>8}{"top-1 error":>14}{"top-5 error":>14}  most often taken for'
    lines = ['', header]
    for row in classes:
        instead = f'  {row["instead"]} ({row["instead_images"]})' if row['instead'] else ''
        lines.append(f'{row["name"]:<{width}}{row["images"]:>8,}{_percents(row)}{instead}')
    return lines


def _weights(given: list[str] | None, fit: bool, members: int) -> list[float] | None:
    """Returns the weights of the members, normalized to sum 1, or None if the weights are to be fitted.

    Raises ConfigError: the flags are invalid.
    """
    if fit:
        if given is not None or members == 1:
            what = 'name two checkpoints or more' if given is None else 'leave it out, or --weights'
            raise ConfigError(f'--fit_weights: {what}')
        return None
    if given is None:
        return [1 / members] * members
    text = f'--weights={",".join(given)}'
    try:
        values = [float(value) for value in given]
    except ValueError:
        raise ConfigError(f'{text}: not numbers; write for example --weights=0.5,0.3,0.2') from None
    if len(values) != members:
        raise ConfigError(f'{text}: {len(values)} for {members} checkpoints; give one for each')
    total = sum(values)
    if min(values) < 0 or not 0 < total < math.inf:
        raise ConfigError(f'{text}: weights are 0 or more, and one at least is above 0')
    return [value / total for value in values]


def main(argv: list[str]) -> int:
    """Evaluates the checkpoints argv[1:]; returns the exit code and logs an error as one line."""
    logging.set_verbosity(logging.ERROR)
    given, names = flags.FLAGS, argv[1:]
    try:
        weights = _weights(given.weights, given.fit_weights, len(names))
        path = check_output('predictions', given.predictions)
        members = [find(name) for name in names]
    except ConfigError as error:
        log_error(str(error))
        return 2
    if members[0].config.cpu_tuning:
        startup.configure_cpu_backend()
    startup.enable_compilation_cache()
    from alexnet_jax.checkpoint import CheckpointError  # imports jax, so it follows the validation of the flags

    views = int(given.views)
    try:
        store = store_of(members, given.data_dir)
        steps, scores, labels = zip(*[predict(member, store, views) for member in members], strict=True)
        told = [{'checkpoint': name, 'step': step} for name, step in zip(names, steps, strict=True)]
        report, mixed = summarise(told, scores, labels[0], store.class_names, weights, given.per_class)
        if path is not None:
            names_array = np.array(store.class_names)
            with atomic_write(path, 'wb') as file:
                np.savez(
                    file, allow_pickle=False, probabilities=np.exp(mixed), labels=labels[0], class_names=names_array
                )
    except (ConfigError, CheckpointError) as error:
        log_error(str(error))
        return 2
    except (pipeline.DatasetError, OSError) as error:
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
    wanted = f'which checkpoint? Name {FORMS}: alexnet evaluate CHECKPOINT...'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, most=math.inf))
