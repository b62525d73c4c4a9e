"""Evaluates checkpoints on data that they were not trained on, and keeps the results in the folders of the runs."""

import dataclasses
import datetime
import os
import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import Bool, Int32, Int64

from alexnet_jax import metrics
from alexnet_jax.config import ConfigError
from alexnet_jax.data.split_names import TEST, VALIDATION, split_kind
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.evaluate import corruptions, stored
from alexnet_jax.evaluate.class_matching import read_class_file
from alexnet_jax.evaluate.other_data import OtherData, Request, UnreadableExample, log_unreadable, open_other_data
from alexnet_jax.evaluate.predictor import Predictor
from alexnet_jax.evaluate.summary import summarize
from alexnet_jax.inference.trained_model import TrainedModel, load_model
from alexnet_jax.metrics import Scores
from alexnet_jax.paths import absolute_path, absolute_source, shown
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef
from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.environment import environment
from alexnet_jax.runtime.files import JsonObject
from alexnet_jax.runtime.workdir import read_dataset_statistics, read_result_json


@dataclasses.dataclass(frozen=True)
class Judged:
    """The readable images of the data, and what the members say about them.

    Attributes:
      scores: log probabilities of each member, with the classes in the order of the first member.
      labels, right: see OtherData.
      indices: positions of the images in the examples of the data.
      unreadable: the images that were left out.
    """

    scores: list[Scores]
    labels: Int32[np.ndarray, ' n']
    right: Bool[np.ndarray, 'n classes'] | None
    indices: Int64[np.ndarray, ' n']
    unreadable: list[UnreadableExample]


def request_of(given: flags.FlagValues, ref: CheckpointRef) -> Request:
    """Returns what the flags ask for; `ref` is the first checkpoint, whose settings are the defaults."""
    source = ref.config.data.source if given.source is None else absolute_source('--source', given.source)
    data_dir = ref.config.data.data_dir if given.data_dir is None else absolute_path('--data_dir', given.data_dir)
    return Request(
        source,
        given.split,
        data_dir,
        given.all_classes,
        None if given.classes is None else read_class_file(given.classes),
        given.class_numbers,
        given.real_labels,
    )


def evaluate_elsewhere(
    refs: Sequence[CheckpointRef],
    request: Request,
    views: int,
    weights: Sequence[float] | None,
    per_class: bool,
    is_saved: bool = False,
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Evaluates the checkpoints `refs` on the data of `request`, and keeps the result of each in the folder of its run.

    The classes of the members of an ensemble may have any order. See summary.summarize() for `weights`, `per_class` and
    the report.

    Returns the report, and the arrays that --predictions saves; without the names of the images unless `is_saved`,
    because TFDS reads each record again for its name.

    Raises:
      SourceError, ConfigError, DatasetError: see other_data.open_other_data(), or the members have other classes.
      CheckpointError: a checkpoint cannot be read.
    """
    all_names = [_class_names(ref) for ref in refs]
    class_names = all_names[0]
    columns = [_columns(ref, names, refs[0], class_names) for ref, names in zip(refs, all_names, strict=True)]
    start = time.monotonic()
    data = open_other_data(request, refs[0].name, class_names)
    _log_training_images(refs, request, data)
    checkpoints: list[JsonObject] = []
    found: list[tuple[Scores, dict[int, UnreadableExample]]] = []
    for ref, own in zip(refs, columns, strict=True):
        predictor = Predictor(load_model(ref), own, views)
        found.append(predictor.predict(data))
        checkpoints.append(_checkpoint(predictor.model))
    judged = _judge(data, found)
    members = [{'checkpoint': ref.name, **checkpoint} for ref, checkpoint in zip(refs, checkpoints, strict=True)]
    report, mixed = summarize(members, judged.scores, judged.labels, class_names, weights, per_class, judged.right)
    if per_class:
        report['classes'] = [row for row in report['classes'] if row['images']]
    facts = _facts(request, data, judged.unreadable, views)
    seconds = time.monotonic() - start
    for ref, checkpoint, scores in zip(refs, checkpoints, judged.scores, strict=True):
        figures = metrics.error_rates(*metrics.with_best_label(scores, judged.labels, judged.right))
        images = {'images': len(scores), **figures}
        if per_class and len(refs) == 1:
            images['per_class'] = report['classes']
        _store(ref, request, data, views, checkpoint | facts | images | {'seconds': seconds})
    _, labels = metrics.with_best_label(mixed, judged.labels, judged.right)
    arrays = {
        'probabilities': np.exp(mixed),
        'labels': labels,
        'class_names': np.array(class_names),
    }
    if is_saved:
        arrays['images'] = np.array([data.examples.name(index) for index in judged.indices.tolist()])
    if judged.right is not None:
        arrays['right_labels'] = judged.right
    return {'data': f'images of {data.described}', **facts, **report}, arrays


def _class_names(ref: CheckpointRef) -> list[str]:
    return read_dataset_statistics(ref.workdir, ref.config)[1]


def _columns(ref: CheckpointRef, names: list[str], first: CheckpointRef, wanted: list[str]) -> Int64[np.ndarray, ' n']:
    """Returns the label in `names`, those of `ref`, of each class in `wanted`.

    Raises ConfigError: the classes differ.
    """
    positions = {name: label for label, name in enumerate(names)}
    other = next((name for name in wanted if name not in positions), None)
    if other is not None or len(names) != len(wanted):
        which = f'such as {shown(other)}, which it lacks' if other is not None else f'{len(names)}, not {len(wanted)}'
        raise ConfigError(f'{ref.name}: has other classes than {first.name}, {which}; evaluate it separately')
    return np.array([positions[name] for name in wanted])


def _log_training_images(refs: Sequence[CheckpointRef], request: Request, data: OtherData) -> None:
    """Logs if the images are from the source on which a checkpoint was trained, and not from a split apart."""
    kinds = [split_kind(name) for name in (data.split, os.path.basename(request.source))]
    for ref in refs:
        own = ref.config.data.source
        is_within = request.source == own or request.source.startswith(f'{own}/')
        if is_within and VALIDATION not in kinds and TEST not in kinds:
            log(f'{data.described} is what {ref.name} was trained on: its training images are among these images')


def _judge(data: OtherData, found: Sequence[tuple[Scores, dict[int, UnreadableExample]]]) -> Judged:
    """Returns the images that all members could read. Raises DatasetError: there is none."""
    unreadable = {position: example for _, problems in found for position, example in problems.items()}
    problems = [*data.left_out['unreadable'], *(example for _, example in sorted(unreadable.items()))]
    log_unreadable(problems)
    kept = np.ones(len(data), bool)
    kept[list(unreadable)] = False
    if not kept.any():
        raise DatasetError(f'{data.described}: none of the {len(data):,} images can be read')
    return Judged(
        [scores[kept] for scores, _ in found],
        data.labels[kept],
        None if data.right is None else data.right[kept],
        data.indices[kept],
        problems,
    )


def _facts(request: Request, data: OtherData, unreadable: Sequence[UnreadableExample], views: int) -> JsonObject:
    """Returns what a result says about the data."""
    left_out = data.left_out | {'unreadable': len(unreadable)}
    if unreadable:
        left_out['first_unreadable'] = unreadable[0]._asdict()
    return {
        'source': data.source,
        'split': data.split,
        'origin': data.origin,
        'data_digest': data.digest,
        'views': views,
        'ranked_classes': int(data.ranked.sum()),
        'model_classes': len(data.ranked),
        'real_labels': None if request.real_labels is None else absolute_path('--real_labels', request.real_labels),
        'classes_file': None if request.class_file is None else absolute_path('--classes', request.class_file.path),
        'classes_digest': None if request.class_file is None else request.class_file.digest(),
        'class_numbers': request.class_numbers,
        'left_out': left_out,
    }


def _options(ref: CheckpointRef, request: Request) -> list[str]:
    """Returns what tells results for the same data apart, for stored.result_name()."""
    checkpoint = '' if ref.selector == 'newest' else ref.selector if ref.selector == 'best' else f'step_{ref.selector}'
    file = request.class_file
    return [
        'real_labels' * (request.real_labels is not None),
        'all_classes' * request.all_classes,
        'class_numbers' * request.class_numbers,
        '' if file is None else f'classes_{file.digest()[:8]}',
        checkpoint,
    ]


def _store(ref: CheckpointRef, request: Request, data: OtherData, views: int, result: JsonObject) -> None:
    """Keeps `result` in the folder of the run, and logs where."""
    name = stored.result_name(data.source, data.split, views, *_options(ref, request))
    if stored.store(ref.workdir, name, result | _context()):
        log(f'the result is kept in {os.path.join(ref.workdir, stored.FOLDER, name)}.json')


def _checkpoint(model: TrainedModel) -> JsonObject:
    return {'step': model.step, 'digest': model.digest}


def _context() -> JsonObject:
    """Returns time, command, versions and hardware."""
    return {'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), **environment()}


def evaluate_corruptions(
    ref: CheckpointRef, request: Request, place: str, views: int, clean_error: float | None
) -> JsonObject:
    """Evaluates a checkpoint on the sets of ImageNet-C in `place`, see corruptions.find_sets().

    The result of each set is kept as soon as it is there. A set with a result for the same weights, images and classes
    is not evaluated again.

    Args:
      ref: the checkpoint.
      request: what to evaluate; its source and split are not used.
      place: the value of --corruptions.
      views: number of views.
      clean_error: top-1 error without corruption; None takes that of the run if it is known.

    Raises: see evaluate_elsewhere().
    """
    sets = corruptions.find_sets(place, request.data_dir)
    names = _class_names(ref)
    model = load_model(ref)
    predictor = Predictor(model, np.arange(len(names)), views)
    where = place if place.startswith('tfds:') else f'folder:{absolute_path("--corruptions", place)}'
    folder = stored.result_name(where, 'corruptions', views, *_options(ref, request))
    errors: dict[corruptions.Set, float] = {}
    images: dict[str, int] = {}
    skipped, is_writable = 0, True
    for (corruption, severity), source in sets.items():
        asked = dataclasses.replace(request, source=source, split=None)
        data = open_other_data(asked, ref.name, names, is_logged=not errors)
        name = os.path.join(folder, f'{corruption}_{severity}')
        key = _checkpoint(model) | _facts(request, data, [], views)
        key.pop('left_out')
        before = stored.read(ref.workdir, name) or {}
        error, counted = before.get('top1_error'), before.get('images')
        if key.items() <= before.items() and isinstance(error, float) and isinstance(counted, int):
            errors[corruption, severity], images[source] = error, counted
            skipped += 1
            continue
        judged = _judge(data, [predictor.predict(data)])
        figures = metrics.error_rates(judged.scores[0], judged.labels)
        errors[corruption, severity], images[source] = figures['top1_error'], len(judged.labels)
        facts = _facts(request, data, judged.unreadable, views)
        is_writable = is_writable and stored.store(
            ref.workdir, name, key | facts | {'images': len(judged.labels), **figures} | _context()
        )
    if skipped:
        log(f'{skipped} of the {len(sets)} sets were evaluated by an earlier command')
    fewest, most = min(images, key=images.__getitem__), max(images, key=images.__getitem__)
    if images[fewest] < images[most]:
        log(f'the sets differ: {fewest} has {images[fewest]:,} images that count, but {most} has {images[most]:,}')
    if clean_error is None:
        clean_error = _error_of_run(ref, model, views)
    report = corruptions.summarize_corruptions(errors, clean_error)
    result = {'source': where, 'split': 'corruptions', 'views': views, **_checkpoint(model), **report}
    if is_writable and stored.store(ref.workdir, folder, result | _context()):
        log(f'the result is kept in {os.path.join(ref.workdir, stored.FOLDER, folder)}.json')
    return {'checkpoint': ref.name, **result}


def _error_of_run(ref: CheckpointRef, model: TrainedModel, views: int) -> float | None:
    """Returns the top-1 validation error in result.json of the run, if it is that of the checkpoint, or None."""
    result = read_result_json(ref.workdir) or {}
    figures = (result.get('views') or {}).get(str(views)) if isinstance(result.get('views'), dict) else None
    error = figures.get('top1_error') if isinstance(figures, dict) else None
    if result.get('step') != model.step or not isinstance(error, float):
        return None
    log(f'clean error {error:.2%}: that of the validation images of {ref.name}')
    return error
