"""Profiles the `paper` step on a CPU: a table of the time of each layer's parts beside its roofline minimum.

    python benchmarks/layers.py [--pass=train|forward] [--batch_size=128] [--rounds=3] [--json]

The JAX profiler traces the compiled step of the training loop or of the evaluation. The time of a thread is assigned to
the HLO instruction that it executes, or to the instruction whose task it runs. Each moment is divided equally among the
threads that are busy then, so the parts add up to the time of the step. `idle` is the time in which no thread is busy.

An instruction belongs to the part of the step that its scope names (jax.named_scope; see hlo.py). A fusion counts for
the part of its last instruction, so `lrn` may include a bias and a ReLU that the fusion recomputes.

FLOPs are those of convolutions and matrix products. Bytes are those of the operands and results of each instruction,
without regard to caches. `least` is the minimum time: the larger of FLOPs and bytes, each divided by the machine's
rate. The same run measures these rates: FLOP/s of a product of large matrices and bytes/s of adding two large arrays.
`of it` is `least` divided by the measured time: 1 is the roofline. A value above 1 means that the operands were in a
cache. The table shows the traced step of median time.
"""

import collections
import glob
import heapq
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from alexnet_jax.audit.hlo import STEPS, Program
from alexnet_jax.shapes import LAYERS
from benchmarks import runner

PRODUCT_SIZES, ADDED = (2048, 4096), 2**26  # rows of the square matrices; float32 elements of an array
ORDER = ('augment', *LAYERS, 'dropout', 'logits', 'loss', 'gradients', 'update', 'metrics', 'other', 'idle')

# (time in ns, thread, kind of action, instruction or task); time_by_instruction() lists the kinds.
Action = tuple[float, int, str, Any]


def time_by_instruction(actions: Iterable[Action]) -> dict[str | None, float]:
    """Returns the nanoseconds of each instruction between the first and the last action; the key None is idle time.

    Args:
      actions: in order of time.
        (time, thread, 'instruction', name): the instruction begins, nested in the thread's current one.
        (time, thread, 'record', task): the thread's current instruction schedules a task.
        (time, thread, 'task', task): the thread begins a task.
        (time, thread, 'end', None): the thread's innermost instruction or task ends.
    """
    doing: dict[int, list[str | None]] = collections.defaultdict(list)
    owners: dict[Any, str | None] = {}
    totals: dict[str | None, float] = collections.defaultdict(float)
    last = None
    for now, thread, what, value in actions:
        busy = [stack[-1] for stack in doing.values() if stack and stack[-1] is not None]
        for name in busy or (None,):
            totals[name] += (now - (now if last is None else last)) / max(1, len(busy))
        last = now if last is not None or what == 'instruction' else None
        if what == 'record':
            owners[value] = doing[thread][-1] if doing[thread] else None
        elif what == 'end':
            doing[thread].pop()
        else:
            doing[thread].append(value if what == 'instruction' else owners.get(value))
    return totals


def actions_of_thread(thread: int, events: list[Any], module: str) -> Iterator[Action]:
    """Yields the actions in one thread's profiler events: instructions of `module`, and tasks of its thread pool."""
    spans: list[tuple[float, float, str, Any]] = []  # (begin, end, kind, instruction or task)
    begun: list[int] = []  # indices of unfinished tasks
    for event in sorted(events, key=lambda event: event.start_ns):
        kind = event.name.removeprefix('ThreadpoolListener::')
        if kind == 'StartRegion':
            begun.append(len(spans))
            spans.append((event.start_ns, float('inf'), 'task', dict(event.stats)['_c']))
        elif kind == 'StopRegion':
            if begun:  # otherwise the task began before the trace
                i = begun.pop()
                spans[i] = (spans[i][0], event.start_ns, *spans[i][2:])
        elif kind == 'Record':
            spans.append((event.start_ns, event.start_ns, 'record', dict(event.stats)['_p']))
        elif not event.name.startswith('end: '):
            stats = dict(event.stats)
            if stats.get('hlo_module') == module:
                spans.append((event.start_ns, event.end_ns, 'instruction', stats['hlo_op']))
    last = max((event.start_ns for event in events), default=0.0)
    ends: list[float] = []
    for begin, end, what, value in sorted(spans, key=lambda span: (span[0], -span[1])):
        while ends and (ends[-1] < begin or (ends[-1] == begin and what != 'record')):
            yield ends.pop(), thread, 'end', None
        yield begin, thread, what, value
        if what != 'record':
            ends.append(min(end, ends[-1] if ends else last))
    while ends:
        yield ends.pop(), thread, 'end', None


def traced(run: Callable[[], Any], module: str) -> list[Action]:
    """Returns the actions of all threads while `run` runs the compiled `module` once."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix='layers_') as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        threads = enumerate(line for plane in planes for line in plane.lines)
        each = [list(actions_of_thread(i, list(line.events), module)) for i, line in threads]
    return list(heapq.merge(*each, key=lambda action: action[0]))


def rows_of(actions: list[Action], program: Program, product: float, bandwidth: float) -> list[dict[str, Any]]:
    """Returns the table's rows: seconds, FLOPs, bytes and minimum seconds of each part, forward and backward.

    Args:
      product: FLOP/s of the machine.
      bandwidth: bytes/s of the machine.
    """
    executed = collections.Counter(value for _, _, what, value in actions if what == 'instruction')
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, nanoseconds in time_by_instruction(actions).items():
        part, direction = ('idle', 'forward') if name is None else program.part(name)
        empty = {'part': part, 'pass': direction, 'seconds': 0.0, 'flops': 0, 'bytes': 0, 'least_seconds': 0.0}
        row = rows.setdefault((part, direction), empty)
        row['seconds'] += nanoseconds / 1e9
        if name is not None:
            flops, size = executed[name] * program.flops(name), executed[name] * program.bytes(name)
            row['flops'] += flops
            row['bytes'] += size
            row['least_seconds'] += max(flops / product, size / bandwidth)
    return sorted(rows.values(), key=lambda row: (*_place(row['part']), row['pass'] == 'backward'))


def _place(part: str) -> tuple[int, int]:
    layer, _, step = part.partition('/')
    return ORDER.index(layer), ('', *STEPS, 'copies').index(step)


def kind(part: str) -> str:
    """Returns the kind of operation of a part, regardless of its layer."""
    layer, _, step = part.partition('/')
    return step or ('convolutions' if layer.startswith('conv') else 'products' if layer.startswith('fc') else layer)


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums the rows over layers and passes, by kind; the longest time first."""
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        total = sums.setdefault(kind(row['part']), {'part': kind(row['part']), 'pass': ''})
        for name in ('seconds', 'flops', 'bytes', 'least_seconds'):
            total[name] = total.get(name, 0) + row[name]
    return sorted(sums.values(), key=lambda row: -row['seconds'])


def machine_rates() -> tuple[float, float]:
    """Measures the FLOP/s of a product of large matrices and the bytes/s of adding large arrays."""
    import jax
    import jax.numpy as jnp

    def seconds(function: Callable[..., Any], *arrays: Any) -> float:
        compiled, times = jax.jit(function), []
        for _ in range(4):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    matrices = [jnp.ones((size, size)) for size in PRODUCT_SIZES]
    arrays = jnp.ones(ADDED), jnp.zeros(ADDED)
    product = max(2 * len(matrix) ** 3 / seconds(lambda a: a @ a, matrix) for matrix in matrices)
    return product, 3 * arrays[0].nbytes / seconds(lambda a, b: a + b, *arrays)


def profile(name: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Returns the results for --json of the pass `name`."""
    from alexnet_jax.runtime import backend

    backend.configure_cpu_backend()
    import jax

    from benchmarks.project import Project, paper_config

    project = Project(paper_config(batch_size))
    if name == 'train':
        project.train_step = compiled = project.train_step.lower(*project.train_arguments).compile()
        run = project.train
    else:
        project.eval_step = compiled = project.eval_step.lower(*project.eval_arguments).compile()
        run = project.forward
    program = Program(compiled.as_text())
    for _ in range(2):
        run()
    rates, traces = [machine_rates()], []
    for _ in range(rounds):
        traces.append(traced(run, program.module))
        rates.append(machine_rates())
    product, bandwidth = map(max, zip(*rates, strict=True))
    tables = [rows_of(trace, program, product, bandwidth) for trace in traces]
    rows = sorted(tables, key=lambda rows: sum(row['seconds'] for row in rows))[(rounds - 1) // 2]
    totals = {total: sum(row[total] for row in rows) for total in ('seconds', 'flops')}
    speeds = {'product_flops_per_second': product, 'bytes_per_second': bandwidth}
    result = {'pass': name, 'batch_size': batch_size, **totals, **speeds, 'rows': rows, 'kinds': by_kind(rows)}
    return result | {'versions': {'jax': jax.__version__}}


def report(result: dict[str, Any]) -> str:
    """Formats the tables as text."""
    total, product, bandwidth = (result[n] for n in ('seconds', 'product_flops_per_second', 'bytes_per_second'))
    lines = [
        f'{result["machine"]}; jax {result["versions"]["jax"]}',
        f'{result["pass"]}, batch {result["batch_size"]}, float32',
        f'{total:.3f} s, {result["batch_size"] / total:.1f} images/s, {result["flops"] / total / 1e9:.0f} GFLOP/s;'
        f' the machine: products {product / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s',
    ]
    for rows in (result['rows'], result['kinds']):
        table = [('part', '', 'ms', 'share', 'GFLOP/s', 'MB', 'GB/s', 'least', 'of it')]
        for row in rows:
            seconds, size, least = max(row['seconds'], 1e-9), row['bytes'], row['least_seconds']
            flops = f'{row["flops"] / seconds / 1e9:.0f}' if row['flops'] else ''
            traffic = f'{size / 1e6:.0f}', f'{size / seconds / 1e9:.1f}', f'{least * 1e3:.1f}', f'{least / seconds:.2f}'
            share = f'{seconds * 1e3:.1f}', f'{seconds / total:.1%}'
            table.append((row['part'], row['pass'], *share, flops, *(traffic if size else ('',) * 4)))
        lines += ['', *runner.text_table(*table)]
    return '\n'.join(lines)


def main() -> None:
    """Profiles the requested pass and prints the table."""
    parser = runner.make_parser(__doc__, 3)
    parser.add_argument('--pass', choices=('train', 'forward'), default='train', dest='name')
    parser.add_argument('--batch_size', type=runner.positive, default=128)
    arguments = parser.parse_args()
    os.environ |= runner.NO_GPU
    runner.print_result(profile(arguments.name, arguments.batch_size, arguments.rounds), report, arguments.json)


if __name__ == '__main__':
    main()
