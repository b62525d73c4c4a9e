"""What the folder of a sweep says: its plan, the results of its runs, and where those stand that are not done."""

import contextlib
import json
import os
from typing import Any

from alexnet_jax.monitor import read_json

# What is read of sweep.json, and its types.
_SWEEP = {'config': str, 'base': str | None, 'variants': list, 'runs': list}
_VARIANT = {'name': str, 'published': list | None, 'source': str, 'note': str}
_RUN = {'variant': str, 'seed': int | None, 'directory': str}


class ReportError(ValueError):
    """There is nothing to report: one line with the cause and what to do."""


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
    wrong = 'is damaged' if os.path.exists(path) else 'is missing'
    raise ReportError(f'{path} {wrong}: run `alexnet train --config=... --sweep=all --workdir={folder}` first')


def _has(value: Any, types: dict[str, Any]) -> bool:
    return isinstance(value, dict) and all(name in value and isinstance(value[name], types[name]) for name in types)


def _are_differences(published: list[Any] | None) -> bool:
    return published is None or (
        len(published) == 2 and all(isinstance(each, float | int | None) for each in published)
    )


def read_results(folder: str, sweep: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The result.json of each finished run of the sweep in `folder`, by the run's directory."""
    found = {run['directory']: read_result(os.path.join(folder, run['directory'])) for run in sweep['runs']}
    return {directory: result for directory, result in found.items() if result}


def read_result(workdir: str) -> dict[str, Any] | None:
    """The result.json of the run in `workdir`; None where it is not done."""
    result = read_json(os.path.join(workdir, 'result.json'))
    return result if result and _is_done(result) else None


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
            state = standing(os.path.join(folder, run['directory']))
        elif str(views) not in result['views']:
            state = f'done, but not with {views_text(views)}'
        else:
            continue
        seed = '' if run['seed'] is None else f' seed {run["seed"]}'
        missing.append(f'{run["variant"]}{seed} ({state})')
    return missing


def standing(workdir: str) -> str:
    """Where the run in `workdir` stands that is not done."""
    path = os.path.join(workdir, 'result.json')
    result = read_json(path)
    if os.path.exists(path) and (result is None or result.get('status') != 'preempted'):
        return 'unreadable result.json'
    step = result.get('step') if result else _last_step(os.path.join(workdir, 'metrics.jsonl'))
    if step is not None:
        return f'at step {step}'
    return 'begun, no step logged' if os.path.isdir(workdir) else 'not begun'


def _last_step(path: str) -> int | None:
    """Of the last whole line of a metrics.jsonl; None where there is none."""
    step = None
    with contextlib.suppress(OSError), open(path, errors='replace') as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the line a killed run was writing
                step = json.loads(line)['step']
    return step


def views_text(views: int | None) -> str:
    """For a reader; None: nothing is measured."""
    return 'no run done' if views is None else f'{views} view{"s" * (views != 1)}'
