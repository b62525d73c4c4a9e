"""The table of a sweep: each variant's errors over its seeds, and the differences to the base, measured and published.

    python -m alexnet_jax.report SWEEP_DIR [--views=10] [--markdown=FILE] [--csv=FILE]

Reads SWEEP_DIR/sweep.json and the result.json of its runs, of which some may still be missing; prints Markdown.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from alexnet_jax.command import parse_flags
from alexnet_jax.monitor import complain, read_json, write_aside

# What is read of sweep.json, and its types.
_SWEEP = {'config': str, 'base': str | None, 'variants': list, 'runs': list}
_VARIANT = {'name': str, 'published': list | None, 'source': str, 'note': str}
_RUN = {'variant': str, 'seed': int | None, 'directory': str}


class ReportError(ValueError):
    """There is nothing to report: one line with the cause and what to do."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """One kind of error of a variant; None is what is not known.

    Attributes:
      mean: over the runs, in percent.
      deviation: the sample's standard deviation, in percentage points; not known of one run.
      difference: of the mean to that of the base, in percentage points.
      interval: both ends of the 95 % confidence interval of the difference, see welch_interval().
      published: the published difference, in percentage points.
    """

    mean: float | None
    deviation: float | None
    difference: float | None
    interval: tuple[float, float] | None
    published: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of a sweep. `runs_done` are those that the figures are of, `runs_planned` all; the rest is as given."""

    name: str
    runs_done: int
    runs_planned: int
    top1: Figures
    top5: Figures
    source: str
    note: str


def read_sweep(folder: str) -> dict[str, Any]:
    """What sweep.json in `folder` says. Raises ReportError: there is none, or it is damaged."""
    path = os.path.join(folder, 'sweep.json')
    sweep = read_json(path) or {}
    if (
        _has(sweep, _SWEEP)
        and all(_has(each, _VARIANT) and _are_differences(each['published']) for each in sweep['variants'])
        and all(_has(each, _RUN) for each in sweep['runs'])
    ):
        return sweep
    wrong = f'{path} is damaged' if os.path.exists(path) else f'{folder} has no sweep.json'
    if not os.path.isdir(folder):
        wrong = f'there is no folder {folder}'
    raise ReportError(f'{wrong}: run `python launch.py --config=... --sweep=all --workdir={folder}` first')


def _has(value: Any, types: dict[str, Any]) -> bool:
    return isinstance(value, dict) and all(name in value and isinstance(value[name], types[name]) for name in types)


def _are_differences(published: list[Any] | None) -> bool:
    return published is None or (
        len(published) == 2 and all(isinstance(each, float | int | None) for each in published)
    )


def read_results(folder: str, sweep: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The result.json of each finished run of the sweep in `folder`, by the run's directory."""
    found = {run['directory']: read_json(_result_of(folder, run)) for run in sweep['runs']}
    return {directory: result for directory, result in found.items() if result and _is_done(result)}


def _result_of(folder: str, run: dict[str, Any]) -> str:
    return os.path.join(folder, run['directory'], 'result.json')


def _is_done(result: dict[str, Any]) -> bool:
    """Whether it is the result of a finished run, with errors that can be."""
    try:
        return (
            result['status'] == 'done'
            and any(result['views'])
            and all(
                int(views) > 0 and 0 <= errors['top1_error'] <= 1 and 0 <= errors['top5_error'] <= 1
                for views, errors in result['views'].items()
            )
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def choose_views(results: dict[str, dict[str, Any]], wanted: int | None) -> int | None:
    """`wanted`, or else the largest number of views that all `results` have; None: neither is there.

    Raises ReportError: no result has the wanted views, or without a wish there are none that all have.
    """
    each = [{int(views) for views in result['views']} for result in results.values()]
    if not each:
        return wanted
    known = ', '.join(map(str, sorted(set.union(*each))))
    common = set.union(*each) & {wanted} if wanted else set.intersection(*each)
    if not common:
        raise ReportError(
            f'--views={wanted}: no finished run has so many; there are {known}'
            if wanted
            else f'the finished runs have no number of views in common; choose --views of {known}'
        )
    return max(common)


def missing_runs(
    folder: str, sweep: dict[str, Any], results: dict[str, dict[str, Any]], views: int | None
) -> list[str]:
    """The runs of the sweep in `folder` without a result for `views`, each with where it stands in brackets."""
    missing = []
    for run in sweep['runs']:
        result = results.get(run['directory'])
        if result is None:
            state = _state(folder, run)
        elif str(views) not in result['views']:
            state = f'done, but not with {_views_text(views)}'
        else:
            continue
        seed = '' if run['seed'] is None else f' seed {run["seed"]}'
        missing.append(f'{run["variant"]}{seed} ({state})')
    return missing


def _state(folder: str, run: dict[str, Any]) -> str:
    """Where a run stands that is not done."""
    path = _result_of(folder, run)
    result = read_json(path)
    if os.path.exists(path) and (result is None or result.get('status') != 'preempted'):
        return 'unreadable result.json'
    step = result.get('step') if result else _last_step(os.path.join(folder, run['directory'], 'metrics.jsonl'))
    if step is not None:
        return f'at step {step}'
    return 'begun, no step logged' if os.path.isdir(os.path.dirname(path)) else 'not begun'


def _last_step(path: str) -> int | None:
    """Of the last whole line of a metrics.jsonl; None where there is none."""
    step = None
    with contextlib.suppress(OSError), open(path, errors='replace') as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the line a killed run was writing
                step = json.loads(line)['step']
    return step


def welch_interval(values: Sequence[float], base: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of mean(values) - mean(base), by Welch's t: the variances need not be equal.

    None where a side has fewer than two values, or neither has any spread.
    """
    sides = (values, base)
    if min(map(len, sides)) < 2:
        return None
    squares = [statistics.variance(side) / len(side) for side in sides]  # standard errors, squared
    if not any(squares):
        return None
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy.stats takes a second more to import

    freedom = sum(squares) ** 2 / sum(square**2 / (len(side) - 1) for square, side in zip(squares, sides, strict=True))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(sum(squares))
    difference = statistics.fmean(values) - statistics.fmean(base)
    return difference - half, difference + half


def _figures(values: Sequence[float], base: Sequence[float], published: float | None) -> Figures:
    """Of the errors of a variant's and of the base's runs, in percent; an empty base gives no difference."""
    return Figures(
        mean=statistics.fmean(values) if values else None,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        difference=statistics.fmean(values) - statistics.fmean(base) if values and base else None,
        interval=welch_interval(values, base),
        published=published,
    )


def summarise(sweep: dict[str, Any], results: dict[str, dict[str, Any]], views: int | None) -> list[Row]:
    """One row a variant, in the order of `sweep`; errors, 0 to 1 in `results`, are in percent in the rows.

    Args:
      sweep: see read_sweep().
      results: see read_results().
      views: whose errors; see choose_views().
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
                top1=_figures(percent(name, 'top1_error'), percent(base, 'top1_error'), published[0]),
                top5=_figures(percent(name, 'top5_error'), percent(base, 'top5_error'), published[1]),
                source=variant['source'],
                note=variant['note'],
            )
        )
    return rows


def as_markdown(sweep: dict[str, Any], rows: list[Row], views: int | None, missing: list[str]) -> str:
    """The table for a reader, and below it what it is of, the sources, the notes and the `missing` runs."""
    base = sweep['base']
    header = ['variant', 'runs']
    for kind in ('top-1', 'top-5'):
        header += [f'{kind} error, %']
        if base is not None:
            header += [f'{kind} difference', f'{kind} difference, published']
    lines = [header, ['---', *['--:'] * (len(header) - 1)]]
    for row in rows:
        cells = [row.name.replace('|', r'\|'), f'{row.runs_done}/{row.runs_planned}']
        for figures in (row.top1, row.top5):
            cells += _cells(figures)[: 1 if base is None else 3]
        lines.append(cells)
    text = [f'| {" | ".join(cells)} |' for cells in lines]
    errors = f'`{sweep["config"]}`, {_views_text(views)}; errors are mean +- sample standard deviation over the runs'
    differences = (
        f'; differences of the means to `{base}` are in percentage points, with two runs or more on either side'
        " [with their 95 % confidence interval by Welch's t]."
    )
    text += ['', errors + ('.' if base is None else differences)]
    sources = [f'* {row.name}: {row.source}' for row in rows if row.source and base is not None]
    notes = [f'* {row.name}: {row.note}' for row in rows if row.note]
    for title, listed in (('Sources of the published differences:', sources), ('Notes:', notes)):
        text += ['', title, '', *listed] if listed else []
    if missing:
        text += ['', f'Missing: {", ".join(missing)}']
    return '\n'.join(text) + '\n'


def _views_text(views: int | None) -> str:
    return 'no run done' if views is None else f'{views} view{"s" * (views != 1)}'


def _cells(figures: Figures) -> list[str]:
    """Error, difference, published difference."""
    error = '' if figures.mean is None else f'{figures.mean:.2f}'
    if figures.deviation is not None:
        error += f' +- {figures.deviation:.2f}'
    difference = '' if figures.difference is None else f'{figures.difference:+z.2f}'
    if figures.interval is not None:
        difference += ' [{:+z.2f}, {:+z.2f}]'.format(*figures.interval)
    return [error, difference, '' if figures.published is None else f'{figures.published:+z.2f}']


def as_csv(rows: list[Row]) -> str:
    """A line a variant, under a line of names: percent and percentage points, not rounded, empty where not known."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {'variant': row.name, 'runs_done': row.runs_done, 'runs_planned': row.runs_planned}
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


def _write(flag: str, text: str) -> None:
    """Write `text` to the file that the flag names, if any, whole or not at all. Raises ReportError."""
    path = flags.FLAGS[flag].value
    if path is None:
        return
    path = os.path.expanduser(path)
    try:
        with write_aside(path) as file:
            file.write(text)
    except OSError as error:
        raise ReportError(f'--{flag}: {path} cannot be written: {error.strerror}') from None


def main(argv: list[str]) -> int:
    """Report the sweep in the folder argv[1]; returns the exit code, 2 after one line on what is wrong."""
    folder = argv[1]
    try:
        sweep = read_sweep(folder)
        results = read_results(folder, sweep)
        views = choose_views(results, flags.FLAGS.views)
        rows = summarise(sweep, results, views)
        text = as_markdown(sweep, rows, views, missing_runs(folder, sweep, results, views))
        _write('markdown', text)
        _write('csv', as_csv(rows))
    except ReportError as error:
        complain(str(error))
        return 2
    print(text, end='')
    return 0


if __name__ == '__main__':
    flags.DEFINE_integer('views', None, 'Whose errors; by default the most that all results have.', lower_bound=1)
    flags.DEFINE_string('markdown', None, 'File to write the table to as well.')
    flags.DEFINE_string('csv', None, 'File to write the figures to, not rounded.')
    wanted = 'which sweep? Name its folder: python -m alexnet_jax.report SWEEP_DIR'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, most=1))
