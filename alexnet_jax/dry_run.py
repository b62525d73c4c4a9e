"""The plan of a training command, which `alexnet train --dry_run` prints.

The plan makes the checks of the command at its start. Nothing is written, compiled or sent to another process.
"""

import fcntl
import math
import os
from collections.abc import Sequence

import jax

from alexnet_jax import parallel
from alexnet_jax.config import UNKNOWN, Config, ConfigError, check_mesh, with_num_classes
from alexnet_jax.data.dataset import PreparedDataset
from alexnet_jax.lr_multipliers import KINDS, first_trained_layer, frozen_names, frozen_parameters
from alexnet_jax.prepare.describe import Description, describe, size_text
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.prepare.writer import PrepareConfig
from alexnet_jax.runtime.checkpoint_files import checkpoint_steps, read_newest_progress
from alexnet_jax.runtime.files import JsonObject, free_bytes
from alexnet_jax.runtime.workdir import (
    check_fits_import,
    describe_changes,
    has_untrained_import,
    is_finished,
    trained_on,
)
from alexnet_jax.schedules import Intervals, Schedule
from alexnet_jax.shapes import DENSE, POOLS, LayerShape, layer_table
from alexnet_jax.training.init_source import describe_fit, read_settings


def print_plan(config: Config, config_name: str, workdir: str, process_group: JsonObject | None) -> int:
    """Prints what a training command would do, and returns the exit code, 0.

    Args:
      config: the configuration.
      config_name: its name in the plan.
      workdir: the folder of the run.
      process_group: the processes of the run, see distributed.initialize().

    Raises ConfigError: the command would refuse to start, for the same reason.
    """
    lines = [('config', f'{config_name}, preset {config.model.preset}')]
    if is_finished(config, workdir):  # the command then looks at nothing else
        lines.append(('start', f'{workdir} is done; the command prints its result'))
    else:
        os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a GPU may be in use by a run
        data, model, mesh_line = _mesh(config, process_group)
        described = _data(config, trained_on(workdir))
        if config.model.num_classes == UNKNOWN:
            config = with_num_classes(config, len(described.card.class_names))
            check_fits_import(config, workdir)
            data, model, mesh_line = _mesh(config, process_group)  # the mesh may not divide the number of classes
        examples = described.card.images.get('train')
        _check_unlocked(workdir)
        lines += [
            *(('data', line) for line in described.lines()),
            ('mesh', mesh_line),
            *(('steps', line) for line in _steps(config, examples)),
            ('memory', _memory(config, data, model)),
            ('disk', _disk(config, workdir)),
            *(('start', line) for line in _start(config, workdir, described.prepared, described.card.class_names)),
        ]
    for i, (label, line) in enumerate(lines):
        print(f'{label if i == 0 or lines[i - 1][0] != label else "":<8}{line}')
    return 0


def _check_unlocked(workdir: str) -> None:
    """Raises ConfigError if another run uses `workdir`."""
    try:
        with open(os.path.join(workdir, 'lock')) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
    except BlockingIOError:
        raise ConfigError(f'--workdir: another process is training in {workdir}; name another folder') from None
    except OSError:
        pass  # no run has started, or the file system has no locks


def _mesh(config: Config, process_group: JsonObject | None) -> tuple[int, int, str]:
    """Returns the numbers of devices on the axes, `data` and `model`, and the line of the plan.

    The function counts the devices of this process and assumes that the other processes have as many. If JAX would
    detect the processes, their number is unknown, and a `data` of -1 becomes that of one process.
    """
    local, kind = jax.local_device_count(), jax.local_devices()[0].device_kind
    layout, model, here = config.mesh.layout, config.mesh.model, f'{local} device{"s" * (local > 1)} ({kind})'
    if process_group == {}:
        check_mesh(config, config.mesh.data, model)
        data = max(1, local // model) if config.mesh.data == -1 else config.mesh.data
        return data, model, f'layout {layout}, model {model}; JAX detects the processes; this process has {here}'
    processes = process_group['num_processes'] if process_group else 1
    data, model = parallel.mesh_shape(config, local * processes)
    images = config.train.batch_size // (data * model if layout == 'hybrid' else data)
    line = f'layout {layout}, data {data} x model {model}, {images:,} images per device; '
    if process_group:
        line += (
            f'process {process_group["process_id"]} of {processes} has {here}, the others are assumed to have as many'
        )
    else:
        line += f'this machine has {here}'
    return data, model, line


def _data(config: Config, fingerprint: str | None) -> Description:
    """Returns the description of the data set, see describe(). Raises ConfigError: it cannot be used or prepared."""
    data = config.data
    settings = PrepareConfig(
        source=data.source,
        image_size=data.image_size,
        channels=data.channels,
        encoding=data.encoding,
        class_names=data.class_names or (),
        validation_fraction=data.validation_fraction,
        validation_split=data.validation_split,
        max_corrupt_fraction=data.max_corrupt_fraction,
        num_classes=config.model.num_classes,
    )
    try:
        return describe(settings, data.data_dir, data.prepared_dir, fingerprint)
    except SourceError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f'config.data.source: {error.filename}: {error.strerror}') from None


def _steps(config: Config, examples: int | None) -> list[str]:
    """Returns the lines about the length of the run, its evaluations and checkpoints, and the learning rate."""
    optimizer, train = config.optimizer, config.train
    if examples is None:
        length = f'{train.epochs:g} epochs' if train.steps is None else f'{train.steps:,} steps'
        every = f'evaluation every {config.eval.every}, checkpoint every {config.checkpoint.every}'
        return [f'{length}, {every}', f'learning rate {optimizer.learning_rate:g}, schedule {optimizer.schedule}']
    schedule, intervals = Schedule(optimizer, train, examples), Intervals.from_config(config, examples)
    total, frozen = schedule.total_steps, frozen_names(config)
    counts = [max(1, math.ceil(total / every)) for every in (intervals.eval_every, intervals.checkpoint_every)]
    at_the_end = f' and at the end with {config.eval.views} views' if config.eval.views > 1 else ''
    return [
        f'{total:,} steps of {train.batch_size:,} images, {total * train.batch_size / examples:,.1f} epochs;'
        f' evaluation every {intervals.eval_every:,} steps ({counts[0]:,}){at_the_end},'
        f' checkpoint every {intervals.checkpoint_every:,} steps ({counts[1]:,})',
        f'learning rate {optimizer.learning_rate:g}, {_decays(schedule)}',
        *([f'optimizer.lr_multipliers freezes {", ".join(frozen)}'] if frozen else ()),
    ]


def _decays(schedule: Schedule) -> str:
    """Describes the decays of the learning rate, and what differs for single parameters."""
    config = schedule.config
    milestones = ', '.join(f'{step:,}' for step in schedule.milestones)
    text = {
        'plateau': f'divided by {config.decay_factor:g} after {config.patience} evaluations without a lower error, at'
        f' most {config.max_decays} times{", then the run ends" if config.stop_on_plateau else ""}',
        'steps': f'divided by {config.decay_factor:g} at steps {milestones}',
        'dexp': f'divided by up to {config.dexp_factor:g} in {config.dexp_parts} equal parts of the run',
        'poly': f'times (1 - step / {schedule.total_steps:,}) to the power {config.poly_power:g}',
        'cosine': f'times half a cosine, from 1 to 0 at step {schedule.total_steps:,}',
        'constant': 'constant',
    }[config.schedule]
    if schedule.warmup_steps:
        text += f', after a linear warmup of {schedule.warmup_steps:,} steps'
    if config.bias_lr_multiplier != 1 or config.bias_schedule != 'same':
        text += f'; biases: {config.bias_lr_multiplier:g} times, schedule {config.bias_schedule}'
    fields = [name for name in ('lr_multipliers', 'lr_overrides') if getattr(config, name)]
    return text + ''.join(f'; see optimizer.{name}' for name in fields)


def _memory(config: Config, data: int, model: int) -> str:
    """Estimates the memory of a device. The activations are those of one micro-batch, without train.remat.

    Layers before the first trained one keep no activations. Those of the largest of these layers count as far as they
    exceed the gradients, because the gradients come into being after them.
    """
    table = layer_table(config.model, config.data.crop_size, config.data.channels)
    devices = data * model
    frozen, weights, gradients = frozen_parameters(config), 0.0, 0.0
    for layer in table:
        shards = model if config.mesh.layout == 'towers' or layer.name in DENSE else 1
        sizes = {kind: 4 * math.prod(getattr(layer, kind)) / shards for kind in KINDS}
        weights += sum(sizes.values())
        gradients += sum(size for kind, size in sizes.items() if (layer.name, kind) not in frozen)
    velocities = weights / (data if config.mesh.shard_optimizer else 1)
    gradients *= 2 if config.train.grad_accum_steps > 1 else 1
    images, size, channels = config.train.batch_size / devices, config.data.image_size, config.data.channels
    values, first = [*map(_activations, table)], [layer.name for layer in table].index(first_trained_layer(config))
    bytes_per_value = images / config.train.grad_accum_steps * (4 if config.model.dtype == 'float32' else 2)
    activations = bytes_per_value * (config.data.crop_size**2 * channels + sum(values[first:]))
    if first:  # the augmented images are written once, see train_step.local_gradients()
        activations += bytes_per_value * config.data.crop_size**2 * channels
    activations += max(0.0, bytes_per_value * max(values[:first], default=0) - gradients)
    average = weights if config.train.ema_decay else 0.0
    parts = {
        'weights': weights,
        **({'average of the weights': average} if average else {}),
        'velocities': velocities,
        'gradients': gradients,
        'copy for checkpoints': weights + velocities + average,
        'activations and images': activations + images * size**2 * channels,
    }
    shown = ', '.join(f'{name} {size_text(part)}' for name, part in parts.items())
    return f'about {size_text(sum(parts.values()))} per device, estimated: {shown}'


def _activations(layer: LayerShape) -> int:
    """Returns how many values of `layer` an image needs in the backward pass."""
    ops = layer.spec.ops
    normalized = sum(ops.count(op) for op in ('lrn', 'spatial_lrn', 'batch_norm'))
    return math.prod(layer.output) * (1 + normalized) + any(op in POOLS for op in ops) * math.prod(layer.pooled)


def _disk(config: Config, workdir: str) -> str:
    """Estimates the size of the checkpoints."""
    table = layer_table(config.model, config.data.crop_size, config.data.channels)
    arrays = 3 if config.train.ema_decay else 2  # weights and velocities, and the average of the weights
    size = arrays * 4 * sum(layer.parameters for layer in table)
    kept = (config.checkpoint.keep + 2) * size  # the best too, and one while it is written
    free = free_bytes(workdir)
    return (
        f'a checkpoint takes up to {size_text(size)}, the newest {config.checkpoint.keep}, the best and the next'
        f' {size_text(kept)}; {size_text(free)} are free{"" if free > kept else ", which is too little"}'
    )


def _start(config: Config, workdir: str, prepared: PreparedDataset | None, class_names: Sequence[str]) -> list[str]:
    """Returns whether the command would start or resume the run, at which step, and with which changed settings.

    For a run that would start from the weights of train.init, further lines name the layers that are drawn anew.

    Raises ConfigError: the run was started with another data set, or no checkpoint can be read.
    """
    folder = os.path.join(workdir, 'checkpoints')
    newest = read_newest_progress(folder)
    if newest is None:
        if checkpoint_steps(folder):
            raise ConfigError(
                f'{folder}: no checkpoint can be read; remove the folder or use another --workdir to start over'
            )
        if config.train.init is None:
            return [f'starts at step 0 in {workdir}']
        return [
            f'starts at step 0 in {workdir}, from the weights in {config.train.init}',
            *describe_fit(read_settings(config.train.init), config, list(class_names)),
        ]
    step, _ = newest
    if has_untrained_import(workdir):
        return [f'starts at step 0 in {workdir}, from its imported weights']
    started_with = trained_on(workdir)
    if prepared is not None and started_with is not None and not prepared.has_fingerprint(started_with):
        raise ConfigError(
            f'config.data: the prepared data set is not the one that {workdir} was started with; put that one back,'
            ' or use another --workdir'
        )
    return [f'resumes {workdir} at step {step:,}', *describe_changes(config, workdir)]
