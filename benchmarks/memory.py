"""Compares the peak memory of the `paper` train step on a CPU: this project's and PyTorch's.

    python benchmarks/memory.py [--batch_size=128] [--steps=10] [--torch_python=PATH] [--json]

Each side has its own process, alone on the machine. The figure is the largest resident set of the process so far
(ru_maxrss, which includes shared libraries and pages of mapped files): after the imports, after the network and the
batch are made, after the first step including its compilation, and after all steps. PyTorch's side is the peer of
train_step.py.

For the project the table adds the compiler's figures: `state`, which is donated to the new state; `batch`, which
includes all other arguments of the step; and `temporary`, which is allocated at once when a step begins. The peak
exceeds the sum of these and the imports by workspaces of library calls and memory that the allocator retains.

--config.a.b=value applies to the project's side, for example --config.cpu_tuning=False.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from alexnet_jax.config import Config
from benchmarks.train_step import configuration
from benchmarks.workers import NO_GPU, Worker, machine, serve

SIDES = PROJECT, PEER = 'jax', 'torch'


def peak() -> int:
    """Returns the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def project_step(config: Config) -> tuple[dict[str, int], Callable[[], float]]:
    """Returns the byte figures of this project's side, and its train step."""
    from alexnet_jax.runtime import backend

    if config.cpu_tuning:
        backend.configure_cpu_backend()
    import jax

    from alexnet_jax import augment, parallel  # noqa: F401
    from benchmarks.project import Project

    imported = peak()
    project = Project(config)
    jax.block_until_ready(project.state)
    made = peak()
    project.train_step = project.train_step.lower(*project.train_arguments).compile()
    compiled = project.train_step.memory_analysis()
    backend.reserve_step_memory(compiled.temp_size_in_bytes)
    found = {'imported': imported, 'made': made, 'state': compiled.alias_size_in_bytes}
    found['batch'] = compiled.argument_size_in_bytes - compiled.alias_size_in_bytes
    return found | {'temporary': compiled.temp_size_in_bytes}, project.train


def torch_step(batch_size: int) -> tuple[dict[str, int], Callable[[], float]]:
    """Returns the byte figures of PyTorch's side, and its train step."""
    import torch  # noqa: F401

    from benchmarks.peers import torch_passes

    imported = peak()
    train = torch_passes(batch_size, 'float32', 'cpu')['train']
    return {'imported': imported, 'made': peak()}, train


def start(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Any, Callable[[int], int]]:
    """Runs in a worker. Returns the initial figures, and a function that runs steps and returns the peak memory."""
    if arguments.worker == PROJECT:
        found, train = project_step(configuration(arguments, overrides))
    else:
        found, train = torch_step(arguments.batch_size)
    version = sys.modules[arguments.worker].__version__

    def respond(steps: int) -> int:
        for _ in range(steps):
            train()
        return peak()

    return {'version': version} | found, respond


def report(result: dict[str, Any]) -> str:
    """Formats the table as text."""
    columns = ('imported', 'made', 'first_step', 'peak')
    lines = [
        f'{result["machine"]}; batch {result["batch_size"]}, float32, {result["steps"]} steps; peak memory so far, MB',
        '',
        f'{"side":<12}{"version":<14}' + ''.join(f'{name.replace("_", " "):>12}' for name in columns),
    ]
    for side in (side for side in SIDES if side in result):
        found = result[side]
        lines.append(f'{side:<12}{found["version"]:<14}' + ''.join(f'{found[name] / 1e6:>12,.0f}' for name in columns))
    if PROJECT in result:
        state, batch, temporary = (result[PROJECT][name] / 1e6 for name in ('state', 'batch', 'temporary'))
        lines += ['', f'compiled step: state {state:,.0f}, batch {batch:,.0f}, temporary {temporary:,.0f} MB']
    if result['ratio'] is not None:
        lines.append(f'{PROJECT} / {PEER}: {result["ratio"]:.2f}')
    return '\n'.join(lines)


def main() -> None:
    """Runs the sides one after the other and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--sides', default=','.join(SIDES), help='which of %(default)s to run')
    parser.add_argument('--torch_python', default=sys.executable, metavar='PATH', help='an interpreter that has torch')
    parser.add_argument('--json', action='store_true', help='one JSON object in place of the table')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    parser.set_defaults(dtype='float32')
    arguments, overrides = parser.parse_known_args()
    if unknown := [argument for argument in overrides if not re.match(r'--config\.[\w.]+=', argument)]:
        parser.error(f'{unknown[0]!r} is no flag; settings of the project are written --config.a.b=value')
    if min(arguments.batch_size, arguments.steps) < 1:
        parser.error('--batch_size and --steps are at least 1')
    if unknown := sorted(set(arguments.sides.split(',')) - set(SIDES)):
        parser.error(f'--sides: there is no {", ".join(unknown)}; there are {", ".join(SIDES)}')
    if not shutil.which(arguments.torch_python):
        parser.error(f'--torch_python: {arguments.torch_python!r} is no program')
    if arguments.worker:
        return serve(lambda: start(arguments, overrides))
    configuration(arguments, overrides)
    result: dict[str, Any] = {}
    for side in (side for side in SIDES if side in arguments.sides.split(',')):
        python = arguments.torch_python if side == PEER else sys.executable
        command = [python, os.path.abspath(__file__), f'--worker={side}', *sys.argv[1:]]
        with contextlib.ExitStack() as stack:
            worker = Worker(side, command, NO_GPU, stack)
            first_step = worker.ask(1)
            result[side] = worker.about | {'first_step': first_step, 'peak': worker.ask(arguments.steps - 1)}
    both = all(side in result for side in SIDES)
    result['ratio'] = result[PROJECT]['peak'] / result[PEER]['peak'] if both else None
    result |= {'batch_size': arguments.batch_size, 'steps': arguments.steps, 'config': overrides}
    result |= {'python': platform.python_version(), 'machine': machine(), 'date': datetime.date.today().isoformat()}
    print(json.dumps(result) if arguments.json else report(result))
    return None


if __name__ == '__main__':
    main()
