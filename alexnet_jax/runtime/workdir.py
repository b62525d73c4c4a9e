"""Reads and writes the files of a workdir, and checks whether a run in the workdir can resume or is finished."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shlex

import ml_collections
import numpy as np

from alexnet_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    field_names,
    get_by_path,
    resolve,
    upgrade,
    with_num_classes,
)
from alexnet_jax.runtime.checkpoint_files import read_newest_progress
from alexnet_jax.runtime.commands import recorded_command
from alexnet_jax.runtime.console import log, summarize_exception
from alexnet_jax.runtime.files import JsonObject, atomic_write, quarantine, read_json
from alexnet_jax.shapes import layer_table

# A run keeps these fields and, but for model.precision, those of `model`: the weights and the order of the data depend
# on them.
FIXED_FIELDS = ('seed', 'data.source', 'data.image_size', 'data.encoding', 'train.batch_size', 'train.init')
# These fields change what the network sees. A run keeps them too, except with --allow_changes.
INPUT_FIELDS = ('data.channels', 'data.crop_size', 'data.crop', 'data.mean', 'data.mean_crop', 'data.std')
# These of INPUT_FIELDS belong to weights: a run that starts from weights takes them from there.
PREPROCESSING_FIELDS = ('data.channels', 'data.mean', 'data.mean_crop', 'data.std')
# These fields say where the data are. A change of them makes no other run.
PATH_FIELDS = ('data.data_dir', 'data.prepared_dir')

# The files that a run writes, besides folders.
RUN_FILES = (
    'config.json',
    'config_history.jsonl',
    'environment.json',
    'dataset_statistics.npz',
    'metrics.jsonl',
    'layers.jsonl',
    'result.json',
    'wandb.json',
)

# Keys of result.json in runs of version 0.1.
RENAMED_RESULT_KEYS = {'goal_step': 'target_step', 'damaged_records': 'corrupt_records'}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message is one line with the folder, the cause and the remedy."""


class DatasetStatisticsError(ConfigError):
    """dataset_statistics.npz cannot be used; the message is one line with the file and the cause."""


def check_resumable(config: Config, workdir: str, every_field: bool = False, allow_changes: bool = False) -> None:
    """Checks that a run with `config` can resume from the checkpoints in `workdir`, if there are any.

    Args:
      config: a resolved configuration.
      workdir: the folder of the run.
      every_field: refuse a change of any field except PATH_FIELDS, as a sweep does, because the names of its runs state
        their settings.
      allow_changes: accept a change of INPUT_FIELDS if the weights still fit.

    Imported weights that were not trained on yet fix only the network and its preprocessing.

    Raises ConfigError: the checkpoints belong to another network, another order of the data or, without
      `allow_changes`, other INPUT_FIELDS; or WORKDIR/checkpoints is not a folder.
    """
    checkpoints = os.path.join(workdir, 'checkpoints')
    if os.path.lexists(checkpoints) and not os.path.isdir(checkpoints):
        raise ConfigError(f'--workdir: {checkpoints} is not a folder; remove it or use another --workdir')
    before = _config_before(workdir) if _has_files(checkpoints) else None
    if before is None:
        return
    config = with_num_classes(config, before.model.num_classes)
    fields = [field for field in _changed(before, config) if not _is_moved(before, config, field)]
    changed = {field: (get_by_path(before, field), get_by_path(config, field)) for field in fields}
    if has_untrained_import(workdir):
        _check_fits_import(before, config, workdir, list(changed))
        every_field = False
        changed = {field: values for field, values in changed.items() if field in _FIXED_BY_IMPORT}
    for field, (was, given) in changed.items():
        is_fixed = field in FIXED_FIELDS or _is_of_network(field)
        if is_fixed or (every_field and field not in PATH_FIELDS):
            raise ConfigError(
                f'config.{field}: {given!r}, but {workdir} was started with {was!r}; use that or another --workdir'
            )
    seen = [_arrow(before, config, field) for field in changed if field in INPUT_FIELDS]
    if seen and not allow_changes:
        raise ConfigError(
            f'{", ".join(seen)}: the network in {workdir} would see other inputs; use the earlier settings, another'
            ' --workdir or --allow_changes'
        )
    if _parameter_shapes(before) != _parameter_shapes(config):
        field = next(field for field in ('data.channels', 'data.crop_size') if field in changed)
        raise ConfigError(
            f'{_arrow(before, config, field)}: the weights in {workdir} do not fit; use {changed[field][0]} or another'
            ' --workdir'
        )


# Of the settings of imported weights, training keeps these and those of `model`.
_FIXED_BY_IMPORT = ('data.crop_size', *PREPROCESSING_FIELDS)


def _check_fits_import(before: Config, config: Config, workdir: str, changed: list[str]) -> None:
    """Raises ConfigError if the imported weights in `workdir` cannot be trained on with `config`."""
    advice = f'--init={workdir} --workdir=NEW starts a new run from the weights'
    for field in changed:
        if _is_of_network(field):
            raise ConfigError(
                f'config.{field}: {get_by_path(config, field)!r}, but {workdir} has imported weights of a network with'
                f' {get_by_path(before, field)!r}; {advice}'
            )
    if config.train.init is not None:
        raise ConfigError(f'config.train.init: {workdir} has imported weights already; use another --workdir')
    if 'data.image_size' in changed and before.data.mean == 'image':
        raise ConfigError(
            f'config.data.image_size: {config.data.image_size}, but the mean image of the weights in {workdir} has'
            f' {before.data.image_size} pixels; use {before.data.image_size}'
        )


def check_fits_import(config: Config, workdir: str) -> None:
    """Raises ConfigError if imported weights in `workdir` have another network than `config` has with its data."""
    before = _config_before(workdir) if has_untrained_import(workdir) else None
    if before is not None:
        _check_fits_import(before, config, workdir, _changed(before, config))


def has_untrained_import(workdir: str) -> bool:
    """Returns whether the newest checkpoint in `workdir` has imported weights before their first train step."""
    newest = read_newest_progress(os.path.join(workdir, 'checkpoints'))
    return newest is not None and newest[0] == 0 and _fingerprint(newest[1]) is None


def is_started(workdir: str) -> bool:
    """Returns whether `workdir` has checkpoints or a result."""
    return _has_files(os.path.join(workdir, 'checkpoints')) or read_result_json(workdir) is not None


def with_settings_of_run(config: Config, workdir: str) -> Config:
    """Returns `config` with what a run in `workdir` decides for itself; `config` if there is none.

    The run decides model.num_classes if it is auto, except for imported weights before their first train step, which
    check_fits_import() compares with the data. If the run started from the weights of train.init, it also
    decides train.init if that is None, and what it took from the weights, see with_preprocessing_of().
    """
    before = _config_before(workdir) if is_started(workdir) else None
    if before is None:
        return config
    if not has_untrained_import(workdir):
        config = with_num_classes(config, before.model.num_classes)
    if before.train.init is None:
        return config
    init = before.train.init if config.train.init is None else config.train.init
    return with_preprocessing_of(
        before, dataclasses.replace(config, train=dataclasses.replace(config.train, init=init))
    )


def with_preprocessing_of(weights: Config, config: Config) -> Config:
    """Returns `config` with PREPROCESSING_FIELDS of `weights`.

    If the first dense layer fits only images of the size of `weights`, the result has their data.crop_size too.
    """
    names = [field.removeprefix('data.') for field in PREPROCESSING_FIELDS]
    data = dataclasses.replace(config.data, **{name: getattr(weights.data, name) for name in names})
    cropped = dataclasses.replace(data, crop_size=weights.data.crop_size)
    wanted = _first_dense_inputs(weights.model, weights.data)
    fits, would_fit = (_first_dense_inputs(config.model, each) == wanted for each in (data, cropped))
    if would_fit and not fits and cropped.crop_size <= data.image_size:
        data = cropped
    return dataclasses.replace(config, data=data)


def _first_dense_inputs(model: ModelConfig, data: DataConfig) -> int:
    """Returns the number of inputs of the first dense layer of the network for the images of `data`."""
    table = layer_table(model, data.crop_size, data.channels)
    return next((row.kernel[0] for row in table if not row.spec.kernel), 0)


def trained_on(workdir: str) -> str | None:
    """Returns the fingerprint of the data set in the newest checkpoint of `workdir`; None for a new run."""
    newest = read_newest_progress(os.path.join(workdir, 'checkpoints'))
    if newest is None:
        return None
    return _fingerprint(newest[1])


def _fingerprint(progress: JsonObject) -> str | None:
    return progress.get('dataset_fingerprint', progress.get('store'))  # the key of version 0.1


def _is_of_network(field: str) -> bool:
    """Returns whether `field` belongs to the network that was trained; model.precision changes only rounding."""
    return field.startswith('model.') and field != 'model.precision'


def _has_files(folder: str) -> bool:
    return os.path.isdir(folder) and bool(os.listdir(folder))


def _parameter_shapes(config: Config) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    rows = layer_table(config.model, config.data.crop_size, config.data.channels)
    return [(row.name, row.kernel, row.bias) for row in rows]


def _changed(before: Config, after: Config) -> list[str]:
    """Returns the names of the fields that differ."""
    return [field for field in field_names(after) if get_by_path(before, field) != get_by_path(after, field)]


def _is_moved(before: Config, after: Config, field: str) -> bool:
    """Returns whether `field` is the source, which was moved; the fingerprint of its images decides."""
    if field != 'data.source':
        return False
    (kind, _, path), (new_kind, _, new_path) = (config.data.source.partition(':') for config in (before, after))
    return kind == new_kind and os.path.isabs(path) and not os.path.lexists(path) and os.path.lexists(new_path)


def _arrow(before: Config, after: Config, field: str) -> str:
    return f'config.{field}: {_shown(get_by_path(before, field))} -> {_shown(get_by_path(after, field))}'


def _shown(value: object) -> str:
    """Returns `value` as text in one line, at most 200 characters of it."""
    text = str(value) if str(value).isprintable() else repr(value)
    return text if len(text) <= 200 else f'{text[:200]}...'


def describe_changes(config: Config, workdir: str) -> list[str]:
    """Returns a line for each field in which `config` differs from the settings with which the run was saved.

    These are the settings in the newest checkpoint in `workdir` or, if an earlier version wrote it, those in
    config.json. A further line names a config.json that cannot be read.
    """
    before, problem = _config_before(workdir), ''
    try:
        _read_config_json(workdir)
    except ConfigError as error:
        problem = str(error)
    if before is None:
        return [
            f'{workdir}/config.json {problem}, and the checkpoints have no settings: the run resumes with the settings'
            ' of this command, and changes of settings are unknown'
        ]
    repaired = f'{workdir}/config.json {problem}; it is written again, and the checkpoint has the settings of the run'
    changed = [] if has_untrained_import(workdir) else _changed(before, config)
    return [repaired] * bool(problem) + [_arrow(before, config, field) for field in changed]


def is_finished(config: Config, workdir: str) -> bool:
    """Returns whether `workdir` contains a finished run with the resolved `config`; PATH_FIELDS may differ."""
    result = read_result_json(workdir)
    if result is None or result.get('status') != 'done' or not _has_numbers(result.get('views', {})):
        return False
    try:
        before = _read_config_json(workdir)
    except ConfigError:
        return False  # training reads the last checkpoint, and writes config.json and result.json again
    changed = [field for field in _changed(before, config) if not _is_moved(before, config, field)]
    return set(changed) <= set(PATH_FIELDS)


def _has_numbers(views: object) -> bool:
    """Returns whether `views` of result.json has the numbers that a finished run prints."""
    names = ('loss', 'top1_error', 'top5_error')
    return isinstance(views, dict) and all(
        isinstance(errors, dict) and all(isinstance(errors.get(name), int | float) for name in names)
        for errors in views.values()
    )


def _config_before(workdir: str) -> Config | None:
    """Returns the settings in the newest checkpoint or, without those, in config.json; None if neither is readable.

    Before the first step of imported weights config.json decides, where users name the data of the weights.
    """
    saved = read_newest_progress(os.path.join(workdir, 'checkpoints'))
    is_imported = saved is not None and saved[1].get('dataset_fingerprint', '') is None
    from_checkpoint = _checkpoint_config(workdir)
    if from_checkpoint is not None and not is_imported:
        return from_checkpoint[1]
    with contextlib.suppress(ConfigError):
        return _read_config_json(workdir)
    return from_checkpoint[1] if from_checkpoint else None


def _checkpoint_config(workdir: str) -> tuple[str, Config] | None:
    """Returns (folder, settings) of the newest readable checkpoint, or None if the checkpoint has no settings."""
    directory = os.path.join(workdir, 'checkpoints')
    if saved := read_newest_progress(directory):
        with contextlib.suppress(ConfigError):
            return os.path.join(directory, str(saved[0])), resolve_written(saved[1].get('config'))
    return None


def resolve_written(written: object) -> Config:
    """Returns the resolved configuration from `written`, the content of a config.json of this or an older version.

    Raises ConfigError: `written` has other content; the text continues a sentence about the file.
    """
    if not isinstance(written, dict):
        raise ConfigError('is not a JSON object')
    try:
        return resolve(ml_collections.ConfigDict(upgrade(written)))
    except Exception as error:  # a corrupt file may contain any JSON
        raise ConfigError(f'has unusable settings ({summarize_exception(error)})') from None


def _read_config_json(workdir: str) -> Config:
    """Returns the resolved config.json. Raises ConfigError: see resolve_written(); or the file cannot be read."""
    path = os.path.join(workdir, 'config.json')
    try:
        with open(path, encoding='utf-8') as file:
            written = json.load(file)
    except FileNotFoundError:
        raise ConfigError('is missing') from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f'cannot be read ({summarize_exception(error)})') from None
    saved = read_newest_progress(os.path.join(workdir, 'checkpoints'))
    known = saved[1].get('config') if saved else None
    lost = sorted(_fields(known) - _fields(written)) if isinstance(known, dict) and isinstance(written, dict) else []
    if lost:
        raise ConfigError(f'has no field {lost[0]}')
    return resolve_written(written)


def _fields(written: JsonObject) -> set[str]:
    groups = {name: group for name, group in written.items() if isinstance(group, dict)}
    return set(written) | {f'{name}.{field}' for name, group in groups.items() for field in group}


def read_config(workdir: str) -> Config:
    """Returns the resolved configuration of the run in `workdir`.

    If config.json cannot be read, the settings are those in the newest checkpoint, and the log says so. The checkpoint
    also decides about `model` and INPUT_FIELDS.

    Raises ConfigError: config.json is missing or unreadable, and the checkpoints have no settings.
    """
    saved = _checkpoint_config(workdir)
    try:
        config = _read_config_json(workdir)
    except ConfigError as error:
        if saved is None:
            raise ConfigError(f'{workdir}/config.json {error}') from None
        log(f'{workdir}/config.json {error}; the settings are those of {saved[0]}')
        return saved[1]
    return with_settings_of_weights(config, saved[1], saved[0]) if saved else config


def with_settings_of_weights(config: Config, saved: Config, checkpoint: str) -> Config:
    """Returns `config` with `model` and INPUT_FIELDS of `saved`, the settings in `checkpoint`; logs the differences."""
    changed = [field for field in _changed(config, saved) if field in INPUT_FIELDS or field.startswith('model.')]
    for field in changed:
        log(f'{_arrow(config, saved, field)}, as in {checkpoint} and not as in config.json')
    names = [field.removeprefix('data.') for field in INPUT_FIELDS]
    data = dataclasses.replace(config.data, **{name: getattr(saved.data, name) for name in names})
    return dataclasses.replace(config, model=saved.model, data=data) if changed else config


def append_history(workdir: str, step: int, config: Config) -> None:
    """Appends a start of the run at `step` to config_history.jsonl; logs an error if the file cannot be written.

    The keys of a line are step, time (ISO 8601, UTC), command and config.
    """
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    line = json.dumps({'step': step, 'time': time, 'command': recorded_command(), 'config': config.to_dict()})
    path = os.path.join(workdir, 'config_history.jsonl')
    try:
        with open(path, 'ab+') as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b'\n':
                line = f'\n{line}'  # a killed process left the last line incomplete
            file.write(f'{line}\n'.encode())
    except OSError as error:
        log(f'{path} is not written: {summarize_exception(error)}')


def quarantine_folders(workdir: str) -> None:
    """Renames each folder that has the name of a file of a run, so that the run can write the file; logs the names."""
    for name in RUN_FILES:
        path = os.path.join(workdir, name)
        if os.path.isdir(path):
            log(f'{path} is a folder; moved to {quarantine(path)}')


def read_result_json(workdir: str) -> JsonObject | None:
    """Returns the content of result.json with current key names, or None if the file is missing or unreadable."""
    result = read_json(os.path.join(workdir, 'result.json'))
    return None if result is None else {RENAMED_RESULT_KEYS.get(key, key): value for key, value in result.items()}


def dataset_statistics_path(workdir: str) -> str:
    """Returns the path of dataset_statistics.npz, or of inputs.npz in a run of version 0.1."""
    path, old = (os.path.join(workdir, name) for name in ('dataset_statistics.npz', 'inputs.npz'))
    return old if os.path.exists(old) and not os.path.exists(path) else path


def write_dataset_statistics(
    workdir: str, statistics: dict[str, np.ndarray], class_names: list[str], digest_of_import: str | None = None
) -> None:
    """Writes dataset_statistics.npz, so that the weights of the run can be used without its prepared data set.

    Args:
      workdir: the folder of the run.
      statistics: see prepare.shards.statistics().
      class_names: one name per label.
      digest_of_import: statistics_digest() in the checkpoint of imported weights, if `statistics` replace those of the
        import when training begins; None otherwise.
    """
    replaced = {} if digest_of_import is None else {'digest_of_import': np.array(digest_of_import)}
    with atomic_write(os.path.join(workdir, 'dataset_statistics.npz'), 'wb') as file:
        np.savez(file, allow_pickle=False, class_names=np.array(class_names), **statistics, **replaced)


def read_dataset_statistics(workdir: str, config: Config | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the statistics and class names that write_dataset_statistics() wrote.

    Raises DatasetStatisticsError: the file is missing or corrupt, or does not match `config`, if given.
    """
    path = dataset_statistics_path(workdir)
    try:
        with open(path, 'rb') as file, np.load(file) as opened:  # np.load(path) leaves corrupt files open
            arrays = dict(opened)
        class_names = arrays.pop('class_names').tolist()
        arrays.pop('digest_of_import', None)
        _check_statistics(arrays, class_names, config)
    except Exception as error:  # NumPy and zipfile raise many types for a corrupt file
        raise DatasetStatisticsError(f'{path} cannot be read ({summarize_exception(error)})') from None
    return arrays, class_names


def statistics_belong_to(workdir: str, statistics: dict[str, np.ndarray], digest: str | None) -> bool:
    """Returns whether `statistics`, read from `workdir`, are those of a checkpoint with the statistics digest `digest`.

    Earlier versions saved no digest. Until training from imported weights writes its first checkpoint, the digest is
    that of the import, see write_dataset_statistics().
    """
    if digest in (statistics_digest(statistics), None):
        return True
    with np.load(dataset_statistics_path(workdir)) as arrays:
        return 'digest_of_import' in arrays and str(arrays['digest_of_import']) == digest


def _check_statistics(arrays: dict[str, np.ndarray], class_names: object, config: Config | None) -> None:
    """Raises ValueError if shapes, dtypes or values are not those of prepare.shards.statistics()."""
    size, _, channels = arrays['mean_image'].shape
    classes = len(class_names) if isinstance(class_names, list) else 0
    if config is not None:
        size, channels, classes = config.data.image_size, config.data.channels, config.model.num_classes
    shapes = {
        'mean_image': (size, size, channels),
        'mean_rgb': (channels,),
        'eigenvalues': (channels,),
        'eigenvectors': (channels, channels),
        'class_counts': (classes,),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape or arrays[name].dtype.kind not in 'fiu' or not np.isfinite(arrays[name]).all():
            raise ValueError(f'{name} is not an array of {shape} finite numbers')
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise ValueError('class_names is not a list of text')
    if len(class_names) != classes:
        raise ValueError(f'class_names has {len(class_names)} names and not {classes}')


def statistics_digest(statistics: dict[str, np.ndarray]) -> str:
    """Returns the sha256 hex digest of the statistics that preprocessing uses, as little-endian float64."""
    digest = hashlib.sha256()
    for name in ('mean_image', 'mean_rgb', 'eigenvalues', 'eigenvectors'):
        digest.update(np.ascontiguousarray(statistics[name], dtype='<f8').data)
    return digest.hexdigest()


def check_class_names(name: str, workdir: str, weights_names: list[str], data_names: list[str]) -> None:
    """Compares the class names of weights with those of the data, and logs a difference.

    Raises ConfigError: the names are the same but in another order, so predictions would get wrong labels.

    Args:
      name: name of the weights in the message.
      workdir: the folder of the run with the weights.
      weights_names: class names of the weights, one per label.
      data_names: class names of the data, one per label.
    """
    if weights_names == data_names:
        return
    if sorted(weights_names) == sorted(data_names):
        label = next(i for i, pair in enumerate(zip(weights_names, data_names, strict=True)) if pair[0] != pair[1])
        file = f'@{os.path.abspath(dataset_statistics_path(workdir))}'
        train = file if re.fullmatch(r'[\w@./-]+', file) else shlex.quote(repr(file))
        prepare = file if train == file else shlex.quote(file)
        raise ConfigError(
            f'{name}: its classes are those of the data in another order: label {label} is {weights_names[label]!r},'
            f' but {data_names[label]!r} in the data; prepare the data in the order of the weights, in another'
            f' data_dir: --config.data.class_names={train} for training, or alexnet prepare --class_names={prepare}'
        )
    log(
        f'{name}: its classes have other names than those of the data; the first is {weights_names[0]!r},'
        f' but {data_names[0]!r} in the data'
    )
