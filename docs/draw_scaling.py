"""The figure docs/scaling.png and the tables of docs/scaling.md: python -m docs.draw_scaling

Every point is an audit of the compiled `paper` step; nothing is executed. A few minutes on two cores.
"""

import os

import jax
import matplotlib.pyplot as plt

from alexnet_jax import config
from alexnet_jax.audit import cost_model, step_audit

DEVICES = (2, 8, 32, 128, 512)
FLOPS = 1e13  # assumed sustained rate of a device, in FLOP/s
LINKS = {'100 GB/s': 1e11, '100 Gbit/s': 12.5e9}  # assumed bandwidth of a device, in bytes/s
# The colors of Okabe and Ito with one marker each, so that the layouts can be told apart without colors.
STYLES = {'data': ('#D55E00', 'o'), 'towers': ('#0072B2', 's'), 'hybrid': ('#009E73', '^')}
MODEL = {'data': 1, 'towers': 2, 'hybrid': 8}  # devices along `model`, or all devices if there are fewer
PER_DEVICE, TOTAL = '128 images per device', '1,024 images in total'


def audited(layout: str, devices: int, batch: str) -> dict:
    """Returns the bytes that a device sends per step and, for each of LINKS, the predicted efficiency."""
    model = min(MODEL[layout], devices)
    settings = config.default_config()
    settings.mesh.layout = layout
    settings.train.batch_size = 1024
    settings = step_audit.audit_config(
        settings, f'data:{devices // model},model:{model}', 128 if batch == PER_DEVICE else None
    )
    report = step_audit.audit(settings)
    predictions = {
        link: cost_model.predict(settings, report['collectives'], bandwidth, FLOPS) for link, bandwidth in LINKS.items()
    }
    return {'mesh': f'({devices // model}, {model})', 'bytes': report['wire_bytes_per_device']} | predictions


def print_tables(points: dict) -> None:
    """Prints both tables in Markdown: bytes, and efficiency between its two bounds."""
    for batch in (PER_DEVICE, TOTAL):
        print(f'\n{batch}\n\n| layout | mesh | MB sent | {" | ".join(LINKS)} |')
        print(f'| --- | --- | --: |{" --: |" * len(LINKS)}')
        for layout in STYLES:
            for devices in DEVICES:
                point = points[layout, devices, batch]
                ranges = [
                    f'{point[link]["efficiency_without_overlap"]:.1%} to'
                    f' {point[link]["efficiency_with_gradients_overlapped"]:.1%}'
                    for link in LINKS
                ]
                print(f'| `{layout}` | {point["mesh"]} | {point["bytes"] / 1e6:.1f} | {" | ".join(ranges)} |')


def draw(points: dict, file: str) -> None:
    """Draws bytes on the left, efficiency as a band between its bounds on the right; a row for each kind of batch."""
    figure, rows = plt.subplots(2, 3, figsize=(13, 7.5), sharex=True, layout='constrained')
    for axes, batch in zip(rows, (PER_DEVICE, TOTAL), strict=True):
        for layout, (color, marker) in STYLES.items():
            series = [points[layout, devices, batch] for devices in DEVICES]
            axes[0].plot(DEVICES, [point['bytes'] / 1e6 for point in series], color=color, marker=marker, label=layout)
            for axis, link in zip(axes[1:], LINKS, strict=True):
                low = [100 * point[link]['efficiency_without_overlap'] for point in series]
                high = [100 * point[link]['efficiency_with_gradients_overlapped'] for point in series]
                axis.fill_between(DEVICES, low, high, color=color, alpha=0.15, linewidth=0)
                axis.plot(DEVICES, low, color=color, marker=marker, label=layout)
                axis.plot(DEVICES, high, color=color, marker=marker, markerfacecolor='white', linestyle='--')
        axes[0].set(ylabel=f'{batch}\n\nMB sent, per step and device', ylim=(0, None))
        for axis, link in zip(axes[1:], LINKS, strict=True):
            axis.set(ylabel='efficiency, %', ylim=(0, 104), title=f'{link} (assumed)' if batch == PER_DEVICE else '')
    rows[0][0].set_title('bytes, from the compiled step')
    rows[0][0].legend(frameon=False)
    for axis in rows.flat:
        axis.set_xscale('log', base=2)
        axis.set_xticks(DEVICES, map(str, DEVICES))
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    for axis in rows[1]:
        axis.set_xlabel('devices')
    figure.suptitle(
        f'Computed, not measured: {FLOPS / 1e12:g} TFLOP/s per device assumed.'
        ' Solid: no overlap; dashed: gradients are communicated during computation',
        fontsize=11,
    )
    figure.savefig(file, dpi=110)


if __name__ == '__main__':
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', max(DEVICES))
    found = {
        (layout, devices, batch): audited(layout, devices, batch)
        for layout in STYLES
        for devices in DEVICES
        for batch in (PER_DEVICE, TOTAL)
    }
    print_tables(found)
    draw(found, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'scaling.png'))
