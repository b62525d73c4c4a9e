"""Labeled images that a run was not trained on, for its evaluation. This module does not import jax."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from alexnet_jax.config import ConfigError, DataConfig
from alexnet_jax.data.images import UnreadableImage, read_image, resize_and_center_crop
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.evaluate.class_matching import ClassFile, match_classes
from alexnet_jax.evaluate.right_labels import RightLabels, read_right_labels
from alexnet_jax.paths import shown
from alexnet_jax.prepare.classes import labels_of
from alexnet_jax.prepare.image_files import shortened
from alexnet_jax.prepare.raw_sources import Examples, RawExample, Source, SourceError
from alexnet_jax.prepare.sources import open_split
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.runtime.files import JsonObject


class UnreadableExample(NamedTuple):
    """The name of an image in its source, and the reason why it cannot be read."""

    name: str
    reason: str


_UNREADABLE = (UnreadableImage, OSError, RuntimeError)  # RuntimeError: a corrupt ArrayRecord
_READ_AHEAD = 512  # images that are read and decoded ahead of the network


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate on, as the flags say.

    Attributes:
      source: absolute source, see sources.open_split().
      split: name of the split, or None.
      data_dir: folder of the TFDS data sets.
      all_classes: whether all classes of the run are ranked, also those that the data lacks.
      class_file, class_numbers: see class_matching.match_classes().
      real_labels: path of a file for right_labels.read_right_labels(), or None.
    """

    source: str
    split: str | None
    data_dir: str
    all_classes: bool = False
    class_file: ClassFile | None = None
    class_numbers: bool = False
    real_labels: str | None = None


@dataclasses.dataclass(frozen=True)
class OtherData:
    """The images of a split that count, with labels of the run.

    Attributes:
      source, split, origin: where the images come from.
      digest: digest of the names, sizes and labels of all images of the split.
      examples: all images of the split.
      indices: positions in `examples` of the images that count.
      labels: the label of each of these images; one of the right labels if there are several.
      right: the right labels of each of these images, or None if each has one.
      ranked: the classes of the run among which the network chooses.
      left_out: why images do not count: number and names by reason.
    """

    source: str
    split: str
    origin: str
    digest: str
    examples: Examples
    indices: Integer[np.ndarray, ' n']
    labels: Integer[np.ndarray, ' n']
    right: RightLabels | None
    ranked: Bool[np.ndarray, ' classes']
    left_out: JsonObject

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def described(self) -> str:
        """The source and the split as text."""
        return self.source if self.split == 'all' else f'{self.source}, {self.split}'


def open_other_data(request: Request, run: str, run_names: Sequence[str], is_logged: bool = True) -> OtherData:
    """Opens the images to evaluate on, and gives them labels of the run.

    The log says what was chosen: the split, how the classes are matched, and what is left out.

    Args:
      request: what to evaluate on.
      run: name of the run in messages.
      run_names: the class names of the run.
      is_logged: whether the choices are logged.

    Raises:
      SourceError: the source cannot be read, see sources.open_split(); the message names --source.
      ConfigError: the classes cannot be matched, or the file of right labels is unusable.
      DatasetError: no image can be read.
    """
    opened = _open(request)
    ((split, examples),) = opened.splits.items()
    described = request.source if split == 'all' else f'{request.source}, {split}'
    lines = [
        f'{described}: {len(examples):,} images'
        + (f' of {len(opened.class_names):,} classes from {opened.origins[split]}' if opened.class_names else ''),
        *opened.notes,
    ]
    own, unreadable = _own_labels(examples)
    if len(unreadable) == len(own):
        raise DatasetError(f'{described}: no image can be read; {_described_unreadable(unreadable)}')
    right = _right_labels(request, examples, run, run_names)
    if right is not None:
        unreadable = []  # read_images() finds them
    labels, others = np.full(len(own), -1, np.int32), list[str]()
    try:
        labels, others, line = _labels_of_run(own, opened.class_names, run_names, request, run)
        lines.append(line)
    except ConfigError:
        if right is None:
            raise
    counts = labels >= 0 if right is None else right.any(-1)
    ranked = np.isin(np.arange(len(run_names)), labels[counts]) | request.all_classes
    if right is None:
        left_out: JsonObject = {'of_other_classes': int(np.sum(~counts)) - len(unreadable), 'other_classes': others}
    else:
        left_out = {'without_right_label': int(np.sum(~counts))}
        ranked |= right.any(0)
        labels, right = right.argmax(-1).astype(np.int32), right[counts]
    for line in [*lines, *_describe_choice(run, ranked, left_out, request)] if is_logged else ():
        log(line)
    return OtherData(
        request.source,
        split,
        opened.origins[split],
        opened.fingerprint,
        examples,
        np.flatnonzero(counts),
        labels[counts],
        right,
        ranked,
        left_out | {'unreadable': unreadable},
    )


def _open(request: Request) -> Source:
    """Opens the split. Raises SourceError: see sources.open_split()."""
    try:
        return open_split(request.source, request.data_dir, request.split, labeled=request.real_labels is None)
    except SourceError as error:
        raise SourceError(str(error).replace('config.data.source: ', '--source: ')) from None


def _right_labels(request: Request, examples: Examples, run: str, run_names: Sequence[str]) -> RightLabels | None:
    """Returns the right labels of all examples, or None without --real_labels. Raises ConfigError."""
    if request.real_labels is None:
        return None
    names = [examples.name(index) for index in range(len(examples))]
    return read_right_labels(request.real_labels, names, run_names, run, request.class_file, request.class_numbers)


def _labels_of_run(
    own: Integer[np.ndarray, ' n'], names: Sequence[str], run_names: Sequence[str], request: Request, run: str
) -> tuple[Integer[np.ndarray, ' n'], list[str], str]:
    """Returns the labels of the run for the labels `own` of the data, the classes that the run lacks, and a log line.

    The label is -1 if there is none. Raises ConfigError: see class_matching.match_classes().
    """
    used = [label for label in np.unique(own).tolist() if 0 <= label < len(names)]
    matching = match_classes(
        [names[label] for label in used], run_names, request.source, run, request.class_file, request.class_numbers
    )
    table = np.full(len(names) + 1, -1, np.int32)
    table[used] = matching.labels
    rules = ', '.join(f'{count:,} by {rule}' for rule, count in matching.how.items())
    line = f'classes of the data that {run} has: {sum(matching.how.values()):,} ({rules})'
    others = [names[label] for label, found in zip(used, matching.labels, strict=True) if found < 0]
    return table[np.where((own >= 0) & (own < len(names)), own, -1)], others, line


def _own_labels(examples: Examples) -> tuple[Integer[np.ndarray, ' n'], list[UnreadableExample]]:
    """Returns the labels of the examples, which may have to be read, and the name and problem of unreadable ones."""
    known = labels_of(examples)
    if known is not None:
        return np.asarray(known, np.int64), []  # the labels of IDX files are unsigned
    labels, unreadable = np.full(len(examples), -1, np.int32), []
    progress = ProgressBar('read the labels', len(examples), 'images')
    for index in range(len(examples)):
        try:
            labels[index] = examples[index][1]
        except _UNREADABLE as error:
            unreadable.append(UnreadableExample(examples.name(index), _reason(error)))
        progress.update()
    progress.close()
    return labels, unreadable


def _describe_choice(
    run: str, ranked: Bool[np.ndarray, ' classes'], left_out: JsonObject, request: Request
) -> Iterator[str]:
    """Yields lines about the classes that are ranked and about what is left out."""
    if not ranked.all():
        yield (
            f'restricted to the {ranked.sum():,} of {len(ranked):,} classes of {run} that the data has; --all_classes'
            ' ranks all'
        )
    if left_out.get('of_other_classes'):
        names = left_out['other_classes']
        class_or_classes = 'class' if len(names) == 1 else 'classes'
        listed = (
            f'{len(names):,} {class_or_classes} that {run} does not have: {shortened(names)}' if names else 'no class'
        )
        yield f'left out: {left_out["of_other_classes"]:,} images of {listed}'
    if left_out.get('without_right_label'):
        yield f'left out: {left_out["without_right_label"]:,} images without a right label in {request.real_labels}'


def log_unreadable(unreadable: Sequence[UnreadableExample]) -> None:
    """Logs the number of unreadable images and the first of them."""
    if unreadable:
        log(f'left out: {_described_unreadable(unreadable)}')


def _described_unreadable(unreadable: Sequence[UnreadableExample]) -> str:
    """Returns the number of unreadable images and the first of them as text."""
    first = f'; the first is {shown(unreadable[0][0])} ({unreadable[0][1]})' if unreadable else ''
    return f'{len(unreadable):,} unreadable image{"s" * (len(unreadable) != 1)}{first}'


def _reason(error: Exception) -> str:
    return getattr(error, 'strerror', None) or (str(error).splitlines() or [type(error).__name__])[0]


def read_images(
    data: OtherData, settings: DataConfig
) -> Iterator[tuple[int, UInt8[np.ndarray, 's s c'] | UnreadableExample]]:
    """Reads the images of `data` in order, as the preparation of a data set with `settings` does.

    One thread reads the examples in their order, and one thread per core decodes them. Memory holds at most _READ_AHEAD
    images. Yields the position in data.indices with the pixels, or with the problem of an unreadable image.
    """

    def read(index: int) -> RawExample | UnreadableExample:
        try:
            return data.examples[index]
        except _UNREADABLE as error:
            return UnreadableExample(data.examples.name(index), _reason(error))

    def decode(reading: Future[RawExample | UnreadableExample], index: int):
        example = reading.result()
        if isinstance(example, UnreadableExample):
            return example
        try:
            return resize_and_center_crop(read_image(example[0]), settings.image_size, settings.channels)
        except UnreadableImage as error:
            return UnreadableExample(data.examples.name(index), str(error))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(cores)
    pending: collections.deque[Future] = collections.deque()
    try:
        for position, index in enumerate(data.indices.tolist()):
            pending.append(decoders.submit(decode, reader.submit(read, index), index))
            if len(pending) == _READ_AHEAD:
                yield position - _READ_AHEAD + 1, pending.popleft().result()
        for position in range(len(data) - len(pending), len(data)):
            yield position, pending.popleft().result()
    finally:
        for pool in (decoders, reader):
            pool.shutdown(wait=False, cancel_futures=True)
