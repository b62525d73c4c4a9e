"""launch.py as several processes: the same run as one process, and a timely end if one of them fails."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ROOT,
    config_flags,
    environment,
    free_port,
    largest_file,
    read_lines,
    read_result,
    run_command,
    start_command,
    truncate,
    usage_error,
)

STEPS = 8
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_programs')]
STUCK_AFTER = 40  # seconds, more than compiling takes

# One process reads slowly, or fails or blocks after 200 records.
FAULTY_INPUT = """
import dataclasses, runpy, sys, time
sys.path.insert(0, '.')
from alexnet_jax.data import dataset
from alexnet_jax.prepare.writer import PrepareConfig
(fault, index), sys.argv = sys.argv[1].split(), ['launch.py', *sys.argv[2:]]
class Faulty:
    in_memory = False
    def __init__(self, source):
        self.source, self.reads = source, 0
    def __len__(self):
        return len(self.source)
    def corrupt_mask(self):
        return self.source.corrupt_mask()
    def take_cached(self, indices):
        return None
    def __getitem__(self, index):
        self.reads += 1
        if fault == 'slow':
            time.sleep(0.05)
        elif self.reads > 200 and fault == 'unreadable':
            raise OSError('this record cannot be read')
        elif self.reads > 200:
            time.sleep(1000)
        return self.source[index]
open_prepared = dataset.open_prepared
def faulty_store(directory, settings):
    store = open_prepared(directory, settings)
    return dataclasses.replace(store, train=Faulty(store.train))
if f'--process_id={index}' in sys.argv:
    dataset.open_prepared = faulty_store
runpy.run_path('launch.py', run_name='__main__')
"""

# Each of four processes with two devices prints what it sees as JSON.
FOUR = """
import dataclasses, hashlib, json, os, sys
from types import SimpleNamespace
import jax, numpy as np
from alexnet_jax import parallel
from alexnet_jax.runtime import distributed
from alexnet_jax.training.checkpointing import Checkpointer, state_digest
from alexnet_jax.config import ConfigError, default_config, resolve
from alexnet_jax.runtime.preemption import PreemptionHandler
address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def refusal(function, *arguments):
    try:
        function(*arguments)
    except ConfigError as error:
        return str(error)
def enter(workdir):
    with distributed.workdir_lock(workdir):
        pass
config = resolve(default_config())
with PreemptionHandler() as preemption:
    group = {'coordinator_address': address, 'num_processes': 4, 'process_id': index}
    distributed.initialize(group, config.distributed, preemption)
    seen = {'shares': {}}
    for data, model in ((8, 1), (4, 2), (2, 4), (1, 8), (3, 1), (6, 1)):
        devices, kinds = jax.devices()[:data * model], (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((data, model), ('data', 'model'), kinds, devices=devices)
        try:
            seen['shares'][f'{data}x{model}'] = parallel.process_shard(parallel.batch_sharding(mesh, 'towers'))
        except ConfigError as error:
            seen['shares'][f'{data}x{model}'] = 'refused'
    mesh = parallel.make_mesh(config)
    rows = np.arange(16, dtype=np.uint32).reshape(4, 4)[index]
    batch = parallel.make_global_batch(parallel.batch_sharding(mesh, 'towers'), {'example_id': rows})
    params = {'b': batch['example_id'].astype('float32')}
    state = SimpleNamespace(params=params, opt_state={}, batch_stats={}, average={})
    seen['rows'] = distributed.gather_to_host(batch['example_id']).tolist()
    seen['digest'] = state_digest(state)
    seen['agreed'] = distributed.first_error_on_any_process(f'problem of {index}' if index > 1 else '')
    seen['same'] = refusal(distributed.assert_equal_across_processes, {'a': 1, 'b': [1, 2]})
    seen['other'] = refusal(distributed.assert_equal_across_processes, {'a': 1, 'b': [1, 3 if index == 2 else 2]})
    os.makedirs(f'{folder}/{index}')
    open(f'{folder}/{index}/lock', 'w').write('of an earlier run')
    seen['shared'] = refusal(enter, folder)
    os.makedirs(f'{folder}/{index}/checkpoints/{7 if index == 2 else "none"}')
    seen['restored'] = Checkpointer(f'{folder}/{index}/checkpoints', keep=1).restore({})
    distributed.SHARED_FS_TIMEOUT_SECS = 0.5
    seen['not shared'] = refusal(enter, f'{folder}/{index}')
    print(json.dumps(seen), flush=True)
    jax.distributed.shutdown()
"""


# Compiles faster; process 0 finds the programs that other tests have compiled.
VARIABLES = {'XLA_FLAGS': '--xla_backend_optimization_level=0', 'PYTHONPATH': str(ROOT)}


class Group:
    """The processes of one run of launch.py or `program`; process I writes to WORKDIR.I.out and WORKDIR.I.err.

    Nobody reads the output of process `unread`, which is a pipe.
    """

    def __init__(
        self,
        count: int,
        devices: int,
        data_dir: str,
        workdir: Path,
        *overrides: str,
        program=('launch.py',),
        unread: int | None = None,
    ):
        settings = {
            'data.data_dir': data_dir,
            'model.widths': '(8,0,0,0,16,0,32)',  # few layers, because compiling takes most of the time
            'model.lrn': False,
            'model.towers': 1,
            'train.batch_size': 64,
            'train.steps': STEPS,
            'train.log_every': 1,
            'optimizer.schedule': 'constant',
            'eval.every': 4,
            'eval.views': 1,
            'eval.batch_size': 300,  # neither a divisor of 1600 nor a multiple of 8
            'checkpoint.every': 3,
        }
        address, self.workdir, self.processes = f'localhost:{free_port()}', workdir, []
        for index in range(count):
            group = [f'--coordinator_address={address}', f'--num_processes={count}', f'--process_id={index}']
            command = [sys.executable, *program, f'--workdir={workdir}', *config_flags(settings), *overrides]
            command += group if count > 1 else []
            variables = environment(JAX_NUM_CPU_DEVICES=str(devices), **VARIABLES)
            read, pipe = os.pipe()
            os.close(read)
            with open(self.file(index, 'out'), 'w') as out, open(self.file(index, 'err'), 'w') as err:
                streams = (pipe, pipe) if index == unread else (out, err)
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=variables, stdout=streams[0], stderr=streams[1])
                )
            os.close(pipe)

    def __enter__(self) -> 'Group':
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def file(self, index: int, kind: str) -> Path:
        return Path(f'{self.workdir}.{index}.{kind}')

    def output(self, index: int, kind: str = 'err') -> str:
        """Returns what a process has written, without the lines of the collectives library."""
        text = self.file(index, kind).read_text()
        # Two of its threads may print at the same time, so that line breaks follow later.
        return ''.join(line for line in text.splitlines(keepends=True) if line.strip() and 'peer ranks' not in line)

    def wait(self, timeout: float) -> list[int]:
        """Returns all exit codes within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(deadline - time.monotonic(), 0.01)) for process in self.processes]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while f'train {step}/' not in self.output(0):
            assert all(process.poll() is None for process in self.processes), self.output(0) + self.output(1)
            assert time.monotonic() < deadline, self.output(0) + self.output(1)
            time.sleep(0.02)


def lines(workdir: Path, split: str) -> list[dict]:
    return [line for line in read_lines(workdir / 'metrics.jsonl') if line['split'] == split]


def run(count: int, devices: int, data_dir: str, workdir: Path, *overrides: str) -> Group:
    """Runs to the end without an error."""
    with Group(count, devices, data_dir, workdir, *overrides) as group:
        assert group.wait(300) == [0] * count, group.output(0) + group.output(count - 1)
    return group


def assert_equal_runs(workdir: Path, expected: Path) -> None:
    """The losses are equal to float32 precision, and every validation image counts once."""
    for split, steps in (('train', list(range(1, STEPS + 1))), ('validation', [4, STEPS])):
        assert [line['step'] for line in lines(workdir, split)] == steps
        losses = [[line['loss'] for line in lines(folder, split)] for folder in (workdir, expected)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    assert read_result(workdir)['views']['1']['examples'] == 1600
    np.testing.assert_allclose(
        read_result(workdir)['views']['1']['loss'], read_result(expected)['views']['1']['loss'], rtol=2e-5
    )


@pytest.fixture(scope='module')
def alone(photos_dir, tmp_path_factory) -> Path:
    """One process with eight devices."""
    return run(1, 8, photos_dir, tmp_path_factory.mktemp('alone') / 'run').workdir


@pytest.fixture(scope='module')
def together(photos_dir, tmp_path_factory) -> Group:
    """Two processes with four devices each."""
    return run(2, 4, photos_dir, tmp_path_factory.mktemp('together') / 'run', '--tensorboard')


def preempt(data_dir: str, folder: Path, signals: list[tuple[int, signal.Signals]]) -> Path:
    """Sends each signal to the given one of two processes. JAX looks for signals once a second: the input is slow."""
    (folder / 'faulty.py').write_text(FAULTY_INPUT)
    program = (str(folder / 'faulty.py'), 'slow 1')
    with Group(2, 4, data_dir, folder / 'run', '--config.data.reader_threads=1', program=program) as group:
        group.wait_for_step(1)
        for index, number in signals:
            group.processes[index].send_signal(number)
        assert group.wait(120) == [75, 75], group.output(0) + group.output(1)
    assert 'same command' in group.output(0)
    assert 'Traceback' not in group.output(0) + group.output(1)
    return group.workdir


@pytest.fixture(scope='module')
def preempted(photos_dir, tmp_path_factory) -> Path:
    """Sends SIGTERM to one of two processes."""
    return preempt(photos_dir, tmp_path_factory.mktemp('preempted'), [(1, signal.SIGTERM)])


def test_two_processes_match_one(together, alone):
    assert_equal_runs(together.workdir, alone)
    assert together.output(1) == together.output(1, 'out') == ''
    assert '1 view' in together.output(0, 'out')
    assert together.output(0).count('resuming') == 0
    (events,) = (together.workdir / 'tensorboard').iterdir()  # only of the primary process
    content = events.read_bytes()
    assert (content.count(b'kernels'), content.count(b'predictions')) == (2, 2)  # with the weights of both processes


def test_sigterm_to_one_process_stops_all_and_resumes(photos_dir, tmp_path, preempted, together):
    shutil.copytree(preempted, tmp_path / 'run')
    step = read_result(preempted)['step']
    assert 1 <= step < STEPS - 2
    assert (preempted / 'checkpoints' / str(step)).exists()
    newer = tmp_path / 'run' / 'checkpoints' / str(step + 1)
    shutil.copytree(preempted / 'checkpoints' / str(step), newer)
    truncate(largest_file(newer / 'state'))
    resumed = run(2, 4, photos_dir, tmp_path / 'run')
    assert f'{newer} ' in resumed.output(0)
    assert re.search(rf'{tmp_path}/run at step {step}\b', resumed.output(0))
    assert resumed.output(1) == ''
    assert read_result(resumed.workdir)['state_digest'] == read_result(together.workdir)['state_digest']


@pytest.mark.parametrize(
    'signals',
    [
        [(0, signal.SIGINT), (1, signal.SIGINT)],  # Ctrl-C on one terminal
        [(1, signal.SIGHUP), (1, signal.SIGHUP), (1, signal.SIGTERM)],
        [(0, signal.SIGUSR1), (0, signal.SIGUSR2)],
        [(1, signal.SIGUSR2)],
    ],
    ids=str,
)
def test_each_signal_to_one_process_stops_all_and_resumes(photos_dir, tmp_path, together, signals):
    workdir = preempt(photos_dir, tmp_path, signals)
    step = read_result(workdir)['step']
    assert 1 <= step < STEPS
    assert (workdir / 'checkpoints' / str(step)).exists()
    resumed = run(2, 4, photos_dir, workdir)
    assert f'{workdir} at step {step} of {STEPS}' in resumed.output(0)
    assert read_result(workdir)['state_digest'] == read_result(together.workdir)['state_digest']


@pytest.mark.parametrize('unread', [0, 1])
def test_closed_pipe_under_one_process_changes_nothing(photos_dir, tmp_path, together, unread):
    with Group(2, 4, photos_dir, tmp_path / 'run', unread=unread) as group:
        assert group.wait(300) == [0, 0], group.output(1 - unread)
    assert read_result(tmp_path / 'run')['state_digest'] == read_result(together.workdir)['state_digest']


def test_checkpoint_corrupt_for_one_process_is_skipped_by_all(photos_dir, tmp_path):
    overrides = ['--config.model.towers=2', '--config.mesh.model=2', '--config.train.steps=2']
    overrides += ['--config.checkpoint.every=1', '--config.checkpoint.keep=2']
    run(2, 1, photos_dir, tmp_path / 'run', *overrides)
    digest = read_result(tmp_path / 'run')['state_digest']
    (tmp_path / 'run' / 'result.json').unlink()  # as after a kill at the end of the run
    newest = tmp_path / 'run' / 'checkpoints' / '2'
    # Process 0 does not read the second tower.
    truncate(largest_file(newest / 'state' / 'ocdbt.process_1' / 'd'), 100)
    resumed = run(2, 1, photos_dir, tmp_path / 'run', *overrides)
    assert re.search(rf'{newest} .*Error reading ".*"', resumed.output(0))
    assert 'bound method' not in resumed.output(0)
    assert f'{tmp_path}/run at step 1 of 2' in resumed.output(0)
    assert resumed.output(1) == ''
    assert read_result(tmp_path / 'run')['state_digest'] == digest


def test_run_resumes_with_other_process_counts(photos_dir, tmp_path, preempted, alone):
    shutil.copytree(preempted, tmp_path / 'run')
    step = read_result(preempted)['step']
    for count, devices, steps in [(1, 8, STEPS - 2), (1, 4, STEPS - 1), (4, 2, STEPS)]:
        moved = run(count, devices, photos_dir, tmp_path / 'run', f'--config.train.steps={steps}')
        assert f'{tmp_path}/run at step {step} of {steps}' in moved.output(0)
        step = steps
    # Remove the evaluations at the ends of the shorter runs, which the longest run does not have.
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    recorded = metrics.read_text().splitlines()
    shorter = [line for line in recorded if json.loads(line)['step'] in (STEPS - 2, STEPS - 1) and 'train' not in line]
    assert len(shorter) == 2
    metrics.write_text('\n'.join(line for line in recorded if line not in shorter) + '\n')
    assert_equal_runs(tmp_path / 'run', alone)


@pytest.mark.parametrize('fault', ['unreadable 1', 'stuck 0', 'kill 0', 'kill 1'])
def test_failure_of_one_process_ends_all(photos_dir, tmp_path, fault):
    (tmp_path / 'faulty.py').write_text(FAULTY_INPUT)
    kind, failed = fault[:-2], int(fault[-1])
    program = ('launch.py',) if kind == 'kill' else (str(tmp_path / 'faulty.py'), fault)
    overrides = ['--config.train.steps=100000', '--config.eval.every=100000', '--config.checkpoint.every=100000']
    if kind == 'stuck':
        # Both watchdogs end at about the same time, and a missed heartbeat must not end process 0 earlier.
        overrides += [
            f'--config.distributed.watchdog_timeout={STUCK_AFTER}',
            f'--config.distributed.heartbeat_timeout={STUCK_AFTER}',
        ]
    with Group(2, 4, photos_dir, tmp_path / 'run', *overrides, program=program) as group:
        group.wait_for_step(2)
        if kind == 'kill':
            group.processes[failed].kill()
        elif kind == 'unreadable':
            group.processes[failed].wait(120)
        start = time.monotonic()
        codes = group.wait(STUCK_AFTER + 45 if kind == 'stuck' else 30)
        print(f'{fault}: all ended after {time.monotonic() - start:.1f} s with {codes}')
    log, survivor = group.output(failed), group.output(1 - failed)
    # The survivor reports an error, or JAX aborts it when the other process is gone.
    assert codes[1 - failed] in (1, -signal.SIGABRT)
    if codes[1 - failed] == 1:
        assert f'alexnet_jax: process {1 - failed} of 2: ' in survivor
    assert len(survivor.splitlines()) < 200
    assert codes[failed] == (-signal.SIGKILL if kind == 'kill' else 1)
    if kind == 'unreadable':
        assert log.startswith('alexnet_jax: process 1 of 2: ')
        assert '\nOSError: this record cannot be read\n' in log
    if kind == 'stuck':
        assert 'alexnet_jax: process 0 of 2: no progress' in log
        assert '__getitem__' in log  # the stack trace of the blocked thread
    assert not (tmp_path / 'run' / 'result.json').exists()


def test_four_processes_shard_gather_and_compare(tmp_path):
    address = f'localhost:{free_port()}'
    (tmp_path / 'run').mkdir()
    variables = {**VARIABLES, 'JAX_NUM_CPU_DEVICES': '2', 'stdout': subprocess.PIPE}
    with contextlib.ExitStack() as stack:
        four = [
            stack.enter_context(start_command('-c', FOUR, address, index, tmp_path / 'run', **variables))
            for index in range(4)
        ]
        for process in four:
            stack.callback(process.kill)  # After a failure, the others wait.
        outputs = [process.communicate(timeout=200) for process in four]
    assert [process.returncode for process in four] == [0] * 4, outputs
    seen = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    for index, view in enumerate(seen):
        assert view['shares'] == {
            '8x1': [index, 4],
            '4x2': [index, 4],
            '2x4': [index // 2, 2],  # Two processes hold the two towers of the same rows.
            '1x8': [0, 1],
            '3x1': 'refused',  # Two processes have no device.
            '6x1': 'refused',
        }
        assert view['rows'] == list(range(16))
        assert view['agreed'] == 'problem of 2'
        assert view['same'] is view['shared'] is None
        assert view['restored'] is None  # Process 0 sees no checkpoint, process 2 sees one.
        assert view['other'].startswith('b: [1, 3] on process 2')
        assert view['not shared'].startswith(f'--workdir: {tmp_path}/run/1 on process 1')
    expected = hashlib.sha256(b"[0]['b']" + np.arange(16, dtype='<f4').tobytes()).hexdigest()
    assert {view['digest'] for view in seen} == {expected}


def launch(data_dir: str, workdir: Path, *flags: str) -> subprocess.CompletedProcess:
    given = ('launch.py', f'--workdir={workdir}', f'--config.data.data_dir={data_dir}')
    return run_command(*given, *flags, timeout=120, **VARIABLES)


@pytest.mark.parametrize(
    ('flags', 'pattern'),
    [
        ('--num_processes=2 --process_id=0', '--num_processes: .*--coordinator_address'),
        ('--coordinator_address=localhost:1234', '--coordinator_address: .*--num_processes.*--process_id'),
        ('--distributed --process_id=0', '--distributed.*--process_id'),
        ('--coordinator_address=localhost --num_processes=2 --process_id=0', "--coordinator_address: 'localhost'"),
        ('--coordinator_address=h:1 --num_processes=2 --process_id=2', '--process_id: 2 .*--num_processes=2'),
        ('--distributed', '--distributed: .*SLURM.*TPU.*Kubernetes'),
        ('--config.distributed.initialization_timeout=0', 'config.distributed.initialization_timeout: 0 .*1 to'),
    ],
)
def test_invalid_flags_are_rejected(photos_dir, tmp_path, flags, pattern):
    assert re.match(pattern, usage_error(launch(photos_dir, tmp_path / 'run', *flags.split())))


def test_unreachable_coordinator_times_out(photos_dir, tmp_path):
    start = time.monotonic()
    group = (f'--coordinator_address=localhost:{free_port()}', '--num_processes=2', '--process_id=1')
    alone = launch(photos_dir, tmp_path / 'run', *group, '--config.distributed.initialization_timeout=3')
    assert time.monotonic() - start < 60
    assert alone.returncode == 1
    assert re.search('alexnet_jax: process 1 of 2: .*localhost:', alone.stderr)
    assert 'Traceback' not in alone.stderr


def ends(address: str, devices: tuple[int, ...], data_dir: str, workdir: Path) -> list[tuple[int, str]]:
    """Starts len(devices) of two processes of a run; returns exit codes and standard errors."""
    started = [
        start_command(
            *('launch.py', f'--workdir={workdir}', f'--config.data.data_dir={data_dir}'),
            *(f'--coordinator_address={address}', '--num_processes=2', f'--process_id={index}'),
            **{**VARIABLES, 'JAX_NUM_CPU_DEVICES': str(number)},
        )
        for index, number in enumerate(devices)
    ]
    logs = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, log) for process, log in zip(started, logs, strict=True)]


def test_taken_coordinator_port_is_reported(photos_dir, tmp_path):
    with socket.create_server(('', 0)) as taken:
        address = f'localhost:{taken.getsockname()[1]}'
        [(code, log)] = ends(address, (1,), photos_dir, tmp_path / 'run')
    assert code == 1
    assert log.startswith(f'alexnet_jax: process 0 of 2: --coordinator_address: {address} ')
    assert log.count('\n') == 1


def test_unequal_device_counts_are_rejected(photos_dir, tmp_path):
    ended = ends(f'localhost:{free_port()}', (1, 2), photos_dir, tmp_path / 'run')
    for index, (code, log) in enumerate(ended):
        assert code == 2
        assert re.search(f'alexnet_jax: process {index} of 2: .*1, 2 devices', log)
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_finished_run_is_done_even_without_its_data(photos_dir, tmp_path):
    workdir = tmp_path / 'run'
    with Group(1, 1, photos_dir, workdir, '--config.train.steps=0') as group:
        assert group.wait(120) == [0], group.output(0)
    with Group(1, 1, '/elsewhere', workdir, '--config.train.steps=0') as group:
        assert group.wait(120) == [0], group.output(0)
    assert 'is done' in group.output(0, 'out')
