"""The report page of a sweep: its table, and the curves, kernels and machines of its runs."""

import json
import os
import shlex
from typing import Any

from alexnet_jax.config import ConfigError
from alexnet_jax.report import html, model_section, run_page
from alexnet_jax.report.run_files import read_metrics
from alexnet_jax.runtime.console import ProgressBar
from alexnet_jax.runtime.files import read_json
from alexnet_jax.sweep.table import Row, as_cells, caption, footnotes


def page(
    folder: str,
    sweep: dict[str, Any],
    results: dict[str, dict[str, Any]],
    rows: list[Row],
    views: int | None,
    missing: list[str],
    made_by: str,
) -> bytes:
    """Returns the page of the sweep in `folder`.

    Args:
      sweep, results, missing: see sweep_results.
      rows: see sweep_table.summarise().
      views: the number of views of the errors in `rows`.
      made_by: the command that is running.
    """
    done, planned = (sum(getattr(row, name) for row in rows) for name in ('runs_done', 'runs_planned'))
    lead = f'A sweep of `{sweep["config"]}`: {len(rows)} variants, {done} of {planned} runs done.'
    command = shlex.join(['alexnet', 'train', f'--config={sweep["config"]}', '--sweep=all', f'--workdir={folder}'])
    sections = [
        html.section('Errors by variant', *_table(sweep, rows, views, missing, command)),
        html.section('What was run', html.command(command), *_overrides(sweep)),
        html.section('Curves', *_curves(folder, sweep, command)),
        html.section('Kernels of conv1', *_kernels(folder, sweep, results, command)),
        html.section('Hardware and versions', *_machines(folder, sweep, command)),
    ]
    return html.document(os.path.basename(os.path.abspath(folder)), lead, sections, made_by)


def _table(sweep: dict[str, Any], rows: list[Row], views: int | None, missing: list[str], command: str) -> list[str]:
    cells = [[cell.replace('+-', '\u00b1') for cell in line] for line in as_cells(sweep, rows)]
    parts = [html.table(cells, 'errors by variant'), html.paragraph(caption(sweep, views).replace('+-', '\u00b1'))]
    if sweep['base'] is not None:
        parts.append(html.paragraph('Published differences are figures of others on their data, not of runs here.'))
    for title, listed in footnotes(sweep, rows).items():
        parts.append(html.subsection(title, html.listing(listed)))
    if missing:
        why = html.paragraph(f'`{command}` runs what is missing:', 'missing')
        parts.append(html.subsection('Missing runs', why, html.listing(missing)))
    return parts


def _overrides(sweep: dict[str, Any]) -> list[str]:
    lines = [['variant', 'settings', 'seeds']]
    for variant in sweep['variants']:
        overrides = variant.get('overrides')
        overrides = overrides if isinstance(overrides, dict) else {}
        settings = [f'`{name}={json.dumps(value)}`' for name, value in overrides.items()]
        seeds = [
            str(run['seed']) for run in sweep['runs'] if run['variant'] == variant['name'] and run['seed'] is not None
        ]
        lines.append([variant['name'], ', '.join(settings), ', '.join(seeds)])
    return [html.table(lines, 'settings of the variants', numbers=False)]


def _curves(folder: str, sweep: dict[str, Any], command: str) -> list[str]:
    read, missing = {}, []
    for run in sweep['runs']:
        try:
            read[run['directory']] = read_metrics(os.path.join(folder, run['directory']))
        except ConfigError as error:
            missing.append(str(error))
    parts = [run_page.curves_section(read)] if read else []
    if missing:
        parts += [html.paragraph(f'Without these runs; `{command}` writes them:', 'missing'), html.listing(missing)]
    return parts


def _kernels(folder: str, sweep: dict[str, Any], results: dict[str, dict[str, Any]], command: str) -> list[str]:
    """Returns the kernels of the first finished run of each variant."""
    first: dict[str, str] = {}
    for run in sweep['runs']:
        if run['directory'] in results:
            first.setdefault(run['variant'], run['directory'])
    parts, missing = [], [f'{row["name"]}: no run is done' for row in sweep['variants'] if row['name'] not in first]
    progress = ProgressBar('kernels', len(first), 'networks')
    for variant, directory in first.items():
        try:
            network = model_section.read_network(os.path.join(folder, directory))
            title = variant if directory == variant else f'{variant} ({directory})'
            parts.append(html.subsection(title, *model_section.kernel_sheets(network)))
        except ConfigError as error:
            missing.append(f'{variant}: {error}')
        progress.update()
    progress.close()
    parts += [model_section.about_kernels()] if parts else []
    if missing:
        why = f'Without these variants, for weights are wanted; `{command}` makes those of runs that are not done:'
        parts += [html.paragraph(why, 'missing'), html.listing(missing)]
    return parts


def _machines(folder: str, sweep: dict[str, Any], command: str) -> list[str]:
    """Returns hardware and versions, grouping runs that have the same ones."""
    together: dict[str, list[str]] = {}
    for run in sweep['runs']:
        found = read_json(os.path.join(folder, run['directory'], 'environment.json')) or {}
        together.setdefault(json.dumps({**found, 'command': None}, sort_keys=True), []).append(run['directory'])
    parts = []
    for text, runs in together.items():
        known = {name: value for name, value in json.loads(text).items() if name != 'command'}
        made_with = run_page.environment_section(known, command)
        title = f'{len(runs)} run{"s" * (len(runs) > 1)}: {", ".join(runs)}'
        parts += [html.subsection(title, *made_with)] if len(together) > 1 else made_with
    return parts
