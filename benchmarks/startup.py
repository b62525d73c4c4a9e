"""Times how soon launch.py responds, and how long it runs to the end of the first train step of the `paper` preset.

    python benchmarks/startup.py [--rounds=3] [--cases=help,field,value,cold,warm,resumed] [--json]

Each case times new processes from their start, with Python's and the disk's caches warm:
  help     until launch.py --help has ended.
  field    until launch.py has rejected a nonexistent config field.
  value    until launch.py has rejected an invalid value of the network, which takes all checks of the config.
  cold     until the log has the line about the first step (configs/imagenet.py, batch 128, crop 224), with an empty
           compilation cache;
  warm     the same with the compilation cache of an earlier run;
  resumed  the same where the run resumes from a checkpoint, up to the end of its next step.
The last three cases train on 256 random images, with 1,000 classes, prepared beforehand. Their time has the stages
  imports  Python, the flags, and the imports of all training libraries
  data     opening the prepared store
  restore  finding, reading and checking the newest checkpoint
  state    the initial state: tracing its program, and compiling it or reading it from the cache; the random numbers
           are drawn in parallel with the following stages
  trace    tracing and lowering the train step in JAX
  compile  compiling the train step or reading it from the cache
  step     the first train step itself, in memory never used before
  other    the rest: the mesh, files of the run, the wait for the first batch
"""

import argparse
import contextlib
import json
import os
import platform
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAUNCH = os.path.join(ROOT, 'launch.py')
ANSWERS = {'help': '--help', 'field': '--config.optimizer.lr=3', 'value': '--config.model.towers=3'}
STARTS = ('cold', 'warm', 'resumed')
CASES = (*ANSWERS, *STARTS)
STAGES = ('imports', 'data', 'restore', 'state', 'trace', 'compile', 'step', 'other')
EVENTS = {  # of jax.monitoring, by the stage that they belong to
    'jaxpr_trace_duration': 'trace',
    'jaxpr_to_mlir_module_duration': 'trace',
    'backend_compile_duration': 'compile',
}
TARGETS = dict.fromkeys(ANSWERS, 1.5) | {'warm': 8.0}  # seconds
CLASSES, TRAINING, VALIDATION = 1000, 256, 32  # classes, and images of each split, at most one per class


def answer(flag: str) -> float:
    """Returns the seconds until launch.py with `flag` has ended."""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, LAUNCH, flag], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    said = run.stdout + run.stderr
    if 'Traceback' in said or ('--workdir' not in said and run.returncode != 2):
        sys.exit(f'startup: launch.py {flag} ended with {run.returncode}:\n{said}')
    return seconds


def make_store(folder: str) -> None:
    """Writes images of random pixels to `folder`, one folder per class, and prepares the store from them."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, images in (('train', TRAINING), ('val', VALIDATION)):
        for label in range(CLASSES):
            path = Path(folder, 'pictures', split, f'{label:04d}')
            path.mkdir(parents=True)
            if label < images:
                Image.fromarray(random.integers(0, 256, (256, 256, 3), np.uint8)).save(path / 'noise.jpg')
    command = [
        sys.executable,
        '-m',
        'alexnet_jax.prepare',
        f'--source=folder:{folder}/pictures',
        f'--data_dir={folder}',
    ]
    subprocess.run(command, cwd=ROOT, check=True)


def trace_launch(arguments: list[str]) -> None:
    """Runs launch.py with `arguments`, and prints the seconds of its stages as JSON when it logs a step."""
    start = float(os.environ['STARTUP_BEGAN'])
    seconds, compiled = dict.fromkeys(STAGES, 0.0), 0.0
    sys.path.insert(0, ROOT)
    from alexnet_jax.runtime import backend, console

    def timed(stage: str, function: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            begun = time.time()
            try:
                return function(*given, **named)
            finally:
                seconds[stage] += time.time() - begun

        return call

    def hook() -> None:
        """Replaces enable_compilation_cache(), the last call before training is imported."""
        enable_compilation_cache()
        import jax

        from alexnet_jax.training.trainer import Checkpointer, init_state, open_or_prepare

        seconds['imports'] = time.time() - start
        open_or_prepare = timed('data', open_or_prepare)
        init_state = timed('state', init_state)
        Checkpointer.restore = timed('restore', Checkpointer.restore)  # type: ignore[method-assign]
        jax.monitoring.register_event_duration_secs_listener(on_event)

    def on_event(event: str, duration_secs: float, **named: Any) -> None:
        nonlocal compiled
        stage = EVENTS.get(event.rsplit('/', 1)[-1])
        if stage and 'train_step' in str(named.get('fun_name')):
            seconds[stage] += duration_secs
            compiled = time.time()

    def on_log(message: str) -> None:
        write(message)
        if message.startswith('train ') and compiled:
            end = time.time()
            seconds['step'] = end - compiled
            seconds['other'] = end - start - sum(seconds.values())
            print(json.dumps(seconds), flush=True)

    enable_compilation_cache, write = backend.enable_compilation_cache, console.log
    backend.enable_compilation_cache, console.log = hook, on_log
    sys.argv = [LAUNCH, *arguments]
    runpy.run_path(LAUNCH, run_name='__main__')


def first_step(folder: str, cache: str, workdir: str, save: bool = False) -> dict[str, float]:
    """Returns the seconds of each stage to the end of a new process's first train step, and of all stages as `total`.

    Args:
      save: whether the run may write a checkpoint before it ends; otherwise it is killed.
    """
    settings = {
        'data.source': f'folder:{folder}/pictures',
        'data.data_dir': folder,
        'train.log_every': '1 step',
    }
    fields = [f'--config.{name}={value}' for name, value in settings.items()]
    command = [sys.executable, os.path.abspath(__file__), '--trace', f'--config={ROOT}/configs/imagenet.py']
    unset = ('JAX_COMPILATION_CACHE_DIR', 'JAX_ENABLE_COMPILATION_CACHE', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {'XDG_CACHE_HOME': cache, 'STARTUP_BEGAN': repr(time.time())}
    with tempfile.TemporaryFile('w+') as errors:
        process: Any = subprocess.Popen(
            [*command, f'--workdir={workdir}', *fields],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        start = time.perf_counter()
        try:
            line = process.stdout.readline()
            seconds = time.perf_counter() - start
            if save:
                process.send_signal(signal.SIGTERM)
                process.wait()
        finally:
            process.kill()
            process.wait()
        if not line:
            errors.seek(0)
            sys.exit(f'{errors.read()}\nstartup: the run ended with exit code {process.returncode}; see above')
    return json.loads(line) | {'total': seconds}


def measure_starts(cases: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Returns the stages of each start, by case."""
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in STARTS if case in cases}
    if not runs:
        return runs
    with tempfile.TemporaryDirectory() as folder:
        make_store(folder)
        resumed, warm = os.path.join(folder, 'resumed'), os.path.join(folder, 'warm')
        first_step(folder, warm, resumed, save='resumed' in runs)
        for _ in range(rounds):
            for case in runs:
                cache = os.path.join(folder, 'cold') if case == 'cold' else warm
                workdir = resumed if case == 'resumed' else os.path.join(folder, 'run')
                runs[case].append(first_step(folder, cache, workdir))
                for made in ('cold', 'run'):
                    with contextlib.suppress(FileNotFoundError):
                        shutil.rmtree(os.path.join(folder, made))
    return runs


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each stage by itself; the medians do not add up exactly to the median of the total."""
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def report(result: dict[str, Any]) -> str:
    """Formats the tables as text."""
    versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items())
    lines = [f'{result["processor"]}; {versions}; medians of {result["rounds"]}, seconds', '']
    lines += [f'{"":<10}{"median":>8}{"target":>8}']
    for case in CASES:
        if case in result:
            target = f'{TARGETS[case]:>8.1f}' if case in TARGETS else ''
            lines.append(f'{case:<10}{result[case]:>8.2f}{target}')
    if result['stages']:
        lines += ['', f'{"":<10}' + ''.join(f'{stage:>9}' for stage in STAGES)]
        for case, stages in result['stages'].items():
            lines.append(f'{case:<10}' + ''.join(f'{stages[stage]:>9.2f}' for stage in STAGES))
    return '\n'.join(lines)


def main() -> None:
    """Times the requested cases and prints the results."""
    if sys.argv[1:2] == ['--trace']:
        return trace_launch(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3, help='processes of each case')
    parser.add_argument('--cases', default=','.join(CASES), help='which of %(default)s to time')
    parser.add_argument('--json', action='store_true', help='one JSON object in place of the tables')
    arguments = parser.parse_args()
    cases = arguments.cases.split(',')
    if unknown := set(cases) - set(CASES):
        parser.error(f'--cases: there is no {", ".join(sorted(unknown))}; there are {", ".join(CASES)}')
    if arguments.rounds < 1:
        parser.error('--rounds is at least 1')
    sys.path.insert(0, ROOT)
    from importlib.metadata import version

    result: dict[str, Any] = {
        'rounds': arguments.rounds,
        'processor': f'{os.cpu_count()} cores, {processor()}',
        'versions': {
            'Python': platform.python_version(),
            **{name: version(name) for name in ('jax', 'jaxlib', 'flax')},
        },
    }
    for case, flag in ANSWERS.items():
        if case in cases:
            result[case] = statistics.median(answer(flag) for _ in range(arguments.rounds))
    stages = {case: medians(runs) for case, runs in measure_starts(cases, arguments.rounds).items()}
    result |= {case: found.pop('total') for case, found in stages.items()} | {'stages': stages}
    print(json.dumps(result) if arguments.json else report(result))
    return None


def processor() -> str:
    """Returns the name of the processor."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        name = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), name)
    return name


if __name__ == '__main__':
    main()
