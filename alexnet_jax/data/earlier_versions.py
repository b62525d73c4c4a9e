"""Prepared data sets of earlier versions, whose names and manifests have the source as the user typed it."""

import dataclasses
import os

from etils import epath

from alexnet_jax.config import ConfigError
from alexnet_jax.data.dataset import (
    Manifest,
    dataset_dir,
    earlier_texts,
    load_manifest,
    match_earlier_source,
    name_by_text,
)
from alexnet_jax.data.prepare_command import PrepareSettings, replace_command
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
            manifest = load_manifest(directory) if (epath.Path(directory) / 'prepared.json').exists() else None
        except ConfigError:  # corrupt
            continue
        match = manifest and manifest.version == 1 and match_earlier_source(manifest.source, source)
        if manifest and match:
            found.append(EarlierDataset(directory, manifest, match == 'absolute'))
    return next((one for one in found if one.is_same_path), found[0] if found else None)


def check_labels(found: EarlierDataset, settings: PrepareSettings, data_dir: str, prepared_dir: str | None) -> None:
    """Raises ConfigError if the labels of a data set of an earlier version may be swapped, see has_swapped_labels()."""
    if not has_swapped_labels(found.manifest, settings):
        return
    raise ConfigError(
        f'config.data.class_names: {found.directory} is not used, because its labels may be swapped:'
        f' {describe_swap(found.manifest)}; prepare it anew: {replace_command(settings, data_dir, prepared_dir)}'
    )


def describe_swap(manifest: Manifest) -> str:
    """Returns why the labels of a data set may be swapped."""
    names = manifest.class_names
    shown = ', '.join(names[:5]) + ', ...' * (len(names) > 5)
    return f'an earlier version, which ignored the order of class_names, prepared it with {shown}'


def has_swapped_labels(manifest: Manifest, settings: PrepareSettings) -> bool:
    """Returns whether the labels of a data set of an earlier version may be swapped.

    Earlier versions gave labels in the order of the folders, even if `class_names` were the names of the folders in
    another order.
    """
    names = manifest.class_names
    kind, _, root = absolute_source('config.data.source', settings.source).partition(':')
    if kind != 'folder' or names == sorted(names):
        return False
    folders = [_subfolders(os.path.join(root, 'train')), _subfolders(root)]
    return sorted(names) in folders or not any(folders)  # otherwise the names replace other names


def validates_on_test(manifest: Manifest, settings: PrepareSettings) -> bool:
    """Returns whether an earlier version took the test split for validation, which `settings` do not ask for."""
    if manifest.validation_fraction is not None or settings.validation_split is not None:
        return False
    kind, _, root = absolute_source('config.data.source', settings.source).partition(':')
    folders = _subfolders(root)
    return kind == 'idx' or ('test' in folders and not {'val', 'validation'} & set(folders))


def _subfolders(folder: str) -> list[str]:
    """Returns the sorted names of the folders in `folder`; [] if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    except OSError:
        return []
