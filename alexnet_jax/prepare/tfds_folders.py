"""The folders of TFDS data sets: DATA_DIR/NAME/VERSION or DATA_DIR/NAME/CONFIG/VERSION."""

import dataclasses
import os
import re

import tensorflow_datasets as tfds

from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.runtime.files import read_json

_VERSION = r'(?:\d+|\*)(?:\.(?:\d+|\*)){2}'
_SOURCE = re.compile(rf'tfds:(\w+)(?:[:/](?!{_VERSION}$)(\w[\w+.-]*))?(?:[:/]({_VERSION}))?')


@dataclasses.dataclass(frozen=True)
class TfdsName:
    """A data set of TFDS.

    Attributes:
      name: its name.
      config: its configuration; None for the default; '' for the data set without a configuration, whether or not
        configurations of it are prepared too.
      version: its version, such as '5.*.*'; None for the newest.
    """

    name: str
    config: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        """Returns the name in the syntax of TFDS."""
        config = f'/{self.config}' if self.config else ''
        return f'{self.name}{config}{f":{self.version}" if self.version else ""}'


def parse_name(source: str) -> TfdsName:
    """Returns the data set that 'tfds:NAME[:CONFIG][:VERSION]' names; a slash may replace a colon.

    Raises SourceError: the source has another form.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise SourceError(f'config.data.source: {source!r} is not tfds:NAME[:config][:version]')
    return TfdsName(*match.groups())


def find_version(name: TfdsName, data_dir: str) -> tuple[str | None, tuple[str, ...]]:
    """Finds the newest version of a data set that TFDS has prepared in `data_dir`.

    Returns the folder of the version, or None if there is none, and notes for Source.notes. Raises SourceError: the
    configuration is ambiguous, or `data_dir` is a folder inside the folder of the data set.
    """
    folder, notes = _find_version(name, data_dir)
    root = os.path.abspath(data_dir)
    for _ in range(3):  # VERSION, CONFIG and NAME
        root, inner = os.path.split(root)
        if folder is None and inner == name.name and _find_version(name, root)[0]:
            raise SourceError(
                f'config.data.data_dir: {data_dir} is a folder of the data set {name}; set the field to {root}, which'
                ' contains the folder of the data set'
            )
    return folder, notes


def _find_version(name: TfdsName, data_dir: str) -> tuple[str | None, tuple[str, ...]]:
    folder, notes = os.path.join(data_dir, name.name), []
    if not os.path.isdir(folder):  # TFDS also accepts the name of the class, such as MNIST
        folder = os.path.join(data_dir, tfds.core.naming.camelcase_to_snakecase(name.name))
    config = name.config
    if config is None and not _versions(folder):
        configs = [config for config in _subfolders(folder) if _versions(os.path.join(folder, config))]
        config = (read_json(os.path.join(folder, '.config', 'metadata.json')) or {}).get('default_config_name')
        if config is None and len(configs) > 1:
            raise SourceError(
                f'config.data.source: {folder} has the configurations {", ".join(configs)}; add one of them, such as'
                f' tfds:{name.name}:{configs[0]}'
            )
        if config is None and configs:
            config = configs[0]
            notes.append(f'{config} is the only prepared configuration of {name.name}')
    folder = os.path.join(folder, config) if config else folder
    versions = [version for version in _versions(folder) if version.match(name.version or '*.*.*')]
    if not versions:
        return None, ()
    if len(versions) > 1:
        notes.append(f'{versions[-1]} is the newest of the versions {", ".join(map(str, versions))} in {folder}')
    return os.path.join(folder, str(versions[-1])), tuple(notes)


def _subfolders(folder: str) -> list[str]:
    """Returns the sorted names of the folders in `folder`, which may be missing."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if os.path.isdir(folder) else []


def _versions(folder: str) -> list[tfds.core.Version]:
    """Returns the versions that are prepared in `folder`, the newest last."""
    names = [name for name in _subfolders(folder) if is_prepared(os.path.join(folder, name))]
    return sorted(tfds.core.Version(name) for name in names if tfds.core.Version.is_valid(name))


def is_prepared(folder: str) -> bool:
    """Returns whether `folder` has the file that TFDS writes last."""
    return os.path.exists(os.path.join(folder, 'dataset_info.json'))


def describe_rest(name: TfdsName, data_dir: str) -> str:
    """Returns the end of a message about a missing data set: what `data_dir` has of the data set, or ''."""
    root = os.path.join(data_dir, name.name)
    paths = [
        os.path.join(first, second) for first in _subfolders(root) for second in ('', *_subfolders(f'{root}/{first}'))
    ]
    found = []
    for path in (path.rstrip(os.sep) for path in paths):
        base = os.path.basename(path)
        if is_prepared(os.path.join(root, path)):
            found.append(path)
        elif 'incomplete' in base or tfds.core.Version.is_valid(base):
            found.append(f'{path} (incomplete)')
    return f'; {root} has only {", ".join(found)}' if found else ''
