"""The results of `alexnet evaluate` on other data, for the report of a run."""

from collections.abc import Mapping

from alexnet_jax.evaluate import stored
from alexnet_jax.evaluate.corruptions import ALEXNET_ERRORS, SEVERITIES, mean_lines
from alexnet_jax.paths import shown
from alexnet_jax.report.blocks import Block, Section, Table
from alexnet_jax.report.run_files import number, percent, views_of
from alexnet_jax.runtime.files import JsonObject

_LEFT_OUT = {  # by key of `left_out` in a result
    'of_other_classes': 'of other classes',
    'without_right_label': 'without a right label',
    'unreadable': 'unreadable',
}


def evaluation_sections(workdir: str) -> list[Section]:
    """Returns a section with the results in WORKDIR/evaluations, or [] if there are none."""
    results = stored.read_all(workdir)
    plain = [result for result in results.values() if not _is_corruptions(result)]
    blocks: list[Block] = []
    if plain:
        header = ['data', 'views', 'step', 'loss', 'top-1 error', 'top-5 error', 'images', 'classes', 'left out']
        blocks.append(('table', Table('errors on other data', header, [_row(result) for result in plain])))
    for result in results.values():
        if _is_corruptions(result):
            blocks += _corruption_blocks(result)
    if not blocks:
        return []
    about = (
        'Errors on images that `alexnet evaluate --source` read, whose classes were matched by WordNet id or name. With'
        ' classes such as 200 of 1,000, the network chose among these 200.'
    )
    return [('Other data', [('text', about), *blocks])]


def evaluation_lines(workdir: str) -> list[str]:
    """Returns a line of text for each result in WORKDIR/evaluations."""
    lines = []
    for result in stored.read_all(workdir).values():
        data, views, step, loss, top1, top5, _, classes, _ = _row(result)
        if _is_corruptions(result):
            lines.append(f'  {data}, {views_of(views)}, step {step}: {"; ".join(_means(result))}')
        else:
            lines.append(
                f'  {data}, {classes} classes, {views_of(views)}, step {step}: loss {loss}  top-1 error {top1}'
                f'  top-5 error {top5}'
            )
    return lines


def _is_corruptions(result: JsonObject) -> bool:
    return isinstance(result.get('corruptions'), list)


def _row(result: JsonObject) -> list[str]:
    """Returns the cells of a result: data, views, step, loss, errors, images, classes and what is left out."""
    loss, left_out = number(result.get('loss')), result.get('left_out')
    ranked, known = _count(result, 'ranked_classes'), _count(result, 'model_classes')
    counts = left_out if isinstance(left_out, dict) else {}
    numbers = [(_count(counts, key), what) for key, what in _LEFT_OUT.items()]
    return [
        _data(result),
        _count(result, 'views'),
        _count(result, 'step'),
        '' if loss is None else f'{loss:.4f}',
        percent(result.get('top1_error')),
        percent(result.get('top5_error')),
        _count(result, 'images'),
        ranked if ranked == known else f'{ranked} of {known}',
        ', '.join(f'{count} {what}' for count, what in numbers if count not in ('', '0')),
    ]


def _data(result: JsonObject) -> str:
    """Returns source, split, and several right labels as text."""
    parts = [_text(result.get('source'))]
    if result.get('split') != 'all':
        parts.append(_text(result.get('split')))
    if result.get('real_labels'):
        parts.append(f'right labels of {_text(result["real_labels"])}')
    return ', '.join(filter(None, parts))


def _text(value: object) -> str:
    return shown(value.replace('`', "'")) if isinstance(value, str) and value else ''


def _count(values: Mapping[str, object], key: str) -> str:
    value = number(values.get(key))
    return '' if value is None else f'{value:,.0f}'


def _corruption_blocks(result: JsonObject) -> list[Block]:
    """Returns the errors by corruption and the mCE."""
    rows = []
    for row in result['corruptions']:
        if isinstance(row, dict):
            errors = row.get('top1_errors')
            cells = [percent(error) for error in errors] if isinstance(errors, list) else []
            cells = (cells + [''] * len(SEVERITIES))[: len(SEVERITIES)]
            means = [percent(row.get(key)) for key in ('top1_error', 'ce', 'relative_ce')]
            rows.append([_text(row.get('corruption')), *cells, *means])
    header = ['top-1 error', *(f'severity {level}' for level in SEVERITIES), 'mean', 'CE', 'relative CE']
    return [
        ('heading', f'{_data(result)}, {views_of(_count(result, "views"))}, step {_count(result, "step")}'),
        ('table', Table('errors by corruption', header, rows)),
        ('text', '; '.join(_means(result))),
        (
            'remark',
            f'CE is the error relative to that of AlexNet in Hendrycks and Dietterich (2019), mCE its mean over'
            f' {len(ALEXNET_ERRORS)} corruptions.',
        ),
    ]


def _means(result: JsonObject) -> list[str]:
    """Returns the lines of corruptions.mean_lines(), or a remark that the result is corrupt."""
    missing = result.get('missing')
    report = {key: number(result.get(key)) for key in ('mce', 'relative_mce', 'clean_error')}
    if not isinstance(missing, list) or (not missing and report['mce'] is None):
        return ['the file of the result is corrupt']
    if report['clean_error'] is None:
        report['relative_mce'] = None
    return mean_lines({**report, 'missing': [_text(name) for name in missing]})
