"""Converts a source of raw images to a prepared data set, and resumes an interrupted conversion."""

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from alexnet_jax.config import ConfigError, check_num_classes
from alexnet_jax.data.dataset import (
    dataset_dir,
    read_manifest,
    sampled_digests,
)
from alexnet_jax.data.earlier_versions import EarlierDataset, find_earlier
from alexnet_jax.data.inventory import describe_change, take_inventory
from alexnet_jax.data.manifest import MANIFEST, MANIFEST_VERSION, Manifest, write_manifest
from alexnet_jax.data.prepare_command import replace_command
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.paths import absolute_source, check_folder, check_writable, is_url
from alexnet_jax.prepare.adoption import adopt, find_same_images
from alexnet_jax.prepare.classes import order_classes
from alexnet_jax.prepare.data_card import DataCard, card_of_source
from alexnet_jax.prepare.raw_sources import Source, SourceError
from alexnet_jax.prepare.shard_writer import ShardReport, SkippedImage, read_report, write_shards
from alexnet_jax.prepare.shards import ImageSpec, Shard, content_fingerprint, statistics
from alexnet_jax.prepare.sources import check_downloaded, is_local, open_source
from alexnet_jax.prepare.tfds_source import missing_tfds_data
from alexnet_jax.runtime.console import ProgressBar, log
from alexnet_jax.runtime.files import JsonObject, atomic_write, free_bytes, json_digest, read_json, write_json

SHARD_SIZE = 1024
JPEG_SIZE_RATIO = 0.25  # assumed JPEG size relative to raw images, for the disk space check


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Settings of a data set. The fields to `validation_split` determine the contents.

    Attributes:
      source: see sources.open_source().
      image_size, channels, encoding: see shards.ImageSpec.
      class_names: the classes of the source in the order of their labels, see classes.order_classes(); or empty.
      validation_fraction, validation_split: see sources.open_source().
      max_corrupt_fraction: maximum fraction of unreadable images.
      num_classes: the number of classes that the source must have, see config.check_num_classes().
      workers: number of processes.
    """

    source: str
    image_size: int = 256
    channels: int = 3
    encoding: str = 'raw'
    class_names: tuple[str, ...] = ()
    validation_fraction: float = 0.1
    validation_split: str | None = None
    max_corrupt_fraction: float = 0.001
    num_classes: int | None = None
    workers: int = 2


def prepare(settings: PrepareConfig, data_dir: str, prepared_dir: str | None = None, replace: bool = False) -> str:
    """Prepares the data set for `settings` unless it exists, and returns its folder.

    The folder is dataset.dataset_dir(), or that of a data set of an earlier version, which cannot be renamed.

    Args:
      settings: the settings of the data set.
      data_dir: folder of the data sets of TFDS and, in the folder `prepared`, of prepared data sets.
      prepared_dir: folder that replaces `data_dir`/prepared.
      replace: whether to prepare an existing data set anew. It is removed when the new one is complete.

    Raises:
      SourceError: the source cannot be read (see sources.open_source()), the disk is too small, or a folder is a URL.
      ConfigError: the existing data set has other settings or images, the class names do not fit the source, or a
        folder cannot be used or is not writable.
      DatasetError: too many images are unreadable, a split has no usable image, or a process was killed.
      OSError: a file cannot be written.
    """
    settings, data_dir, target = _locate(settings, data_dir, prepared_dir)
    try:
        _check_writable(target, prepared_dir)
    except ConfigError:
        if os.path.exists(target) and not replace:
            _check_same(target, settings, data_dir, prepared_dir)  # without a lock, because no process writes there
            return target
        earlier = None if replace else _find_same_images(settings, data_dir, prepared_dir)
        if earlier is None:
            raise
        return earlier.directory
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(f'{target}.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f'{target}: another process is preparing this data set; waiting for it')
            fcntl.flock(lock, fcntl.LOCK_EX)  # also returns if the other process dies
        _finish_exchange(target)
        if replace:
            _prepare(settings, data_dir, target)
            earlier = find_earlier(settings, data_dir, prepared_dir)
            if earlier is not None and earlier.is_same_path:
                shutil.rmtree(earlier.directory)
            return target
        if os.path.exists(target):
            shutil.rmtree(f'{target}.incomplete', ignore_errors=True)  # left by a process killed after the rename
            _check_same(target, settings, data_dir, prepared_dir)
            return target
        earlier = _find_same_images(settings, data_dir, prepared_dir)
        if earlier is not None:
            return adopt(earlier, target)
        _prepare(settings, data_dir, target)
        return target


def _finish_exchange(target: str) -> None:
    """Gives the new data set its name and removes the one that it replaces, which a killed process may have left."""
    replaced, new = f'{target}.replaced', os.path.join(f'{target}.incomplete', 'store')
    if os.path.exists(replaced) and not os.path.exists(target):
        os.rename(new if os.path.exists(os.path.join(new, MANIFEST)) else replaced, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _locate(settings: PrepareConfig, data_dir: str, prepared_dir: str | None) -> tuple[PrepareConfig, str, str]:
    """Returns `settings` and `data_dir` with absolute paths, and the folder of the data set.

    Raises SourceError or ConfigError: a folder is a URL or cannot be used.
    """
    for folder in (data_dir, prepared_dir or ''):
        if is_url(folder):
            raise SourceError(
                f'{folder}: data sets are prepared on a local disk; prepare there, then copy the folder prepared/'
            )
    data_dir = check_folder('config.data.data_dir', data_dir)
    settings = dataclasses.replace(settings, source=absolute_source('config.data.source', settings.source))
    return settings, data_dir, dataset_dir(data_dir, settings, prepared_dir)


def _check_writable(target: str, prepared_dir: str | None) -> None:
    """Raises ConfigError if the folder of prepared data sets is not writable."""
    field = f'config.data.{"data_dir" if prepared_dir is None else "prepared_dir"}'
    remedy = 'set config.data.prepared_dir to a folder for prepared data sets'
    check_writable(field, os.path.dirname(target), remedy)


def _check_same(directory: str, settings: PrepareConfig, data_dir: str, prepared_dir: str | None) -> None:
    """Raises ConfigError if the data set in `directory` has other settings, or if its source has changed since."""
    replace = replace_command(settings, data_dir, prepared_dir)
    manifest = read_manifest(directory, settings, replace)
    if manifest.version > 1:
        change = describe_change(manifest.inventory, os.path.dirname(directory))
    elif is_local(settings.source) and _source(settings, data_dir).fingerprint != manifest.fingerprint:
        change = 'other names, sizes or labels of files, or another choice of validation images'
    else:
        change = None
    if change:
        raise ConfigError(
            f'{settings.source} has changed since {directory} was prepared from it ({change}); use another data_dir, or'
            f' replace the data set: {replace}'
        )


def _source(settings: PrepareConfig, data_dir: str) -> Source:
    return open_source(settings.source, data_dir, settings.validation_fraction, settings.validation_split)


def _find_same_images(settings: PrepareConfig, data_dir: str, prepared_dir: str | None) -> EarlierDataset | None:
    """Returns the data set of an earlier version that has the images of the source, or None.

    Raises SourceError or ConfigError: see adoption.find_same_images() and _check_same().
    """
    found = find_same_images(settings, data_dir, prepared_dir)
    if found is not None and found.is_same_path:
        _check_same(found.directory, settings, data_dir, prepared_dir)
    return found


@dataclasses.dataclass(frozen=True)
class Preview:
    """What prepare() would do.

    Attributes:
      card: what the data set would contain.
      complete: number of images in the shards that an interrupted preparation left.
      bytes: estimated size of the data set, or of one image if `card.images` is {}.
      download_bytes: bytes that TFDS would download.
    """

    card: DataCard
    complete: int
    bytes: int
    download_bytes: int


def preview(settings: PrepareConfig, data_dir: str, prepared_dir: str | None) -> Preview | str:
    """Returns what prepare() would do to write a data set that does not exist, without writing anything.

    If prepare() would use a data set of an earlier version instead, the function returns its folder.

    Raises SourceError or ConfigError: prepare() would refuse `data_dir`, the source, its classes or the size of the
    disk.
    """
    settings, data_dir, target = _locate(settings, data_dir, prepared_dir)
    earlier = _find_same_images(settings, data_dir, prepared_dir)
    if earlier is not None:
        return earlier.directory
    _check_writable(target, prepared_dir)
    missing = _missing_data(settings, data_dir)
    if missing is not None:
        source, images, download_bytes = missing
        format = _image_spec(settings, source)
        size = _estimated_bytes(sum(images.values()) or 1, format)
        card = dataclasses.replace(card_of_source(settings.source, source), images=images)
        return Preview(card, 0, round(size), download_bytes)
    check_downloaded(settings.source)
    source = _open(settings, data_dir)
    format = _image_spec(settings, source)
    shards, staging_dir = _shards(source), f'{target}.incomplete'
    is_same_plan = read_json(os.path.join(staging_dir, 'plan.json')) == _plan(settings, source, format)
    complete = _read_reports(shards, staging_dir) if is_same_plan else {}
    _check_disk(shards, complete, format, target)
    card = card_of_source(settings.source, source)
    done = sum(len(shard.examples) for shard in shards if shard.report in complete)
    return Preview(card, done, round(_estimated_bytes(sum(card.images.values()), format)), 0)


def _missing_data(settings: PrepareConfig, data_dir: str) -> tuple[Source, dict[str, int], int] | None:
    """Describes data that TFDS has not prepared yet; returns None if _open() would only read files.

    Returns the result of missing_tfds_data(), with the classes in the order of the labels.

    Raises the errors of _open() that are known before the download.
    """
    missing = missing_tfds_data(settings.source, data_dir)
    if missing is None:
        return None
    source, images, download_bytes = missing
    return _with_classes(settings, source), images, download_bytes


def _open(settings: PrepareConfig, data_dir: str) -> Source:
    """Returns the source, with its classes in the order of the labels.

    Raises SourceError or ConfigError: the source cannot be read, or does not have the classes of `settings`.
    """
    return _with_classes(settings, _source(settings, data_dir))


def _with_classes(settings: PrepareConfig, source: Source) -> Source:
    source = order_classes(source, settings.class_names, settings.source)
    check_num_classes(settings.num_classes, settings.source, source.class_names)
    return source


def _description(settings: PrepareConfig, source: Source, format: ImageSpec) -> JsonObject:
    """Returns the fields of the manifest that the settings determine."""
    return {
        'version': MANIFEST_VERSION,
        'source': settings.source,
        'validation_fraction': settings.validation_fraction if source.holds_out_validation else None,
        'validation_split': settings.validation_split,
        **dataclasses.asdict(format),
        'class_names': list(format.class_names),
    }


def _plan(settings: PrepareConfig, source: Source, format: ImageSpec) -> JsonObject:
    """Returns the content of plan.json, which tells whether an interrupted preparation had the same settings."""
    return _description(settings, source, format) | {'images_a_shard': SHARD_SIZE}


def _prepare(settings: PrepareConfig, data_dir: str, target: str) -> None:
    _missing_data(settings, data_dir)  # raises errors before a download
    source = _open(settings, data_dir)
    format = _image_spec(settings, source)
    for line in card_of_source(settings.source, source).summary():
        log(line)
    inventory = take_inventory(source.roots, os.path.dirname(target))  # before the images are read
    staging_dir = f'{target}.incomplete'
    plan = _plan(settings, source, format)
    if read_json(os.path.join(staging_dir, 'plan.json')) != plan:
        shutil.rmtree(staging_dir, ignore_errors=True)  # started with other settings
    for folder in ('store', 'reports'):
        os.makedirs(os.path.join(staging_dir, folder), exist_ok=True)
    write_json(os.path.join(staging_dir, 'plan.json'), plan)
    shards = _shards(source)
    start, complete = time.monotonic(), _read_reports(shards, staging_dir)
    _check_disk(shards, complete, format, target)
    reports = _write_shards(shards, complete, format, staging_dir, settings)
    description = _description(settings, source, format) | {
        'origins': dict(source.origins),
        'notes': list(source.notes),
        'source_digest': source.fingerprint,
        'inventory': dataclasses.asdict(inventory),
    }
    _write_metadata(shards, reports, format, description, staging_dir)
    if os.path.exists(target):
        os.rename(target, f'{target}.replaced')
    os.rename(os.path.join(staging_dir, 'store'), target)
    _finish_exchange(target)
    shutil.rmtree(staging_dir)
    read = sum(len(shard.examples) for shard in shards if shard.report not in complete)
    _summarize(target, reports, read, time.monotonic() - start, settings.workers)


def _image_spec(settings: PrepareConfig, source: Source) -> ImageSpec:
    return ImageSpec(settings.image_size, settings.channels, settings.encoding, tuple(source.class_names))


def _shards(source: Source) -> list[Shard]:
    """Returns the shards of both splits, training first. The number of processes does not affect the shards."""
    shards = []
    for split, examples in source.splits.items():
        starts = range(0, len(examples), SHARD_SIZE)
        for index, start in enumerate(starts):
            part = examples.subset(range(start, min(start + SHARD_SIZE, len(examples))))
            shards.append(Shard(split, index, len(starts), part))
    return shards


def _read_reports(shards: list[Shard], staging_dir: str) -> dict[str, ShardReport]:
    """Returns the reports, by file name, of the `shards` whose files are complete and contain the same images.

    The function omits shards with skipped images, because the user may have repaired those images.
    """
    folders = os.path.join(staging_dir, 'store'), os.path.join(staging_dir, 'reports')
    reports = {shard.report: read_report(shard, *folders) for shard in shards}
    return {name: report for name, report in reports.items() if report and not report['skipped']}


def _check_disk(shards: list[Shard], reports: dict[str, ShardReport], format: ImageSpec, target: str) -> None:
    """Raises SourceError if the missing shards do not fit on the disk."""
    images = sum(len(shard.examples) for shard in shards if shard.report not in reports)
    needed = _estimated_bytes(images, format)
    free = free_bytes(target)
    if needed > free:
        hint = ' or give --encoding=jpeg' if format.encoding == 'raw' else ''
        raise SourceError(
            f'{target} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: choose another data_dir{hint}'
        )


def _estimated_bytes(images: int, format: ImageSpec) -> float:
    """Returns the estimated size in bytes of `images` prepared images."""
    return images * format.image_size**2 * format.channels * (1 if format.encoding == 'raw' else JPEG_SIZE_RATIO)


def _write_shards(
    shards: list[Shard], complete: dict[str, ShardReport], format: ImageSpec, staging_dir: str, settings: PrepareConfig
) -> dict[str, ShardReport]:
    """Writes the shards without a report in `complete` in worker processes, and returns the reports of all shards."""
    reports, total = dict(complete), sum(len(shard.examples) for shard in shards)
    done = sum(len(shard.examples) for shard in shards if shard.report in complete)
    if done:
        log(f'{done:,} of {total:,} images were prepared by an earlier run')
    pending = [shard for shard in shards if shard.report not in complete]
    progress = ProgressBar(f'prepare {settings.source}', total, 'images', done=done)
    folders = os.path.join(staging_dir, 'store'), os.path.join(staging_dir, 'reports')
    with (
        contextlib.closing(progress),
        contextlib.closing(write_shards(pending, format, *folders, settings.workers)) as written,
    ):
        for shard, report in written:
            reports[shard.report] = report
            progress.update(len(shard.examples))
            _check_skipped(reports, total, staging_dir, settings)
    return reports


def _check_skipped(reports: dict[str, ShardReport], total: int, staging_dir: str, settings: PrepareConfig) -> None:
    """Lists the skipped images in a file and raises DatasetError if too many images are skipped."""
    skipped = _skipped(reports)
    if len(skipped) <= settings.max_corrupt_fraction * total:
        return
    path = os.path.join(staging_dir, 'skipped.jsonl')
    _write_lines(path, skipped)
    first, allowed = skipped[0], int(settings.max_corrupt_fraction * total)
    raise DatasetError(
        f'too many images of {settings.source} are unusable: {len(skipped)} so far, but'
        f' data.max_corrupt_fraction={settings.max_corrupt_fraction:g} of {total} allows {allowed}; the first is'
        f' {first["name"]}, {first["reason"]}; all are listed in {path};'
        ' repair them or raise --max_corrupt_fraction (--config.data.max_corrupt_fraction), then rerun'
        ' the command to resume'
    )


def _skipped(reports: dict[str, ShardReport]) -> list[SkippedImage]:
    """Returns the skipped images, in the order of the shard names."""
    return [line for name in sorted(reports) for line in reports[name]['skipped']]


def _write_lines(path: str, lines: list[SkippedImage]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(line) + '\n' for line in lines)


def _write_metadata(
    shards: list[Shard], reports: dict[str, ShardReport], format: ImageSpec, description: JsonObject, staging_dir: str
) -> None:
    """Writes the files of a data set besides the shards: TFDS metadata, statistics, skipped images and the manifest.

    `description` has the fields of the manifest that do not depend on the stored images. Raises DatasetError: no image
    of a split is usable.
    """
    folder = os.path.join(staging_dir, 'store')
    for name in set(os.listdir(folder)) - {shard.file for shard in shards}:
        os.remove(os.path.join(folder, name))  # temporary files of killed processes
    template = tfds.core.ShardedFileTemplate(dataset_name='prepared', data_dir=folder, filetype_suffix='array_record')
    splits = []
    for split in ('train', 'validation'):
        of_split = [reports[shard.report] for shard in shards if shard.split == split]
        lengths = [report['examples'] for report in of_split]
        if not sum(lengths):
            raise DatasetError(f'{description["source"]}: no image of the {split} split is usable')
        size = sum(report['bytes'] for report in of_split)
        splits.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=format.features(),
        split_infos=splits,
        filename_template=template,
        check_data=False,
        description=f'shorter side {format.image_size} pixels, center square',
    )
    figures = statistics(os.path.join(staging_dir, 'reports'), shards)
    np.savez(os.path.join(folder, 'statistics.npz'), allow_pickle=False, **figures)
    _write_lines(os.path.join(folder, 'skipped.jsonl'), _skipped(reports))
    images = {split.name: split.num_examples for split in splits}
    files = {name: os.path.getsize(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
    digests = {name: sampled_digests(epath.Path(folder) / name) for name in files}
    fingerprint = content_fingerprint((report['content'] for report in reports.values()), format.class_names)
    order = json_digest({name: report['order'] for name, report in reports.items()})
    description |= {'images': images, 'files': files, 'digests': digests, 'fingerprint': fingerprint, 'order': order}
    write_manifest(folder, Manifest(**description))


def _summarize(target: str, reports: dict[str, ShardReport], read: int, seconds: float, workers: int) -> None:
    """Logs the number of images, the size, the speed, and the skipped images by reason."""
    size = sum(report['bytes'] for report in reports.values())
    stored = sum(report['examples'] for report in reports.values())
    log(
        f'prepared {target}: {stored:,} images, {size / 1e9:.2f} GB, {size / stored:,.0f} bytes per image;'
        f' {read:,} read in {seconds:.0f} s, {read / seconds:.0f} images/s with {workers} processes'
    )
    reasons = collections.Counter(line['reason'] for line in _skipped(reports))
    for reason, count in reasons.most_common():
        log(f'skipped {count:,}: {reason}')
    if reasons:
        log(f'skipped images are listed in {target}/skipped.jsonl')
