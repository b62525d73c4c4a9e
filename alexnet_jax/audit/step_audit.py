"""Compiles a training step for simulated devices and reports its collectives, FLOPs and memory."""

import dataclasses
import json
import os
import re
from typing import NotRequired, TypedDict

import ml_collections

from alexnet_jax import shapes
from alexnet_jax.audit import cost_model
from alexnet_jax.audit.hlo_collectives import Collective, step_collectives
from alexnet_jax.config import UNKNOWN, Config, ConfigError, resolve
from alexnet_jax.runtime.files import JsonObject

MAX_SIMULATED_DEVICES = 2048  # limit of XLA for one CPU process
_LAYER_FIELDS = ('name', 'output', 'parameters', 'multiply_adds')


class AuditReport(TypedDict):
    """The costs of a training step; --json prints these fields. Bytes and FLOPs are per step and device.

    `multiply_adds` are those of the forward pass for one image. cost_model.predict() computes the `prediction`.
    """

    layout: str
    mesh: dict[str, int]
    batch_size: int
    batch_per_device: float
    parameters: int
    multiply_adds: int
    flops_per_device: int
    compiler_flops_per_device: int
    peak_bytes_per_device: int
    collectives: list[Collective]
    wire_bytes_per_device: int
    analytic_minimum_bytes: int
    layers: list[JsonObject]
    prediction: NotRequired[dict[str, float]]


def audit_config(
    config: ml_collections.ConfigDict, mesh: str | None = None, images_per_device: int | None = None
) -> Config:
    """Applies the arguments to `config` in place and returns the resolved configuration.

    If mesh.data is -1, it becomes JAX_NUM_CPU_DEVICES (default 1) divided by mesh.model, at least 1.

    Args:
      config: Configuration of a training run.
      mesh: Devices on the axes, such as 'data:64,model:2'; None keeps config.mesh.
      images_per_device: Sets train.batch_size to this number times the number of devices; None keeps the batch size.

    Raises ConfigError: invalid mesh or configuration, or more than MAX_SIMULATED_DEVICES devices.
    """
    for axis in mesh.split(',') if mesh is not None else []:
        match = re.fullmatch(r'(data|model):([1-9]\d*)', axis)
        if not match:
            raise ConfigError(f'--mesh: {mesh!r} is not a mesh; write for example --mesh=data:64,model:2')
        config.mesh[match[1]] = int(match[2])
    if config.mesh.data == -1:
        simulated = os.environ.get('JAX_NUM_CPU_DEVICES', '1')
        if not simulated.isdecimal():
            raise ConfigError(f'JAX_NUM_CPU_DEVICES: {simulated!r} is not a number of devices')
        config.mesh.data = max(1, int(simulated) // max(1, config.mesh.model))
    devices = config.mesh.data * config.mesh.model
    if images_per_device:
        config.train.batch_size = images_per_device * devices
    if devices > MAX_SIMULATED_DEVICES:
        raise ConfigError(f'config.mesh: {devices} devices; at most {MAX_SIMULATED_DEVICES} can be simulated')
    resolved = resolve(config)
    if resolved.model.num_classes == UNKNOWN:
        raise ConfigError(
            'config.model.num_classes: auto is the number of classes of the data, which audit does not read; give the'
            ' number'
        )
    return resolved


def audit(config: Config) -> AuditReport:
    """Returns the costs of a training step of `config` (see audit_config()). JAX must have at least as many devices."""
    import jax
    import numpy as np

    from alexnet_jax import parallel
    from alexnet_jax.training.state import abstract_state
    from alexnet_jax.training.train_step import make_train_step

    mesh = parallel.make_mesh(config)
    batch_size, size, channels = config.train.batch_size, config.data.image_size, config.data.channels
    struct = jax.ShapeDtypeStruct
    batch = {
        'image': struct((batch_size, size, size, channels), np.uint8),
        'label': struct((batch_size,), np.int32),
        'example_id': struct((batch_size,), np.uint32),
    }
    preprocessing = {
        'mean': struct((size, size, channels), np.float32),
        'color': struct((channels, channels), np.float32),
        'divisor': struct((), np.float32),
        'scale': struct((channels,), np.float32),
    }
    if config.data.class_weights != 'none':
        preprocessing['class_weights'] = struct((config.model.num_classes,), np.float32)
    rates = {name: {kind: struct((), np.float32) for kind in ('kernel', 'bias')} for name in shapes.LAYERS}
    lowered = make_train_step(config, mesh).lower(abstract_state(config, mesh), batch, rates, preprocessing)
    # The machine code is never executed. Level 0 reduces the compile time to 40 % and yields the same HLO.
    compiled = lowered.compile(compiler_options={'xla_backend_optimization_level': 0})
    lowered_hlo = lowered.as_text(dialect='hlo', debug_info=True)
    memory = compiled.memory_analysis()
    devices = config.mesh.data * config.mesh.model
    table = cost_model.layers(config)
    found = step_collectives(compiled.as_text(), lowered_hlo, devices)
    return {
        'layout': config.mesh.layout,
        'mesh': {'data': config.mesh.data, 'model': config.mesh.model},
        'batch_size': batch_size,
        'batch_per_device': batch_size / devices,
        'parameters': sum(layer.parameters for layer in table),
        'multiply_adds': sum(layer.multiply_adds for layer in table),
        'flops_per_device': round(cost_model.flops_per_image(config) * batch_size / devices),
        'compiler_flops_per_device': round(compiled.cost_analysis()['flops']),
        'peak_bytes_per_device': memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        'collectives': found,
        'wire_bytes_per_device': round(sum(each.bytes for each in found)),
        'analytic_minimum_bytes': round(cost_model.lower_bound_bytes(config)),
        'layers': [{name: getattr(layer, name) for name in _LAYER_FIELDS} for layer in table],
    }


def as_json(report: AuditReport) -> str:
    """Returns the report of audit() as one JSON object."""

    def plain(each: Collective) -> dict[str, object]:
        return {**dataclasses.asdict(each), 'bytes': round(each.bytes)}

    return json.dumps(report, default=plain)


def collectives_table(found: list[Collective]) -> str:
    """Returns one line per collective: kind, layer, group size, bytes, dtype and shapes."""
    lines = [f'{"collective":<18} {"layer":<10}{"group":>6}{"bytes":>14}  shapes on a device']
    for each in found:
        shapes = ' '.join('x'.join(map(str, shape)) or 'scalar' for shape in each.shapes)
        row = f'{each.kind:<18} {each.layer or "?":<10}{each.group_size:>6}{round(each.bytes):>14,}'
        lines.append(f'{row}  {each.dtype} {shapes}')
    return '\n'.join(lines)


def layers_table(report: AuditReport) -> str:
    """Returns one line per layer: output shape, parameters and multiply-adds, with their shares of the total."""
    lines = [f'{"layer":<7}{"output":<14}{"parameters":>12}{"share":>8}{"multiply-adds":>16}{"share":>8}']
    for layer in report['layers']:
        output = 'x'.join(map(str, layer['output']))
        lines.append(
            f'{layer["name"]:<7}{output:<14}{layer["parameters"]:>12,}'
            f'{layer["parameters"] / report["parameters"]:>8.1%}{layer["multiply_adds"]:>16,}'
            f'{layer["multiply_adds"] / report["multiply_adds"]:>8.1%}'
        )
    lines.append(f'{"":<21}{report["parameters"]:>12,}{"":>8}{report["multiply_adds"]:>16,}')
    return '\n'.join(lines)


def as_text(report: AuditReport) -> str:
    """Returns the report of audit() as text."""
    data, model = report['mesh']['data'], report['mesh']['model']
    wire, least = report['wire_bytes_per_device'], report['analytic_minimum_bytes']
    devices = data * model
    lines = [
        f'layout {report["layout"]} on data {data} x model {model} = {devices} device{"s" * (devices > 1)},'
        f' batch {report["batch_size"]:,}: {report["batch_per_device"]:g} images per device',
        '',
        layers_table(report),
        '',
        collectives_table(report['collectives']),
        '',
        'per step and device',
        f'bytes sent       {wire:>18,}  {wire / least:.4f} of the lower bound of this layout, {least:,}'
        if least
        else f'bytes sent       {wire:>18,}',
        f'FLOPs            {report["flops_per_device"]:>18,}  convolutions and matrix products, padding included',
        f"compiler's count {report['compiler_flops_per_device']:>18,}  without padding, other operations included",
        f'memory, bytes    {report["peak_bytes_per_device"]:>18,}  compiled for a CPU',
    ]
    return '\n'.join(lines + prediction_lines(report.get('prediction')))


def prediction_lines(prediction: dict[str, float] | None) -> list[str]:
    """Formats the result of cost_model.predict() as lines of text; returns [] for None."""
    if prediction is None:
        return []
    lines = [
        '',
        f'predicted from {prediction["bandwidth"]:.3g} bytes/s and {prediction["flops"]:.3g} FLOP/s per device, latency'
        ' not modeled',
        f'compute {prediction["compute_seconds"] * 1e3:.2f} ms, wire {prediction["wire_seconds"] * 1e3:.2f} ms',
    ]
    for name in ('without_overlap', 'with_gradients_overlapped'):
        lines.append(
            f'{name.replace("_", " "):<26}{prediction[f"step_seconds_{name}"] * 1e3:>10.2f} ms per step'
            f'{prediction[f"images_per_second_{name}"]:>14,.0f} images/s in total'
            f'{prediction[f"efficiency_{name}"]:>8.1%} efficiency'
        )
    return lines
