"""Statistics of a sweep: means, standard deviations, differences with confidence intervals, and published values."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence

from alexnet_jax.runtime.files import JsonObject
from alexnet_jax.sweep.results import SweepPlan, views_text


@dataclasses.dataclass(frozen=True)
class ErrorSummary:
    """Statistics of the top-1 or top-5 error of a variant; None stands for an unknown value.

    Attributes:
      mean: Mean over the runs, in percent.
      deviation: Sample standard deviation, in percentage points; None for fewer than two runs.
      difference: Mean of the variant minus mean of the base, in percentage points.
      interval: Lower and upper limit of the 95 % confidence interval of the difference, see welch_interval().
      published: Published difference, in percentage points.
    """

    mean: float | None
    deviation: float | None
    difference: float | None
    interval: tuple[float, float] | None
    published: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of a sweep. The statistics are over `runs_done` of `runs_planned` runs."""

    name: str
    runs_done: int
    runs_planned: int
    top1: ErrorSummary
    top5: ErrorSummary
    source: str
    note: str


def welch_interval(values: Sequence[float], base: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % confidence interval of mean(values) - mean(base) by Welch's t-test (unequal variances).

    Returns None if either sample has fewer than two values, or if both have zero variance.
    """
    sides = (values, base)
    if min(map(len, sides)) < 2:
        return None
    squares = [statistics.variance(side) / len(side) for side in sides]  # squared standard errors
    if not any(squares):
        return None
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy.stats would add a second of import time

    freedom = sum(squares) ** 2 / sum(square**2 / (len(side) - 1) for square, side in zip(squares, sides, strict=True))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(sum(squares))
    difference = statistics.fmean(values) - statistics.fmean(base)
    return difference - half, difference + half


def _error_summary(values: Sequence[float], base: Sequence[float], published: float | None) -> ErrorSummary:
    """Returns the statistics of a variant. `values` and `base` are errors of runs in percent; `base` may be empty."""
    return ErrorSummary(
        mean=statistics.fmean(values) if values else None,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        difference=statistics.fmean(values) - statistics.fmean(base) if values and base else None,
        interval=welch_interval(values, base),
        published=published,
    )


def summarize(sweep: SweepPlan, results: Mapping[str, JsonObject], views: int | None) -> list[Row]:
    """Returns one row per variant, in the order of `sweep`. The rows have errors in percent; `results` has fractions.

    Args:
      sweep: See read_sweep().
      results: See read_results().
      views: Number of views whose errors the table shows, see choose_views().
    """
    planned = {
        variant['name']: [run['directory'] for run in sweep['runs'] if run['variant'] == variant['name']]
        for variant in sweep['variants']
    }
    measured = {
        name: [
            results[directory]['views'][str(views)]
            for directory in directories
            if str(views) in results.get(directory, {'views': {}})['views']
        ]
        for name, directories in planned.items()
    }

    def percent(name: str | None, error: str) -> list[float]:
        return [100 * errors[error] for errors in measured.get(name or '', [])]

    rows = []
    for variant in sweep['variants']:
        name, published = variant['name'], variant['published'] or (None, None)
        base = None if name == sweep['base'] else sweep['base']
        rows.append(
            Row(
                name=name,
                runs_done=len(measured[name]),
                runs_planned=len(planned[name]),
                top1=_error_summary(percent(name, 'top1_error'), percent(base, 'top1_error'), published[0]),
                top5=_error_summary(percent(name, 'top5_error'), percent(base, 'top5_error'), published[1]),
                source=variant['source'],
                note=variant['note'],
            )
        )
    return rows


def as_cells(sweep: SweepPlan, rows: list[Row]) -> list[list[str]]:
    """Returns the cells of the table: a header, then one line per variant. Only a sweep with a base has differences."""
    base = sweep['base']
    header = ['variant', 'runs']
    for kind in ('top-1', 'top-5'):
        header += [f'{kind} error, %']
        if base is not None:
            header += [f'{kind} difference', f'{kind} difference, published']
    lines = [header]
    for row in rows:
        cells = [row.name, f'{row.runs_done}/{row.runs_planned}']
        for figures in (row.top1, row.top5):
            cells += _cells(figures)[: 1 if base is None else 3]
        lines.append(cells)
    return lines


def _cells(figures: ErrorSummary) -> list[str]:
    """Returns the cells for error, difference and published difference."""
    error = '' if figures.mean is None else f'{figures.mean:.2f}'
    if figures.deviation is not None:
        error += f' +- {figures.deviation:.2f}'
    difference = '' if figures.difference is None else f'{figures.difference:+z.2f}'
    if figures.interval is not None:
        difference += ' [{:+z.2f}, {:+z.2f}]'.format(*figures.interval)
    return [error, difference, '' if figures.published is None else f'{figures.published:+z.2f}']


def caption(sweep: SweepPlan, views: int | None) -> str:
    """Returns the caption of the table: config, number of views, and definition of the statistics."""
    errors = f'`{sweep["config"]}`, {views_text(views)}; errors are mean +- sample standard deviation over the runs'
    differences = (
        f'; differences of the means to `{sweep["base"]}` are in percentage points, with at least two runs on either'
        " side [with their 95 % confidence interval by Welch's t]."
    )
    return errors + ('.' if sweep['base'] is None else differences)


def footnotes(sweep: SweepPlan, rows: list[Row]) -> dict[str, list[str]]:
    """Returns the lines of each non-empty section below the table, by title."""
    found = {
        'Sources of the published differences': [
            f'{row.name}: {row.source}' for row in rows if row.source and sweep['base'] is not None
        ],
        'Notes': [f'{row.name}: {row.note}' for row in rows if row.note],
    }
    return {title: lines for title, lines in found.items() if lines}


def as_markdown(sweep: SweepPlan, rows: list[Row], views: int | None, missing: list[str]) -> str:
    """Returns the table as Markdown, followed by the caption, the sources, the notes and the `missing` runs."""
    header, *lines = as_cells(sweep, rows)
    table = [header, ['---', *['--:'] * (len(header) - 1)]]
    table += [[line[0].replace('|', r'\|'), *line[1:]] for line in lines]
    text = [f'| {" | ".join(cells)} |' for cells in table]
    text += ['', caption(sweep, views)]
    for title, listed in footnotes(sweep, rows).items():
        text += ['', f'{title}:', '', *(f'* {line}' for line in listed)]
    if missing:
        text += ['', f'Missing: {", ".join(missing)}']
    return '\n'.join(text) + '\n'


def as_csv(rows: list[Row]) -> str:
    """Returns CSV with one line per variant, in unrounded percent and percentage points. Unknown values are empty."""
    lines = []
    for row in rows:
        line: dict[str, object] = {'variant': row.name, 'runs_done': row.runs_done, 'runs_planned': row.runs_planned}
        for kind, figures in (('top1', row.top1), ('top5', row.top5)):
            low, high = figures.interval or (None, None)
            line |= {
                f'{kind}_error_mean': figures.mean,
                f'{kind}_error_std': figures.deviation,
                f'{kind}_difference': figures.difference,
                f'{kind}_interval_low': low,
                f'{kind}_interval_high': high,
                f'{kind}_published': figures.published,
            }
        lines.append(line | {'source': row.source})
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0] if lines else [], lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
