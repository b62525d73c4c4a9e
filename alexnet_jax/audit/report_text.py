"""Formats the report of step_audit.audit() as text and as JSON."""

import dataclasses
import json

from alexnet_jax.audit.hlo_collectives import Collective
from alexnet_jax.audit.step_audit import AuditReport
from alexnet_jax.audit.target_report import TargetReport

ACCESSED = {
    'asynchronous_copies': 'by asynchronous copies to and from on-chip memory',
    'loops': 'by instructions in loops',
}


def as_json(report: AuditReport) -> str:
    """Returns the report of audit() as one JSON object."""

    def plain(each: Collective) -> dict[str, object]:
        return {**dataclasses.asdict(each), 'bytes': round(each.bytes)}

    return json.dumps(report, default=plain)


def collectives_table(found: list[Collective], with_schedule: bool = False) -> str:
    """Returns one line per collective: kind, layer, group size, bytes, dtype and shapes.

    `with_schedule` adds whether the collective is asynchronous, and the executions of those in loops.
    """
    schedule = f'{"schedule":>14}' if with_schedule else ''
    lines = [f'{"collective":<18} {"layer":<10}{"group":>6}{"bytes":>14}{schedule}  shapes on a device']
    for each in found:
        shapes = ' '.join('x'.join(map(str, shape)) or 'scalar' for shape in each.shapes)
        row = f'{each.kind:<18} {each.layer or "?":<10}{each.group_size:>6}{round(each.bytes):>14,}'
        if with_schedule:
            row += f'{"asynchronous" if each.is_async else "synchronous":>14}'
            shapes += f' ({each.trips} times)' if each.trips > 1 else ''
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
    devices, target = data * model, report.get('target')
    lines = [
        f'layout {report["layout"]} on data {data} x model {model} = {devices} device{"s" * (devices > 1)},'
        f' batch {report["batch_size"]:,}: {report["batch_per_device"]:g} images per device',
        *([compiled_line(target)] if target else []),
        '',
        layers_table(report),
        '',
        collectives_table(report['collectives'], with_schedule=target is not None),
        '',
        'per step and device',
        f'bytes sent       {wire:>18,}'
        + (f'  {wire / least:.4f} of the lower bound of this layout, {least:,}' if least else ''),
        f'FLOPs            {report["flops_per_device"]:>18,}  convolutions and matrix products, padding included',
    ]
    if report['compiler_flops_per_device'] is not None:
        count = report['compiler_flops_per_device']
        lines.append(f"compiler's count {count:>18,}  without padding, other operations included")
    if target:
        lines += target_lines(target)
    else:
        lines.append(f'memory, bytes    {report["peak_bytes_per_device"]:>18,}  compiled for a CPU')
    return '\n'.join(lines + prediction_lines(report.get('prediction')))


def compiled_line(target: TargetReport) -> str:
    """Returns the line that says by what the step was compiled, and for what."""
    return (
        f'compiled for {target["devices"]} x {target["device_kind"]} ({target["target"]}) in'
        f' {target["compile_seconds"]:.0f} s by {target["compiler"]} {target["compiler_version"]}'
        f' and jax {target["jax_version"]}; not run'
    )


def target_lines(target: TargetReport) -> list[str]:
    """Formats what the compiler of an accelerator emitted, and the times that are modeled from it."""
    memory, copies, kernels = target['memory'], target['copies'], target['kernels']
    accessed, gradients = target['accessed_bytes'], target['gradient_collectives']
    lines = [
        f'compiled for CPU {target["cpu"]["wire_bytes"]:>18,}  bytes sent; {target["cpu"]["peak_bytes"]:,} of memory',
        f'memory, bytes    {memory["total"]:>18,}  {"fits" if memory["fits"] else "DOES NOT FIT"}: state and batch'
        f' {memory["state"]:,} + step {memory["step"]:,}, of {memory["available"]:,}',
        f'bytes accessed   {accessed["total"]:>18,}  by {kernels["number"]:,} kernels'
        + (f', launched {kernels["launches"]:,} times' if kernels['launches'] != kernels['number'] else ''),
        *[f'  counted once     {kernels["unbounded_loops"]:>16,}  loops whose length depends on data']
        * (kernels['unbounded_loops'] > 0),
        *(f'  of which         {accessed[key]:>16,}  {name}' for key, name in ACCESSED.items() if accessed[key]),
        f'copies           {copies["bytes"]:>18,}  bytes of {copies["kernels"]} kernels with copies or transposes;'
        f' {copies["only_moving"]} of them, {copies["only_moving_bytes"]:,} bytes, only move data',
    ]
    lines.append(products_line(target))
    if target['convolutions']:
        layouts = ', '.join(f'{count} {layout}' for layout, count in target['convolutions'].items())
        lines.append(f'cuDNN            {sum(target["convolutions"].values()):>18,}  convolutions: {layouts}')
    lines.append(
        f'gradient bytes   {gradients["bytes"]:>18,}  collectives: {gradients["number"]},'
        f' bytes of the synchronous ones: {gradients["synchronous"]:,}'
    )
    if target['differences']:
        lines += ['', 'differences from the design', *(f'  {each}' for each in target['differences'])]
    return lines + model_lines(target)


def products_line(target: TargetReport) -> str:
    """Returns the line with the number of convolutions and matrix products by the precision of their operands."""
    listed = ', '.join(f'{count} {name}' for name, count in target['products'].items())
    return f'products         {sum(target["products"].values()):>18,}  convolutions and matrix products: {listed}'


def model_lines(target: TargetReport) -> list[str]:
    """Formats the modeled schedule: the position of each collective, the times, and the costliest instructions."""
    roof, hardware = target['roofline'], target['hardware']
    lines = [
        '',
        f'modeled, not measured: {hardware["tensorfloat32"] / 1e12:g} (float32 inputs), {hardware["bfloat16"] / 1e12:g}'
        f' (bfloat16) TFLOP/s, memory {hardware["bandwidth"] / 1e9:,.0f} GB/s, link {hardware["link"] / 1e9:,.0f} GB/s;'
        ' an upper bound of the speed',
        f'compute {roof["compute_seconds"] * 1e3:.3f} ms, communication {roof["communication_seconds"] * 1e3:.3f} ms,'
        f' of which {roof["exposed_seconds"] * 1e3:.3f} ms are not behind compute',
        f'at least {roof["step_seconds"] * 1e3:.3f} ms per step, at most {roof["images_per_second"]:,.0f} images/s',
        f'gradient bytes behind compute: {target["gradient_bytes_behind_compute"]:.1%}',
        '',
        f'{"collective":<18} {"layer":<18}{"MB":>8}{"start":>8}{"end":>8}{"ms":>8}{"exposed":>9}  computed meanwhile',
    ]
    for each in target['overlap']:
        row = (
            f'{each["kind"]:<18} {", ".join(layer or "?" for layer in each["layers"]):<18}'
            f'{each["bytes"] / 1e6:>8.1f}{each["start"]:>8.1%}{each["done"]:>8.1%}'
            f'{each["seconds"] * 1e3:>8.3f}{each["exposed_seconds"] * 1e3:>9.3f}  {", ".join(list(each["behind"])[:3])}'
        )
        lines.append(row.rstrip())
    if roof['compiler_cycles']:
        lines.append(f"compiler's estimate: {roof['compiler_cycles']:,} cycles per step, without collectives")
    lines += ['', f'{"costliest instructions":<42}{"part":<24}{"ms":>8}{"share":>8}{"MB":>10}{"GFLOP":>9}{"times":>7}']
    for work in roof['costliest']:
        part = work['part'] + ' backward' * (work['direction'] == 'backward')
        share = work['seconds'] / roof['compute_seconds']
        lines.append(
            f'{work["name"]:<42}{part:<24}{work["seconds"] * 1e3:>8.3f}{share:>8.1%}'
            f'{work["bytes"] * work["executions"] / 1e6:>10,.1f}{work["flops"] * work["executions"] / 1e9:>9,.1f}'
            f'{work["executions"]:>7,}'
        )
    return lines


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
            f'{prediction[f"images_per_second_{name}"]:>14,.0f} images/s'
            f'{prediction[f"efficiency_{name}"]:>8.1%} efficiency'
        )
    return lines
