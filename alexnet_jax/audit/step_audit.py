"""Compiles a training step for simulated devices or for an accelerator and reports collectives, FLOPs and memory."""

import os
import re
import time
from typing import Any, NotRequired, TypedDict

import ml_collections

from alexnet_jax import shapes
from alexnet_jax.audit import cost_model, target_report
from alexnet_jax.audit.hlo_collectives import Collective, step_collectives
from alexnet_jax.audit.target_report import TargetReport
from alexnet_jax.audit.targets import Compiler, CompilerError, Target, target_devices
from alexnet_jax.config import UNKNOWN, Config, ConfigError, resolve
from alexnet_jax.runtime.files import JsonObject

MAX_SIMULATED_DEVICES = 2048  # limit of XLA for one CPU process
_LAYER_FIELDS = ('name', 'output', 'parameters', 'multiply_adds')


class AuditReport(TypedDict):
    """The costs of a training step; --json prints these fields. Bytes and FLOPs are per step and device.

    `multiply_adds` are those of the forward pass for one image. cost_model.predict() computes the `prediction`. With a
    target, collectives, bytes sent and memory are those of the step compiled for the target.
    """

    layout: str
    mesh: dict[str, int]
    batch_size: int
    batch_per_device: float
    parameters: int
    multiply_adds: int
    flops_per_device: int
    compiler_flops_per_device: int | None
    peak_bytes_per_device: int
    collectives: list[Collective]
    wire_bytes_per_device: int
    analytic_minimum_bytes: int
    layers: list[JsonObject]
    prediction: NotRequired[dict[str, float]]
    target: NotRequired[TargetReport]


def audit_config(
    config: ml_collections.ConfigDict,
    mesh: str | None = None,
    images_per_device: int | None = None,
    target: Target | None = None,
) -> Config:
    """Applies the arguments to `config` in place and returns the resolved configuration.

    If mesh.data is -1, it becomes the number of devices divided by mesh.model, at least 1. The devices are those of the
    target or, without one, JAX_NUM_CPU_DEVICES (default 1).

    Args:
      config: Configuration of a training run.
      mesh: Devices on the axes, such as 'data:64,model:2'; None keeps config.mesh.
      images_per_device: Sets train.batch_size to this number times the number of devices; None keeps the batch size.
      target: The accelerators for which the step will be compiled.

    Raises ConfigError: invalid mesh or configuration, more than MAX_SIMULATED_DEVICES devices, or a mesh that does not
      have all devices of the target.
    """
    for axis in mesh.split(',') if mesh is not None else []:
        match = re.fullmatch(r'(data|model):([1-9]\d*)', axis)
        if not match:
            raise ConfigError(f'--mesh: {mesh!r} is not a mesh; write for example --mesh=data:64,model:2')
        config.mesh[match[1]] = int(match[2])
    if config.mesh.data == -1:
        available = target.devices if target else _simulated_devices()
        config.mesh.data = max(1, available // max(1, config.mesh.model))
    devices = config.mesh.data * config.mesh.model
    if target and devices != target.devices:
        model = config.mesh.model if target.devices % max(1, config.mesh.model) == 0 else 1
        raise ConfigError(
            f'config.mesh: data={config.mesh.data} times model={config.mesh.model} is {devices} devices, and'
            f' --target={target.text} has {target.devices}; write for example'
            f' --mesh=data:{target.devices // model},model:{model}'
        )
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


def _simulated_devices() -> int:
    """Returns JAX_NUM_CPU_DEVICES. Raises ConfigError: the variable is not a number."""
    simulated = os.environ.get('JAX_NUM_CPU_DEVICES', '1')
    if not simulated.isdecimal():
        raise ConfigError(f'JAX_NUM_CPU_DEVICES: {simulated!r} is not a number of devices')
    return int(simulated)


def audit(config: Config, target: Target | None = None, compiler: Compiler | None = None) -> AuditReport:
    """Returns the costs of a training step of `config` (see audit_config()).

    The step is compiled for JAX's CPU devices, of which there must be as many as the mesh has. With `target`, the step
    is compiled by `compiler` for the target as well, see targets.py.

    Raises:
      ConfigError: the compiler refuses the topology of the target.
      CompilerError: the compiler refuses the step.
    """
    import jax

    from alexnet_jax import parallel

    if target is None or compiler is None:
        return _report(config, parallel.make_mesh(config), {'xla_backend_optimization_level': 0})[0]
    mesh = parallel.make_mesh(config, target_devices(target, compiler))
    try:
        report, compiled, seconds = _report(config, mesh, None)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CompilerError(f'{compiler.package} {compiler.version} for {target.text}: {reason}') from None
    report['target'] = target_report.make(
        config,
        target,
        compiler,
        mesh.devices.flat[0].device_kind,
        compiled,
        report['collectives'],
        audit(config),
        seconds,
    )
    return report


def _report(config: Config, mesh: Any, options: dict[str, Any] | None) -> tuple[AuditReport, Any, float]:
    """Returns the costs of a training step, the jax.stages.Compiled step, and the seconds to trace and compile it.

    Args:
      config: See audit_config().
      mesh: jax.sharding.Mesh of the devices for which the step is compiled.
      options: Compiler options. Machine code for a CPU is never executed: 'xla_backend_optimization_level' 0 reduces
        the compile time to 40 % and yields the same HLO.
    """
    started = time.monotonic()
    lowered = _lower(config, mesh)
    compiled = lowered.compile(compiler_options=options)
    seconds = time.monotonic() - started
    lowered_hlo = lowered.as_text(dialect='hlo', debug_info=True)
    memory = compiled.memory_analysis()
    devices = config.mesh.data * config.mesh.model
    table = cost_model.layers(config)
    found = step_collectives(compiled.as_text(), lowered_hlo, devices)
    flops = (compiled.cost_analysis() or {}).get('flops')
    report: AuditReport = {
        'layout': config.mesh.layout,
        'mesh': {'data': config.mesh.data, 'model': config.mesh.model},
        'batch_size': config.train.batch_size,
        'batch_per_device': config.train.batch_size / devices,
        'parameters': sum(layer.parameters for layer in table),
        'multiply_adds': sum(layer.multiply_adds for layer in table),
        'flops_per_device': round(cost_model.flops_per_image(config) * config.train.batch_size / devices),
        'compiler_flops_per_device': None if flops is None else round(flops),
        'peak_bytes_per_device': memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        'collectives': found,
        'wire_bytes_per_device': round(sum(each.bytes for each in found)),
        'analytic_minimum_bytes': round(cost_model.lower_bound_bytes(config, mesh.devices.flat[0].platform)),
        'layers': [{name: getattr(layer, name) for name in _LAYER_FIELDS} for layer in table],
    }
    return report, compiled, seconds


def _lower(config: Config, mesh: Any) -> Any:
    """Returns the jax.stages.Lowered training step on a mesh."""
    import jax
    import numpy as np

    from alexnet_jax.training.state import abstract_state
    from alexnet_jax.training.train_step import make_train_step

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
    return make_train_step(config, mesh).lower(abstract_state(config, mesh), batch, rates, preprocessing)
