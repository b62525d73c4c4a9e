"""Runs the benchmarks and writes their results to README.md, as the table between two marks.

    python benchmarks/table.py [NAME ...] [--torch_python=PATH]      # `make bench` runs all of them

Results are kept in docs/logs/benchmarks.json, so that the table can be remade after one benchmark runs again.
`--only_table` remakes it without any measurement.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.workers import ROOT, machine

RESULTS, README = 'docs/logs/benchmarks.json', 'README.md'
BEGIN, END = '<!-- The table is made by `make bench`. -->', '<!-- End of what `make bench` makes. -->'
PEERS = {'tensorflow': 'TensorFlow, oneDNN', 'torch': 'PyTorch, `torch.compile`'}
WITH_TORCH = ('train_step', 'memory')
PACKAGES = {'PIL': 'Pillow'}  # names in the table, if different

# (quantity, this project's figure, peer, the peer's figure, ratio). table() leaves the first two cells empty if both
# equal those of the row above.
Row = tuple[str, str, str, str, str]


def train_step_rows(result: dict[str, Any]) -> list[Row]:
    """Images/s of the train step and of the forward pass, and their shares of the peak FLOP/s."""
    rows = []
    for prefix, name in (('', 'train step'), ('forward_', 'forward pass')):
        own, share = result[f'{prefix}images_per_second'], result[f'{prefix}share_of_product']
        what = f'{name} of `paper`, batch {result["batch_size"]}, {result["dtype"]}: images/s'
        for peer in PEERS:
            if speed := result[f'{peer}_{prefix}images_per_second']:
                ratio = result[f'{peer}_{prefix}ratio']
                rows.append((what, f'{own:.1f}', PEERS[peer], f'{speed:.1f}', f'{ratio:.2f}'))
        rate = max(result['product_flops_per_second'].values())
        what = f'its FLOP/s, as a share of the {rate / 1e9:.0f} G that a matrix product reaches'
        rows.append((what, f'{share["jax"]:.2f}', '', '', ''))
    return rows


def layers_rows(result: dict[str, Any]) -> list[Row]:
    """Shares of convolutions and matrix products, and of the roofline minimum, in the step's time."""
    kinds = {row['part']: row for row in result['kinds']}
    products = sum(kinds[kind]['seconds'] for kind in ('convolutions', 'products'))
    least = sum(row['least_seconds'] for row in result['rows'])
    return [
        (
            'convolutions and matrix products in the time of a train step',
            f'{products / result["seconds"]:.0%}',
            '',
            '',
            '',
        ),
        ('what the roofline allows in the time of a train step', f'{least / result["seconds"]:.0%}', '', '', ''),
    ]


def input_rows(result: dict[str, Any]) -> list[Row]:
    """Images/s read from both kinds of stores, and images/s of their preparation."""
    speeds, rows = result['images_per_second'], []
    peers = {'tensorflow': "tf.data, the recipe of Flax's example", 'pillow': "Pillow threads, torchvision's recipe"}
    for side, store in (('raw', 'a raw store'), ('jpeg', 'a store of JPEGs')):
        for peer, name in peers.items():
            ratio = speeds[side] / speeds[peer]
            rows.append(
                (f'input from {store}: images/s', f'{speeds[side]:,.0f}', name, f'{speeds[peer]:,.0f}', f'{ratio:.1f}')
            )
    for side, speed in result['prepare_images_per_second'].items():
        rows.append(
            (f'preparing a store, {side}, with {result["cores"]} processes: images/s', f'{speed:,.0f}', '', '', '')
        )
    return rows


def startup_rows(result: dict[str, Any]) -> list[Row]:
    """Seconds until launch.py has ended, and until the first step is over."""
    texts = {
        'help': '`launch.py --help`',
        'field': 'a wrong override refused',
        'cold': 'first step of `paper`, nothing compiled before',
        'warm': 'first step of `paper`, compiled before',
        'resumed': 'first step of `paper`, from a checkpoint',
    }
    return [(f'{text}: seconds', f'{result[case]:.1f}', '', '', '') for case, text in texts.items() if case in result]


def loop_overhead_rows(result: dict[str, Any]) -> list[Row]:
    """Images/s of the loop and of the step alone, and the delay by a checkpoint."""
    rows = []
    for part in ('quickstart', 'paper'):
        if found := result['parts'].get(part):
            speeds = [f'{found[name]:,.1f}' for name in ('images_per_second', 'step_images_per_second')]
            ratio = f'{found["ratio"]:.3f}'
            rows.append(
                (f'`launch.py`, {part}, input included: images/s', speeds[0], 'the step alone', speeds[1], ratio)
            )
    if found := result['parts'].get('checkpoint'):
        what = f'training held up by a checkpoint that takes {found["saving"]:.1f} s: seconds'
        rows.append((what, f'{found["held_up"]:.3f}', '', '', ''))
    return rows


def memory_rows(result: dict[str, Any]) -> list[Row]:
    """Peak memory of the train step."""
    what = f'peak memory of the train step of `paper`, batch {result["batch_size"]}: MB'
    own = f'{result["jax"]["peak"] / 1e6:,.0f}'
    if result['ratio'] is None:
        return [(what, own, '', '', '')]
    return [(what, own, PEERS['torch'], f'{result["torch"]["peak"] / 1e6:,.0f}', f'{1 / result["ratio"]:.2f}')]


ROWS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    'train_step': train_step_rows,
    'layers': layers_rows,
    'memory': memory_rows,
    'loop_overhead': loop_overhead_rows,
    'input': input_rows,
    'startup': startup_rows,
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the Markdown table of the benchmarks' results by name, with machines, versions and dates below."""
    lines = ['| | this project | beside it | | ratio |', '| --- | --: | --- | --: | --: |']
    for name, rows in ROWS.items():
        above = None
        for what, own, *peer in rows(results[name]) if name in results else []:
            shown = ('', '') if (what, own) == above else (what, own)
            lines.append('| ' + ' | '.join((*shown, *peer)) + ' |')
            above = (what, own)
    measured = {name: results[name] for name in ROWS if name in results}
    machines = sorted({result['machine'] for result in measured.values()})
    versions = {PACKAGES.get(n, n): v for result in measured.values() for n, v in result.get('versions', {}).items()}
    packages = [
        f'{name} {version}' for name, version in sorted(versions.items(), key=lambda v: v[0].lower()) if version
    ]
    said = [text for text in packages if not text.lower().startswith('python')]  # `machines` has Python's
    dates = sorted({result['date'] for result in measured.values()})
    period = ' to '.join(dates[:1] + dates[1:][-1:])
    lines += ['', f'{"; ".join(machines)}; {", ".join(said)}. Measured {period}.']
    return '\n'.join(lines)


def put_into(readme: str, made: str) -> str:
    """Returns `readme` with `made` between the marks. Raises ValueError: the marks are not there once and in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f'there must be one line {BEGIN!r} and behind it one line {END!r}')
    return f'{before}{BEGIN}\n{made}\n{END}{after}'


def run(name: str, flags: list[str]) -> dict[str, Any]:
    """Runs the benchmark `name` and returns its results with machine and date. Exits if it fails."""
    command = [sys.executable, os.path.join(ROOT, 'benchmarks', f'{name}.py'), '--json', *flags]
    print(f'{name}: running', file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f'table: {name} ended with exit code {done.returncode}; see above')
    result = json.loads(done.stdout.splitlines()[-1])
    return {'machine': machine(), 'date': datetime.date.today().isoformat()} | result


def main() -> None:
    """Runs the requested benchmarks, stores their results and writes the table."""
    from alexnet_jax.runtime.files import atomic_write, read_json, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(ROWS)}; all without')
    parser.add_argument('--torch_python', default=sys.executable, metavar='PATH', help='an interpreter that has torch')
    parser.add_argument('--only_table', action='store_true', help='run nothing')
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(ROWS)):
        parser.error(f'there is no benchmark {", ".join(unknown)}; there are {", ".join(ROWS)}')
    os.chdir(ROOT)
    results = read_json(RESULTS) or {}
    for name in [] if arguments.only_table else arguments.names or ROWS:
        results[name] = run(name, [f'--torch_python={arguments.torch_python}'] if name in WITH_TORCH else [])
        write_json(RESULTS, results)
    if not results:
        parser.error(f'{RESULTS} has no results yet; leave out --only_table')
    with open(README) as file:
        readme = file.read()
    try:
        text = put_into(readme, table(results))
    except ValueError as error:
        sys.exit(f'table: {README}: {error}')
    with atomic_write(README) as file:
        file.write(text)


if __name__ == '__main__':
    main()
