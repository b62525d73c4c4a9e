"""Compares the step times of all presets, ablations and mesh layouts with those of another checkout of the project.

    python benchmarks/presets.py --against=CHECKOUT [--against_python=PATH] [--only=REGEX] [--rounds=5] [--json]

Cases are `preset/NAME` (a published network, with 16 or 128 images per step), `ablation/NAME` (the rows of
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

Each side runs benchmarks/presets.py of its own checkout, so that neither needs to know the other's modules and field
names. The protocol must therefore stay as it is: cases() by `python -c`, the flags --against and --worker=this, and the
requests that start() describes. The cases of both checkouts are matched by name.
"""

import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import runner

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
Times = dict[str, dict[str, dict[str, float]]]  # seconds by case, pass and side


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


def cases_of(checkout: str, python: str) -> dict[str, Case]:
    """Returns the cases of another checkout by name."""
    code = 'import json; from benchmarks.presets import cases; print(json.dumps(cases()))'
    environment = os.environ | runner.NO_GPU
    run = subprocess.run([python, '-c', code], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        runner.fail(f'the cases of {checkout} cannot be listed with {python}; see above')
    return json.loads(run.stdout)


def start() -> tuple[str, Callable[[list[Any]], Any]]:
    """Runs in a worker. Returns the versions of Python and JAX, and a function that answers requests.

    The answer to ['prepare', case] is whether this checkout has the case; that to [pass, repeats] is the seconds per
    pass.
    """
    from alexnet_jax.config import ConfigError, apply_overrides, resolve
    from alexnet_jax.runtime import backend
    from benchmarks.project import Project

    backend.configure_cpu_backend()
    timed: dict[str, Callable[[], float]] = {}

    def prepare(module: str, argument: str | None, fields: dict[str, Any]) -> bool:
        timed.clear()  # frees the memory of the previous case
        try:
            get_config = importlib.import_module(f'configs.{module}').get_config
            config = get_config(argument) if argument else get_config()
            apply_overrides(config, {name: _tuples(value) for name, value in fields.items()})
            project = Project(resolve(config))
        except ConfigError:
            return False
        timed.update(train=project.train, forward=project.forward)
        return True

    def respond(request: list[Any]) -> Any:
        what, argument = request
        if what == 'prepare':
            return prepare(*argument)
        begin = time.perf_counter()
        for _ in range(argument):
            timed[what]()
        return (time.perf_counter() - begin) / argument

    return f'Python {platform.python_version()}, jax {importlib.metadata.version("jax")}', respond


def _tuples(value: Any) -> Any:
    """Converts lists to tuples: JSON has only lists, the configuration has tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def measure(workers: list[runner.Worker], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the median seconds of the prepared case by pass and side. The sides take turns."""
    medians = {}
    for name in PASSES:
        once = runner.take_turns(workers, [name, 1], 1, warmup=1)  # the first compiles
        columns = runner.take_turns(workers, [name, math.ceil(SHORTEST / max(once)[0])], rounds)
        medians[name] = {w.side: statistics.median(column) for w, column in zip(workers, columns, strict=True)}
    return medians


def kind(case: str) -> str:
    """Returns the kind of a case: preset, ablation, whole or mesh."""
    return case.partition('/')[0]


def judge(times: Times) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Returns each kind's margin, as a share of the time, and the (case, pass) that are slower by more than it."""
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
    rows = [('case', 'pass', 'this, ms', 'other, ms', 'ratio', 'other / itself', '')]
    for case, passes in result['seconds'].items():
        for name, seconds in passes.items():
            this, other, again = (seconds[side] for side in SIDES)
            figures = f'{this * 1e3:.1f}', f'{other * 1e3:.1f}', f'{other / this:.2f}', f'{other / again:.2f}'
            rows.append((case, name, *figures, 'slower' if [case, name] in result['slower'] else ''))
    margins = ', '.join(f'{margin:.1%} ({name})' for name, margin in result['margins'].items())
    return '\n'.join(
        [
            f'{result["machine"]}; this checkout against {result["against"]}',
            f'this: {result["versions"]["this"]}; other: {result["versions"]["other"]}',
            *('', *runner.text_table(*rows)),
            *(f'{case} is missing in the other checkout' for case in result['absent']),
            *('', f'{len(result["slower"])} slower by more than the noise: {margins}'),
        ]
    )


def compare(
    pairs: dict[str, tuple[Case, Case]], sides: dict[str, tuple[str, str]], rounds: int
) -> tuple[Times, dict[str, str]]:
    """Returns the seconds of the cases that both checkouts accept, and the versions by side.

    Args:
      pairs: (case of this checkout, case of the other one) by name.
      sides: (checkout, interpreter) of each side.
    """
    times: Times = {}
    versions: dict[str, str] = {}
    for devices in (1, DEVICES):
        chosen = [name for name in pairs if name.startswith('mesh/') == (devices > 1)]
        # Each process compiles for itself: of two equal ones, the one that read the compilation cache was faster.
        environment = {'JAX_NUM_CPU_DEVICES': str(devices), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
        with contextlib.ExitStack() as stack:
            workers = []
            for side, (checkout, python) in sides.items() if chosen else ():
                command = [python, f'{checkout}/benchmarks/presets.py', f'--against={checkout}', '--worker=this']
                workers.append(runner.Worker(side, command, runner.NO_GPU | environment, stack))
                versions[side] = workers[-1].about
            for number, name in enumerate(chosen, 1):
                print(f'{name}, {number} of {len(chosen)}', file=sys.stderr, flush=True)
                ready = [worker.ask(['prepare', pairs[name][worker.side != 'this']]) for worker in workers]
                if all(ready):
                    times[name] = measure(workers, rounds)
    return times, versions


def main() -> int:
    """Times the requested cases and prints the results. Returns exit code 1 if a case is slower, else 0."""
    parser = runner.make_parser(__doc__, 5)
    parser.add_argument('--against', required=True, metavar='CHECKOUT', help='another checkout of the project')
    parser.add_argument('--against_python', type=runner.program, default=sys.executable, help='its interpreter')
    parser.add_argument('--only', default='', metavar='REGEX', help='the cases in whose names it is found')
    arguments = parser.parse_args()
    if arguments.worker:
        runner.serve(start)
        return 0
    against, python = os.path.abspath(arguments.against), arguments.against_python
    if not os.path.isfile(os.path.join(against, 'benchmarks', 'presets.py')):
        parser.error(f'--against: {arguments.against!r} has no benchmarks/presets.py')
    own = cases()
    wanted = [name for name in own if re.search(arguments.only, name)]
    if not wanted:
        parser.error(f'--only: {arguments.only!r} matches none of {", ".join(own)}')
    others = cases_of(against, python)
    sides = {'this': (runner.ROOT, sys.executable), 'other': (against, python), 'again': (against, python)}
    pairs = {name: (own[name], others[name]) for name in wanted if name in others}
    times, versions = compare(pairs, sides, arguments.rounds)
    absent = [name for name in wanted if name not in times]
    if not times:
        runner.fail(f'{against} has none of these cases: {", ".join(absent)}')
    margins, slower = judge(times)
    result = {'seconds': times, 'absent': absent, 'margins': margins, 'slower': list(map(list, slower))}
    result |= {'against': against, 'rounds': arguments.rounds, 'versions': versions}
    runner.print_result(result, report, arguments.json)
    return bool(slower)


if __name__ == '__main__':
    sys.exit(main())
