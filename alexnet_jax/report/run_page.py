"""The report page of one run: its settings, its results, and the weights of its network."""

import os
from typing import Any

from alexnet_jax.plots import curves, network, style
from alexnet_jax.report import html, model_section
from alexnet_jax.report.config_diff import differences, length, published
from alexnet_jax.report.run_files import Run, errors_of, number, percent, read_layers, read_run, views_of
from alexnet_jax.sweep.results import read_result, run_status

DPI = 200  # of the drawings
_NAMED = 20  # classes listed by name
_APART = ('versions', 'command')  # keys of environment.json that the page shows separately


def page(workdir: str, data_dir: str | None, neighbours: bool, made_by: str) -> bytes:
    """Returns the page of the run in `workdir`.

    Args:
      data_dir: the folder of the prepared images; None: the one in the run's settings.
      neighbours: whether to search the training images for neighbors of some images.
      made_by: the command that is running.
    """
    run = read_run(workdir)
    last = errors_of(run)[-1:]
    lead = f'{run.state[0].upper()}{run.state[1:]}.'
    for _, views, _, top1, top5, _ in last:
        lead += f' Validation: top-1 error {top1}, top-5 error {top5} with {views_of(views)}.'
    sections = [
        html.section('What was run', *config_section(run)),
        html.section('Result', *result(run)),
        html.section('Curves', curves_section({run.name: run.metrics}) if run.metrics else _no_metrics(run)),
        *model_section.sections(workdir, run.command, data_dir, neighbours),
        html.section('Layers', *layers(run)),
        html.section('Time', *speed(run)),
        html.section('Hardware and versions', *environment_section(run.environment, run.command)),
    ]
    return html.document(run.name, lead, sections, made_by)


def config_section(run: Run) -> list[str]:
    """Returns the command, the settings, and the network."""
    parts = [html.command(run.command)]
    if run.config is None:
        why = f'{run.config_problem}. Preset, data and settings are not known; `{run.command}` writes that file.'
        return [*parts, html.paragraph(why, 'missing')]
    config, data = run.config, run.config.data
    names = ', '.join(run.class_names[:_NAMED])
    more = f' and {len(run.class_names) - _NAMED:,} more' if len(run.class_names) > _NAMED else ''
    parts.append(
        html.facts(
            {
                'preset': f'`{config.model.preset}`',
                'data': f'`{data.source}`, {config.model.num_classes:,} classes; images of {data.image_size} x'
                f' {data.image_size} pixels, of which the network sees {data.crop_size} x {data.crop_size}',
                'classes': f'{names}{more}',
                'length': length(config, run.examples),
                'seed': str(config.seed),
            }
        )
    )
    if run.inputs_problem:
        parts.append(html.paragraph(f'Names of classes and number of images: {run.inputs_problem}.', 'missing'))
    changed = differences(config)
    parts.append(html.paragraph(f'Settings that differ from those of the preset `{config.model.preset}`:'))
    if changed:
        lines = [['setting', 'preset', 'this run'], *changed]
        parts.append(html.table(lines, 'settings that differ from the preset', numbers=False))
    else:
        parts.append(html.paragraph('None.'))
    drawing = network.draw(config.model, data.crop_size, data.channels, run.name)
    caption = 'The network, as figure 2 of the paper: boxes are maps and units with their sizes, a row a tower.'
    parts.append(html.sheet(style.as_png(drawing, DPI), 'diagram of the network and its layers', caption, wide=True))
    return parts


def result(run: Run) -> list[str]:
    """Returns the errors, beside the published ones if the network and the images are the same."""
    lines = [['', 'views', 'loss', 'top-1 error', 'top-5 error', 'images'], *errors_of(run)]
    measured = len(lines) - 1
    parts = []
    if not measured:
        why = f'No validation errors: {run_status(run.workdir)}; `{run.command}` ends with them.'
        parts.append(html.paragraph(why, 'missing'))
    elif not read_result(run.workdir):
        parts.append(html.paragraph(f'The run is {run.state}; these are its last errors so far.', 'missing'))
    remark = ''
    if run.config is not None:
        line, remark = published(run.config)
        lines += [line] if line else []
    if len(lines) > 1:
        parts.append(html.table(lines, 'errors', published=range(measured + 1, len(lines))))
    parts.append(html.paragraph(remark) if remark else '')
    notes = {'stalled_step': 'the loss was found to stall', 'target_step': 'the training error reached its goal'}
    told = {name: number(run.result.get(name)) for name in notes}
    parts += [html.paragraph(f'At step {step:,.0f} {notes[name]}.') for name, step in told.items() if step is not None]
    damaged = number(run.result.get('corrupt_records'))
    return [*parts, html.paragraph(f'{damaged:,.0f} records of the data were damaged and left out.') if damaged else '']


def curves_section(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the curves of loss, errors and learning rate of `runs`, the results of read_metrics() by name."""
    caption = (
        'Loss and errors on batches as they are trained on, and on all validation images (one view); learning rate.'
    )
    alt = 'curves of loss, top-1 error, top-5 error and learning rate by step'
    return html.sheet(style.as_png(curves.draw(runs), DPI), alt, caption, wide=True)


def _no_metrics(run: Run) -> str:
    return html.paragraph(f'{run.metrics_problem}; `{run.command}` writes one at each `train.log_every`.', 'missing')


def layers(run: Run) -> list[str]:
    """Returns the last line of layers.jsonl as a table."""
    path = os.path.join(run.workdir, 'layers.jsonl')
    last = read_layers(path)
    rows = {name: row for name, row in last.items() if isinstance(row, dict)}
    if not rows:
        why = f'{path} is missing or has no line that can be read; `{run.command}` writes one at each evaluation.'
        return [html.paragraph(why, 'missing')]
    lines = [['layer', 'mean size of weights', 'update / weight', 'mean size of biases', 'update / bias', 'dead units']]
    for name, row in rows.items():
        sizes = [number(row.get(key)) for key in ('kernel', 'kernel_update', 'bias', 'bias_update')]
        cells = []
        for size, update in (sizes[:2], sizes[2:]):
            cells.append('' if size is None else f'{size:.3g}')
            cells.append(f'{update / size:.1e}' if size and update is not None else '')
        lines.append([name, *cells, percent(row.get('dead'))])
    step = number(last.get('step'))
    when = '' if step is None else f'At step {step:,.0f}: '
    return [
        html.table(lines, 'weights, updates and dead units by layer'),
        html.paragraph(
            f'{when}mean sizes of weights, and of their last update in relation to them; dead units give 0 for every'
            ' image of a batch (of a convolution, maps that are 0 everywhere).',
            'quiet',
        ),
    ]


def speed(run: Run) -> list[str]:
    """Returns the training time and the images/s."""
    lines = [line for line in run.metrics if line['split'] == 'train']
    rates = [number(line.get('images_per_second')) for line in lines]
    rate = number(run.result.get('images_per_second')) or next((each for each in reversed(rates) if each), None)
    if not rate:
        why = f'No rate is known: {run_status(run.workdir)}; `{run.command}` measures it.'
        return [html.paragraph(why, 'missing')]
    waits = [wait for line in lines if (wait := number(line.get('input_wait'))) is not None]
    values = {'training': f'{rate:,.1f} images/s'}
    step = number(run.result.get('step')) or (lines[-1]['step'] if lines else None)
    if step and run.config is not None:
        images = step * run.config.train.batch_size
        values['time'] = f'{duration(images / rate)} for {images:,.0f} images at that rate, without evaluations'
    if waits:
        values['input wait'] = f'{percent(sum(waits) / len(waits))} of the time'
    return [html.facts(values)]


def duration(seconds: float) -> str:
    """Formats seconds for readers."""
    for unit, size in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.1f} seconds'


def environment_section(environment: dict[str, Any], command: str) -> list[str]:
    """Returns hardware and versions from environment.json."""
    if not environment:
        why = f'No readable environment.json: runs write it when they begin and when they go on, by `{command}`.'
        return [html.paragraph(why, 'missing')]
    versions = environment.get('versions')
    known = {name.replace('_', ' '): str(value) for name, value in environment.items() if name not in _APART}
    if isinstance(versions, dict):
        known['versions'] = ', '.join(f'{name} {version}' for name, version in versions.items())
    return [html.facts(known)]
