"""Images with several right labels, such as those of ReaL (Beyer et al. 2020, "Are we done with ImageNet?")."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from alexnet_jax.config import ConfigError
from alexnet_jax.evaluate.class_matching import ClassFile, match_classes
from alexnet_jax.paths import shown
from alexnet_jax.weights.weight_files import class_names

IMAGENET_IMAGES = 50_000  # validation images of ILSVRC2012
_IMAGENET_NAME = re.compile(r'ILSVRC2012_val_(\d{8})\b')

RightLabels = Bool[np.ndarray, 'n classes']


def read_right_labels(
    path: str,
    image_names: Sequence[str],
    run_names: Sequence[str],
    run: str,
    file: ClassFile | None,
    class_numbers: bool,
) -> RightLabels:
    """Returns which labels of the run are right for each image; a row without a True is that of an image without any.

    The file is JSON in one of two forms. A list, as in real.json of ReaL, has a list of numbers of classes for each of
    the images ILSVRC2012_val_00000001, ILSVRC2012_val_00000002, ...; the numbers are the positions of the classes among
    the sorted WordNet ids of ILSVRC2012, unless `class_numbers` or `file` say otherwise. An object has a list of class
    names for each file name, with or without the folder.

    Args:
      path: the file.
      image_names: names of the images.
      run_names: class names of the run.
      run: name of the run in messages.
      file, class_numbers: see class_matching.match_classes().

    Raises ConfigError: the file is unreadable or has another form or length, or its classes or images match none.
    """
    flag = f'--real_labels={path}'
    try:
        with open(os.path.expanduser(path), encoding='utf-8') as opened:
            content = json.load(opened)
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or 'unreadable') if isinstance(error, OSError) else 'not JSON'
        raise ConfigError(f'{flag}: {reason}; name real.json of ReaL, or a JSON object') from None
    if isinstance(content, list) and all(_is_list(entry, int) and min(entry, default=0) >= 0 for entry in content):
        entries: Sequence[Sequence[int | str]] = _by_number(flag, content, image_names)
        used = sorted({str(label) for entry in content for label in entry}, key=int)
        labels = dict(zip(used, _labels_of_numbers(flag, used, run_names, run, file, class_numbers), strict=True))
    elif isinstance(content, dict) and all(_is_list(entry, str) for entry in content.values()):
        entries = _by_name(flag, content, image_names)
        used = sorted({name for entry in content.values() for name in entry})
        matched = match_classes(used, run_names, flag, run, file, class_numbers)
        labels = dict(zip(used, matched.labels, strict=True))
    else:
        raise ConfigError(
            f'{flag}: must be a list with a list of numbers per image, or an object with a list of class names per file'
            ' name'
        )
    right = np.zeros((len(image_names), len(run_names)), bool)
    for row, entry in zip(right, entries, strict=True):
        row[[label for value in entry if (label := labels[str(value)]) >= 0]] = True
    if not right.any():
        raise ConfigError(f'{flag}: no image has a right label that is a class of {run}')
    return right


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _by_number(flag: str, content: list[list[int]], image_names: Sequence[str]) -> list[list[int]]:
    """Returns the entry of each image by the number in its name. Raises ConfigError."""
    matches = [_IMAGENET_NAME.search(os.path.basename(name)) for name in image_names]
    other = next((name for name, match in zip(image_names, matches, strict=True) if match is None), None)
    if other is not None:
        raise ConfigError(
            f'{flag}: is a list in the order of ILSVRC2012_val_00000001, ..., but an image is named {shown(other)};'
            ' give an object with the file names'
        )
    numbers = [int(match[1]) for match in matches if match is not None]
    wrong = next((number for number in numbers if not 0 < number <= len(content)), None)
    if wrong is not None or len(content) not in (IMAGENET_IMAGES, len(image_names), max(numbers)):
        which = f'ILSVRC2012_val_{max(numbers) if wrong is None else wrong:08d}'
        raise ConfigError(
            f'{flag}: {len(content):,} entries, but there must be one for each of the {IMAGENET_IMAGES:,} validation'
            f' images, and an image is {which}'
        )
    return [content[number - 1] for number in numbers]


def _labels_of_numbers(
    flag: str, numbers: list[str], run_names: Sequence[str], run: str, file: ClassFile | None, class_numbers: bool
) -> tuple[int, ...]:
    """Returns the labels of the run for numbers of classes. Raises ConfigError: a number is none of a class."""
    if not class_numbers and not (file and file.names):
        imagenet = class_names(None, 1000)
        if numbers and int(numbers[-1]) < len(imagenet):
            try:
                return match_classes([imagenet[int(number)] for number in numbers], run_names, flag, run, file).labels
            except ConfigError:
                pass  # the run has other names than WordNet ids
        raise ConfigError(
            f'{flag}: its numbers are those of the 1000 WordNet ids of ILSVRC2012, and {run} has other classes; add'
            ' --class_numbers if they are the labels of the run, or --classes=FILE, which names them'
        )
    return match_classes(numbers, run_names, flag, run, file, class_numbers).labels


def _by_name(flag: str, content: dict[str, list[str]], image_names: Sequence[str]) -> list[list[str]]:
    """Returns the entry of each image by its path or file name; [] without one. Raises ConfigError: none has one."""
    bases = [os.path.basename(name) for name in image_names]
    shared = [base for base, count in Counter(bases).items() if count > 1 and base in content]
    if shared:
        raise ConfigError(f'{flag}: several images are named {shown(min(shared))}; give their folders too')
    entries = [content.get(name, content.get(base, [])) for name, base in zip(image_names, bases, strict=True)]
    if not any(entries):
        raise ConfigError(
            f'{flag}: has no labels for the images, such as {shown(image_names[0])}; its names are such as'
            f' {shown(next(iter(content), "none"))}'
        )
    return entries
