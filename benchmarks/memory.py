"""Compares the peak memory of the `paper` train step on a CPU: this project's and PyTorch's.

    python benchmarks/memory.py [--batch_size=128] [--steps=10] [--torch_python=PATH] [--json]

The sides run one after the other, each in its own process. The figure is the largest resident set of the process so far
(ru_maxrss, which includes shared libraries and pages of mapped files): after the imports, after the network and the
batch are made, after the first step including its compilation, and after all steps. PyTorch's side is the peer of
train_step.py.

For the project the table adds the compiler's figures: `state`, which is donated to the new state; `batch`, which
includes all other arguments of the step; and `temporary`, which is allocated at once when a step begins. The peak
exceeds the sum of these and the imports by workspaces of library calls and memory that the allocator retains.

--config.a.b=value applies to the project's side, for example --config.cpu_tuning=False.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import runner

SIDES = PROJECT, PEER = 'jax', 'torch'


def project_step(batch_size: int, flags: list[str]) -> tuple[dict[str, int], Callable[[], float]]:
    """Returns the byte figures of this project's side, and its train step."""
    from alexnet_jax.runtime import backend
    from benchmarks.project import Project, paper_config

    config = paper_config(batch_size, flags)
    if config.cpu_tuning:
        backend.configure_cpu_backend()
    import jax

    from alexnet_jax.training import train_step  # noqa: F401

    imported = runner.peak_memory()
    project = Project(config)
    jax.block_until_ready(project.state)
    made = runner.peak_memory()
    step = project.train_step.lower(*project.train_arguments).compile()
    project.train_step, compiled = step, step.memory_analysis()
    backend.reserve_step_memory(compiled.temp_size_in_bytes)
    found = {'imported': imported, 'made': made, 'state': compiled.alias_size_in_bytes}
    found['batch'] = compiled.argument_size_in_bytes - compiled.alias_size_in_bytes
    return found | {'temporary': compiled.temp_size_in_bytes}, project.train


def torch_step(batch_size: int) -> tuple[dict[str, int], Callable[[], float]]:
    """Returns the byte figures of PyTorch's side, and its train step."""
    import torch  # noqa: F401

    from benchmarks.peers import torch_passes

    imported = runner.peak_memory()
    train = torch_passes(batch_size)['train']
    return {'imported': imported, 'made': runner.peak_memory()}, train


def start(side: str, batch_size: int, flags: list[str]) -> tuple[dict[str, Any], Callable[[int], int]]:
    """Runs in a worker. Returns the initial figures, and a function that runs steps and returns the peak memory."""
    found, train = project_step(batch_size, flags) if side == PROJECT else torch_step(batch_size)

    def respond(steps: int) -> int:
        for _ in range(steps):
            train()
        return runner.peak_memory()

    return {'version': sys.modules[side].__version__} | found, respond


def report(result: dict[str, Any]) -> str:
    """Formats the table as text."""
    columns = ('imported', 'made', 'first_step', 'peak')
    rows = [
        (side, result[side]['version'], *(f'{result[side][name] / 1e6:,.0f}' for name in columns))
        for side in SIDES
        if side in result
    ]
    lines = [
        f'{result["machine"]}; batch {result["batch_size"]}, float32, {result["steps"]} steps; peak memory so far, MB',
        *('', *runner.text_table(('side', 'version', *columns), *rows)),
    ]
    if PROJECT in result:
        state, batch, temporary = (result[PROJECT][name] / 1e6 for name in ('state', 'batch', 'temporary'))
        lines += ['', f'compiled step: state {state:,.0f}, batch {batch:,.0f}, temporary {temporary:,.0f} MB']
    if result['ratio'] is not None:
        lines.append(f'{PROJECT} / {PEER}: {result["ratio"]:.2f}')
    return '\n'.join(lines)


def main() -> None:
    """Runs the sides one after the other and prints the results."""
    parser = runner.make_parser(__doc__, None, '--sides', SIDES)
    parser.add_argument('--batch_size', type=runner.positive, default=128)
    parser.add_argument('--steps', type=runner.positive, default=10)
    parser.add_argument('--torch_python', type=runner.program, default=sys.executable, help='Python with torch')
    arguments, flags = parser.parse_known_args()
    if arguments.worker:
        return runner.serve(lambda: start(arguments.worker, arguments.batch_size, flags))
    from benchmarks.project import paper_config

    paper_config(arguments.batch_size, flags)  # exits if a flag is invalid
    result: dict[str, Any] = {}
    for side in arguments.sides:
        python = arguments.torch_python if side == PEER else sys.executable
        with contextlib.ExitStack() as stack:
            worker = runner.Worker(side, runner.command_of(side, python=python), runner.NO_GPU, stack)
            result[side] = worker.about | {'first_step': worker.ask(1), 'peak': worker.ask(arguments.steps - 1)}
    both = all(side in result for side in SIDES)
    result['ratio'] = result[PROJECT]['peak'] / result[PEER]['peak'] if both else None
    result |= {'batch_size': arguments.batch_size, 'steps': arguments.steps, 'config': flags}
    return runner.print_result(result | {'python': platform.python_version()}, report, arguments.json)


if __name__ == '__main__':
    main()
