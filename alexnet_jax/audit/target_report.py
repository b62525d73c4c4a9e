"""The part of an audit that is about an accelerator: memory, kernels, layouts, overlap and the modeled time."""

import collections
import dataclasses
import importlib.metadata
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from alexnet_jax.audit.hlo import MOVES, Program
from alexnet_jax.audit.hlo_collectives import Collective
from alexnet_jax.audit.roofline import COPY_STARTS, Timeline, Transfer, is_unbounded, operand_precision, simulate
from alexnet_jax.audit.targets import Compiler, Target
from alexnet_jax.config import Config

if TYPE_CHECKING:
    from alexnet_jax.audit.step_audit import AuditReport

COSTLIEST = 5  # instructions in the report
REPEATED = 0.05  # share of the bytes accessed from which on a copy in a loop is reported


class TargetReport(TypedDict):
    """The step as compiled for an accelerator; --json prints these fields. Bytes are per step and device.

    What the compiler emitted:
      target, device_kind, devices, compiler, compiler_version, jax_version, compile_seconds: What was compiled for
        what, and the time of tracing and compiling. `executed` is always False.
      memory: Bytes of a device: `state` (arguments: parameters, velocities, batch), `step` (temporaries and results
        that do not reuse an argument), `total`, `available`, and whether the step `fits`.
      cpu: `wire_bytes` and `peak_bytes` of the same step compiled for simulated CPU devices.
      gradient_collectives: Number, `bytes`, and bytes of those that are `synchronous`.
      kernels: Scheduled instructions that compute or move data, those in loops once. `launches` counts executions.
        The bodies of `unbounded_loops`, whose length depends on data, count once.
      copies: Number and bytes of the kernels that contain a copy or a transpose, and of those that only move data.
      products: Number of convolutions and matrix products by dtype and precision of their operands, see
        roofline.operand_precision().
      convolutions: Layout of the convolutions that call cuDNN, and their number; {} for TPUs.
      accessed_bytes: Bytes read from and written to the memory of a device, without collectives: `total`, and of these
        the `asynchronous_copies` to and from on-chip memory, and the instructions in `loops`. See hlo.Program.bytes().
      differences: What differs from the step compiled for a CPU, and copies repeated in loops, one sentence each.

    What is modeled, see roofline.py:
      overlap: For each collective, the share of compute before its start and its end, its bytes, seconds, exposed
        seconds, and the parts of the step in between.
      gradient_bytes_behind_compute: Share of the gradient bytes that are sent while the device computes, without the
        updated weights that mesh.shard_optimizer gathers.
      roofline: Seconds of `compute`, `communication`, `exposed` communication and the `step`, `images_per_second` on
        all devices, the `costliest` instructions (see roofline.Work), and the `compiler_cycles`, the sum of the cycles
        that the compiler for TPUs estimates (0 for GPUs).
      hardware: The data sheet, see targets.Hardware.
    """

    target: str
    device_kind: str
    devices: int
    compiler: str
    compiler_version: str
    jax_version: str
    compile_seconds: float
    executed: bool
    memory: dict[str, Any]
    cpu: dict[str, int]
    gradient_collectives: dict[str, int]
    kernels: dict[str, int]
    copies: dict[str, int]
    products: dict[str, int]
    convolutions: dict[str, int]
    accessed_bytes: dict[str, int]
    differences: list[str]
    overlap: list[dict[str, Any]]
    gradient_bytes_behind_compute: float
    roofline: dict[str, Any]
    hardware: dict[str, Any]


def make(
    config: Config,
    target: Target,
    compiler: Compiler,
    device_kind: str,
    compiled: Any,
    found: Sequence[Collective],
    cpu: 'AuditReport',
    compile_seconds: float,
) -> TargetReport:
    """Returns the report of a step compiled for `target`.

    Args:
      config: See step_audit.audit_config().
      target: The accelerators.
      compiler: What compiled the step.
      device_kind: The compiler's name of a device.
      compiled: The jax.stages.Compiled step.
      found: The collectives of the step.
      cpu: The report of the same step compiled for CPUs.
      compile_seconds: Time of tracing and compiling.
    """
    program = Program(compiled.as_text())
    line = simulate(program, found, target.hardware, config.mesh.data, config.mesh.model)
    gradients = [each for each in line.transfers if each.is_gradient]
    sent = sum(each.bytes for each in gradients)
    hidden = sum(each.hidden_bytes for each in gradients)
    return {
        'target': target.text,
        'device_kind': device_kind,
        'devices': target.devices,
        'compiler': compiler.package,
        'compiler_version': compiler.version,
        'jax_version': importlib.metadata.version('jax'),
        'compile_seconds': round(compile_seconds, 1),
        'executed': False,
        'memory': _memory(compiled, target),
        'cpu': {'wire_bytes': cpu['wire_bytes_per_device'], 'peak_bytes': cpu['peak_bytes_per_device']},
        'gradient_collectives': {
            'number': len(gradients),
            'bytes': round(sent),
            'synchronous': round(sum(each.bytes for each in gradients if not each.collectives[0].is_async)),
        },
        'kernels': {
            'number': len(line.work),
            'launches': sum(each.executions for each in line.work.values()),
            'unbounded_loops': sum(is_unbounded(program, each) for each in program.instructions.values()),
        },
        'copies': _copies(program, line),
        'products': _products(program),
        'convolutions': _convolutions(program),
        'accessed_bytes': _accessed(program, line),
        'differences': differences(found, cpu['collectives'], gradients) + repeated_copies(program, line),
        'overlap': [_overlap(each) for each in line.transfers],
        'gradient_bytes_behind_compute': round(hidden / sent, 6) if sent else 1.0,
        'roofline': _roofline(line, config),
        'hardware': dataclasses.asdict(target.hardware),
    }


def _memory(compiled: Any, target: Target) -> dict[str, Any]:
    analysis = compiled.memory_analysis()
    state = analysis.argument_size_in_bytes
    step = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    available = target.hardware.memory
    return {
        'state': state,
        'step': step,
        'total': state + step,
        'available': available,
        'fits': state + step <= available,
    }


def _accessed(program: Program, line: Timeline) -> dict[str, int]:
    sums = {'total': 0, 'asynchronous_copies': 0, 'loops': 0}
    for work in line.work.values():
        moved = work.bytes * work.executions
        sums['total'] += moved
        if program.instructions[work.name].opcode in COPY_STARTS:
            sums['asynchronous_copies'] += moved
        elif work.executions > 1:
            sums['loops'] += moved
    return sums


def _copies(program: Program, line: Timeline) -> dict[str, int]:
    """Counts the kernels with a copy or a transpose; asynchronous copies to on-chip memory do not count."""
    counts = {'kernels': 0, 'bytes': 0, 'only_moving': 0, 'only_moving_bytes': 0}
    for name, work in line.work.items():
        each = program.instructions[name]
        inside = each.fused or [each]
        if any(inner.opcode in ('copy', 'transpose') for inner in inside):
            counts['kernels'] += 1
            counts['bytes'] += work.bytes * work.executions
            if all(inner.opcode in MOVES for inner in inside):
                counts['only_moving'] += 1
                counts['only_moving_bytes'] += work.bytes * work.executions
    return counts


def _products(program: Program) -> dict[str, int]:
    products = (each for each in program.instructions.values() if not each.fused and program.flops(each.name))
    counts = collections.Counter(operand_precision(program, each) for each in products)
    return dict(sorted(counts.items()))


def _convolutions(program: Program) -> dict[str, int]:
    """Returns the number of cuDNN's convolutions per layout, and under 'other' that of XLA's own convolutions."""
    if not any('__cudnn$conv' in each.attributes for each in program.instructions.values()):
        return {}
    counts: collections.Counter[str] = collections.Counter()
    for each in program.instructions.values():
        if each.opcode == 'custom-call' and '__cudnn$conv' in each.attributes:
            labels = re.search(r'dim_labels=(\w+)_', each.attributes)
            counts[{'b01f': 'NHWC', 'bf01': 'NCHW'}.get(labels[1], labels[1]) if labels else '?'] += 1
        elif each.opcode == 'convolution':
            counts['other'] += 1
    return dict(counts)


def _overlap(transfer: Transfer) -> dict[str, Any]:
    first = transfer.collectives[0]
    return {
        'kind': first.kind,
        'layers': sorted({each.layer for each in transfer.collectives}),
        'asynchronous': first.is_async,
        'bytes': round(transfer.bytes),
        'seconds': transfer.seconds,
        'exposed_seconds': transfer.exposed_seconds,
        'start': transfer.start,
        'done': transfer.done,
        'behind': transfer.behind,
    }


def _roofline(line: Timeline, config: Config) -> dict[str, Any]:
    return {
        'compute_seconds': line.compute_seconds,
        'communication_seconds': sum(each.seconds for each in line.transfers),
        'exposed_seconds': line.exposed_seconds,
        'step_seconds': line.step_seconds,
        'images_per_second': config.train.batch_size / line.step_seconds,
        'flops': sum(each.flops * each.executions for each in line.work.values()),
        'costliest': [dataclasses.asdict(each) for each in line.costliest[:COSTLIEST]],
        'compiler_cycles': sum(each.cycles * each.executions for each in line.work.values()),
    }


def differences(
    found: Sequence[Collective], designed: Sequence[Collective], gradients: Sequence[Transfer]
) -> list[str]:
    """Returns where the collectives of a program differ from the design, one sentence each.

    Args:
      found: Collectives of the step compiled for the accelerator.
      designed: Collectives of the step compiled for a CPU, which emits those that the program states.
      gradients: Transfers of gradients in the modeled schedule.
    """
    result = []
    for layer in dict.fromkeys(each.layer for each in (*designed, *found)):
        wanted, has = ([each for each in group if each.layer == layer] for group in (designed, found))
        result += _layer_differences(layer, wanted, has)
    stated = {(each.start, each.kind) for each in designed if each.layer == 'gradients'}
    if len(gradients) > max(1, len(stated)):
        result.append(f'gradients are sent in {len(gradients)} collectives instead of {max(1, len(stated))}')
    synchronous = sum(each.bytes for each in gradients if not each.collectives[0].is_async)
    if synchronous:
        share = synchronous / sum(each.bytes for each in gradients)
        result.append(
            f'{share:.0%} of the gradient bytes are sent by synchronous collectives: nothing is computed meanwhile'
        )
    return result


def repeated_copies(program: Program, line: Timeline) -> list[str]:
    """Returns one sentence for each copy in a loop that moves the share REPEATED of all bytes, or more."""
    total = sum(work.bytes * work.executions for work in line.work.values())
    cycles = sum(work.cycles * work.executions for work in line.work.values())
    return [
        f'{work.name}, in a loop, copies {work.bytes:,} bytes {work.executions:,} times per step'
        + (
            f', {work.cycles * work.executions / cycles:.0%} of the cycles that the compiler estimates'
            if cycles
            else ''
        )
        for work in line.costliest
        if work.executions > 1
        and work.bytes * work.executions >= REPEATED * total
        and program.instructions[work.name].opcode in ('copy', 'transpose')
    ]


def _layer_differences(layer: str, wanted: Sequence[Collective], has: Sequence[Collective]) -> list[str]:
    """Returns the differences of kinds, dtypes and bytes of the collectives of one layer."""
    result = []
    kinds = dict.fromkeys(each.kind for each in (*wanted, *has))
    sums = {kind: [sum(each.bytes for each in group if each.kind == kind) for group in (wanted, has)] for kind in kinds}
    added = [kind for kind, (before, after) in sums.items() if after and not before]
    lost = [kind for kind, (before, after) in sums.items() if before and not after]
    name = layer or 'no layer'
    if lost or added:
        total = round(sum(sums[kind][1] - sums[kind][0] for kind in (*lost, *added)))
        what = (
            f'{" and ".join(lost)} became {" and ".join(added)}'
            if lost and added
            else (f'{" and ".join(added)} was added' if added else f'{" and ".join(lost)} is missing')
        )
        result.append(f'{name}: {what} ({total:+,} bytes)')
    for kind, (before, after) in sums.items():
        if not (before and after) or round(before) == round(after):
            continue
        dtypes = [sorted({each.dtype for each in group if each.kind == kind}) for group in (wanted, has)]
        why = f' ({"/".join(dtypes[1])} instead of {"/".join(dtypes[0])})' if dtypes[0] != dtypes[1] else ''
        result.append(f'{name}: {kind} sends {round(after):,} bytes instead of {round(before):,}{why}')
    return result
