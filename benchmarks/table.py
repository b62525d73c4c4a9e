"""Runs the benchmarks and writes their results to docs/benchmarks.md, as the table between two markers.

    python benchmarks/table.py [NAME ...] [--torch_python=PATH]      # `make bench` runs all of them

docs/logs/benchmarks.json keeps the results, so that one benchmark can run again without the others. `--only_table`
writes the table without running a benchmark.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import runner

RESULTS, PAGE = 'docs/logs/benchmarks.json', 'docs/benchmarks.md'
BEGIN, END = '<!-- The table is made by `make bench`. -->', '<!-- End of what `make bench` makes. -->'
PEERS = {'tensorflow': 'TensorFlow, oneDNN', 'torch': 'PyTorch, `torch.compile`'}
INPUT_PEERS = {'tensorflow': "tf.data, the recipe of Flax's example", 'pillow': "Pillow threads, torchvision's recipe"}
STARTS = {
    'help': '`launch.py --help`',
    'field': 'an invalid override rejected',
    'cold': 'first step of `paper`, empty compilation cache',
    'warm': 'first step of `paper`, compiled before',
    'resumed': 'first step of `paper`, from a checkpoint',
}
WITH_TORCH = ('train_step', 'memory')

# (quantity, this project's figure), and where there is a comparison (with what, its figure, ratio). table() leaves the
# first two cells empty if both equal those of the row above.
Row = tuple[str, ...]


def train_step_rows(result: dict[str, Any]) -> list[Row]:
    """Images/s of the train step and of the forward pass, and their shares of the peak FLOP/s."""
    rows: list[Row] = []
    for prefix, name in (('', 'train step'), ('forward_', 'forward pass')):
        own, share = result[f'{prefix}images_per_second'], result[f'{prefix}share_of_product']
        what = f'{name} of `paper`, batch {result["batch_size"]}, {result["dtype"]}: images/s'
        for peer, title in PEERS.items():
            if speed := result[f'{peer}_{prefix}images_per_second']:
                rows.append((what, f'{own:.1f}', title, f'{speed:.1f}', f'{result[f"{peer}_{prefix}ratio"]:.2f}'))
        rate = max(result['product_flops_per_second'].values())
        rows.append((f'its FLOP/s / those of a matrix product, {rate / 1e9:.0f} G', f'{share["jax"]:.2f}'))
    return rows


def layers_rows(result: dict[str, Any]) -> list[Row]:
    """Shares of convolutions and matrix products, and of the roofline minimum, in the step's time."""
    products = sum(row['seconds'] for row in result['kinds'] if row['part'] in ('convolutions', 'products'))
    least = sum(row['least_seconds'] for row in result['rows'])
    return [
        ('convolutions and matrix products / time of a train step', f'{products / result["seconds"]:.0%}'),
        ('minimum time by the roofline / time of a train step', f'{least / result["seconds"]:.0%}'),
    ]


def input_rows(result: dict[str, Any]) -> list[Row]:
    """Images/s read from both kinds of prepared data sets, and images/s of their preparation from each source."""
    speeds = result['images_per_second']
    rows: list[Row] = []
    for side in ('raw', 'jpeg'):
        what = f'input from a prepared data set, {side}: images/s'
        for peer, title in INPUT_PEERS.items():
            ratio = f'{speeds[side] / speeds[peer]:.1f}'
            rows.append((what, f'{speeds[side]:,.0f}', title, f'{speeds[peer]:,.0f}', ratio))
    prepared, processes = result['prepare_images_per_second'].items(), f'{result["cores"]} processes'
    rows += [(f'preparation, {side}, {processes}: images/s', f'{speed:,.0f}') for side, speed in prepared]
    for kind, ratio in result['prepare_from_ratio'].items():
        speed, folder = result['prepare_from'][kind], result['prepare_from']['folder']
        what = f'preparation from {kind}, {processes}: images/s'
        rows.append((what, f'{speed:,.0f}', 'the same JPEGs in folders', f'{folder:,.0f}', f'{ratio:.2f}'))
    return rows


def startup_rows(result: dict[str, Any]) -> list[Row]:
    """Seconds until launch.py has ended, and until the first step has ended."""
    return [(f'{text}: seconds', f'{result[case]:.1f}') for case, text in STARTS.items() if case in result]


def loop_overhead_rows(result: dict[str, Any]) -> list[Row]:
    """Images/s of the loop and of the step alone, and the delay by a checkpoint."""
    rows: list[Row] = []
    for part, found in result['parts'].items():
        if part == 'checkpoint':
            what = f'delay of training by a checkpoint that takes {found["saving"]:.1f} s: seconds'
            rows.append((what, f'{found["held_up"]:.3f}'))
        else:
            own, alone = (f'{found[name]:,.1f}' for name in ('images_per_second', 'step_images_per_second'))
            what = f'`launch.py`, {part}, input included: images/s'
            rows.append((what, own, 'the step alone', alone, f'{found["ratio"]:.3f}'))
    return rows


def memory_rows(result: dict[str, Any]) -> list[Row]:
    """Peak memory of the train step."""
    what = f'peak memory of the train step of `paper`, batch {result["batch_size"]}: MB'
    own = f'{result["jax"]["peak"] / 1e6:,.0f}'
    if result['ratio'] is None:
        return [(what, own)]
    return [(what, own, PEERS['torch'], f'{result["torch"]["peak"] / 1e6:,.0f}', f'{1 / result["ratio"]:.2f}')]


def freezing_rows(result: dict[str, Any]) -> list[Row]:
    """Time and memory of steps with frozen layers, as shares of those of a step that trains all layers."""
    rows: list[Row] = []
    for case, what in (('convolutions', 'with frozen convolutions'), ('head', 'of fc8 alone')):
        found, full = result['cases'][case], result['cases']['full']
        step = f'train step of `paper` {what}, batch {result["batch_size"]} / of all layers'
        rows.append((f'{step}: time', f'{found["ratio"]:.2f}'))
        rows.append((f'{step}: temporary memory', f'{found["temporary"] / full["temporary"]:.2f}'))
    return rows


ROWS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    'train_step': train_step_rows,
    'layers': layers_rows,
    'memory': memory_rows,
    'freezing': freezing_rows,
    'loop_overhead': loop_overhead_rows,
    'input': input_rows,
    'startup': startup_rows,
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the Markdown table of the benchmarks' results by name, with machines, versions and dates below."""
    lines = ['| | this project | compared with | | ratio |', '| --- | --: | --- | --: | --: |']
    measured = {name: results[name] for name in ROWS if name in results}
    above: Row = ()
    for name, result in measured.items():
        for row in ROWS[name](result):
            shown = ('', '', *row[2:]) if row[:2] == above[:2] else row
            lines.append('| ' + ' | '.join([*shown, *[''] * (5 - len(shown))]) + ' |')
            above = row
    versions = {name: version for result in measured.values() for name, version in result.get('versions', {}).items()}
    packages = [  # the machine's description has the version of Python
        f'{name.replace("PIL", "Pillow")} {version}'
        for name, version in sorted(versions.items(), key=lambda item: item[0].lower())
        if version and name.lower() != 'python'
    ]
    machines = sorted({result['machine'] for result in measured.values()})
    dates = sorted({result['date'] for result in measured.values()})
    period = ' to '.join(dates[:1] + dates[1:][-1:])
    return '\n'.join([*lines, '', f'{"; ".join(machines)}; {", ".join(packages)}. Measured {period}.'])


def replace_table(page: str, made: str) -> str:
    """Returns `page` with `made` between the markers. Raises ValueError: each marker must occur once, in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f'there must be one line {BEGIN!r} and below it one line {END!r}')
    return f'{before}{BEGIN}\n{made}\n{END}{after}'


def run(name: str, flags: list[str]) -> dict[str, Any]:
    """Runs the benchmark `name` and returns its results. Exits if it fails."""
    print(f'{name}: running', file=sys.stderr, flush=True)
    command = [sys.executable, os.path.join(runner.ROOT, 'benchmarks', f'{name}.py'), '--json', *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        runner.fail(f'{name} ended with exit code {done.returncode}; see above')
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the requested benchmarks, stores their results and writes the table."""
    from alexnet_jax.runtime.files import atomic_write, read_json, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'some of {", ".join(ROWS)}; the default is all')
    parser.add_argument('--torch_python', default=sys.executable, metavar='PATH', help='Python with torch')
    parser.add_argument('--only_table', action='store_true', help='run nothing')
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(ROWS)):
        parser.error(f'{", ".join(unknown)} is unknown; the benchmarks are {", ".join(ROWS)}')
    os.chdir(runner.ROOT)
    results = read_json(RESULTS) or {}
    for name in [] if arguments.only_table else arguments.names or ROWS:
        results[name] = run(name, [f'--torch_python={arguments.torch_python}'] if name in WITH_TORCH else [])
        write_json(RESULTS, results)
    if not results:
        parser.error(f'{RESULTS} has no results yet; omit --only_table')
    try:
        with open(PAGE) as file:
            text = replace_table(file.read(), table(results))
    except (OSError, ValueError) as error:
        runner.fail(f'{PAGE}: {error}')
    with atomic_write(PAGE) as file:
        file.write(text)


if __name__ == '__main__':
    main()
