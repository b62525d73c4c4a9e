"""The page that accelerator.py writes of its results, in Markdown."""

import statistics
from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]  # see accelerator.run()


def summary(about: dict[str, Any], results: Sequence[Result], metrics: Sequence[dict[str, Any]]) -> str:
    """Returns the page.

    Args:
      about: the device, the date and the minutes.
      results: the results so far.
      metrics: the lines of metrics.jsonl of the quickstart, see accelerator.read_metrics().
    """
    device, rows = about['device'], {result['name']: result['rows'] for result in results}
    lines = [
        f'# {device["count"]} x {device["kind"]}, {about["date"]}',
        '',
        f'jax {device["jax"]}, jaxlib {device["jaxlib"]}, {device["client"]}; {device["machine"]}.',
        '',
        *table(
            ('part', 'result', 'seconds', ''),
            [(each['name'], each['status'], f'{each["seconds"]:.0f}', each['note']) for each in results],
        ),
    ]
    peers = [row for name, found in rows.items() if name.startswith('peers') for row in found]
    sections = {
        'Train step of `paper` on one device': steps(rows.get('steps', [])),
        'In turn with PyTorch, one step at a time': in_turn(peers),
        'Rounding, relative to float64': precision(rows.get('precision', [])),
        'Quickstart': training(metrics),
        'Modeled by `alexnet audit`, and measured': audit(rows.get('audit', []), rows.get('steps', [])),
    }
    for title, section in sections.items():
        lines += ['', f'## {title}', '', *section] if section else []
    return '\n'.join(lines) + '\n'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table, or [] without rows."""
    cells = [head, ['---'] * len(head), *rows]
    return ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in cells] if rows else []


def megabytes(count: float | None) -> str:
    """Formats bytes; '' if they are unknown."""
    return '' if count is None else f'{count / 1e6:,.0f} MB'


def steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the table of accelerator_parts.steps()."""
    head = ('dtype', 'precision', 'batch', 'images/s', 'fastest', 'compile s', 'state', 'temporary', 'peak so far')
    cells = [
        (
            *(str(row[name]) for name in ('dtype', 'precision', 'batch_size')),
            *(f'{row[name]:,.0f}' for name in ('images_per_second', 'best_images_per_second', 'compile_seconds')),
            *(megabytes(row[name]) for name in ('state', 'temporary')),
            megabytes((row['memory_stats'] or {}).get('peak_bytes_in_use')),
        )
        for row in rows
    ]
    return table(head, cells)


def in_turn(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the table of the results of train_step.py."""
    head = ('dtype', 'precision', 'batch', 'pass', 'images/s', 'PyTorch', 'project / PyTorch', 'share of product')
    cells = []
    for row in rows:
        for prefix, name in (('', 'train'), ('forward_', 'forward')):
            own, peer, ratio = (
                row.get(f'{key}images_per_second' if key != 'ratio' else f'torch_{prefix}ratio')
                for key in (prefix, f'torch_{prefix}', 'ratio')
            )
            cells.append(
                (
                    *(str(row[key]) for key in ('dtype', 'precision', 'batch_size')),
                    name,
                    f'{own:,.0f}',
                    'absent' if peer is None else f'{peer:,.0f}',
                    '' if ratio is None else f'{ratio:.2f}',
                    f'{row[f"{prefix}share_of_product"]["jax"]:.2f}',
                )
            )
    return table(head, cells)


def precision(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the table of accelerator_parts.precision()."""
    return table(
        ('operation', 'operands', 'error'),
        [(row['operation'], row['precision'], f'{row["error"]:.1e}') for row in rows],
    )


def training(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a sentence on speed and input of the quickstart after its first line, which includes the compilation."""
    train = [line for line in metrics if line.get('split') == 'train'][1:]
    if not train:
        return []
    speed, wait = (statistics.median(line[name] for line in train) for name in ('images_per_second', 'input_wait'))
    return [f'{speed:,.0f} images/s, {wait:.1%} of the time waiting for input, last loss {train[-1]["loss"]:.3f}.']


def audit(rows: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the modeled speed and memory of a device beside the measured ones, for float32 and 128 images.

    A slice of several TPUs is modeled with its collectives, and the step is measured on one device.
    """
    found = [row['target'] for row in rows if isinstance(row.get('target'), dict)]
    fastest = [
        row for row in measured if (row['dtype'], row['precision'], row['batch_size']) == ('float32', 'default', 128)
    ]
    if not found or not fastest:
        return []
    modeled = found[0]['roofline']['images_per_second'] / found[0]['devices']
    speed, memory = fastest[0]['images_per_second'], found[0]['memory']
    return table(
        ('', f'modeled, of {found[0]["devices"]} devices', 'measured, of 1 device', 'measured / modeled'),
        [
            ('images/s of a device', f'{modeled:,.0f}', f'{speed:,.0f}', f'{speed / modeled:.2f}'),
            (
                'bytes of a device',
                megabytes(memory['total']),
                megabytes((fastest[0]['memory_stats'] or {}).get('peak_bytes_in_use')),
                '',
            ),
        ],
    )
