"""Compares the step times of all presets, ablations and mesh layouts with those of another checkout of the project.

    python benchmarks/presets.py --against=CHECKOUT [--against_python=PATH] [--only=REGEX] [--rounds=5] [--json]

Cases are `preset/NAME` (the published networks, 16 images per step, the small ones 128), `ablation/NAME` (the rows of
configs/ablations.py, each on the smallest network that has it), `mesh/LAYOUT` (the quickstart on eight simulated
devices), and `whole/NAME` (the quickstart and `paper` with their own batch sizes). Each case times a training step and
an evaluation of the center view (`forward`), with the batch in memory.

--against_python runs the other checkout with another interpreter, for example one with another JAX version:
`--against=. --against_python=.venv-3.11/bin/python`.

Three processes take turns: this checkout, the other one, and the other one again. The difference between the last two
is noise. Each kind of case has its own noise; it is largest for eight devices on fewer cores. A case is slower if its
time is longer by more than MARGIN standard deviations of the noise (estimated from the kind's median) and by more than
FLOOR. Then the exit code is 1. A ratio is the other checkout's time over this one's: above 1 this checkout is faster.
Cases that the other checkout does not have are left out.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import project
from benchmarks.workers import NO_GPU, ROOT, Worker, machine, serve

PASSES = ('train', 'forward')
SIDES = ('this', 'other', 'again')
MARGIN, FLOOR = 3.0, 0.03
SHORTEST = 0.3  # minimum seconds of a timing; shorter steps are repeated
DEVICES = 8
MESHES: dict[str, dict[str, Any]] = {
    'data_8x1': {'mesh.data': 8, 'mesh.layout': 'data'},
    'towers_8x1': {'mesh.data': 8},
    'towers_4x2': {'mesh.data': 4, 'mesh.model': 2},
    'hybrid_4x2': {'mesh.data': 4, 'mesh.model': 2, 'mesh.layout': 'hybrid'},
    'towers_4x2_shard_optimizer': {'mesh.data': 4, 'mesh.model': 2, 'mesh.shard_optimizer': True},
    'hybrid_4x2_shard_optimizer': {
        'mesh.data': 4,
        'mesh.model': 2,
        'mesh.layout': 'hybrid',
        'mesh.shard_optimizer': True,
    },
}

# A worker prepares a case from a module of configs, the argument of its get_config(), and overrides by dotted name.
Case = tuple[str, str | None, dict[str, Any]]


def cases() -> dict[str, Case]:
    """Returns all cases by name."""
    from alexnet_jax.presets import PRESETS
    from configs import ablations

    found: dict[str, Case] = {}
    for name in PRESETS:
        batch_size = 128 if name.startswith('cifar10') else 16
        found[f'preset/{name}'] = ('imagenet', name, {'train.batch_size': batch_size, 'mesh.data': 1})
    for data in ablations.SEEDS:
        for variant in ablations.sweep(data):
            if 'train.batch_size' not in variant.overrides:
                batch_size = 16 if data == 'imagenet' else 64
                fields = {'train.batch_size': batch_size, 'mesh.data': 1} | variant.overrides
                found.setdefault(f'ablation/{variant.name}', ('ablations', data, fields))
    found['whole/paper'] = ('imagenet', 'paper', {'mesh.data': 1})
    found['whole/quickstart'] = ('quickstart', None, {'mesh.data': 1})
    for name, fields in MESHES.items():
        found[f'mesh/{name}'] = ('quickstart', None, fields)
    return found


def start(checkout: str) -> tuple[str, Callable[[Any], Any]]:
    """Runs in a worker. Returns the versions of Python and JAX, and a function that answers requests.

    The answer to ['prepare', case] is whether the checkout has the case; that to [pass, repeats] is the seconds per
    pass.
    """
    sys.path.insert(0, checkout)
    from alexnet_jax.config import ConfigError, apply_overrides, resolve
    from alexnet_jax.runtime import backend

    assert backend.__file__.startswith(checkout)
    backend.configure_cpu_backend()
    timed: dict[str, Callable[[], float]] = {}

    def prepare(module: str, argument: str | None, fields: dict[str, Any]) -> bool:
        timed.clear()  # frees the memory of the previous case
        try:
            get_config = importlib.import_module(f'configs.{module}').get_config
            config = get_config(argument) if argument else get_config()
            apply_overrides(config, {name: _tuples(value) for name, value in fields.items()})
            made = project.Project(resolve(config))
        except ConfigError:
            return False
        timed.update(train=made.train, forward=made.forward)
        return True

    def respond(request: list[Any]) -> Any:
        what, *rest = request
        if what == 'prepare':
            return prepare(*rest[0])
        begin = time.perf_counter()
        for _ in range(rest[0]):
            timed[what]()
        return (time.perf_counter() - begin) / rest[0]

    return f'Python {platform.python_version()}, jax {importlib.metadata.version("jax")}', respond


def _tuples(value: Any) -> Any:
    """Converts lists to tuples: JSON has only lists, the configuration has tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def measure(workers: list[Worker], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the median seconds of the prepared case by pass and side. The sides take turns."""
    medians = {}
    for name in PASSES:
        for worker in workers:
            worker.ask([name, 1])  # compiles
        repeats = math.ceil(SHORTEST / max(worker.ask([name, 1]) for worker in workers))
        table = [[worker.ask([name, repeats]) for worker in workers] for _ in range(rounds)]
        columns = zip(*table, strict=True)
        medians[name] = {w.side: statistics.median(column) for w, column in zip(workers, columns, strict=True)}
    return medians


def kind(case: str) -> str:
    """Returns the kind of a case: preset, ablation, whole or mesh."""
    return case.partition('/')[0]


def judge(times: dict[str, dict[str, dict[str, float]]]) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Returns each kind's margin, as a share of the time, and the (case, pass) that are slower by more than the margin.

    Args:
      times: seconds by case, pass and side.
    """
    each = {(case, name): seconds for case, passes in times.items() for name, seconds in passes.items()}
    noise: dict[str, list[float]] = {}
    for (case, _), seconds in each.items():
        noise.setdefault(kind(case), []).append(abs(math.log(seconds['again'] / seconds['other'])))
    # Half of a normal distribution is within 0.6745 standard deviations.
    margins = {name: max(FLOOR, MARGIN * statistics.median(found) / 0.6745) for name, found in noise.items()}
    # The longer of the other checkout's two times, so that noise in one of them does not count.
    slower = [
        (case, name)
        for (case, name), s in each.items()
        if s['this'] > (1 + margins[kind(case)]) * max(s['other'], s['again'])
    ]
    return margins, slower


def report(result: dict[str, Any]) -> str:
    """Formats the table as text."""
    lines = [f'{result["machine"]}; this checkout against {result["against"]}']
    lines += [f'this: {result["versions"]["this"]}; other: {result["versions"]["other"]}', '']
    lines += [f'{"case":<36}{"pass":<9}{"this, ms":>10}{"other, ms":>11}{"ratio":>8}{"other / itself":>16}']
    for case, passes in result['seconds'].items():
        for name, seconds in passes.items():
            mark = '  slower' if [case, name] in result['slower'] else ''
            line = f'{case:<36}{name:<9}{seconds["this"] * 1e3:>10.1f}{seconds["other"] * 1e3:>11.1f}'
            line += f'{seconds["other"] / seconds["this"]:>8.2f}{seconds["other"] / seconds["again"]:>16.2f}{mark}'
            lines.append(line)
    lines += [f'{case:<36}not there in the other checkout' for case in result['absent']]
    margins = ', '.join(f'{margin:.1%} ({name})' for name, margin in result['margins'].items())
    lines += ['', f'{len(result["slower"])} slower by more than the noise: {margins}']
    return '\n'.join(lines)


def main() -> int:
    """Times the requested cases and prints the results. Returns exit code 1 if a case is slower, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--against', required=True, metavar='CHECKOUT', help='another checkout of the project')
    parser.add_argument('--against_python', default=sys.executable, metavar='PATH', help='the interpreter that runs it')
    parser.add_argument('--only', default='', metavar='REGEX', help='the cases in whose names it is found')
    parser.add_argument('--rounds', type=int, default=5, help='timed, of each pass')
    parser.add_argument('--json', action='store_true', help='one JSON object in place of the table')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    against = os.path.abspath(arguments.against)
    if arguments.worker:
        serve(lambda: start(ROOT if arguments.worker == 'this' else against))
        return 0
    if not os.path.isdir(os.path.join(against, 'alexnet_jax')):
        parser.error(f'--against: {arguments.against!r} has no folder alexnet_jax')
    if not shutil.which(arguments.against_python):
        parser.error(f'--against_python: {arguments.against_python!r} is no program')
    wanted = {name: case for name, case in cases().items() if re.search(arguments.only, name)}
    if not wanted or arguments.rounds < 1:
        parser.error(f'--only: none of {", ".join(cases())}' if arguments.rounds > 0 else '--rounds is at least 1')

    times: dict[str, dict[str, dict[str, float]]] = {}
    absent: list[str] = []
    versions: dict[str, str] = {}
    for devices in (1, DEVICES):
        names = [name for name in wanted if name.startswith('mesh/') == (devices > 1)]
        if not names:
            continue
        with contextlib.ExitStack() as stack:
            # Each process compiles for itself: of two equal ones, the one that read the compilation cache was faster.
            environment = NO_GPU | {'JAX_NUM_CPU_DEVICES': str(devices), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
            command = [os.path.abspath(__file__), f'--against={against}']
            pythons = (sys.executable, arguments.against_python, arguments.against_python)
            workers = [
                Worker(side, [python, *command, f'--worker={side}'], environment, stack)
                for side, python in zip(SIDES, pythons, strict=True)
            ]
            versions |= {worker.side: worker.about for worker in workers}
            for number, name in enumerate(names, 1):
                print(f'{name}, {number} of {len(names)}', file=sys.stderr, flush=True)
                there = [worker.ask(['prepare', wanted[name]]) for worker in workers]
                if all(there):
                    times[name] = measure(workers, arguments.rounds)
                else:
                    absent.append(name)
    if not times:
        sys.exit(f'presets: {arguments.against} has none of these cases: {", ".join(absent)}')
    margins, slower = judge(times)
    result = {'seconds': times, 'absent': absent, 'margins': margins, 'slower': list(map(list, slower))}
    result |= {'against': against, 'rounds': arguments.rounds, 'versions': versions}
    result |= {'machine': machine(), 'date': datetime.date.today().isoformat()}
    print(json.dumps(result) if arguments.json else report(result))
    return bool(slower)


if __name__ == '__main__':
    sys.exit(main())
