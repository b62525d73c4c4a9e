"""The report page of a run or of a sweep: the content of each section, and the reasons for missing content."""

import json
import os
import shlex

from alexnet_jax.config import ConfigError
from alexnet_jax.plots import curves, network, style
from alexnet_jax.report import model_section
from alexnet_jax.report.blocks import Block, Figure, Section, Table, png_picture, render
from alexnet_jax.report.config_diff import differences, length, published
from alexnet_jax.report.evaluations import evaluation_sections
from alexnet_jax.report.run_files import Run, Sweep, errors_of, number, percent, read_layers, read_metrics, read_run
from alexnet_jax.runtime.console import ProgressBar
from alexnet_jax.runtime.files import JsonObject, read_json
from alexnet_jax.runtime.workdir import CheckpointError
from alexnet_jax.sweep.results import read_result, run_status
from alexnet_jax.sweep.table import as_cells, caption, footnotes

_DPI = 200  # of the drawings
_MAX_NAMES = 20  # classes listed by name
# By key of result.json.
_EVENTS = {
    'stalled_step': 'The loss stalled',
    'target_step': 'The training error reached its target',
    'plateau_step': 'The validation error stopped improving after the last decay, which ended the run',
}
_NOT_FACTS = ('versions', 'command', 'folder')  # keys of environment.json that the page shows differently


def run_page(
    workdir: str, data_dir: str | None, neighbors: bool, command: str, prepared_dir: str | None = None
) -> bytes:
    """Returns the page of the run in `workdir`. `command` is the running command. See model_sections()."""
    run = read_run(workdir)
    no_metrics = f'{run.metrics_problem}. `{run.train_command}` writes a line every `train.log_every`.'
    sections: list[Section] = [
        ('What was run', config_section(run)),
        ('Result', _result_section(run)),
        *evaluation_sections(workdir),
        ('Curves', [_curves({run.name: run.metrics}) if run.metrics else ('missing', no_metrics)]),
        *model_section.model_sections(workdir, run.train_command, data_dir, neighbors, prepared_dir),
        ('Layers', _layer_section(run)),
        ('Throughput', _throughput_section(run)),
        ('Hardware and versions', environment_section(run.environment, run.train_command)),
    ]
    return render(run.name, run.headline, sections, command)


def config_section(run: Run) -> list[Block]:
    """Returns the training command, the settings, and a diagram of the network."""
    if run.config is None:
        why = f'{run.config_problem}. The settings are unknown; `{run.train_command}` writes config.json.'
        return [('command', run.train_command), ('missing', why)]
    config, data = run.config, run.config.data
    more = f' and {len(run.class_names) - _MAX_NAMES:,} more' if len(run.class_names) > _MAX_NAMES else ''
    facts = {
        'preset': f'`{config.model.preset}`',
        'data': f'`{data.source}`, {config.model.num_classes:,} classes; images of {data.image_size} x'
        f' {data.image_size} pixels, cropped to {data.crop_size} x {data.crop_size}',
        'classes': ', '.join(run.class_names[:_MAX_NAMES]) + more,
        'length': length(config, run.examples),
        'seed': str(config.seed),
    }
    blocks: list[Block] = [('command', run.train_command), ('facts', facts)]
    if run.inputs_problem:
        blocks.append(('missing', f'The class names and the number of images are unknown: {run.inputs_problem}.'))
    if changed := differences(config):
        blocks.append(('text', f'These settings differ from the preset `{config.model.preset}`:'))
        header = ['setting', 'preset', 'this run']
        blocks.append(('table', Table('settings that differ from the preset', header, changed, numeric=False)))
    else:
        blocks.append(('text', f'All settings are those of the preset `{config.model.preset}`.'))
    drawing = style.as_png(network.draw(config.model, data.crop_size, data.channels, run.name), _DPI)
    about = 'The network, drawn as in figure 2 of the paper. Boxes are feature maps and units; each row is a tower.'
    picture = png_picture(drawing, 'diagram of the network and its layers')
    return [*blocks, ('figure', Figure(picture, about, wide=True))]


def _result_section(run: Run) -> list[Block]:
    """Returns the validation errors, and the published errors if they are comparable."""
    rows, blocks = errors_of(run), list[Block]()
    if not rows:
        why = f'No validation errors: {run_status(run.workdir)}. `{run.train_command}` computes them after training.'
        blocks.append(('missing', why))
    elif not read_result(run.workdir):
        blocks.append(('missing', f'The run is {run.state}. These are the errors of its latest evaluation.'))
    published_row, remark = published(run.config) if run.config else ([], '')
    if published_row:
        rows.append(published_row)
    if rows:
        header = ['', 'views', 'loss', 'top-1 error', 'top-5 error', 'images']
        blocks.append(('table', Table('errors', header, rows, published=bool(published_row))))
    if remark:
        blocks.append(('text', remark))
    for name, event in _EVENTS.items():
        if (step := number(run.result.get(name))) is not None:
            blocks.append(('text', f'{event} at step {step:,.0f}.'))
    if corrupt := number(run.result.get('corrupt_records')):
        blocks.append(('text', f'{corrupt:,.0f} corrupt records of the data set were skipped.'))
    return blocks


def _curves(runs: dict[str, list[JsonObject]]) -> Block:
    """Draws the curves of `runs`, which has results of read_metrics() by name."""
    about = 'Loss and errors on the training batches and on all validation images (one view), and the learning rate.'
    alt = 'curves of loss, top-1 error, top-5 error and learning rate by step'
    return 'figure', Figure(png_picture(style.as_png(curves.draw(runs), _DPI), alt), about, wide=True)


def _layer_section(run: Run) -> list[Block]:
    """Returns the last line of layers.jsonl as a table."""
    path = os.path.join(run.workdir, 'layers.jsonl')
    last = read_layers(path)
    layers = {name: values for name, values in last.items() if isinstance(values, dict)}
    if not layers:
        why = f'{path} is missing or has no readable line. `{run.train_command}` writes a line at each evaluation.'
        return [('missing', why)]
    header = ['layer', 'mean |weight|', 'update / weight', 'mean |bias|', 'update / bias', 'dead units']
    rows = []
    for name, values in layers.items():
        cells = []
        for kind in ('kernel', 'bias'):
            size, update = number(values.get(kind)), number(values.get(f'{kind}_update'))
            cells.append('' if size is None else f'{size:.3g}')
            cells.append(f'{update / size:.1e}' if size and update is not None else '')
        rows.append([name, *cells, percent(values.get('dead'))])
    step = number(last.get('step'))
    about = (
        f'{"" if step is None else f"At step {step:,.0f}: "}mean absolute values, and the ratio of the last update to'
        ' them. A dead unit is 0 for all images of a batch; in a convolution, a unit is a feature map.'
    )
    return [('table', Table('weights, updates and dead units by layer', header, rows)), ('remark', about)]


def _throughput_section(run: Run) -> list[Block]:
    """Returns the training time and the images/s."""
    lines = [line for line in run.metrics if line['split'] == 'train']
    rates = [number(line.get('images_per_second')) for line in lines]
    rate = number(run.result.get('images_per_second')) or next((each for each in reversed(rates) if each), None)
    if not rate:
        why = f'The throughput is unknown: {run_status(run.workdir)}. `{run.train_command}` measures it.'
        return [('missing', why)]
    waits = [wait for line in lines if (wait := number(line.get('input_wait'))) is not None]
    facts = {'training': f'{rate:,.1f} images/s'}
    step = number(run.result.get('step')) or (lines[-1]['step'] if lines else None)
    if step and run.config is not None:
        images = step * run.config.train.batch_size
        facts['time'] = f'{_duration(images / rate)} for {images:,.0f} images at this rate, without evaluations'
    if waits:
        facts['input wait'] = f'{percent(sum(waits) / len(waits))} of the time'
    return [('facts', facts)]


def _duration(seconds: float) -> str:
    for unit, size in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.1f} seconds'


def environment_section(environment: JsonObject, train_command: str) -> list[Block]:
    """Returns hardware and versions from environment.json."""
    if not environment:
        why = f'environment.json is missing or corrupt. `{train_command}` writes it when training starts or resumes.'
        return [('missing', why)]
    versions = environment.get('versions')
    facts = {name.replace('_', ' '): str(value) for name, value in environment.items() if name not in _NOT_FACTS}
    if isinstance(versions, dict):
        facts['versions'] = ', '.join(f'{name} {version}' for name, version in versions.items())
    return [('facts', facts)]


def sweep_page(sweep: Sweep, command: str) -> bytes:
    """Returns the page of `sweep`. `command` is the running command."""
    done, planned = (sum(getattr(row, name) for row in sweep.rows) for name in ('runs_done', 'runs_planned'))
    config = sweep.plan['config']
    lead = f'A sweep of `{config}`: {len(sweep.rows)} variants, {done} of {planned} runs done.'
    train = shlex.join(
        ['alexnet', 'train', f'--config={config}', '--sweep=all', f'--workdir={os.path.abspath(sweep.folder)}']
    )
    sections: list[Section] = [
        ('Errors by variant', _variant_errors(sweep, train)),
        ('What was run', [('command', train), _variant_settings(sweep)]),
        ('Curves', _sweep_curves(sweep, train)),
        ('Kernels of conv1', _sweep_kernels(sweep, train)),
        ('Hardware and versions', _sweep_environments(sweep, train)),
    ]
    return render(os.path.basename(os.path.abspath(sweep.folder)), lead, sections, command)


def _variant_errors(sweep: Sweep, train_command: str) -> list[Block]:
    header, *rows = [[cell.replace('+-', '±') for cell in line] for line in as_cells(sweep.plan, sweep.rows)]
    about = caption(sweep.plan, sweep.views).replace('+-', '±')
    blocks: list[Block] = [('table', Table('errors by variant', header, rows)), ('text', about)]
    if sweep.plan['base'] is not None:
        blocks.append(('text', 'The published differences were measured by others on their own data.'))
    for title, lines in footnotes(sweep.plan, sweep.rows).items():
        blocks += [('heading', title), ('list', lines)]
    if sweep.missing:
        why = f'`{train_command}` trains the missing runs:'
        blocks += [('heading', 'Missing runs'), ('missing', why), ('list', sweep.missing)]
    return blocks


def _variant_settings(sweep: Sweep) -> Block:
    rows = []
    for variant in sweep.plan['variants']:
        overrides = variant.get('overrides')
        named = overrides.items() if isinstance(overrides, dict) else ()
        settings = ', '.join(f'`{name}={json.dumps(value)}`' for name, value in named)
        seeds = [run['seed'] for run in sweep.plan['runs'] if run['variant'] == variant['name']]
        rows.append([variant['name'], settings, ', '.join(str(seed) for seed in seeds if seed is not None)])
    return 'table', Table('settings of the variants', ['variant', 'settings', 'seeds'], rows, numeric=False)


def _sweep_curves(sweep: Sweep, train_command: str) -> list[Block]:
    read, missing = {}, []
    for run in sweep.plan['runs']:
        try:
            read[run['directory']] = read_metrics(os.path.join(sweep.folder, run['directory']))
        except ConfigError as error:
            missing.append(str(error))
    blocks: list[Block] = [_curves(read)] if read else []
    if missing:
        blocks += [('missing', f'These runs have no curves; `{train_command}` trains them:'), ('list', missing)]
    return blocks


def _sweep_kernels(sweep: Sweep, train_command: str) -> list[Block]:
    """Returns the kernels of the first finished run of each variant."""
    first: dict[str, str] = {}
    for run in sweep.plan['runs']:
        if run['directory'] in sweep.results:
            first.setdefault(run['variant'], run['directory'])
    names = [variant['name'] for variant in sweep.plan['variants']]
    blocks, missing = list[Block](), [f'{name}: no run is done' for name in names if name not in first]
    progress = ProgressBar('kernels', len(first), 'networks')
    for variant, directory in first.items():
        try:
            trained = model_section.read_network(os.path.join(sweep.folder, directory))
            title = variant if directory == variant else f'{variant} ({directory})'
            blocks += [('heading', title), *model_section.kernel_figures(trained)]
        except (ConfigError, CheckpointError) as error:
            missing.append(f'{variant}: {error}')
        progress.update()
    progress.close()
    if blocks:
        blocks.append(model_section.ABOUT_KERNELS)
    if missing:
        why = f'The weights of these variants are missing; `{train_command}` trains the runs that are not done:'
        blocks += [('missing', why), ('list', missing)]
    return blocks


def _sweep_environments(sweep: Sweep, train_command: str) -> list[Block]:
    """Returns hardware and versions, once for all runs with equal ones."""
    runs_of: dict[str, list[str]] = {}
    for run in sweep.plan['runs']:
        found = read_json(os.path.join(sweep.folder, run['directory'], 'environment.json')) or {}
        found.pop('command', None)
        runs_of.setdefault(json.dumps(found, sort_keys=True), []).append(run['directory'])
    blocks = list[Block]()
    for text, runs in runs_of.items():
        if len(runs_of) > 1:
            blocks.append(('heading', f'{len(runs)} run{"s" * (len(runs) > 1)}: {", ".join(runs)}'))
        blocks += environment_section(json.loads(text), train_command)
    return blocks
