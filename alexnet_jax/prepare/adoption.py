"""Data sets that earlier versions prepared from relative paths: whether they have the images of a source."""

import os
import shlex

import numpy as np

from alexnet_jax.data.dataset import dataset_dir, describe_difference, open_prepared
from alexnet_jax.data.earlier_versions import EarlierDataset, check_labels, find_earlier
from alexnet_jax.data.images import UnreadableImage, read_image, resize_and_center_crop
from alexnet_jax.data.prepare_command import PrepareSettings
from alexnet_jax.data.split_reader import evenly_spaced
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.prepare.sources import is_local, open_source
from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.files import read_json_lines

COMPARED_IMAGES = 32  # per split
TOLERANCE = 4.0  # mean difference of two images in gray levels; versions of decoders and JPEG encoding differ by less


def find_same_images(settings: PrepareSettings, data_dir: str, prepared_dir: str | None) -> EarlierDataset | None:
    """Returns a data set of an earlier version that was prepared from the images of the source, or None.

    If the manifest has the absolute path of the source, the images are not compared. The log names a data set that is
    not used, and why.

    Raises:
      SourceError: the source is missing.
      ConfigError: the labels of the data set may be swapped.
    """
    found = find_earlier(settings, data_dir, prepared_dir)
    if found is None:
        return None
    if not found.is_same_path:
        if not is_local(settings.source):
            target = dataset_dir(data_dir, settings, prepared_dir)
            raise SourceError(
                f'config.data.source: {settings.source.partition(":")[2]} is not a folder; {found.directory} was'
                f' prepared from {found.manifest.source} by an earlier version; to use it for this source:'
                f' {shlex.join(["mv", found.directory, target])}'
            )
        problem = _describe_other_images(found, settings, data_dir)
        if problem is not None:
            log(
                f'{found.directory}, prepared from {found.manifest.source} by an earlier version, is left alone and not'
                f' used, because {problem}'
            )
            return None
    check_labels(found, settings, data_dir, prepared_dir)
    return found


def _describe_other_images(found: EarlierDataset, settings: PrepareSettings, data_dir: str) -> str | None:
    """Returns why a data set is not that of `settings`, or None if no difference is seen.

    The function compares names, sizes and labels of all files, and the pixels of some images, because other images may
    have files with the same names and sizes.
    """
    difference = describe_difference(found.manifest, settings)
    if difference is not None:
        field, wanted, prepared = difference
        return f'its {field} is {prepared!r} and not {wanted!r}'
    source = open_source(settings.source, data_dir, settings.validation_fraction, settings.validation_split)
    if source.fingerprint != found.manifest.fingerprint:
        return f'the files in {settings.source} have other names, sizes, labels or splits'
    data = open_prepared(found.directory, settings)
    lines = read_json_lines(os.path.join(found.directory, 'skipped.jsonl'))
    for split, stored in (('train', data.train), ('validation', data.validation)):
        examples, skipped = source.splits[split], {line['name'] for line in lines if line['split'] == split}
        used = [index for index in range(len(examples)) if examples.name(index) not in skipped]
        if len(used) != len(stored):
            return f'the files of {split} in {settings.source} are others'
        for number, example in evenly_spaced(stored, COMPARED_IMAGES):
            try:
                content, label = examples[used[number]]
                pixels = resize_and_center_crop(read_image(content), settings.image_size, settings.channels)
            except (UnreadableImage, OSError):
                return f'{examples.name(used[number])} in {settings.source} is corrupt'
            if label != example['label'] or np.abs(pixels.astype(float) - example['image']).mean() > TOLERANCE:
                return f'{examples.name(used[number])} in {settings.source} is another image'
    return None


def adopt(found: EarlierDataset, target: str) -> str:
    """Renames a data set of an earlier version to `target` if its manifest has a relative path; returns its folder."""
    if found.is_same_path:
        return found.directory
    try:
        os.rename(found.directory, target)
    except OSError:  # the folder belongs to another user
        return found.directory
    log(f'adopted {found.directory}, which an earlier version prepared from the same images, as {target}')
    return target
