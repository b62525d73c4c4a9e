"""Measures the training loop's overhead on a CPU: images/s of launch.py beside the compiled step's, and checkpointing.

  python benchmarks/loop_overhead.py [--parts=quickstart,paper,checkpoint] [--rounds=N] [--json]

quickstart   launch.py as `make demo` starts it.
paper        launch.py with the full network, batch 128, and 1,000 images of 256 pixels in 1,000 classes (pictures.py).
             Both parts time the interval between two lines of metrics.jsonl, which includes reading, augmentation and
             logging. After each line, launch.py waits for the next request. A second process takes turns with it and
             calls the compiled step of the same configuration on one batch in memory, with two steps in flight, as in
             the loop. The waiting process is stopped. The ratio is the step's median time over launch.py's: 1 means a
             loop without overhead. The timed intervals contain no evaluation and no checkpoint. The quickstart uses
             four such pairs of processes.
checkpoint   steps of the full network while a checkpoint of its state (488 MB) is written. `saving` is the time from
             the call to the end of the writing. `held up` is the time until the weights are checked for finiteness and
             the state is copied, so that the next step can begin. `slowed down` is the extra time of the steps
             meanwhile, which share the cores with the writing. `memory` is the increase in the process's peak memory.
"""

import argparse
import contextlib
import os
import runpy
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import pictures, runner

if TYPE_CHECKING:  # launch.py is timed from its first import
    from alexnet_jax.config import Config
    from benchmarks.project import Project

PARTS = ('quickstart', 'paper', 'checkpoint')
CONFIGS = {'quickstart': 'configs/quickstart.py', 'paper': 'configs/imagenet.py:paper'}
STEPS = {'quickstart': 50, 'paper': 5, 'checkpoint': 2}  # per round
ROUNDS = {'quickstart': 8, 'paper': 4, 'checkpoint': 3}
PAIRS = {'quickstart': 4, 'paper': 1}  # of processes; the memory layout changes a short step's time by 2 %
NEVER = '1000000000 steps'


def overrides(part: str, folder: str) -> dict[str, Any]:
    """Returns the settings of `part` by dotted name, with its data in `folder`."""
    values: dict[str, Any] = {'data.data_dir': folder, 'train.log_every': f'{STEPS[part]} steps'}
    values |= {'train.stall_after': NEVER, 'eval.every': NEVER, 'checkpoint.every': NEVER}
    return values | ({'data.source': f'folder:{folder}/pictures'} if part == 'paper' else {})


def configuration(part: str, folder: str) -> 'Config':
    """Returns the configuration of launch.py with the flags of `part`."""
    from alexnet_jax.config import apply_overrides, preset_config, resolve
    from configs import quickstart

    config = quickstart.get_config() if part == 'quickstart' else preset_config('paper')
    apply_overrides(config, {} if part == 'checkpoint' else overrides(part, folder))
    config.mesh.data = 1
    return resolve(config)


class Loop:
    """Calls the train step on one batch as the training loop does, with two steps in flight."""

    def __init__(self, project: 'Project'):
        import jax

        self.project = project
        self.previous: dict[str, jax.Array] | None = None  # metrics of the step before
        _, *self.arguments = jax.device_put(project.train_arguments)

    def step(self) -> None:
        """Begins a step, and waits until the step before it has ended."""
        import jax

        self.project.state, metrics = self.project.train_step(self.project.state, *self.arguments)
        jax.block_until_ready(self.previous)
        self.previous = metrics

    def seconds(self, steps: int) -> float:
        """Returns the seconds of `steps` steps."""
        import jax

        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        jax.block_until_ready(self.project.state)
        return time.perf_counter() - begin


def checkpoint_figures(loop: Loop, folder: str) -> Callable[[int], dict[str, float]]:
    """Returns a function that times a number of steps, then saves a checkpoint and returns the figures listed above."""
    import jax

    from alexnet_jax.training.checkpointing import Checkpointer
    from alexnet_jax.training.diagnostics import all_finite
    from alexnet_jax.training.run_state import RunState

    checkpoints, saved = Checkpointer(os.path.join(folder, 'checkpoints'), keep=1), 0

    def save(steps: int) -> dict[str, float]:
        nonlocal saved
        usual, saved = loop.seconds(steps) / steps, saved + 1
        memory, begin = runner.peak_memory(), time.perf_counter()
        jax.device_get(all_finite(loop.project.state.params))
        checkpoints.save(loop.project.state, RunState(step=saved), None)
        held_up, ended = time.perf_counter() - begin, []
        writing = checkpoints.writing
        assert writing is not None
        writing.add_done_callback(lambda _: ended.append(time.perf_counter()))
        steps = 0
        while not ended:
            loop.step()
            steps += 1
        jax.block_until_ready(loop.project.state)
        slowed_down = time.perf_counter() - begin - held_up - steps * usual
        checkpoints.wait()
        found = {'saving': ended[0] - begin, 'held_up': held_up, 'slowed_down': slowed_down, 'step': usual}
        return found | {'memory': runner.peak_memory() - memory}

    return save


def start(part: str, folder: str) -> tuple[None, Callable[[int], Any]]:
    """Runs in a worker. Returns a function from a number of steps to seconds, or to the figures of a checkpoint."""
    from alexnet_jax.runtime import backend

    config = configuration(part, folder)
    if config.cpu_tuning:
        backend.configure_cpu_backend()
    from benchmarks.project import Project

    loop = Loop(Project(config))
    return None, checkpoint_figures(loop, folder) if part == 'checkpoint' else loop.seconds


def launch(part: str, folder: str) -> None:
    """Runs launch.py in a worker. After each line of metrics.jsonl, it answers the seconds since the last request."""
    from alexnet_jax.training.metrics_logger import JsonlWriter

    answers, begin, write = runner.open_answers(), time.perf_counter(), JsonlWriter.write

    def write_and_wait(metrics: JsonlWriter, **values: Any) -> None:
        nonlocal begin
        write(metrics, **values)
        print(time.perf_counter() - begin, file=answers, flush=True)
        sys.stdin.readline()
        begin = time.perf_counter()

    JsonlWriter.write = write_and_wait  # type: ignore[method-assign, assignment]
    flags = [f'--config.{name}={value}' for name, value in overrides(part, folder).items()]
    config = f'--config={runner.ROOT}/{CONFIGS[part]}'
    sys.argv = ['launch.py', config, f'--workdir={tempfile.mkdtemp(dir=folder)}', *flags]
    runpy.run_path(os.path.join(runner.ROOT, 'launch.py'), run_name='__main__')


def measure_checkpoint(folder: str, rounds: int) -> dict[str, float]:
    """Returns the figures of the part `checkpoint`; the first checkpoint counts only for its delay and memory."""
    with contextlib.ExitStack() as stack:
        worker = runner.Worker(
            'checkpoint', runner.command_of('checkpoint', f'--folder={folder}'), runner.NO_GPU, stack
        )
        (table,) = runner.take_turns([worker], STEPS['checkpoint'], 1 + rounds)
    found = {name: statistics.median(row[name] for row in table[1:]) for name in table[0]}
    found |= {f'{name}_share': found[name] / found['saving'] for name in ('held_up', 'slowed_down')}
    return found | {'first_held_up': table[0]['held_up'], 'memory': max(row['memory'] for row in table)}


def measure(part: str, folder: str, rounds: int) -> dict[str, float]:
    """Returns images/s of launch.py and of the step alone, and their ratio."""
    command, one_device = runner.command_of(part, f'--folder={folder}'), {'JAX_NUM_CPU_DEVICES': '1'}
    if part == 'paper':
        pictures.make_pictures(f'{folder}/pictures', training=1000, classes=1000, size=(256, 256))
    times: list[list[float]] = [[], []]
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(PAIRS[part]):
            alone = runner.Worker('the step', command, runner.NO_GPU, stack)
            alone.ask(STEPS[part])
            pairs.append((runner.Worker('launch.py', [*command, '--launch'], runner.NO_GPU | one_device, stack), alone))
        for _ in range(rounds):
            for pair in pairs:
                for seconds, side in zip(times, pair, strict=True):
                    seconds.append(side.ask(STEPS[part]))
    of_loop, of_step = map(statistics.median, times)
    images = STEPS[part] * configuration(part, folder).train.batch_size
    speeds = {'images_per_second': images / of_loop, 'step_images_per_second': images / of_step}
    return speeds | {'ratio': of_step / of_loop, 'steps': STEPS[part] * len(times[0])}


def report(result: dict[str, Any]) -> str:
    """Formats the tables as text."""
    rows = [('', 'steps', 'launch.py, images/s', 'the step alone', 'ratio')]
    for part, found in result['parts'].items():
        if part in CONFIGS:
            speeds = found['images_per_second'], found['step_images_per_second']
            rows.append((part, f'{found["steps"]}', *(f'{speed:,.1f}' for speed in speeds), f'{found["ratio"]:.3f}'))
    lines = [result['machine'], *(('', *runner.text_table(*rows)) if rows[1:] else ())]
    if found := result['parts'].get('checkpoint'):
        lines += [
            '',
            f'a checkpoint: {found["saving"]:.2f} s; training held up {found["held_up"]:.4f} s'
            f' ({found["held_up_share"]:.2%}; the first {found["first_held_up"]:.3f} s), steps slowed down'
            f' {found["slowed_down"]:.2f} s ({found["slowed_down_share"]:.1%}); a step {found["step"]:.2f} s;'
            f' {found["memory"] / 1e6:,.0f} MB more at its peak',
        ]
    return '\n'.join(lines)


def main() -> None:
    """Measures the requested parts and prints the results."""
    parser = runner.make_parser(__doc__, None, '--parts', PARTS)
    parser.add_argument('--launch', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--folder', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch:
        return launch(arguments.worker, arguments.folder)
    if arguments.worker:
        return runner.serve(lambda: start(arguments.worker, arguments.folder))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder below is removed
    result: dict[str, Any] = {'parts': {}}
    with tempfile.TemporaryDirectory(prefix='loop_') as folder:
        for part in arguments.parts:
            rounds = arguments.rounds or ROUNDS[part]
            figures = measure_checkpoint(folder, rounds) if part == 'checkpoint' else measure(part, folder, rounds)
            result['parts'][part] = figures
    return runner.print_result(result, report, arguments.json)


if __name__ == '__main__':
    main()
