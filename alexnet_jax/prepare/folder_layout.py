"""Where the splits and classes are in a folder of images."""

import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from alexnet_jax.data.split_names import TRAIN, is_plain_split, split_kind
from alexnet_jax.prepare.image_files import EMPTY, IMAGES, OTHER, REMEDY, Files, content_of, list_folder, shortened
from alexnet_jax.prepare.label_table import find_table
from alexnet_jax.prepare.raw_sources import SourceError

_KAGGLE = ('ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC', 'CLS-LOC')  # in the tree of Kaggle's ImageNet
_DEPTH = 4  # folders that enter() opens at most
_IMAGE_FOLDERS = ('images', 'image', 'imgs', 'img', 'jpegimages', 'pictures', 'photos')
_ANNOTATIONS = (
    *('labels', 'label', 'annotations', 'annotation', 'masks', 'mask', 'bboxes', 'boxes', 'trimaps'),
    *('segmentation', 'segmentations', 'segmentationclass', 'segmentationobject', 'imagesets'),
)
_ANNOTATION_FILES = ('data.yaml', 'dataset.yaml', '_annotations.coco.json', '_annotations.csv', '_darknet.labels')


def enter(root: Path) -> Path:
    """Returns the folder in `root` that contains the splits or classes: usually `root` itself.

    It is another folder if `root` contains Kaggle's tree of ImageNet, or only one folder, which contains splits,
    several classes or a table, perhaps in another single folder. Raises SourceError: `root` has the folders of a data
    set for object detection.
    """
    chosen = folder = root
    for _ in range(_DEPTH):
        folders, _ = list_folder(folder, Counter())
        if find_table(folder):
            break
        _check_annotations(folder, folders)
        kaggle = next((name for name in _KAGGLE if (folder / name / 'train').is_dir()), None)
        if kaggle and not any(map(split_kind, folders)):
            return folder / kaggle
        full = _first_two(folder)
        if len(full) != 1:
            break
        folder = folder / full[0]
        splits = find_split_folders(folder)
        if split_kind(full[0]) and TRAIN not in map(split_kind, splits or ()):
            break
        if splits is not None or _has_classes(folder):
            chosen = folder
    return chosen


def find_split_folders(root: Path) -> list[str] | None:
    """Returns the names of the folders of splits in `root`, or None if the folders in `root` are classes.

    A folder whose name says train, validation or test is a split if it contains folders of images or a table. A class
    may have such a name if its images are directly in its folder, next to classes with other names.
    """
    folders, _ = list_folder(root, Counter())
    named = [name for name in folders if split_kind(name)]
    if not named:
        return None
    has_classes = any(content_of(root / name) == IMAGES for name in folders if name not in named)
    kinds = {split_kind(name) for name in named}
    if not any(map(is_plain_split, named)) and len(kinds) == 1 and (has_classes or len(named) > 1):
        return None  # classes such as bullet_train
    for name in named:
        part = inside_split(root / name)
        _, images = list_folder(part, Counter())
        if find_table(part) or (_first_two(part) and not (images and has_classes)):
            return named
    return named if not has_classes or (TRAIN in kinds and len(kinds) > 1) else None


def inside_split(folder: Path) -> Path:
    """Returns the folder that has the classes or images of a split: `folder`, or the only folder in it.

    That folder is entered if it is named like the split, as in train/train/, or images.
    """
    for _ in range(_DEPTH):
        if find_table(folder):
            break
        _, images = list_folder(folder, Counter())
        full = [] if images else _first_two(folder)
        if len(full) != 1:
            break
        name = full[0].lower()
        is_same = split_kind(name) is not None and split_kind(name) == split_kind(folder.name)
        if not is_same and name not in _IMAGE_FOLDERS:
            break
        folder = folder / full[0]
    return folder


def is_flat(folder: Path) -> bool:
    """Returns whether the images of a split are in no folders of classes and in no table."""
    folders, images = list_folder(folder, Counter())
    contents = (content_of(folder / name) for name in folders)
    return find_table(folder) is None and not any(
        content == IMAGES or (content == EMPTY and not images) for content in contents
    )


def check_classes(folder: Path, files: Mapping[str, Files], start: int) -> list[str]:
    """Returns the names of the folders inside the classes, except usual ones such as images/.

    Args:
      folder: the folder of the classes.
      files: the files of each class.
      start: position in a path at which the part relative to the folder of the classes begins.

    Raises SourceError: the folders in `folder` are no classes, because they contain splits, the same
    folders or each other's names.
    """
    owners: dict[str, str] = {}
    for name, of_class in files.items():
        begin = start + len(name) + 1
        below = {path[begin:].split('/', 1)[0] for path, _ in of_class if '/' in path[begin:]}
        below = {inner for inner in below if inner.lower() not in (*_IMAGE_FOLDERS, *_ANNOTATIONS)}
        twice = sorted(below & set(files))
        if len(twice) > 1:
            raise SourceError(
                f'config.data.source: {folder / name} is no class, because it contains {shortened(twice)}, which are'
                f' also next to it; move it out of {folder}'
            )
        kinds = {split_kind(inner) for inner in below} - {None}
        if TRAIN in kinds and len(kinds) > 1:
            splits = shortened(sorted(filter(split_kind, below)))
            has_classes = any(path[begin:].count('/') > 1 for path, _ in of_class)
            first = min(filter(split_kind, below))
            remedy = (
                f'choose folder:{folder / name}'
                if has_classes
                else 'move the folders of the classes into those of the splits, such as'
                f' {folder / name / first} to {folder / first / name}'
            )
            raise SourceError(
                f'config.data.source: {folder / name} contains the splits {splits} instead of the images of a class;'
                f' {remedy}'
            )
        shared = Counter(owners[inner] for inner in below if inner in owners)
        for other, count in shared.items():
            if count > 1:
                same = sorted(inner for inner in below if owners.get(inner) == other)
                raise SourceError(
                    f'config.data.source: {folder} has the folders {other} and {name}, which are no classes,'
                    f' because both contain {shortened(same)}; choose one of them, such as folder:{folder / other},'
                    f' or {REMEDY}'
                )
        for inner in below:
            owners.setdefault(inner, name)
    return list(owners)


def flat_error(folder: Path, root: Path) -> SourceError:
    """Returns the error for the split `folder`, whose images are in no folders of classes."""
    for place in dict.fromkeys((folder, folder.parent, root, root.parent)):
        ignored = Counter[str]()
        folders, _ = list_folder(place, ignored)
        signs = [f'{name}/' for name in folders if name.lower() in _ANNOTATIONS]
        signs += [name for name in _ANNOTATION_FILES if (place / name).is_file()]
        signs += [name for name in ('*.xml', '*.txt') if ignored[name] > 1 and place == folder]
        if signs:
            return SourceError(
                f'config.data.source: {folder} has no folder per class, and {place} has {shortened(signs, 2)}, as data'
                f' sets for object detection have; classification needs one class per image: {REMEDY}'
            )
    return SourceError(f'config.data.source: the images of the split {folder} are in no folders of classes; {REMEDY}')


def _check_annotations(root: Path, folders: list[str]) -> None:
    """Raises SourceError if `root` has a folder of images and a folder of annotations instead of classes."""
    images = [name for name in folders if name.lower() in _IMAGE_FOLDERS]
    annotations = [name for name in folders if name.lower() in _ANNOTATIONS]
    if not images or not annotations:
        return
    full = [name for name in folders if content_of(root / name) == IMAGES]
    is_nested = _first_two(root / images[0]) and full == images[:1] and not _is_flat_below(root / images[0])
    if set(full) <= {*images, *annotations} and not is_nested:
        raise SourceError(
            f'config.data.source: {root} has the folders {images[0]}/ and {annotations[0]}/, as data sets for object'
            f' detection or segmentation have; classification needs one class per image: {REMEDY}'
        )


def _is_flat_below(folder: Path) -> bool:
    """Returns whether the folders in `folder` are splits without classes."""
    names = find_split_folders(folder)
    return names is not None and not any(_first_two(inside_split(folder / name)) for name in names)


def _has_classes(folder: Path) -> bool:
    """Returns whether `folder` has a table, or only folders, at least two of them with images or empty."""
    return bool(find_table(folder)) or (not list_folder(folder, Counter())[1] and len(_first_two(folder)) > 1)


def _first_two(folder: Path) -> list[str]:
    """Returns the names of at most two folders in `folder` that are empty or contain images.

    An empty folder for annotations next to a folder of images, as in images/ and labels/, does not count.
    """
    folders, _ = list_folder(folder, Counter())
    if any(name.lower() in _IMAGE_FOLDERS for name in folders):
        folders = [name for name in folders if name.lower() not in _ANNOTATIONS or content_of(folder / name) != EMPTY]
    found = (name for name in folders if content_of(folder / name) != OTHER)
    return list(itertools.islice(found, 2))
