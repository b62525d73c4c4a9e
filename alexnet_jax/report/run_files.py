"""Reads the files of a run or of a sweep, even if some are missing or corrupt."""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from alexnet_jax.config import Config, ConfigError
from alexnet_jax.runtime.files import JsonObject, read_json, read_json_lines
from alexnet_jax.runtime.workdir import read_config, read_dataset_statistics, read_result_json
from alexnet_jax.sweep import results as sweep_results
from alexnet_jax.sweep.table import Row, summarize

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Run:
    """Contents of a run's files. Contents of missing or corrupt files are empty.

    Attributes:
      workdir: the folder of the run.
      config: the resolved configuration, or None with the reason in `config_problem`.
      result: result.json.
      metrics: see read_metrics(), or [] with the reason in `metrics_problem`.
      environment: environment.json.
      class_names: class names of the data, or [] with the reason in `inputs_problem`.
      examples: number of training images, or 0 with the reason in `inputs_problem`.
    """

    workdir: str
    config: Config | None
    config_problem: str
    result: JsonObject
    metrics: list[JsonObject]
    metrics_problem: str
    environment: JsonObject
    class_names: list[str]
    examples: int
    inputs_problem: str

    @property
    def name(self) -> str:
        """The name of the folder."""
        return os.path.basename(os.path.abspath(self.workdir))

    @property
    def train_command(self) -> str:
        """The command that trains in the workdir: the original one or, if unknown, one with placeholders."""
        given = self.environment.get('command')
        if isinstance(given, list) and given and all(isinstance(part, str) for part in given):
            folder = self.environment.get('folder')
            where = f'cd {shlex.quote(folder)} && ' if isinstance(folder, str) else ''  # for relative paths
            # Of a repeated flag the last value counts.
            return where + shlex.join(['alexnet', 'train', *given[1:], f'--workdir={os.path.abspath(self.workdir)}'])
        return f'alexnet train --config=... --workdir={shlex.quote(os.path.abspath(self.workdir))}'

    @property
    def state(self) -> str:
        """Whether the run is done, and its current step."""
        step = number(self.result.get('step'))
        if self.class_names and not (self.metrics or self.environment or self.result):
            return 'imported weights that were not trained here'
        if sweep_results.read_result(self.workdir) and step is not None:
            return f'done at step {step:,.0f}'
        if self.result.get('status') == 'preempted':
            return f'preempted, {sweep_results.run_status(self.workdir)}'
        return f'not done: {sweep_results.run_status(self.workdir)}'

    @property
    def headline(self) -> str:
        """The state and the errors in a paragraph."""
        text = f'{self.state[0].upper()}{self.state[1:]}.'
        for _, views, _, top1, top5, _ in errors_of(self)[-1:]:
            text += f' Validation: top-1 error {top1}, top-5 error {top5} with {views_of(views)}.'
        return text


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Contents of a sweep's files. The functions that load_sweep() calls describe the attributes."""

    folder: str
    plan: sweep_results.SweepPlan
    results: dict[str, JsonObject]
    views: int | None
    rows: list[Row]
    missing: list[str]


def load_sweep(folder: str, views: int | None) -> Sweep:
    """Reads the sweep in `folder`. Raises ReportError: sweep.json is missing or corrupt, or no run has `views`."""
    plan = sweep_results.read_sweep(folder)
    results = sweep_results.read_results(folder, plan)
    views = sweep_results.choose_views(results, views)
    rows, missing = summarize(plan, results, views), sweep_results.missing_runs(folder, plan, results, views)
    return Sweep(folder, plan, results, views, rows, missing)


def read_run(workdir: str) -> Run:
    """Reads the files in `workdir`."""
    nothing: tuple[dict[str, np.ndarray], list[str]] = ({}, [])
    config, no_config = _attempt(read_config, workdir, None)
    metrics, no_metrics = _attempt(read_metrics, workdir, list[JsonObject]())
    (statistics, class_names), no_inputs = _attempt(read_dataset_statistics, workdir, nothing)
    examples = int(statistics.get('class_counts', np.zeros(0)).sum())
    result, environment = read_result_json(workdir) or {}, read_json(os.path.join(workdir, 'environment.json')) or {}
    return Run(workdir, config, no_config, result, metrics, no_metrics, environment, class_names, examples, no_inputs)


def _attempt(read: Callable[[str], T], workdir: str, default: T) -> tuple[T, str]:
    """Returns (content, '') or, if the file cannot be read, (`default`, reason)."""
    try:
        return read(workdir), ''
    except ConfigError as error:
        return default, str(error)


def read_metrics(workdir: str) -> list[JsonObject]:
    """Returns the lines of metrics.jsonl with a valid step. Raises ConfigError: no line has one."""
    from alexnet_jax.plots import curves  # imports matplotlib, which takes a second

    lines = []
    with contextlib.suppress(ConfigError):
        lines = [line for line in curves.read_metrics(workdir) if number(line['step']) is not None]
    if not lines:
        raise ConfigError(f'{os.path.join(workdir, "metrics.jsonl")} is missing or has no readable line')
    return lines


def number(value: object) -> float | None:
    """Returns `value` if it is a finite number, otherwise None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return value
    return None


def percent(value: object) -> str:
    """Formats a fraction from 0 to 1 as a percentage; '' if it is not a number."""
    known = number(value)
    return '' if known is None else f'{100 * known:.2f} %'


def errors_of(run: Run) -> list[list[str]]:
    """Returns [run, views, loss, top-1 error, top-5 error, images] of all final or of the latest evaluation."""
    views = run.result.get('views')
    found = [(name, values) for name, values in (views if isinstance(views, dict) else {}).items() if values]
    name_of_row = 'this run'
    if not found:
        found = [('1', line) for line in run.metrics if line['split'] == 'validation'][-1:]
        name_of_row = f'this run, step {found[0][1]["step"]:,}' if found else ''
    lines = []
    for name, values in found:
        if isinstance(values, dict):
            loss, images = number(values.get('loss')), number(values.get('examples'))
            errors = [percent(values.get('top1_error')), percent(values.get('top5_error'))]
            cells = ['' if loss is None else f'{loss:.4f}', *errors, '' if images is None else f'{images:,.0f}']
            lines.append([name_of_row, str(name), *cells])
    return lines


def summary(run: Run) -> str:
    """Returns the state and the errors of the run as text."""
    lines = [f'{run.workdir}: {run.state}']
    for _, views, loss, top1, top5, _ in errors_of(run):
        lines.append(f'  {views_of(views):<8}  loss {loss}  top-1 error {top1}  top-5 error {top5}')
    return '\n'.join(lines) + '\n'


def views_of(text: str) -> str:
    """Returns a readable name for a key of `views` in result.json."""
    return sweep_results.views_text(int(text)) if text in ('1', '10') else text[:20]


def read_layers(path: str) -> JsonObject:
    """Returns the last complete line of a layers.jsonl; {} if there is none."""
    with contextlib.suppress(OSError):
        return [{}, *read_json_lines(path)][-1]
    return {}
