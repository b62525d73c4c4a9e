"""Reads the folder of a sweep: its plan, the results of its finished runs, and the progress of its other runs."""

import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import NotRequired, TypedDict, cast

from alexnet_jax.runtime.files import JsonObject, read_json, read_json_lines
from alexnet_jax.runtime.workdir import read_result_json

# Fields read from sweep.json, with their types.
_SWEEP = {'config': str, 'base': str | None, 'variants': list, 'runs': list}
_VARIANT = {'name': str, 'published': list | None, 'source': str, 'note': str}
_RUN = {'variant': str, 'seed': int | None, 'directory': str}


class PlannedVariant(TypedDict):
    """A variant in sweep.json, see sweep.Variant. Files of version 0.1 have no overrides."""

    name: str
    overrides: NotRequired[dict[str, object]]
    published: Sequence[float | None] | None
    source: str
    note: str


class PlannedRun(TypedDict):
    """A run in sweep.json; `directory` is relative to the folder of the sweep."""

    variant: str
    seed: int | None
    directory: str
    overrides: NotRequired[dict[str, object]]


class SweepPlan(TypedDict):
    """The content of sweep.json. `base` is the name of the variant to which the others are compared."""

    config: str
    base: str | None
    variants: list[PlannedVariant]
    runs: list[PlannedRun]


class ReportError(ValueError):
    """The report cannot be made. The message is one line with the cause and the remedy."""


def read_sweep(folder: str) -> SweepPlan:
    """Returns the content of sweep.json in `folder`. Raises ReportError: the file is missing or corrupt."""
    path = os.path.join(folder, 'sweep.json')
    sweep = read_json(path) or {}
    if (
        _has(sweep, _SWEEP)
        and all(_has(each, _VARIANT) and _are_differences(each['published']) for each in sweep['variants'])
        and all(_has(each, _RUN) for each in sweep['runs'])
    ):
        return cast(SweepPlan, sweep)
    wrong = 'is corrupt' if os.path.exists(path) else 'is missing'
    workdir = shlex.quote(os.path.abspath(folder))
    raise ReportError(f'{path} {wrong}: run `alexnet train --config=... --sweep=all --workdir={workdir}` first')


def _has(value: object, types: Mapping[str, type | UnionType]) -> bool:
    return isinstance(value, dict) and all(name in value and isinstance(value[name], types[name]) for name in types)


def _are_differences(published: list[object] | None) -> bool:
    return published is None or (
        len(published) == 2 and all(isinstance(each, float | int | None) for each in published)
    )


def read_results(folder: str, sweep: SweepPlan) -> dict[str, JsonObject]:
    """Returns the result.json of each finished run of the sweep in `folder`, keyed by the directory of the run."""
    found = {run['directory']: read_result(os.path.join(folder, run['directory'])) for run in sweep['runs']}
    return {directory: result for directory, result in found.items() if result}


def read_result(workdir: str) -> JsonObject | None:
    """Returns the result.json of the run in `workdir`, or None if the run is not finished."""
    result = read_result_json(workdir)
    return result if result and _is_done(result) else None


def _is_done(result: JsonObject) -> bool:
    """Returns whether `result` is from a finished run and has error rates between 0 and 1."""
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


def choose_views(results: Mapping[str, JsonObject], wanted: int | None) -> int | None:
    """Returns `wanted` or, if it is None, the largest number of views that all `results` have in common.

    Returns `wanted` unchanged if there are no `results`.

    Raises ReportError: no result has `wanted` views, or `wanted` is None and no number of views is common to all.
    """
    each = [{int(views) for views in result['views']} for result in results.values()]
    if not each:
        return wanted
    known = ', '.join(map(str, sorted(set.union(*each))))
    common = set.union(*each) & {wanted} if wanted else set.intersection(*each)
    if not common:
        raise ReportError(
            f'--views={wanted}: no finished run has this number of views; the runs have {known}'
            if wanted
            else f'the finished runs have no number of views in common; choose --views of {known}'
        )
    return max(common)


def missing_runs(folder: str, sweep: SweepPlan, results: Mapping[str, JsonObject], views: int | None) -> list[str]:
    """Returns the runs of the sweep in `folder` without a result for `views`, each with its state in parentheses."""
    missing = []
    for run in sweep['runs']:
        result = results.get(run['directory'])
        if result is None:
            state = run_status(os.path.join(folder, run['directory']))
        elif str(views) not in result['views']:
            state = f'done, but not with {views_text(views)}'
        else:
            continue
        seed = '' if run['seed'] is None else f' seed {run["seed"]}'
        missing.append(f'{run["variant"]}{seed} ({state})')
    return missing


def run_status(workdir: str) -> str:
    """Returns the progress of the unfinished run in `workdir`, as text."""
    path = os.path.join(workdir, 'result.json')
    result = read_json(path)
    if os.path.exists(path) and (result is None or result.get('status') != 'preempted'):
        return 'unreadable result.json'
    step = result.get('step') if result else _last_step(os.path.join(workdir, 'metrics.jsonl'))
    if step is not None:
        return f'at step {step}'
    return 'started, no step logged' if os.path.isdir(workdir) else 'not started'


def _last_step(path: str) -> int | None:
    """Returns the step of the last complete line of a metrics.jsonl, or None if there is no such line."""
    with contextlib.suppress(OSError):
        return next((line['step'] for line in reversed(read_json_lines(path)) if 'step' in line), None)
    return None


def views_text(views: int | None) -> str:
    """Returns the number of views as text; None stands for a sweep without results."""
    return 'no run done' if views is None else f'{views} view{"s" * (views != 1)}'
