"""Reads the files in a run's workdir, even if some are missing or corrupt."""

import contextlib
import dataclasses
import json
import os
import shlex
from typing import Any

import numpy as np

from alexnet_jax.config import ConfigError
from alexnet_jax.plots import curves
from alexnet_jax.runtime.files import read_json
from alexnet_jax.runtime.workdir import read_config, read_dataset_statistics, read_result_json
from alexnet_jax.sweep.results import read_result, run_status, views_text


@dataclasses.dataclass(frozen=True)
class Run:
    """Contents of a run's files; missing or corrupt ones are empty.

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
    config: Any
    config_problem: str
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    metrics_problem: str
    environment: dict[str, Any]
    class_names: list[str]
    examples: int
    inputs_problem: str

    @property
    def name(self) -> str:
        """The name of the folder."""
        return os.path.basename(os.path.abspath(self.workdir))

    @property
    def command(self) -> str:
        """The command that trains in the workdir, as it was given or, if unknown, with placeholders."""
        given = self.environment.get('command')
        if isinstance(given, list) and given and all(isinstance(part, str) for part in given):
            return shlex.join(['alexnet', 'train', *given[1:]])
        return f'alexnet train --config=... --workdir={shlex.quote(self.workdir)}'

    @property
    def state(self) -> str:
        """Whether the run is done, and its current step."""
        step = number(self.result.get('step'))
        if self.class_names and not (self.metrics or self.environment or self.result):
            return 'weights from elsewhere, which were not trained here'
        if read_result(self.workdir) and step is not None:
            return f'done at step {step:,.0f}'
        if self.result.get('status') == 'preempted':
            return f'preempted, {run_status(self.workdir)}'
        return f'not done: {run_status(self.workdir)}'


def read_run(workdir: str) -> Run:
    """Reads the files in `workdir`."""
    config, metrics, class_names, examples = None, [], list[str](), 0
    config_problem = metrics_problem = inputs_problem = ''
    try:
        config = read_config(workdir)
    except ConfigError as error:
        config_problem = str(error)
    try:
        metrics = read_metrics(workdir)
    except ConfigError as error:
        metrics_problem = str(error)
    try:
        statistics, class_names = read_dataset_statistics(workdir)
        examples = int(statistics.get('class_counts', np.zeros(0)).sum())
    except ConfigError as error:
        inputs_problem = str(error)
    result, environment = read_result_json(workdir) or {}, read_json(os.path.join(workdir, 'environment.json')) or {}
    return Run(
        workdir=workdir,
        config=config,
        config_problem=config_problem,
        result=result,
        metrics=metrics,
        metrics_problem=metrics_problem,
        environment=environment,
        class_names=class_names,
        examples=examples,
        inputs_problem=inputs_problem,
    )


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl with a valid step. Raises ConfigError: there are none."""
    lines = []
    with contextlib.suppress(ConfigError):
        lines = [line for line in curves.read_metrics(workdir) if number(line['step']) is not None]
    if not lines:
        raise ConfigError(f'{os.path.join(workdir, "metrics.jsonl")} is missing or has no line that can be read')
    return lines


def number(value: Any) -> float | None:
    """Returns `value` if it is a finite number, otherwise None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e300 else None


def percent(value: Any) -> str:
    """Formats a fraction from 0 to 1 as a percentage; '' if it is not a number."""
    known = number(value)
    return '' if known is None else f'{100 * known:.2f} %'


def errors_of(run: Run) -> list[list[str]]:
    """Returns [run, views, loss, top-1 error, top-5 error, images] of each final evaluation, else of the latest."""
    views = run.result.get('views')
    found = [(name, values) for name, values in (views if isinstance(views, dict) else {}).items() if values]
    what = 'this run'
    if not found:
        on_the_way = [line for line in run.metrics if line['split'] == 'validation']
        found = [('1', line) for line in on_the_way[-1:]]
        what = f'this run, step {on_the_way[-1]["step"]:,}' if on_the_way else ''
    lines = []
    for name, values in found:
        if isinstance(values, dict):
            loss, images = number(values.get('loss')), number(values.get('examples'))
            errors = [percent(values.get('top1_error')), percent(values.get('top5_error'))]
            cells = ['' if loss is None else f'{loss:.4f}', *errors, '' if images is None else f'{images:,.0f}']
            lines.append([what, str(name), *cells])
    return lines


def summary(run: Run) -> str:
    """Describes the run for a terminal."""
    lines = [f'{run.workdir}: {run.state}']
    for _, views, loss, top1, top5, _ in errors_of(run):
        lines.append(f'  {views_of(views):<8}  loss {loss}  top-1 error {top1}  top-5 error {top5}')
    return '\n'.join(lines) + '\n'


def views_of(text: str) -> str:
    """Returns a readable name for a key of `views` in result.json."""
    return views_text(int(text)) if text.isdecimal() else text


def read_layers(path: str) -> dict[str, Any]:
    """Returns the last complete line of a layers.jsonl; {} if there is none."""
    last: dict[str, Any] = {}
    with contextlib.suppress(OSError), open(path, errors='replace') as file:
        for text in file:
            with contextlib.suppress(ValueError):  # the last line of a killed run may be incomplete
                line = json.loads(text)
                last = line if isinstance(line, dict) else last
    return last
