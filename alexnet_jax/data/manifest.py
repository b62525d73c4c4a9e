"""The manifest of a prepared data set, prepared.json: its fields, its versions and its fingerprints."""

import dataclasses
import json
import os
from typing import Any

from etils import epath

from alexnet_jax.config import ConfigError
from alexnet_jax.paths import absolute_source
from alexnet_jax.runtime.console import summarize_exception
from alexnet_jax.runtime.files import JsonObject, json_digest, write_json

MANIFEST = 'prepared.json'  # name of the file with the Manifest
MANIFEST_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of prepared.json, which describes a prepared data set.

    Attributes:
      source, image_size, channels, encoding: see DataConfig. Version 1 has the source as the user gave it, which may be
        a relative path; version 2 has absolute paths.
      fingerprint: digest of the stored images, their classes and splits, which depends neither on the source nor on the
        order of the images; see prepare.shards.content_fingerprint(). In version 1, prepare.raw_sources.Source.
        fingerprint.
      validation_fraction: fraction of the training images held out for validation; None if the source has a
        validation split.
      class_names: one name per label.
      images: number of images by split.
      files: size in bytes of each other file of the data set, by name.
      digests: sampled_digests() of each of these files, by name; {} in data sets of version 0.1.
      version: version of this layout; 1 if the file has no version.
      validation_split: see DataConfig; None in version 1.
      order: digest of the images in the order of the records; '' in version 1.
      inventory: the files of the source, see inventory.Inventory; None in version 1.
      origins: where the images of each split come from, see prepare.raw_sources.Source; {} in version 1.
      source_digest: see prepare.raw_sources.Source.fingerprint; '' in version 1.
      notes: what was chosen and what is ignored, see prepare.raw_sources.Source; [] in version 1.
    """

    source: str
    fingerprint: str
    validation_fraction: float | None
    image_size: int
    channels: int
    encoding: str
    class_names: list[str]
    images: dict[str, int]
    files: dict[str, int]
    digests: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    version: int = 1
    validation_split: str | None = None
    order: str = ''
    inventory: JsonObject | None = None
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    source_digest: str = ''
    notes: list[str] = dataclasses.field(default_factory=list)

    def fingerprint_of_images(self) -> str:
        """Returns a digest of images, order, classes and settings, which does not depend on the source.

        The digest of a data set of version 1 is that of earlier versions of the program: the SHA-256 of all fields that
        the manifest then had, but `digests`.
        """
        names = ['fingerprint', 'image_size', 'channels', 'encoding', 'class_names', 'images']
        names += ['source', 'validation_fraction', 'files'] if self.version == 1 else ['order']
        return json_digest({name: getattr(self, name) for name in names})

    def earlier_fingerprints(self) -> list[str]:
        """Returns fingerprint_of_images() of this data set if an earlier version had prepared it from the same source.

        The digests are those for the absolute path of the source and for relative paths.
        """
        found = []
        for text in earlier_texts(self.source) if self.version > 1 else ():
            # The description in this file contained the source.
            size = self.files['dataset_info.json'] + len(json.dumps(f'{text}, ')) - 2
            files = self.files | {'dataset_info.json': size}
            earlier = dataclasses.replace(self, version=1, source=text, fingerprint=self.source_digest, files=files)
            found.append(earlier.fingerprint_of_images())
        return found


def earlier_texts(source: str) -> list[str]:
    """Returns what a user may have typed for the absolute `source` in an earlier version, which kept relative paths."""
    kind, _, location = source.partition(':')
    if kind not in ('folder', 'idx'):
        return [source]
    parts = location.split('/')[1:]
    relative = ['/'.join(parts[start:]) for start in range(len(parts))]
    return [source, *(f'{kind}:{path}' for name in relative for path in (name, f'./{name}')), f'{kind}:.']


def match_earlier_source(recorded: str, source: str) -> str | None:
    """Compares `recorded`, the source as a user gave it to an earlier version, with the absolute `source`.

    Returns 'absolute' if they are the same source, 'relative' if `source` may be what was meant by the relative path in
    `recorded`, and otherwise None.
    """
    (kind, _, path), (wanted_kind, _, wanted) = recorded.partition(':'), source.partition(':')
    if kind != wanted_kind or kind not in ('folder', 'idx'):
        return None
    path = os.path.expanduser(path)
    if os.path.isabs(path):
        return 'absolute' if absolute_source('config.data.source', f'{kind}:{path}') == source else None
    parts = [part for part in os.path.normpath(path).split('/') if part not in ('..', '.')]
    return 'relative' if wanted.split('/')[-len(parts) :] == parts or not parts else None


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Writes prepared.json, with a digest of its content, to `folder`. Raises OSError: the file cannot be written."""
    content = dataclasses.asdict(manifest)
    write_json(os.path.join(folder, MANIFEST), content | {'digest': json_digest(content)})


def load_manifest(directory: str) -> Manifest:
    """Returns the manifest of the data set in `directory`. Raises ConfigError: it is not a complete data set."""
    path = epath.Path(directory) / MANIFEST
    try:
        return _parse_manifest(json.loads(path.read_text()))
    except Exception as error:  # from the library that reads gs://, or from corrupt content
        raise unusable(path, f'is missing, corrupt or of another version ({summarize_exception(error)})') from None


def _parse_manifest(content: dict[str, Any]) -> Manifest:
    """Returns the content of prepared.json as a Manifest. Raises ValueError, TypeError, KeyError: it is corrupt."""
    digest = content.pop('digest', None)
    is_of_0_1 = digest is None and 'digests' not in content
    if not is_of_0_1 and digest != json_digest(content):
        raise ValueError('its content does not match its digest')
    names = {field.name for field in dataclasses.fields(Manifest)}
    manifest = Manifest(**{name: value for name, value in content.items() if name in names})
    if manifest.version not in range(1, MANIFEST_VERSION + 1):
        raise ValueError(f'version {manifest.version} is not known')
    images, sizes, classes = manifest.images, manifest.files, manifest.class_names
    if set(images) != {'train', 'validation'} or not all(isinstance(number, int) for number in images.values()):
        raise ValueError(f'images: {images}')
    if not all(isinstance(size, int) for size in sizes.values()) or not all(isinstance(name, str) for name in classes):
        raise ValueError('files or class_names')
    if not all(isinstance(digests, list) and len(digests) == 2 for digests in manifest.digests.values()):
        raise ValueError('digests')
    return manifest


def unusable(path: epath.Path, problem: str) -> ConfigError:
    """Returns the error for the file `path` of a prepared data set."""
    return ConfigError(
        f'config.data.data_dir: {path} {problem}; copy the data set again, or remove {path.parent} to prepare it again'
    )
