"""launch.py as several processes: the same run as one process, and an end within bounds whatever happens to one."""

import contextlib
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

from alexnet_jax.data import dataset, loader
from alexnet_jax.prepare.writer import PrepareConfig

ROOT = Path(__file__).parent.parent
STEPS = 8
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_programs')]
STUCK_AFTER = 40  # seconds; compiling must not take longer

# One process reads slowly, or after 200 records cannot read or reads for ever.
FAULTY_INPUT = """
import dataclasses, runpy, sys, time
sys.path.insert(0, '.')
from alexnet_jax.data import dataset
from alexnet_jax.prepare.writer import PrepareConfig
(fault, index), sys.argv = sys.argv[1].split(), ['launch.py', *sys.argv[2:]]
class Faulty:
    keeps = False
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
open_store = dataset.open_store
def faulty_store(directory, settings):
    store = open_store(directory, settings)
    return dataclasses.replace(store, train=Faulty(store.train))
if f'--process_id={index}' in sys.argv:
    dataset.open_store = faulty_store
runpy.run_path('launch.py', run_name='__main__')
"""

# Four processes with two devices each, outside of a run; each prints what it sees as JSON.
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
    state = SimpleNamespace(params={'b': batch['example_id'].astype('float32')}, opt_state={}, batch_stats={})
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('', 0))
        return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Compiles faster, and process 0 finds what another test has compiled."""
    return {
        **os.environ,
        'JAX_NUM_CPU_DEVICES': str(devices),
        'XLA_FLAGS': '--xla_backend_optimization_level=0',
        'PYTHONPATH': str(ROOT),
    }


class Group:
    """Processes of launch.py (or of `program`) that belong together; their output is in WORKDIR.I.out and .err."""

    def __init__(self, count: int, devices: int, data_dir: str, workdir: Path, *overrides: str, program=('launch.py',)):
        settings = {
            'data.data_dir': data_dir,
            'model.widths': '(8,0,0,0,16,0,32)',  # few layers, for the compiler takes the longest
            'model.lrn': False,
            'model.towers': 1,
            'train.batch_size': 64,
            'train.steps': STEPS,
            'train.log_every': 1,
            'optimizer.schedule': 'constant',
            'eval.every': 4,
            'eval.views': 1,
            'eval.batch_size': 300,  # neither divides 1600 nor is divided by 8
            'checkpoint.every': 3,
        }
        flags = [f'--config.{field}={value}' for field, value in settings.items()]
        address, self.workdir, self.processes = f'localhost:{free_port()}', workdir, []
        for index in range(count):
            group = [f'--coordinator_address={address}', f'--num_processes={count}', f'--process_id={index}']
            command = [
                sys.executable,
                *program,
                f'--workdir={workdir}',
                *flags,
                *overrides,
                *(group if count > 1 else []),
            ]
            with open(self.file(index, 'out'), 'w') as out, open(self.file(index, 'err'), 'w') as err:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment(devices), stdout=out, stderr=err)
                )

    def __enter__(self) -> 'Group':
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def file(self, index: int, kind: str) -> Path:
        return Path(f'{self.workdir}.{index}.{kind}')

    def said(self, index: int, kind: str = 'err') -> str:
        """What a process wrote, without the lines of the library that carries the collectives."""
        text = self.file(index, kind).read_text()
        return ''.join(line for line in text.splitlines(keepends=True) if 'peer ranks' not in line)

    def wait(self, timeout: float) -> list[int]:
        """The exit codes, of all within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(deadline - time.monotonic(), 0.01)) for process in self.processes]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while f'train {step}/' not in self.said(0):
            assert all(process.poll() is None for process in self.processes), self.said(0) + self.said(1)
            assert time.monotonic() < deadline, self.said(0) + self.said(1)
            time.sleep(0.02)


def lines(workdir: Path, split: str) -> list[dict]:
    recorded = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [line for line in recorded if line['split'] == split]


def result(workdir: Path) -> dict:
    return json.loads((workdir / 'result.json').read_text())


def run(count: int, devices: int, data_dir: str, workdir: Path, *overrides: str) -> Group:
    """A run that ends as it should."""
    with Group(count, devices, data_dir, workdir, *overrides) as group:
        assert group.wait(300) == [0] * count, group.said(0) + group.said(count - 1)
    return group


def assert_equal_runs(workdir: Path, expected: Path) -> None:
    """The same losses, to float32, and every validation image once."""
    for split, steps in (('train', list(range(1, STEPS + 1))), ('validation', [4, STEPS])):
        assert [line['step'] for line in lines(workdir, split)] == steps
        losses = [[line['loss'] for line in lines(folder, split)] for folder in (workdir, expected)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    assert result(workdir)['views']['1']['examples'] == 1600
    np.testing.assert_allclose(result(workdir)['views']['1']['loss'], result(expected)['views']['1']['loss'], rtol=2e-5)


@pytest.fixture(scope='module')
def alone(photos_dir, tmp_path_factory) -> Path:
    """One process with eight devices."""
    return run(1, 8, photos_dir, tmp_path_factory.mktemp('alone') / 'run').workdir


@pytest.fixture(scope='module')
def together(photos_dir, tmp_path_factory) -> Group:
    """Two processes with four devices each."""
    return run(2, 4, photos_dir, tmp_path_factory.mktemp('together') / 'run', '--tensorboard')


@pytest.fixture(scope='module')
def preempted(photos_dir, tmp_path_factory) -> Path:
    """The same two, of which the second got SIGTERM. JAX looks for that once a second, so steps take longer."""
    folder = tmp_path_factory.mktemp('preempted')
    (folder / 'faulty.py').write_text(FAULTY_INPUT)
    program = (str(folder / 'faulty.py'), 'slow 1')
    with Group(2, 4, photos_dir, folder / 'run', '--config.data.reader_threads=1', program=program) as group:
        group.wait_for_step(1)
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.wait(120) == [75, 75], group.said(0) + group.said(1)
    assert 'run the same command again to resume' in group.said(0)
    return group.workdir


def test_two_processes_train_as_one(together, alone):
    assert_equal_runs(together.workdir, alone)
    assert together.said(1) == together.said(1, 'out') == ''
    assert '1 view' in together.said(0, 'out')
    assert together.said(0).count('resuming') == 0
    (events,) = (together.workdir / 'tensorboard').iterdir()  # of the first process
    content = events.read_bytes()
    assert (content.count(b'kernels'), content.count(b'predictions')) == (2, 2)  # with weights of both


def test_sigterm_to_one_stops_all_at_one_step_and_they_go_on(photos_dir, tmp_path, preempted, together):
    shutil.copytree(preempted, tmp_path / 'run')
    step = result(preempted)['step']
    assert 1 <= step < STEPS - 2
    assert (preempted / 'checkpoints' / str(step)).exists()
    newer = tmp_path / 'run' / 'checkpoints' / str(step + 1)
    shutil.copytree(preempted / 'checkpoints' / str(step), newer)
    largest = max((newer / 'state').rglob('*'), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    resumed = run(2, 4, photos_dir, tmp_path / 'run')
    assert f'{newer} is corrupt' in resumed.said(0)
    assert f'resuming {tmp_path}/run at step {step}' in resumed.said(0)
    assert resumed.said(1) == ''
    assert result(resumed.workdir)['state_digest'] == result(together.workdir)['state_digest']


def test_damage_that_only_one_process_meets_is_damage_to_all(photos_dir, tmp_path):
    overrides = ['--config.model.towers=2', '--config.mesh.model=2', '--config.train.steps=2']
    overrides += ['--config.checkpoint.every=1', '--config.checkpoint.keep=2']
    run(2, 1, photos_dir, tmp_path / 'run', *overrides)
    digest = result(tmp_path / 'run')['state_digest']
    (tmp_path / 'run' / 'result.json').unlink()  # as if it had been killed at its end
    newest = tmp_path / 'run' / 'checkpoints' / '2'
    written = newest / 'state' / 'ocdbt.process_1' / 'd'  # the second tower, which process 0 does not read
    largest = max(written.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    resumed = run(2, 1, photos_dir, tmp_path / 'run', *overrides)
    assert re.search(rf'{newest} is corrupt \(.*Error reading ".*"', resumed.said(0))
    assert 'bound method' not in resumed.said(0)
    assert f'resuming {tmp_path}/run at step 1 of 2' in resumed.said(0)
    assert resumed.said(1) == ''
    assert result(tmp_path / 'run')['state_digest'] == digest


def test_a_run_moves_between_numbers_of_processes(photos_dir, tmp_path, preempted, alone):
    shutil.copytree(preempted, tmp_path / 'run')
    step = result(preempted)['step']
    for count, devices, steps in [(1, 8, STEPS - 2), (1, 4, STEPS - 1), (4, 2, STEPS)]:
        moved = run(count, devices, photos_dir, tmp_path / 'run', f'--config.train.steps={steps}')
        assert f'resuming {tmp_path}/run at step {step} of {steps}' in moved.said(0)
        step = steps
    # The evaluations after the last steps of the shorter runs are none of the longest run's.
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    recorded = metrics.read_text().splitlines()
    shorter = [line for line in recorded if json.loads(line)['step'] in (STEPS - 2, STEPS - 1) and 'train' not in line]
    assert len(shorter) == 2
    metrics.write_text('\n'.join(line for line in recorded if line not in shorter) + '\n')
    assert_equal_runs(tmp_path / 'run', alone)


def test_the_images_of_a_run_do_not_depend_on_the_number_of_shares(photos_dir):
    given = PrepareConfig('photos', image_size=72)
    source = dataset.open_store(dataset.dataset_dir(photos_dir, given), given).train

    def batches(first_step, steps, shares):
        readers = [
            loader.training_batches(
                source, seed=5, batch_size=64, first_step=first_step, threads=1, share=share, shares=shares
            )
            for share in range(shares)
        ]
        for _ in range(steps):
            parts = [next(reader) for reader in readers]
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    moved = [*batches(98, 2, 2), *batches(100, 1, 1), *batches(101, 2, 4)]  # an epoch ends at step 100
    for found, expected in zip(moved, batches(98, 5, 1), strict=True):
        for name in ('example_id', 'label', 'image'):
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize('fault', ['unreadable 1', 'stuck 0', 'kill 0', 'kill 1'])
def test_when_one_process_fails_all_end(photos_dir, tmp_path, fault):
    (tmp_path / 'faulty.py').write_text(FAULTY_INPUT)
    kind, failed = fault[:-2], int(fault[-1])
    program = ('launch.py',) if kind == 'kill' else (str(tmp_path / 'faulty.py'), fault)
    overrides = ['--config.train.steps=100000', '--config.eval.every=100000', '--config.checkpoint.every=100000']
    if kind == 'stuck':
        # Both watchdogs bite at about the same time; until the heartbeat is missed JAX leaves process 0 to its own.
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
    said, survivor = group.said(failed), group.said(1 - failed)
    # An error of its own, or JAX found the other one gone and aborted it, in words of JAX's.
    assert codes[1 - failed] in (1, -signal.SIGABRT)
    if codes[1 - failed] == 1:
        assert f'alexnet_jax: process {1 - failed} of 2: ' in survivor
    assert len(survivor.splitlines()) < 200
    assert codes[failed] == (-signal.SIGKILL if kind == 'kill' else 1)
    if kind == 'unreadable':
        assert said.startswith('alexnet_jax: process 1 of 2: the run failed with an unexpected error:')
        assert '\nOSError: this record cannot be read\n' in said
    if kind == 'stuck':
        assert 'alexnet_jax: process 0 of 2: no progress since step' in said
        assert '__getitem__' in said  # where it is stuck
    assert not (tmp_path / 'run' / 'result.json').exists()


def test_four_processes_share_agree_and_refuse(tmp_path):
    address = f'localhost:{free_port()}'
    (tmp_path / 'run').mkdir()
    command = [sys.executable, '-c', FOUR, address]
    with contextlib.ExitStack() as stack:
        four = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(index), str(tmp_path / 'run')],
                    cwd=ROOT,
                    env=environment(2),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for index in range(4)
        ]
        for process in four:
            stack.callback(process.kill)  # those that still wait for one another after a failure
        outputs = [process.communicate(timeout=200) for process in four]
    assert [process.returncode for process in four] == [0] * 4, outputs
    seen = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    for index, view in enumerate(seen):
        assert view['shares'] == {
            '8x1': [index, 4],
            '4x2': [index, 4],
            '2x4': [index // 2, 2],  # two processes hold the two towers of the same rows
            '1x8': [0, 1],
            '3x1': 'refused',  # two processes without a device
            '6x1': 'refused',
        }
        assert view['rows'] == list(range(16))
        assert view['agreed'] == 'problem of 2'
        assert view['same'] is view['shared'] is None
        assert view['restored'] is None  # process 0 sees no checkpoint, process 2 sees one
        assert view['other'] == 'b: [1, 3] on process 2, not so on process 0'
        assert view['not shared'] == f'--workdir: {tmp_path}/run/1 on process 1 is not that of process 0; share it'
    import hashlib

    expected = hashlib.sha256(b"[0]['b']" + np.arange(16, dtype='<f4').tobytes()).hexdigest()
    assert {view['digest'] for view in seen} == {expected}


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, 'launch.py', *arguments],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        ('--num_processes=2 --process_id=0', '--num_processes: --coordinator_address must be given with it'),
        (
            '--coordinator_address=localhost:1234',
            '--coordinator_address: --num_processes and --process_id must be given',
        ),
        ('--distributed --process_id=0', '--distributed finds the processes itself; leave out --process_id'),
        (
            '--coordinator_address=localhost --num_processes=2 --process_id=0',
            "--coordinator_address: 'localhost' is not",
        ),
        (
            '--coordinator_address=h:1 --num_processes=2 --process_id=2',
            '--process_id: 2 is not below --num_processes=2',
        ),
        ('--distributed', '--distributed: found neither SLURM, TPU nor Kubernetes'),
        (
            '--config.distributed.initialization_timeout=0',
            'config.distributed.initialization_timeout: 0 is outside 1 to',
        ),
    ],
)
def test_wrong_flags_are_refused_in_one_line(photos_dir, tmp_path, arguments, reason):
    refused = launch(f'--workdir={tmp_path}/run', f'--config.data.data_dir={photos_dir}', *arguments.split())
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.startswith(f'alexnet_jax: {reason}')
    assert refused.stderr.count('\n') == 1


def test_a_coordinator_out_of_reach_ends_the_process_in_time(photos_dir, tmp_path):
    start = time.monotonic()
    alone = launch(
        f'--workdir={tmp_path}/run',
        f'--config.data.data_dir={photos_dir}',
        f'--coordinator_address=localhost:{free_port()}',
        '--num_processes=2',
        '--process_id=1',
        '--config.distributed.initialization_timeout=3',
    )
    assert time.monotonic() - start < 60
    assert alone.returncode == 1
    assert 'alexnet_jax: process 1 of 2: not all processes met at localhost:' in alone.stderr
    assert 'Traceback' not in alone.stderr


def ends(address: str, devices: tuple[int, ...], data_dir: str, workdir: Path) -> list[tuple[int, str]]:
    """Exit code and standard error of as many processes as `devices` has numbers, of two that belong together."""
    started = [
        subprocess.Popen(
            [
                *[sys.executable, 'launch.py', f'--workdir={workdir}', f'--config.data.data_dir={data_dir}'],
                *[f'--coordinator_address={address}', '--num_processes=2', f'--process_id={index}'],
            ],
            cwd=ROOT,
            env=environment(number),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for index, number in enumerate(devices)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_a_port_that_is_taken_is_said_in_one_line(photos_dir, tmp_path):
    with socket.create_server(('', 0)) as taken:
        address = f'localhost:{taken.getsockname()[1]}'
        [(code, said)] = ends(address, (1,), photos_dir, tmp_path / 'run')
    assert code == 1
    assert said.startswith(f'alexnet_jax: process 0 of 2: --coordinator_address: {address} cannot be used')
    assert said.count('\n') == 1


def test_processes_with_different_numbers_of_devices_are_refused(photos_dir, tmp_path):
    ended = ends(f'localhost:{free_port()}', (1, 2), photos_dir, tmp_path / 'run')
    for index, (code, said) in enumerate(ended):
        assert code == 2
        assert f'alexnet_jax: process {index} of 2: the processes have 1, 2 devices; all must have as many' in said
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_finished_run_is_done_for_a_process_with_its_data_elsewhere(photos_dir, tmp_path):
    workdir = tmp_path / 'run'
    with Group(1, 1, photos_dir, workdir, '--config.train.steps=0') as group:
        assert group.wait(120) == [0], group.said(0)
    with Group(1, 1, '/elsewhere', workdir, '--config.train.steps=0') as group:
        assert group.wait(120) == [0], group.said(0)
    assert 'is done' in group.said(0, 'out')
