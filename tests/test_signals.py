"""Signals of terminals and schedulers: a run saves a checkpoint and exits with 75, other commands end in one line."""

import itertools
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, environment, read_result, run_command, start_command, training_command, wait_for
from PIL import Image
from small_runs import make_run, small_config

from alexnet_jax.data.open_or_prepare import open_or_prepare
from alexnet_jax.inference import trained_model
from alexnet_jax.runtime.checkpoint_ref import parse_checkpoint_ref
from alexnet_jax.runtime.preemption import PREEMPTION_SIGNALS

pytestmark = pytest.mark.usefixtures('compiled_programs')
SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 = PREEMPTION_SIGNALS


def training(data_dir: str, workdir: Path, *overrides: str) -> list[str]:
    """Returns the command of a run that does not end by itself, without evaluations and checkpoints."""
    endless = {'train.steps': 10**6, 'eval.every': 10**6, 'checkpoint.every': 10**6}
    return training_command(data_dir, workdir, endless | {'optimizer.schedule': 'constant'}, *overrides)


def wait_for_training(process: subprocess.Popen, workdir: Path) -> None:
    """Waits until the run has taken its first step."""
    metrics = workdir / 'metrics.jsonl'
    wait_for(lambda: (metrics.exists() and metrics.stat().st_size) or process.poll() is not None, 240)
    assert process.poll() is None


def assert_saved(workdir: Path) -> int:
    """Asserts that the newest checkpoint is that of the step at which the run was preempted; returns the step."""
    result = read_result(workdir)
    step = result['step']
    assert result['status'] == 'preempted'
    assert step >= 1
    assert (workdir / 'checkpoints' / str(step)).is_dir()
    return step


@pytest.mark.slow
@pytest.mark.parametrize('numbers', [(SIGHUP, SIGHUP, SIGTERM), (SIGUSR1, SIGTERM, SIGINT), (SIGUSR2, SIGUSR2)])
def test_signals_save_a_checkpoint(photos_dir, tmp_path, numbers):
    process = start_command(*training(photos_dir, tmp_path / 'run'))
    wait_for_training(process, tmp_path / 'run')
    for number in numbers:
        process.send_signal(number)
    log = process.communicate(timeout=120)[1]
    assert process.returncode == 75, log
    assert_saved(tmp_path / 'run')
    # Of signals that arrive at the same time, Python handles the one with the lowest number first.
    assert any(f' {number.name}: saving before the exit' in log for number in numbers), log
    assert log.count('saving before the exit') == 1
    assert 'Traceback' not in log


@pytest.mark.slow
def test_ctrl_c_under_tee_saves_a_checkpoint_and_the_run_resumes(photos_dir, tmp_path):
    """The terminal sends SIGINT to the whole pipeline, and tee ends first."""
    command = [sys.executable, *training(photos_dir, tmp_path / 'run')]
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
    )
    tee = subprocess.Popen(
        ['tee', tmp_path / 'log'], stdin=run.stdout, stdout=subprocess.DEVNULL, process_group=run.pid
    )
    run.stdout.close()
    wait_for_training(run, tmp_path / 'run')
    run.send_signal(signal.SIGSTOP)
    os.killpg(run.pid, SIGINT)
    assert tee.wait(60) == -SIGINT
    run.send_signal(signal.SIGCONT)
    assert run.wait(120) == 75
    step = assert_saved(tmp_path / 'run')
    resumed = run_command(*training(photos_dir, tmp_path / 'run', f'--config.train.steps={step + 2}'))
    assert resumed.returncode == 0, resumed.stderr
    assert f'resuming {tmp_path}/run at step {step} of {step + 2}' in resumed.stderr
    whole = run_command(*training(photos_dir, tmp_path / 'whole', f'--config.train.steps={step + 2}'))
    assert whole.returncode == 0, whole.stderr
    results = [read_result(tmp_path / name) for name in ('run', 'whole')]
    assert results[0]['state_digest'] == results[1]['state_digest']
    assert results[0]['views'] == results[1]['views']


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('setsid') is None, reason='setsid is not installed')
def test_lost_terminal_saves_a_checkpoint(photos_dir, tmp_path):
    """When a terminal is closed, the kernel sends SIGHUP to the session that it controls, and writing to it fails."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    command = ['setsid', '--ctty', sys.executable, *training(photos_dir, tmp_path / 'run')]
    run = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    wait_for_training(run, tmp_path / 'run')
    os.close(master)
    assert run.wait(120) == 75
    assert_saved(tmp_path / 'run')


@pytest.mark.parametrize('number', [SIGTERM, SIGINT, SIGHUP, SIGUSR1])
@pytest.mark.parametrize('command', [['launch.py'], ['-m', 'alexnet_jax', 'predict', 'run']])
def test_signal_during_the_imports_ends_the_process_without_a_traceback(tmp_path, command, number):
    """Nobody reads the times of the imports, so the process waits in one of them once the pipe is full."""
    process = start_command('-X', 'importtime', *command)
    while ' absl' not in (line := process.stderr.readline()):
        assert line
    process.send_signal(number)
    log = process.communicate(timeout=60)[1]
    assert process.returncode == -number
    assert all(line.startswith('import time:') for line in log.splitlines()[:-1]), log  # the last one is incomplete


@pytest.fixture(scope='module')
def many_images(tmp_path_factory) -> Path:
    """A folder of so many images that no machine prepares them before a signal arrives."""
    folder = tmp_path_factory.mktemp('many')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)).save(folder / 'image.jpg')
    for label, i in itertools.product('ab', range(4000)):
        (folder / 'images' / label).mkdir(parents=True, exist_ok=True)
        os.link(folder / 'image.jpg', folder / 'images' / label / f'{i}.jpg')
    return folder / 'images'


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'begun'), [(SIGINT, False), (SIGINT, True), (SIGHUP, True), (SIGUSR1, True)])
def test_signal_while_data_are_prepared_ends_both_processes(many_images, tmp_path, number, begun):
    """The terminal sends the signal to launch.py and its child process, which imports modules or has begun."""
    data = [f'--config.data.source=folder:{many_images}', '--config.model.num_classes=2']
    run = start_command(*training(str(tmp_path), tmp_path / 'run', *data), start_new_session=True)
    if begun:
        wait_for(lambda: run.poll() is not None or list(tmp_path.glob('prepared/*.incomplete/plan.json')))
    else:
        listing = ['ps', '-o', 'args=', '--ppid', str(run.pid)]
        wait_for(lambda: b'alexnet_jax.prepare' in subprocess.run(listing, capture_output=True).stdout)
    os.killpg(run.pid, number)
    log = run.communicate(timeout=60)[1]
    assert run.returncode == 75, log
    assert 'Traceback' not in log
    assert 'stopped while preparing the data set; run the same command again to resume' in log
    wait_for(lambda: not group_exists(run.pid), 30)


def group_exists(group: int) -> bool:
    """Returns whether a process group has processes."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


HANDLER = """
import os, signal, sys
from alexnet_jax.runtime.console import begin_command
from alexnet_jax.runtime.preemption import PreemptionHandler
begin_command()
with PreemptionHandler(ignore_afterwards=True) as preemption:
    print('ready', flush=True)
    for line in sys.stdin:
        print(preemption.requested and preemption.received.name, flush=True)
        if line == 'end\\n':
            break
print('ended', flush=True)
sys.stdin.readline()
sys.exit(75)
"""


class Handler:
    """A process in a PreemptionHandler's context."""

    def __init__(self, *prefix: str):
        self.process = subprocess.Popen(
            [*prefix, sys.executable, '-c', HANDLER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == 'ready\n'

    def noticed(self, line: str = 'go') -> str:
        """Returns the name of the signal that the process has noticed, or 'False'."""
        self.process.stdin.write(f'{line}\n')
        self.process.stdin.flush()
        return self.process.stdout.readline().rstrip()

    def end(self) -> tuple[int, str]:
        """Returns the exit code and the standard error."""
        log = self.process.communicate('\n' if self.process.poll() is None else None, timeout=60)[1]
        return self.process.returncode, log


@pytest.mark.parametrize('first', PREEMPTION_SIGNALS)
def test_only_a_second_ctrl_c_ends_a_preempted_process(first):
    handler = Handler()
    assert handler.noticed() == 'False'
    others = [number for number in PREEMPTION_SIGNALS if number != SIGINT]
    for number in (first, *others, *others, *([SIGINT] if first != SIGINT else [])):
        handler.process.send_signal(number)
        assert handler.noticed() == first.name
    handler.process.send_signal(SIGINT)
    code, log = handler.end()
    assert code == -SIGINT
    assert f' {first.name}: saving before the exit' in log
    assert ('a second Ctrl-C' in log) == (first == SIGINT)
    assert log.count('\n') == 1


def test_signals_after_the_end_do_not_change_the_exit_code():
    handler = Handler()
    assert handler.noticed('end') == 'False'
    assert handler.process.stdout.readline() == 'ended\n'
    for number in PREEMPTION_SIGNALS:
        handler.process.send_signal(number)
    assert handler.end() == (75, '')


def test_nohup_keeps_sighup_ignored():
    handler = Handler('nohup')
    handler.process.send_signal(SIGHUP)
    assert handler.noticed() == 'False'
    handler.process.send_signal(SIGTERM)
    assert handler.noticed() == 'SIGTERM'
    assert handler.end()[0] == 75


@pytest.fixture(scope='module')
def untrained(photos_dir, tmp_path_factory) -> str:
    return make_run(tmp_path_factory.mktemp('untrained') / 'run', small_config(photos_dir))


@pytest.mark.slow
def test_ctrl_c_ends_predict_in_one_line(untrained, tmp_path):
    """The signal arrives while the command classifies ten thousand images."""
    Image.new('RGB', (400, 400)).save(tmp_path / 'image.png')
    process = start_command('-m', 'alexnet_jax', 'predict', untrained, *[tmp_path / 'image.png'] * 10_000)
    model = process.stderr.readline()
    assert '16 classes' in model
    process.send_signal(SIGINT)
    log = process.communicate(timeout=60)[1]
    assert (process.returncode, log) == (130, 'alexnet_jax: stopped\n')


@pytest.mark.slow
def test_ctrl_c_while_an_existing_data_set_is_opened_is_not_lost(untrained, monkeypatch):
    def interrupted(*arguments):
        signal.raise_signal(SIGINT)
        return open_or_prepare(*arguments)

    signal.signal(SIGINT, signal.default_int_handler)  # SIGINT is ignored when tests run in the background.
    monkeypatch.setattr(trained_model, 'open_or_prepare', interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained_model.open_eval_dataset([parse_checkpoint_ref(untrained)], None)


INTERRUPTED = """
import signal
from alexnet_jax import cli
from alexnet_jax.runtime.console import begin_command
class Destroyed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def raised():
    signal.raise_signal(signal.SIGINT)
def in_a_destructor():
    Destroyed()
    return 0
def caught():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        return 0
def converted():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        raise ValueError from None
def not_interrupted():
    return 3
begin_command()
cli.run(lambda argv: globals()[argv[1]](), max_arguments=1, interrupted='stopped here')
"""


@pytest.mark.parametrize(
    ('case', 'code'),
    [('raised', 130), ('in_a_destructor', 130), ('caught', 130), ('converted', 130), ('not_interrupted', 3)],
)
def test_ctrl_c_ends_commands_with_130_wherever_it_arrives(case, code):
    run = run_command('-c', INTERRUPTED, case)
    assert (run.returncode, run.stdout, run.stderr) == (code, '', 'alexnet_jax: stopped here\n' * (code == 130))
