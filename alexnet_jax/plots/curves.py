"""Curves of loss, errors and learning rate by step, for one or more runs, from the metrics.jsonl of each run."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alexnet_jax.config import ConfigError
from alexnet_jax.plots import style
from alexnet_jax.runtime.files import JsonObject, read_json_lines

# By key of a metrics line: the panel's heading and the factor of the values.
PANELS = {
    'loss': ('loss, nats', 1),
    'top1_error': ('top-1 error, %', 100),
    'top5_error': ('top-5 error, %', 100),
    'learning_rate': ('learning rate', 1),
}
_DASHES = ('-', (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)))
_MARKERS = 'osD^vPX*'
_LARGEST = 1e30  # larger numbers overflow in Matplotlib
_LEGEND_COLUMNS, _LEGEND_ROW = 3, 0.165  # inches


def read_metrics(workdir: str) -> list[JsonObject]:
    """Returns the lines of the run's metrics.jsonl in order, without incomplete and corrupt lines.

    Raises ConfigError: metrics.jsonl cannot be read.
    """
    path = os.path.join(workdir, 'metrics.jsonl')
    try:
        lines = read_json_lines(path)
    except OSError as error:
        raise ConfigError(f'{path}: {error.strerror}; name the folder of a run, which has a metrics.jsonl') from None
    return [line for line in lines if isinstance(line.get('split'), str) and not math.isnan(_number(line.get('step')))]


def groups(names: list[str]) -> dict[str, list[str]]:
    """Groups runs by color. Up to 8 runs have one color each; otherwise runs in one folder (seeds) share one."""
    if len(names) <= len(style.SERIES):
        return {name: [name] for name in names}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(os.path.dirname(name) or name, []).append(name)
    return found


@style.drawing
def draw(runs: Mapping[str, Sequence[JsonObject]]) -> Figure:
    """Draws four panels: loss, top-1 error, top-5 error and learning rate.

    Training has thin lines, validation has lines with markers. Values that are not finite appear as gaps.

    Args:
      runs: results of read_metrics() by name. For more than 8 runs, the runs of each group of groups() are faint, and
        their mean is drawn at the steps that they have in common.

    Raises ValueError: there is no run.
    """
    if not runs:
        raise ValueError('no run to draw')
    found = groups(list(runs))
    legend = _legend(found)
    below = 0.42 + _LEGEND_ROW * math.ceil(len(legend) / _LEGEND_COLUMNS)
    height = 4.3 + below
    figure = style.new_figure(style.WIDTH, height)
    panels = figure.subplots(2, 2, sharex=True)
    figure.subplots_adjust(0.08, below / height, 0.985, 1 - 0.25 / height, hspace=0.2, wspace=0.18)
    for axes, name in zip(panels.flat, PANELS, strict=True):
        _draw_panel(axes, name, runs, found)
    for axes in panels[1]:
        axes.set_xlabel('step')
    figure.legend(handles=legend, loc='lower center', ncols=min(_LEGEND_COLUMNS, len(legend)), handlelength=3.2)
    return figure


def mean_of(runs: Sequence[Sequence[JsonObject]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps that all runs have, and the mean of `name` at each step; NaN if a run lacks the value."""
    found = [{line['step']: _number(line.get(name)) for line in lines} for lines in runs]
    steps = [step for step in found[0] if all(step in run for run in found)]
    return steps, [sum(run[step] for run in found) / len(found) for step in steps]


def _draw_panel(axes: Axes, name: str, runs: Mapping[str, Sequence[JsonObject]], found: dict[str, list[str]]) -> None:
    heading, factor = PANELS[name]
    is_rate = name == 'learning_rate'
    axes.set_title(heading, loc='left')
    axes.grid(alpha=0.3, linewidth=0.5)
    for i, (group, members) in enumerate(found.items()):
        for split in ('train',) if is_rate else ('train', 'validation'):
            look = _look(split, i, len(found) == 1)
            faint = {'color': look['color'], 'linewidth': 0.5, 'alpha': 0.35}
            lines = [[line for line in runs[run] if is_rate or line['split'] == split] for run in members]
            for run, run_lines in zip(members, lines, strict=True):
                values = [factor * _number(line.get(name)) for line in run_lines]
                of_one = faint if len(members) > 1 and not is_rate else look
                of_one = {'marker': '.', **of_one} if len(values) == 1 else of_one
                axes.plot([line['step'] for line in run_lines], values, gid=f'{split}:{run}', **of_one)
            if len(members) > 1 and not is_rate:
                steps, means = mean_of(lines, name)
                axes.plot(steps, [factor * mean for mean in means], gid=f'{split}:mean:{group}', **look)
    if is_rate:
        axes.set_yscale('log', nonpositive='mask')
        axes.yaxis.set_major_formatter(lambda value, position: f'{value:g}')
        low, high = axes.get_ylim()
        labeled = '235' if high < 30 * low else ''  # first digits of the minor ticks, if there are few powers of ten
        axes.yaxis.set_minor_formatter(lambda value, position: f'{value:g}' if f'{value:e}'[0] in labeled else '')
    elif name.endswith('error'):
        axes.set_ylim(bottom=0)


def _look(split: str, group: int, alone: bool) -> dict[str, Any]:
    """Returns the line style of a split and a group; `alone` means that there is only one group."""
    look = {'color': style.SERIES[group % len(style.SERIES)], 'alpha': 0.9}
    if split == 'train':
        return look | {'linestyle': _DASHES[group % len(_DASHES)], 'linewidth': 0.8}
    look |= {'marker': _MARKERS[group % len(_MARKERS)], 'markersize': 3, 'linewidth': 1.2}
    return look | {'color': style.VERMILLION} if alone else look


def _number(value: object) -> float:
    """Returns `value` if it is a number that can be drawn, otherwise NaN, which appears as a gap."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return float(value)
    return math.nan


def _legend(found: dict[str, list[str]]) -> list[Line2D]:
    """Returns entries for training and validation and, if there are several groups, for each group."""
    kinds = {'train': 'training', 'validation': 'validation'}
    alone = len(found) == 1
    entries = [Line2D([], [], label=label, **_look(split, 0, alone)) for split, label in kinds.items()]
    if alone:
        return entries
    for entry in entries:
        entry.set_color(style.BLACK)
    for group, (name, members) in enumerate(found.items()):
        label = style.fit(name, 105) + (f', mean of {len(members)}' if len(members) > 1 else '')
        look = _look('validation', group, False)
        entries.append(Line2D([], [], label=label, **look | {'linestyle': _DASHES[group % len(_DASHES)]}))
    return entries
