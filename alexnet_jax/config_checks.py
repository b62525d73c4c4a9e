"""Validation of settings: each check raises ConfigError with the field, its value and the nearest valid value."""

import difflib
import math
import re
import typing
from collections.abc import Sequence

from alexnet_jax.config_schema import (
    DENSE,
    RENAMED_VALUES,
    SETTINGS,
    UNKNOWN,
    Config,
    ConfigError,
    ModelConfig,
    duration_in_steps,
    get_by_path,
)
from alexnet_jax.lr_multipliers import frozen_parameters, matches, parameters
from alexnet_jax.shapes import LAYERS, layer_specs, layer_table

MAX_CLASS_NAME = 255  # characters of a class name; a file name has no more


def check(config: Config) -> None:
    """Raises ConfigError if a value is not allowed or contradicts another field."""
    for field, setting in SETTINGS.items():
        if setting.about.choices and setting.kind in (str, int):
            check_choice(field, get_by_path(config, field))
    _check_ranges(config)
    _check_model(config)
    _check_durations(config)
    _check_lr_multipliers(config)
    _check_recipe(config)
    check_mesh(config, config.mesh.data, config.mesh.model)


def check_choice(field: str, value: str | int) -> None:
    """Raises ConfigError if `value` is not allowed for `field`, which must have a fixed set of values."""
    choices = SETTINGS[field].about.choices
    if value in choices:
        return
    near: str | int
    if isinstance(value, str):
        new = RENAMED_VALUES.get(field, {}).get(value)
        if new is not None:
            raise ConfigError(f'config.{field}: {value!r} was renamed to {new!r}')
        near = difflib.get_close_matches(value, map(str, choices), 1, 0.0)[0]
    else:
        near = min(map(int, choices), key=lambda choice: abs(choice - value))
    every = ', '.join(map(str, choices))
    raise ConfigError(f'config.{field}: {value!r} is not one of {every}; the nearest is {near!r}')


def check_accepts_none(field: str) -> None:
    """Raises ConfigError if None is not allowed for `field`."""
    setting = SETTINGS.get(field)  # None: resolve() refuses the field
    if setting and not setting.accepts_none:
        choices = ', '.join(map(str, setting.about.choices))
        instead = f'the values are {choices}' if choices else f'the default is {setting.default!r}'
        raise ConfigError(f'config.{field}: None is not allowed; {instead}')


def _check_ranges(config: Config) -> None:
    for field, setting in SETTINGS.items():
        value = get_by_path(config, field)
        if setting.about.bounds is None or setting.kind not in (int, float) or value is None:
            continue
        if setting.about.accepts_auto and value == UNKNOWN:
            continue
        least, greatest = setting.about.bounds
        if not least <= value <= greatest:
            near = greatest if value > greatest else least
            raise ConfigError(f'config.{field}: {value} is outside {least} to {greatest}; the nearest is {near}')
    check_class_names(config.data.class_names or ())
    source = config.data.source
    if source != 'photos' and not re.fullmatch(r'tfds:\w[\w/:.*+-]*|(photos|folder|idx|hf|wds):.+', source, re.DOTALL):
        raise ConfigError(
            f'config.data.source: {source!r} is not photos, tfds:NAME[:config], folder:DIR, idx:DIR, hf:DIR or'
            ' wds:PATTERN; for example tfds:imagenet2012'
        )


def check_class_names(names: Sequence[object], where: str = 'config.data.class_names') -> None:
    """Raises ConfigError unless `names` are distinct, nonempty, printable texts without surrounding blanks.

    A name has at most MAX_CLASS_NAME characters. The message begins with `where`, which has the names.
    """
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or name != name.strip() or not name:
            raise ConfigError(
                f'{where}: {str(name)[:80]!r} is not a printable text without blanks around it, as a class name must be'
            )
        if len(name) > MAX_CLASS_NAME:
            raise ConfigError(
                f'{where}: the class name {name[:80]!r}... has {len(name):,} characters, more than {MAX_CLASS_NAME}'
            )
    seen: set[object] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f'{where}: {name!r} occurs twice')
        seen.add(name)


def check_num_classes(num_classes: int | None, described: str, class_names: Sequence[str]) -> None:
    """Raises ConfigError if the data have another number of classes than the network.

    Args:
      num_classes: config.model.num_classes; UNKNOWN and None accept any number from 2.
      described: the data, for the message.
      class_names: the names of the classes of the data.
    """
    count = len(class_names)
    what = f'{described} has {count} class{"es" * (count != 1)} ({shown_classes(class_names)})'
    if num_classes in (UNKNOWN, None) and count < 2:
        field = 'config.data.source:' if num_classes is None else 'config.model.num_classes: auto, but'
        raise ConfigError(f'{field} {what}; at least 2 are needed')
    if num_classes not in (count, UNKNOWN, None):
        raise ConfigError(
            f'config.model.num_classes: {num_classes}, but {what}; the nearest is {count}, and'
            ' --config.model.num_classes=auto takes the number of the data'
        )


def shown_classes(class_names: Sequence[str]) -> str:
    """Returns the names separated by commas; of more than eight names, the first five and the last.

    Names that contain a comma are in quotation marks.
    """
    names = class_names if len(class_names) <= 8 else [*class_names[:5], '...', class_names[-1]]
    return ', '.join(f'"{name}"' if ',' in name else name for name in names)


def _check_model(config: Config) -> None:
    model, data = config.model, config.data
    _check_lists(config)
    if data.crop_size > data.image_size:
        raise ConfigError(
            f'config.data.crop_size: {data.crop_size} is larger than data.image_size={data.image_size};'
            f' the nearest is {data.image_size}'
        )
    for row in layer_specs(model):
        if row.kernel or not row.cross_tower:
            _check_divides(f'config.model.widths ({row.name})', row.features, 'model.towers', model.towers)
    if _smallest_side(config, data.crop_size) < 1:
        least = next((size for size in range(data.crop_size, 4096) if _smallest_side(config, size) >= 1), None)
        if least is None:
            raise ConfigError(f'config.model.kernel_sizes: {model.kernel_sizes!r} are larger than any allowed image')
        field = 'crop_size' if least <= data.image_size else 'image_size'
        raise ConfigError(
            f'config.data.{field}: {getattr(data, field)} leaves nothing after pool5; the nearest is {least}'
        )
    if model.precision != 'default' and model.dtype != 'float32':
        raise ConfigError(
            f'config.model.precision: {model.precision!r} with model.dtype={model.dtype!r}, which has no operands of'
            " float32 to round; the nearest is 'default'"
        )
    for field in ('lrn_size', 'spatial_lrn_size'):
        if getattr(model, field) % 2 == 0:
            raise ConfigError(
                f'config.model.{field}: {getattr(model, field)} is even; the nearest is {getattr(model, field) + 1}'
            )


def _smallest_side(config: Config, crop_size: int) -> int:
    """Returns the smallest side of the network's feature maps, in pixels."""
    table = layer_table(config.model, crop_size, config.data.channels)
    return min(side for layer in table for side in (*layer.output[:-1], *layer.pooled[:-1]))


def _check_lists(config: Config) -> None:
    """Validates the lists of numbers and of names: their lengths and items."""
    for field, setting in SETTINGS.items():
        values = get_by_path(config, field)
        if setting.about.lengths and values is not None:
            _check_numbers(field, values, (1, config.data.channels) if field == 'data.std' else setting.about.lengths)
    for field, setting in SETTINGS.items():
        known = setting.about.choices
        for name in get_by_path(config, field) if known and setting.kind not in (str, int) else ():
            if name not in known:
                raise ConfigError(f'config.{field}: {name!r} is not one of {", ".join(map(str, known))}')
    _check_ops(config.model)
    if not config.model.widths[0]:
        raise ConfigError('config.model.widths: conv1 cannot be left out, so its width must be at least 1')


def _check_numbers(field: str, values: tuple[object, ...], lengths: tuple[int, ...]) -> None:
    """Raises ConfigError if `values` has none of the `lengths`, or an item of another type or outside its bounds."""
    if len(values) not in lengths:
        per_layer = ', one a layer' if lengths[0] > 2 else ''
        needed = ' or '.join(map(str, lengths))
        raise ConfigError(f'config.{field}: {len(values)} values; {needed} are needed{per_layer}')
    is_whole = int in typing.get_args(SETTINGS[field].kind)
    least, greatest = SETTINGS[field].about.bounds or (-math.inf, math.inf)
    for value in values:
        is_number = isinstance(value, int) if is_whole else isinstance(value, int | float)
        if not is_number or isinstance(value, bool) or not least <= typing.cast(float, value) < greatest:
            what = f'a whole number from {least}' if is_whole else f'a number from {least}'
            raise ConfigError(f'config.{field}: {value!r} is not {what}')


_OPS = ('activation', 'lrn', 'spatial_lrn', 'batch_norm', 'pool', 'ceil_pool')


def _check_ops(model: ModelConfig) -> None:
    if len(model.conv_ops) != 5:
        raise ConfigError(f'config.model.conv_ops: {len(model.conv_ops)} texts; 5 are needed, one per convolution')
    for text in model.conv_ops:
        ops = text.split() if isinstance(text, str) else [text]
        for i, op in enumerate(ops):
            if op not in _OPS or op in ops[:i]:
                raise ConfigError(f'config.model.conv_ops: {text!r} is no order of some of {", ".join(_OPS)}')


def _check_divides(field: str, value: int, by_field: str, by: int) -> None:
    if value % by or value < by:
        near = max(by, round(value / by) * by)
        raise ConfigError(f'{field}: {value} is not divisible by {by_field}={by}; the nearest is {near}')


def _check_durations(config: Config) -> None:
    durations: dict[str, object] = {}
    for field, setting in SETTINGS.items():
        value = get_by_path(config, field)
        if setting.about.is_duration and isinstance(value, tuple):
            durations |= {f'{field}[{i}]': item for i, item in enumerate(value)}
        elif setting.about.is_duration and value is not None:
            durations[field] = value
    for i, entry in enumerate(config.optimizer.lr_overrides):
        names = [f'{layer}/{kind}' for layer in LAYERS for kind in ('kernel', 'bias')]
        is_entry = isinstance(entry, tuple | list) and len(entry) == 3 and entry[0] in names
        is_rate = is_entry and isinstance(entry[2], int | float) and not isinstance(entry[2], bool)
        if not is_rate or not 0 <= entry[2] <= 100:
            raise ConfigError(
                f'config.optimizer.lr_overrides: {entry!r} is no parameter, time and rate,'
                " such as ('conv1/kernel', '67 epochs', 1e-5)"
            )
        durations[f'optimizer.lr_overrides[{i}]'] = entry[1]
    for field, duration in durations.items():
        try:
            steps = duration_in_steps(str(duration), batch_size=1, examples=1)
        except ConfigError as error:
            raise ConfigError(f'config.{field}: {error}') from None
        if steps == 0 and field != 'optimizer.warmup':
            raise ConfigError(f"config.{field}: {duration!r} is no time at all; the nearest is '1 step'")


def _check_lr_multipliers(config: Config) -> None:
    field, every = 'config.optimizer.lr_multipliers', parameters(config.model)
    for entry in config.optimizer.lr_multipliers:
        is_entry = isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str)
        is_factor = is_entry and isinstance(entry[1], int | float) and not isinstance(entry[1], bool)
        if not is_factor or not 0 <= entry[1] < math.inf:
            raise ConfigError(
                f"{field}: {entry!r} is no pattern and number from 0, such as ('conv*', 0.0) in (('conv*', 0.0),)"
            )
        if not any(matches(entry[0], parameter) for parameter in every):
            names = [*dict(every), *map('/'.join, every)]
            near = difflib.get_close_matches(entry[0], names, 1, 0.0)[0]
            raise ConfigError(
                f'{field}: {entry[0]!r} matches no layer or parameter of the network; the nearest is {near!r}'
            )
    if frozen_parameters(config) == set(every):
        raise ConfigError(
            f'{field}: {config.optimizer.lr_multipliers!r} freezes all parameters; give at least one a factor above 0,'
            " for example with ('fc8', 1.0) as the last entry"
        )


def _check_recipe(config: Config) -> None:
    """Raises ConfigError if crop_scale, crop_aspect_ratio or stop_on_plateau contradict each other or other fields."""
    data, optimizer = config.data, config.optimizer
    for field, pair in (('crop_scale', data.crop_scale), ('crop_aspect_ratio', data.crop_aspect_ratio)):
        if pair is not None and pair[0] > pair[1]:
            raise ConfigError(f'config.data.{field}: {pair} is not ascending; the nearest is {pair[::-1]}')
    if data.crop_scale is not None and data.crop_scale[1] > 1:
        near = (min(data.crop_scale[0], 1.0), 1.0)
        raise ConfigError(
            f'config.data.crop_scale: {data.crop_scale} allows crops larger than the image; the nearest is {near}'
        )
    if data.crop_scale is not None and not data.crop:
        raise ConfigError(
            f'config.data.crop_scale: {data.crop_scale} with data.crop=False, which turns random crops off; the nearest'
            ' is None'
        )
    if optimizer.stop_on_plateau and optimizer.schedule != 'plateau':
        raise ConfigError(
            f'config.optimizer.stop_on_plateau: True with optimizer.schedule={optimizer.schedule!r}, which has no'
            " plateau; the nearest is 'plateau'"
        )


def check_mesh(config: Config, data: int, model: int) -> None:
    """Raises ConfigError if batch, towers or widths do not divide evenly over a mesh of `data` x `model` devices.

    If `data` is -1 (not yet known), the function skips the checks of the batch size.
    """
    layout, towers = config.mesh.layout, config.model.towers
    if layout == 'data' and model != 1:
        raise ConfigError(
            f"config.mesh.model: {model} with mesh.layout='data', which has no model axis; the nearest is 1"
        )
    if layout == 'towers':
        _check_model_axis(model, towers, f'model.towers={towers}')
    table = {layer.name: layer for layer in layer_table(config.model, config.data.crop_size, config.data.channels)}
    if layout == 'hybrid' and not all(
        table[name].spec.cross_tower if name in table else name == 'fc8' for name in DENSE
    ):  # without its number of classes, fc8 is not in the table
        raise ConfigError(
            "config.mesh.layout: 'hybrid' needs fc6, fc7 and fc8, and all in model.cross_tower; the nearest is 'towers'"
        )
    has_lrn = any('lrn' in layer.spec.ops for layer in table.values())
    if model > 1 and layout == 'towers' and has_lrn and config.model.lrn_across_towers:
        raise ConfigError(f'config.mesh.model: {model} with model.lrn_across_towers; the nearest is 1')
    if layout == 'hybrid':
        inputs = table['fc6'].kernel[0]
        _check_model_axis(model, inputs, f'the {inputs} inputs of fc6')
    for name in ('fc6', 'fc7'):
        if name in table:
            _check_divides(f'config.model.widths ({name})', table[name].spec.features, 'mesh.model', model)
    if layout != 'hybrid':
        classes = config.model.num_classes
        _check_model_axis(model, classes, f'model.num_classes={classes}')
    if data == 0 or data < -1:
        raise ConfigError(f'config.mesh.data: {data} devices; the nearest is 1 (or -1 for all there are)')
    if data != -1:
        by, parts = ('mesh.data x mesh.model', data * model) if layout == 'hybrid' else ('mesh.data', data)
        _check_divides('config.train.batch_size', config.train.batch_size, by, parts)
        images, count = config.train.batch_size // parts, config.train.grad_accum_steps
        if images % count:
            near = min(
                (size for size in range(1, images + 1) if images % size == 0), key=lambda size: abs(size - count)
            )
            raise ConfigError(
                f'config.train.grad_accum_steps: {count} does not divide the {images} images of train.batch_size that'
                f' each device has; the nearest is {near}'
            )
        if images // count % 2 and (config.train.mixup or config.train.cutmix):
            pairs = 2 * parts * count
            near = max(1, round(config.train.batch_size / pairs)) * pairs
            raise ConfigError(
                f'config.train.batch_size: {config.train.batch_size} with mixup or CutMix gives each device'
                f' {images // count} images at a time, and pairs need an even number; the nearest is {near}'
            )


def _check_model_axis(model: int, number: int, described: str) -> None:
    if number % model:
        near = max(size for size in range(1, model) if number % size == 0)
        raise ConfigError(f'config.mesh.model: {model} does not divide {described}; the nearest is {near}')
