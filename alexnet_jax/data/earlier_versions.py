"""Prepared data sets of earlier versions, whose names and manifests have the source as the user typed it."""

import dataclasses
import os

from etils import epath

from alexnet_jax.config import ConfigError, shown_classes
from alexnet_jax.data.dataset import dataset_dir, name_by_text
from alexnet_jax.data.manifest import MANIFEST, Manifest, earlier_texts, load_manifest, match_earlier_source
from alexnet_jax.data.prepare_command import PrepareSettings, replace_command
from alexnet_jax.data.split_names import TRAIN, VALIDATION, split_kind
from alexnet_jax.paths import absolute_source


@dataclasses.dataclass(frozen=True)
class EarlierDataset:
    """A prepared data set of an earlier version.

    Attributes:
      directory: its folder.
      manifest: its manifest.
      is_same_path: whether the manifest has the absolute path of the source; otherwise the relative path in the
        manifest may be that of another source.
    """

    directory: str
    manifest: Manifest
    is_same_path: bool


def find_earlier(settings: PrepareSettings, data_dir: str, prepared_dir: str | None) -> EarlierDataset | None:
    """Returns the data set that an earlier version may have prepared from the source of `settings`, or None."""
    source = absolute_source('config.data.source', settings.source)
    if source.partition(':')[0] not in ('folder', 'idx'):
        return None
    root = os.path.dirname(dataset_dir(data_dir, settings, prepared_dir))
    found = []
    for name in dict.fromkeys(name_by_text(text, settings) for text in earlier_texts(source)):
        directory = os.path.join(root, name)
        try:
            manifest = load_manifest(directory) if (epath.Path(directory) / MANIFEST).exists() else None
        except ConfigError:  # corrupt
            continue
        match = manifest and manifest.version == 1 and match_earlier_source(manifest.source, source)
        if manifest and match:
            found.append(EarlierDataset(directory, manifest, match == 'absolute'))
    return next((one for one in found if one.is_same_path), found[0] if found else None)


def check_labels(found: EarlierDataset, settings: PrepareSettings, data_dir: str, prepared_dir: str | None) -> None:
    """Raises ConfigError if the labels of a data set of an earlier version may be wrong, see doubt_of_labels()."""
    doubt = doubt_of_labels(found.manifest, settings)
    if doubt is not None:
        command = replace_command(settings, data_dir, prepared_dir)
        raise ConfigError(f'config.data: {found.directory} is not used, because {doubt}; prepare it anew: {command}')


def doubt_of_labels(manifest: Manifest, settings: PrepareSettings) -> str | None:
    """Returns why the labels of a data set of an earlier version may be wrong, or None.

    Earlier versions gave labels in the order of the folders, even if `class_names` were the names of the folders in
    another order, and took folders such as Train and Val for classes.
    """
    names = manifest.class_names
    kind, _, root = absolute_source('config.data.source', settings.source).partition(':')
    if kind != 'folder':
        return None
    kinds = [split_kind(name) for name in names]
    if TRAIN in kinds and all(kinds):
        return f'an earlier version took the splits {shown_classes(names)} for classes'
    folders = [_subfolders(os.path.join(root, 'train')), _subfolders(root)]
    if names == sorted(names) or (any(folders) and sorted(names) not in folders):  # the names replace other names
        return None
    return (
        'an earlier version, which ignored the order of class_names, prepared it with'
        f' {shown_classes(names)}, so its labels may be swapped'
    )


def doubt_of_validation(manifest: Manifest, settings: PrepareSettings) -> str | None:
    """Returns how an earlier version chose the validation images if this version chooses others, or None."""
    kind, _, root = absolute_source('config.data.source', settings.source).partition(':')
    if kind not in ('folder', 'idx') or settings.validation_split is not None:
        return None
    folders = _subfolders(root) if kind == 'folder' else []
    if manifest.validation_fraction is None:
        if kind == 'idx' or ('test' in folders and not {'val', 'validation'} & set(folders)):
            return 'took the test images for validation, which --config.data.validation_split=test confirms'
        return None
    ignored = [name for name in folders if split_kind(name) == VALIDATION]
    return f'held out training images and ignored {ignored[0]}/' if 'train' in folders and ignored else None


def _subfolders(folder: str) -> list[str]:
    """Returns the sorted names of the folders in `folder`; [] if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    except OSError:
        return []
