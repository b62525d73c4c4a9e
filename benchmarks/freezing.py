"""Compares train steps of `paper` with frozen layers with the step that trains all layers.

    python benchmarks/freezing.py [--batch_size=128] [--rounds=7] [--cases=convolutions,head] [--json]

The cases freeze the convolutions, or all layers but fc8 (`head`, which trains a classifier of fixed features). Each
side has its own process, with the batch in memory, and the sides take turns step by step. Time is the wall-clock time
of a step; the ratio is the median time of the case over that of the full step. `temporary` is the memory that the
compiler allocates for one step, besides the state and the batch.

--config.a.b=value applies to all sides.
"""

import contextlib
import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import runner

FULL = 'full'
CASES: dict[str, tuple[tuple[str, float], ...]] = {
    'convolutions': (('conv*', 0.0),),
    'head': (('*', 0.0), ('fc8', 1.0)),
}


def start(case: str, batch_size: int, flags: list[str]) -> tuple[dict[str, Any], Callable[[None], float]]:
    """Runs in a worker. Returns jax's version and the temporary bytes of a step, and a function that times a step."""
    from alexnet_jax.runtime import backend
    from benchmarks.project import Project, paper_config

    config = paper_config(batch_size, [*flags, f'--config.optimizer.lr_multipliers={CASES.get(case, ())}'])
    if config.cpu_tuning:
        backend.configure_cpu_backend()
    project = Project(config)
    step = project.train_step.lower(*project.train_arguments).compile()
    project.train_step, temporary = step, step.memory_analysis().temp_size_in_bytes
    backend.reserve_step_memory(temporary)

    def respond(_: None) -> float:
        begin = time.perf_counter()
        project.train()
        return time.perf_counter() - begin

    return {'jax': importlib.metadata.version('jax'), 'temporary': temporary}, respond


def report(result: dict[str, Any]) -> str:
    """Formats the table as text."""
    rows = [('case', 'step, ms', 'ratio', 'of minima', 'temporary, MB')]
    for case, found in result['cases'].items():
        ratios = f'{found["ratio"]:.3f}', f'{found["ratio_of_minima"]:.3f}'
        rows.append((case, f'{found["seconds"] * 1e3:,.0f}', *ratios, f'{found["temporary"] / 1e6:,.0f}'))
    about = f'{result["machine"]}; `paper`, batch {result["batch_size"]}, {result["rounds"]} steps a side'
    return '\n'.join([about, '', *runner.text_table(*rows)])


def main() -> None:
    """Times the requested cases and prints the results."""
    parser = runner.make_parser(__doc__, 7, '--cases', tuple(CASES))
    parser.add_argument('--batch_size', type=runner.positive, default=128)
    arguments, flags = parser.parse_known_args()
    if arguments.worker:
        return runner.serve(lambda: start(arguments.worker, arguments.batch_size, flags))
    from benchmarks.project import paper_config

    paper_config(arguments.batch_size, flags)  # exits if a flag is invalid
    sides = [FULL, *arguments.cases]
    with contextlib.ExitStack() as stack:
        workers = [runner.Worker(side, runner.command_of(side), runner.NO_GPU, stack) for side in sides]
        columns = runner.take_turns(workers, None, arguments.rounds, warmup=1)
    full, cases = columns[0], {}
    for worker, seconds in zip(workers, columns, strict=True):
        median = statistics.median(seconds)
        cases[worker.side] = {
            'seconds': median,
            'ratio': median / statistics.median(full),
            'ratio_of_minima': min(seconds) / min(full),
            'temporary': worker.about['temporary'],
        }
    result = {'cases': cases, 'batch_size': arguments.batch_size, 'rounds': arguments.rounds, 'config': flags}
    result['versions'] = {'jax': workers[0].about['jax']}
    return runner.print_result(result, report, arguments.json)


if __name__ == '__main__':
    main()
