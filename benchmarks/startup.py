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
  data     opening the prepared data set
  restore  finding, reading and checking the newest checkpoint
  state    the initial state: tracing its program, and compiling it or reading it from the cache; the random numbers
           are drawn in parallel with the following stages
  trace    tracing and lowering the train step in JAX
  compile  compiling the train step or reading it from the cache
  step     the first train step itself, in memory never used before
  other    the rest: the mesh, files of the run, the wait for the first batch
"""

import json
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import pictures, runner

LAUNCH = os.path.join(runner.ROOT, 'launch.py')
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


def answer(flag: str) -> float:
    """Returns the seconds until launch.py with `flag` has ended."""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, LAUNCH, flag], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    output = run.stdout + run.stderr
    if 'Traceback' in output or ('--workdir' not in output and run.returncode != 2):
        runner.fail(f'launch.py {flag} ended with exit code {run.returncode}:\n{output}')
    return seconds


def trace_launch(arguments: list[str]) -> None:
    """Runs launch.py in a worker with `arguments`. Its answer is the seconds of its stages up to its first step."""
    start, answers = float(os.environ['STARTUP_BEGAN']), runner.open_answers()
    seconds, compiled = dict.fromkeys(STAGES, 0.0), 0.0
    from alexnet_jax.runtime import backend, console

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            begun = time.time()
            try:
                return function(*given, **named)
            finally:
                seconds[stage] += time.time() - begun

        return call

    def hook() -> None:
        """Replaces enable_compilation_cache(), the last call before the training libraries are imported."""
        enable_compilation_cache()
        import jax

        # Replaced where they are defined, before the training loop imports them by name.
        from alexnet_jax.data import open_or_prepare
        from alexnet_jax.training import checkpointing, state

        open_or_prepare.open_or_prepare = timed('data', open_or_prepare.open_or_prepare)
        state.init_state = timed('state', state.init_state)
        checkpointing.Checkpointer.restore = timed('restore', checkpointing.Checkpointer.restore)  # type: ignore[method-assign]
        jax.monitoring.register_event_duration_secs_listener(on_event)
        from alexnet_jax.training import trainer  # noqa: F401

        seconds['imports'] = time.time() - start

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
            print(json.dumps(seconds), file=answers, flush=True)

    enable_compilation_cache, write = backend.enable_compilation_cache, console.log
    backend.enable_compilation_cache, console.log = hook, on_log
    sys.argv = [LAUNCH, *arguments]
    runpy.run_path(LAUNCH, run_name='__main__')


def first_step(folder: str, cache: str, workdir: str, save: bool = False) -> dict[str, float]:
    """Returns the seconds of each stage to the end of a new process's first train step.

    Args:
      save: whether the run may write a checkpoint before it ends; otherwise it is killed.
    """
    command = [sys.executable, os.path.abspath(__file__), '--trace', f'--config={runner.ROOT}/configs/imagenet.py']
    command += [f'--config.data.source=folder:{folder}/pictures', f'--config.data.data_dir={folder}']
    command += ['--config.train.log_every=1 step', f'--workdir={workdir}']
    environment = {'XDG_CACHE_HOME': cache, 'STARTUP_BEGAN': repr(time.time())}
    with ExitStack() as stack:
        worker = runner.Worker('launch.py', command, environment, stack)
        if save:
            worker.terminate()
    return worker.about


def measure_starts(cases: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Returns the stages of each start, by case."""
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in STARTS if case in cases}
    if not runs:
        return runs
    with tempfile.TemporaryDirectory() as folder:
        pictures.make_pictures(f'{folder}/pictures', training=256, classes=1000, size=(256, 256))
        command = [sys.executable, '-m', 'alexnet_jax.prepare', f'--source=folder:{folder}/pictures']
        subprocess.run([*command, f'--data_dir={folder}'], cwd=runner.ROOT, check=True)
        resumed, warm = os.path.join(folder, 'resumed'), os.path.join(folder, 'warm')
        first_step(folder, warm, resumed, save='resumed' in runs)
        for _ in range(rounds):
            for case in runs:
                cache = os.path.join(folder, 'cold') if case == 'cold' else warm
                workdir = resumed if case == 'resumed' else os.path.join(folder, 'run')
                runs[case].append(first_step(folder, cache, workdir))
                for made in ('cold', 'run'):
                    shutil.rmtree(os.path.join(folder, made), ignore_errors=True)
    return runs


def report(result: dict[str, Any]) -> str:
    """Formats the tables as text."""
    versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items())
    targets = {case: f'{TARGETS[case]:.1f}' if case in TARGETS else '' for case in CASES}
    cases = [(case, f'{result[case]:.2f}', targets[case]) for case in CASES if case in result]
    lines = [f'{result["machine"]}; {versions}; medians of {result["rounds"]}, seconds', '']
    lines += runner.text_table(('', 'median', 'target'), *cases)
    stages = [(case, *(f'{found[stage]:.2f}' for stage in STAGES)) for case, found in result['stages'].items()]
    return '\n'.join([*lines, *(('', *runner.text_table(('', *STAGES), *stages)) if stages else ())])


def main() -> None:
    """Times the requested cases and prints the results."""
    if sys.argv[1:2] == ['--trace']:
        return trace_launch(sys.argv[2:])
    parser = runner.make_parser(__doc__, 3, '--cases', CASES)
    arguments = parser.parse_args()
    for name in ('COMPILATION_CACHE_DIR', 'ENABLE_COMPILATION_CACHE', 'PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
        os.environ.pop(f'JAX_{name}', None)
    versions = {'Python': platform.python_version()} | {name: version(name) for name in ('jax', 'jaxlib', 'flax')}
    result: dict[str, Any] = {'rounds': arguments.rounds, 'versions': versions, 'stages': {}}
    for case in arguments.cases:
        if case in ANSWERS:
            result[case] = statistics.median(answer(ANSWERS[case]) for _ in range(arguments.rounds))
    for case, runs in measure_starts(arguments.cases, arguments.rounds).items():
        result[case] = statistics.median(sum(run.values()) for run in runs)
        result['stages'][case] = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
    return runner.print_result(result, report, arguments.json)


if __name__ == '__main__':
    main()
