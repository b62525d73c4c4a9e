"""Measures the training loop's overhead on a CPU: images/s of launch.py beside the compiled step's, and checkpointing.

  python benchmarks/loop_overhead.py [--parts=quickstart,paper,checkpoint] [--rounds=N] [--json]

quickstart   launch.py as `make demo` starts it.
paper        launch.py with the full network, batch 128, and a store of 1,000 images of 256 pixels in 1,000 classes,
             made from crops of scikit-image's photographs.
             Both parts time the interval between two lines of metrics.jsonl, which includes reading, augmentation and
             logging. After each line launch.py waits for the next request. In turn with it, a second process calls the
             compiled step of the same configuration on one batch in memory, with two steps in flight, as in the loop.
             The waiting process is stopped. The ratio is the step's median time over launch.py's: 1 means a loop
             without overhead. The timed intervals contain no evaluation and no checkpoint. The quickstart uses four
             such pairs of processes.
checkpoint   steps of the full network while a checkpoint of its state (488 MB) is written. `saving` is the time from
             the call to the end of the writing. `held up` is the time until the weights are checked for finiteness and
             the state is copied, so that the next step can begin. `slowed down` is the extra time of the steps
             meanwhile, which share the cores with the writing. `memory` is the increase in the process's peak memory.
"""

import argparse
import contextlib
import datetime
import json
import os
import runpy
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.workers import NO_GPU, ROOT, Worker, machine, open_answers, serve

PARTS = ('quickstart', 'paper', 'checkpoint')
CONFIGS = {'quickstart': 'configs/quickstart.py', 'paper': 'configs/imagenet.py:paper'}
STEPS = {'quickstart': 50, 'paper': 5, 'checkpoint': 2}  # per round
ROUNDS = {'quickstart': 8, 'paper': 4, 'checkpoint': 3}
PAIRS = {'quickstart': 4, 'paper': 1}  # of processes; the memory layout changes a short step's time by 2 %
IMAGES, CLASSES, SIZE = 2000, 1000, 256
NEVER = '1000000000 steps'


def make_pictures(folder: str) -> None:
    """Writes JPEGs of random crops of the photographs to one folder per class in `folder`."""
    import numpy as np
    from PIL import Image

    from alexnet_jax.prepare.photos import PHOTOGRAPHS, photograph

    photographs, random = [Image.fromarray(photograph(name)) for name in PHOTOGRAPHS], np.random.default_rng(0)
    for i in range(IMAGES):
        image = photographs[i % len(photographs)]
        side = min(image.size) * random.uniform(0.5, 1)
        left, top = (random.uniform(0, length - side) for length in image.size)
        path = os.path.join(folder, f'{i % CLASSES:03d}')
        os.makedirs(path, exist_ok=True)
        part = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        part.save(os.path.join(path, f'{i}.jpg'), quality=90)


def overrides(part: str, folder: str) -> dict[str, Any]:
    """Returns the settings of `part` by dotted name, with its data in `folder`."""
    values: dict[str, Any] = {'data.data_dir': folder, 'train.log_every': f'{STEPS[part]} steps'}
    values |= {'train.stall_after': NEVER, 'eval.every': NEVER, 'checkpoint.every': NEVER}
    if part == 'paper':
        values |= {'data.source': f'folder:{folder}/pictures', 'data.validation_fraction': 0.5}
    return values


def configuration(part: str, folder: str) -> Any:
    """Returns the configuration that launch.py makes of the same flags."""
    from alexnet_jax.config import apply_overrides, preset_config, resolve
    from configs import quickstart

    config = quickstart.get_config() if part == 'quickstart' else preset_config('paper')
    apply_overrides(config, {} if part == 'checkpoint' else overrides(part, folder))
    config.mesh.data = 1
    return resolve(config)


def start(part: str, folder: str) -> tuple[None, Callable[[Any], Any]]:
    """Runs in a worker. Returns a function of a number of steps.

    The function returns the seconds of the steps or, for the part `checkpoint`, the figures of saving one checkpoint.
    """
    from alexnet_jax.runtime import backend

    config = configuration(part, folder)
    if config.cpu_tuning:
        backend.configure_cpu_backend()
    import jax

    from benchmarks.project import Project

    project = Project(config)
    _, *arguments = jax.device_put(project.train_arguments)
    previous: Any = None

    def step() -> None:
        nonlocal previous
        project.state, metrics = project.train_step(project.state, *arguments)
        jax.block_until_ready(previous)
        previous = metrics

    def seconds(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        jax.block_until_ready(project.state)
        return time.perf_counter() - begin

    if part != 'checkpoint':
        return None, seconds
    from alexnet_jax.training.checkpointing import Checkpointer
    from alexnet_jax.training.diagnostics import all_finite
    from alexnet_jax.training.run_state import RunState
    from benchmarks.memory import peak

    checkpoints, saved = Checkpointer(os.path.join(folder, 'checkpoints'), keep=1), 0

    def save(steps: int) -> dict[str, float]:
        nonlocal saved
        usual, saved = seconds(steps) / steps, saved + 1
        memory, begin = peak(), time.perf_counter()
        jax.device_get(all_finite(project.state.params))
        checkpoints.save(project.state, RunState(step=saved), None)
        held_up, ended = time.perf_counter() - begin, []
        writing = checkpoints.writing
        assert writing is not None
        writing.add_done_callback(lambda _: ended.append(time.perf_counter()))
        steps = 0
        while not ended:
            step()
            steps += 1
        jax.block_until_ready(project.state)
        slowed_down = time.perf_counter() - begin - held_up - steps * usual
        checkpoints.wait()
        found = {'saving': ended[0] - begin, 'held_up': held_up, 'slowed_down': slowed_down, 'step': usual}
        return found | {'memory': peak() - memory}

    return None, save


def launch(part: str, folder: str) -> None:
    """Runs launch.py in a worker. After each line of metrics.jsonl, it answers the seconds since the last request."""
    from alexnet_jax.training.metrics_file import JsonlWriter

    answers, begin, write = open_answers(), time.perf_counter(), JsonlWriter.write

    def write_and_wait(metrics: JsonlWriter, **values: Any) -> None:
        nonlocal begin
        write(metrics, **values)
        print(time.perf_counter() - begin, file=answers, flush=True)
        sys.stdin.readline()
        begin = time.perf_counter()

    JsonlWriter.write = write_and_wait  # type: ignore[method-assign, assignment]
    flags = [f'--config.{name}={value}' for name, value in overrides(part, folder).items()]
    sys.argv = ['launch.py', f'--config={ROOT}/{CONFIGS[part]}', f'--workdir={tempfile.mkdtemp(dir=folder)}', *flags]
    runpy.run_path(os.path.join(ROOT, 'launch.py'), run_name='__main__')


def measure(part: str, folder: str, rounds: int) -> dict[str, Any]:
    """Returns the results of a part."""
    command, steps = [sys.executable, os.path.abspath(__file__), f'--folder={folder}', f'--worker={part}'], STEPS[part]
    with contextlib.ExitStack() as stack:
        if part == 'checkpoint':
            saver = Worker(part, command, NO_GPU, stack)
            table = [saver.ask(steps) for _ in range(1 + rounds)]
            found = {name: statistics.median(row[name] for row in table[1:]) for name in table[0]}
            ratios = {f'{name}_share': found[name] / found['saving'] for name in ('held_up', 'slowed_down')}
            return (
                found | ratios | {'first_held_up': table[0]['held_up'], 'memory': max(row['memory'] for row in table)}
            )
        if part == 'paper':
            print('loop_overhead: making pictures', file=sys.stderr, flush=True)
            make_pictures(os.path.join(folder, 'pictures'))
        pairs = []
        for _ in range(PAIRS[part]):
            alone = Worker('step', command, NO_GPU, stack)
            alone.ask(steps)
            launched = Worker('launch.py', [*command, '--launch'], NO_GPU | {'JAX_NUM_CPU_DEVICES': '1'}, stack)
            pairs.append((launched, alone))
        table = [[side.ask(steps) for side in pair] for _ in range(rounds) for pair in pairs]
    of_loop, of_step = (statistics.median(column) for column in zip(*table, strict=True))
    images = steps * configuration(part, folder).train.batch_size
    speeds = {'images_per_second': images / of_loop, 'step_images_per_second': images / of_step}
    return speeds | {'ratio': of_step / of_loop, 'steps': steps * len(table)}


def report(result: dict[str, Any]) -> str:
    """Formats the tables as text."""
    lines = [result['machine'], '']
    if set(result['parts']) & set(CONFIGS):
        lines.append(f'{"":<12}{"steps":>8}{"launch.py, images/s":>22}{"step alone":>12}{"ratio":>8}')
    for part, found in result['parts'].items():
        if part in CONFIGS:
            row = f'{part:<12}{found["steps"]:>8}{found["images_per_second"]:>22,.1f}'
            lines.append(f'{row}{found["step_images_per_second"]:>12,.1f}{found["ratio"]:>8.3f}')
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', default=','.join(PARTS), help='which of %(default)s to measure')
    parser.add_argument('--rounds', type=int, help='timed, of each part')
    parser.add_argument('--json', action='store_true', help='one JSON object in place of the tables')
    parser.add_argument('--worker', choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument('--launch', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--folder', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch:
        return launch(arguments.worker, arguments.folder)
    if arguments.worker:
        return serve(lambda: start(arguments.worker, arguments.folder))
    parts = arguments.parts.split(',')
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f'--parts: there is no {", ".join(unknown)}; there are {", ".join(PARTS)}')
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error('--rounds is at least 1')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder below is removed
    result: dict[str, Any] = {'parts': {}, 'machine': machine(), 'date': datetime.date.today().isoformat()}
    with tempfile.TemporaryDirectory(prefix='loop_') as folder:
        for part in parts:
            result['parts'][part] = measure(part, folder, arguments.rounds or ROUNDS[part])
    print(json.dumps(result) if arguments.json else report(result))
    return None


if __name__ == '__main__':
    main()
