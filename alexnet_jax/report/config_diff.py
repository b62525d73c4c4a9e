"""Differences between the settings of a run and of its preset, and the published errors of the preset."""

from collections.abc import Iterable

from alexnet_jax.config import Config, field_names, get_by_path, preset_config, resolve, total_steps
from alexnet_jax.presets import PRESETS
from alexnet_jax.runtime.workdir import PATH_FIELDS
from alexnet_jax.sweep.results import views_text

# Published errors are comparable only if these settings, and those of `model` except _ROUNDING, equal the preset's.
_SAME_IMAGES = ('data.source', 'data.channels', 'data.image_size', 'data.crop_size')
_ROUNDING = ('model.dtype', 'model.precision')


def length(config: Config, examples: int) -> str:
    """Describes the length of a run. `examples`: number of training images, 0 if unknown."""
    train = config.train
    if not examples:
        duration = f'{train.epochs:g} epochs' if train.steps is None else f'{train.steps:,} steps'
        return f'{duration} with batches of {train.batch_size:,} images'
    steps = total_steps(config.train, examples)
    epochs = steps * train.batch_size / examples
    return f'{steps:,} steps of {train.batch_size:,} images: {epochs:.4g} epochs of {examples:,} training images'


def differences(config: Config) -> list[list[str]]:
    """Returns [name, preset's value, run's value] of each differing setting except seed and PATH_FIELDS."""
    return _differing(config, (field for field in field_names(config) if field not in ('seed', *PATH_FIELDS)))


def _differing(config: Config, fields: Iterable[str]) -> list[list[str]]:
    preset = resolve(preset_config(config.model.preset))
    rows = [[f'`{field}`', *(_shown(get_by_path(each, field)) for each in (preset, config))] for field in fields]
    return [row for row in rows if row[1] != row[2]]


def _shown(value: object) -> str:
    """Formats a setting's value; a list read from JSON looks the same as a tuple."""
    if isinstance(value, list | tuple):
        return f'({", ".join(map(_shown, value))})'
    return f'{value:g}' if isinstance(value, float) else str(value)


def published(config: Config) -> tuple[list[str], str]:
    """Returns the table row of the published errors, or [] if they are not comparable, and a remark about them."""
    figures = PRESETS[config.model.preset].published
    errors = ['' if error is None else f'{error:g} %' for error in (figures.top1_error, figures.top5_error)]
    fields = [field for field in field_names(config) if field.startswith('model.') and field not in _ROUNDING]
    differ = [
        f'{field} is {own} instead of {theirs}' for field, theirs, own in _differing(config, (*_SAME_IMAGES, *fields))
    ]
    if not differ and 'ILSVRC-2010' in figures.source:  # a different data set from the one in the settings
        differ = [f'the images of this run are from `{config.data.source}`']
    name = f'the preset `{config.model.preset}`'
    if not differ:
        line = ['published', '' if figures.views is None else str(figures.views), '', *errors, '']
        return line, f'Published for {name}, not measured here: {figures.source}.'
    known = [f'top-{1 if i == 0 else 5} error {error}' for i, error in enumerate(errors) if error]
    views = '' if figures.views is None else f' with {views_text(figures.views)}'
    more = f'; {len(differ) - 3} more settings differ' if len(differ) > 3 else ''
    return [], (
        f'Published for {name}: {", ".join(known)}{views} ({figures.source}). Not comparable with this run:'
        f' {"; ".join(differ[:3])}{more}.'
    )
