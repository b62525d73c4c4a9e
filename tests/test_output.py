"""Standard output and standard error that are closed, full, lost or not UTF-8: real pipes, devices and terminals."""

import fcntl
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from helpers import ROOT, environment, read_lines, read_result, run_command, training_command, usage_error, wait_for

pytestmark = pytest.mark.usefixtures('compiled_programs')
STEPS = 4
UNBUFFERED = [{}, {'PYTHONUNBUFFERED': '1'}]
SWEEP_LIST = ['launch.py', '--config=ablations:photos', '--sweep=list', '--workdir=w']


def training(data_dir: str, workdir: Path, *overrides: str) -> list[str]:
    """Returns the command of a small run of a few steps."""
    return training_command(data_dir, workdir, {'train.steps': STEPS, 'checkpoint.every': 2}, *overrides)


def shell(command: list[str], rest: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python with the arguments `command` in bash, followed by redirections or pipes, and returns its exit code.

    The exit code is that of the command, not that of the end of the pipe.
    """
    line = f'{shlex.join([sys.executable, *command])} {rest}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ['bash', '-c', line], cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope='module')
def trained(photos_dir, tmp_path_factory) -> Path:
    """A run whose output is read."""
    workdir = tmp_path_factory.mktemp('trained') / 'run'
    run = run_command(*training(photos_dir, workdir))
    assert run.returncode == 0, run.stderr
    return workdir


def assert_equal_runs(workdir: Path, expected: Path) -> None:
    """Digest, evaluation and recorded losses are equal."""
    result, other = read_result(workdir), read_result(expected)
    assert {name: result[name] for name in ('status', 'step', 'state_digest', 'views')} == {
        name: other[name] for name in ('status', 'step', 'state_digest', 'views')
    }
    losses = [
        [(row['step'], row['loss']) for row in read_lines(folder / 'metrics.jsonl')] for folder in (workdir, expected)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('rest', 'variables'),
    [
        ('2>&1 | head -1', {}),
        ('2>/dev/full >/dev/full', {'PYTHONUNBUFFERED': '1'}),
        ('0>&- >&- 2>&-', {}),
    ],
)
def test_lost_output_changes_nothing_about_a_run(trained, photos_dir, tmp_path, rest, variables):
    run = shell(training(photos_dir, tmp_path / 'run'), rest, **variables)
    assert run.returncode == 0, run.stderr
    assert_equal_runs(tmp_path / 'run', trained)


@pytest.mark.slow
def test_lost_terminal_changes_nothing_about_a_run(trained, photos_dir, tmp_path):
    """The progress bar is on a terminal that is closed during the run. It is not the terminal that controls the run."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    command = [sys.executable, *training(photos_dir, tmp_path / 'run')]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=slave, stderr=slave)
    os.close(slave)
    shown = b''
    while b'train' not in shown:
        shown += os.read(master, 1000)
    os.close(master)
    assert process.wait(300) == 0
    assert_equal_runs(tmp_path / 'run', trained)


@pytest.mark.slow
@pytest.mark.parametrize('encoding', ['ascii', 'latin-1:strict', 'cp1252', 'utf-16', None])
def test_characters_outside_the_encoding_are_escaped(trained, tmp_path, encoding):
    """The result of a finished run is printed again from a folder with such a name."""
    folder = tmp_path / 'my run ü π'
    folder.symlink_to(trained)
    variables = {'PYTHONIOENCODING': encoding} if encoding else {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0'}
    settings = json.loads((trained / 'config.json').read_text())
    command = training(settings['data']['data_dir'], folder)
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(**variables), capture_output=True)
    assert run.returncode == 0, run.stderr
    charset = (encoding or 'utf-8').split(':')[0]
    out = run.stdout.decode(charset)
    shown = 'my run ü π'.encode(charset, 'backslashreplace').decode(charset)
    assert f'{tmp_path}/{shown} is done' in out
    assert run.stderr == b''


@pytest.mark.parametrize('variables', UNBUFFERED)
@pytest.mark.parametrize(
    'command',
    [
        SWEEP_LIST,
        ['-m', 'alexnet_jax'],
        ['-m', 'alexnet_jax', '--version'],
        ['launch.py', '--help'],
        ['-m', 'alexnet_jax', 'predict', '--help'],
    ],
)
def test_closed_pipe_ends_a_listing_silently(command, variables):
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(**variables), stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b'')


@pytest.mark.parametrize('variables', UNBUFFERED)
@pytest.mark.parametrize('command', [SWEEP_LIST, ['-m', 'alexnet_jax', 'report', '--help']])
def test_full_disk_under_a_listing_is_one_line(command, variables):
    run = shell(command, '>/dev/full', **variables)
    message = 'alexnet_jax: standard output cannot be written: No space left on device\n'
    assert (run.returncode, run.stderr) == (1, message)


def test_first_lines_of_a_listing_are_complete():
    run = shell(SWEEP_LIST, '| head -2')
    assert re.fullmatch(r' +0  .*\n +1  .*\n', run.stdout)
    assert (run.returncode in (0, 141), run.stderr) == (True, '')


@pytest.mark.slow
def test_predictions_end_with_the_reader(trained, tmp_path):
    """Of endless images, the command classifies one batch or two."""
    for i in range(300):
        (tmp_path / f'{i}.bmp').symlink_to(tmp_path / 'image.bmp')
    pixels = bytes(range(256)) * 48
    header = b'BM' + (54 + len(pixels)).to_bytes(4, 'little') + bytes(4) + (54).to_bytes(4, 'little')
    header += (40).to_bytes(4, 'little') + (64).to_bytes(4, 'little') * 2 + (1).to_bytes(2, 'little')
    header += (24).to_bytes(2, 'little') + bytes(24)
    (tmp_path / 'image.bmp').write_bytes(header + pixels)
    for variables in UNBUFFERED:
        run = shell(['-m', 'alexnet_jax', 'predict', str(trained), str(tmp_path), '--json'], '| head -1', **variables)
        assert run.returncode == 141, run.stderr
        assert json.loads(run.stdout)
        assert len(run.stderr.splitlines()) <= 1, run.stderr  # the line about the model


@pytest.mark.slow
def test_page_is_written_without_a_reader_of_the_text(trained, tmp_path):
    report = ['-m', 'alexnet_jax', 'report', str(trained)]
    run = shell([*report, f'--html={tmp_path}/page.html', '--noneighbors'], '| true', PYTHONUNBUFFERED='1')
    assert run.returncode == 0, run.stderr
    assert (tmp_path / 'page.html').read_text().endswith('</html>\n')
    assert shell(report, '>/dev/full').returncode == 1  # without a page, the text is the result


PROTECTED = """
import os, sys
from alexnet_jax.runtime import console
console.protect_output()
file = open(sys.argv[1], 'w')
console.log('log'), console.log_error('error')
print('print', flush=True)
os.system('echo child; echo child >&2')
file.write('data')
file.close()
sys.exit(7)
"""


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '0>&- 2>&-', '0>&- >&- 2>&-', '>&- 2>&-'])
def test_data_files_do_not_get_closed_descriptors(tmp_path, closed):
    run = shell(['-c', PROTECTED, str(tmp_path / 'data')], closed)
    assert run.returncode == 7, run.stderr
    assert (tmp_path / 'data').read_text() == 'data'
    assert ('child' in run.stdout) == (' >' not in f' {closed}')
    assert ('error' in run.stderr) == ('2>' not in closed)


@pytest.mark.parametrize('variables', UNBUFFERED)
def test_slow_reader_of_a_nonblocking_pipe_gets_everything(variables):
    program = """
import os, sys
from alexnet_jax.runtime import console
for descriptor in (1, 2):
    os.set_blocking(descriptor, False)
console.protect_output()
for i in range(20000):
    print(i, 'x' * 40)
    print(i, 'x' * 40, file=sys.stderr)
"""
    streams = {}
    with subprocess.Popen(
        [sys.executable, '-c', program],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        readers = [
            threading.Thread(target=lambda name=name: streams.update({name: getattr(process, name).read()}))
            for name in ('stdout', 'stderr')
        ]
        wait_for(lambda: int.from_bytes(fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder) > 60000)
        for reader in readers:  # the pipe is full by now
            reader.start()
        for reader in readers:
            reader.join()
    expected = ''.join(f'{i} {"x" * 40}\n' for i in range(20000)).encode()
    assert (process.returncode, streams['stdout'] == expected, streams['stderr'] == expected) == (0, True, True)


FULL_DISK = """
import contextlib, os, resource, sys
folder, limit = sys.argv[1], int(sys.argv[2])
import jax, jax.numpy as jnp
from absl import logging
logging.set_verbosity(logging.FATAL)  # as launch.py does
from alexnet_jax.training.checkpointing import Checkpointer, CheckpointError
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import TrainState
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
checkpoints = Checkpointer(folder, keep=3)
layers = {f'layer{i}': jax.random.normal(jax.random.key(i), (300_000,)) for i in range(8)}
try:
    for step in range(1, 9):
        checkpoints.save(TrainState(jnp.int32(step), layers, {}, {}), RunState(step=step), None)
    checkpoints.close()
except CheckpointError as error:
    print(error, file=sys.stderr, flush=True)
with contextlib.suppress(Exception):
    checkpoints.manager.close()  # waits for the threads, which print at the end
os._exit(7)
"""


@pytest.fixture(params=[3, 12, 20])
def small_disk(tmp_path, request):
    """A folder on a full disk of some megabytes, and 0; or any folder and the allowed size of a file, without root."""
    command = ['mount', '-t', 'tmpfs', '-o', f'size={request.param}m', 'tmpfs', tmp_path]
    if os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
        yield tmp_path, 0
        subprocess.run(['umount', '--lazy', tmp_path], check=True)
    else:
        yield tmp_path, request.param * 30_000


@pytest.mark.slow
def test_full_disk_under_a_checkpoint_is_one_line(small_disk):
    """Each checkpoint has 9 MB."""
    folder, limit = small_disk
    run = run_command('-c', FULL_DISK, folder / 'checkpoints', limit)
    assert run.returncode == 7
    assert re.fullmatch(rf'{folder}/checkpoints: a checkpoint was not written: .*\n', run.stderr), run.stderr


@pytest.mark.slow
def test_model_is_loaded_without_a_warning(trained):
    program = 'import sys, alexnet_jax; print(alexnet_jax.load(sys.argv[1]).step)'
    run = run_command('-c', program, trained)
    assert (run.stdout, run.stderr) == (f'{STEPS}\n', '')


def test_message_about_a_path_with_a_line_break_is_one_line(tmp_path):
    run = run_command('-m', 'alexnet_jax.predict', tmp_path / 'two\nlines', 'image.png')
    assert usage_error(run).startswith(f'{tmp_path}/two\\nlines: ')
