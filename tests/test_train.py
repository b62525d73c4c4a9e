"""Runs of launch.py as a user starts them: exact resume after kill -9, SIGTERM and Ctrl-C, files, refusals, NaN."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS, SAVE_EVERY = 12, 5
pytestmark = pytest.mark.usefixtures('compiled_programs')


def command(data_dir: str, workdir: Path, *overrides: str) -> list[str]:
    """A narrow quickstart: 12 steps of 640 images, ten an epoch, evaluated and saved in the middle of epochs."""
    settings = {
        'data.data_dir': data_dir,
        'model.widths': '(8,16,16,16,16,32,32)',
        'train.batch_size': 640,
        'train.steps': STEPS,
        'train.log_every': 4,
        'eval.every': 7,
        'checkpoint.every': SAVE_EVERY,
        'optimizer.schedule': 'plateau',
        'optimizer.patience': 1,
    }
    flags = [f'--config.{field}={value}' for field, value in settings.items()]
    return [sys.executable, 'launch.py', f'--workdir={workdir}', *flags, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}


def launch(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def interrupt(
    number: signal.Signals, data_dir: str, workdir: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess:
    """Start a run and send the signal as soon as the checkpoint of step 5 is whole, and `before` is done, if given.

    Meanwhile the run stands still.
    """
    process = subprocess.Popen(
        command(data_dir, workdir),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    first = workdir / 'checkpoints' / str(SAVE_EVERY)
    deadline = time.monotonic() + 240
    while not first.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    if before:
        process.send_signal(signal.SIGSTOP)
        before()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def uninterrupted(photos_dir, tmp_path_factory):
    """The run that every interrupted one must equal."""
    workdir = tmp_path_factory.mktemp('uninterrupted')
    run = launch(photos_dir, workdir)
    assert run.returncode == 0, run.stderr
    return workdir, json.loads((workdir / 'result.json').read_text()), run


@pytest.mark.slow
def test_files_of_a_run(uninterrupted):
    workdir, result, run = uninterrupted
    assert (result['status'], result['step']) == ('done', STEPS)
    assert len(result['state_digest']) == 64
    assert result['corrupt_records'] == 0
    assert result['views']['1']['examples'] == result['views']['10']['examples'] == 1600
    assert result['top1_error'] == result['views']['10']['top1_error']
    assert 0 < result['top5_error'] < result['top1_error'] < 1
    recorded = lines(workdir)
    # Every log_every steps, and whenever an evaluation or a checkpoint makes the loop stop and look.
    assert [line['step'] for line in recorded if line['split'] == 'train'] == [4, 5, 7, 8, 10, 12]
    assert [line['step'] for line in recorded if line['split'] == 'validation'] == [7, 12]
    assert {int(path.name) for path in (workdir / 'checkpoints').iterdir()} >= {12}
    training = [line for line in recorded if line['split'] == 'train']
    for name in ('loss', 'top1_error', 'top5_error', 'learning_rate', 'images_per_second', 'input_wait'):
        assert all(isinstance(line[name], float) for line in training), name
    assert json.loads((workdir / 'config.json').read_text())['model']['towers'] == 2
    assert '10 views' in run.stdout
    assert 'ETA' in run.stderr
    assert 'input wait' in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_as_the_uninterrupted(uninterrupted, photos_dir, tmp_path, number):
    stopped = interrupt(number, photos_dir, tmp_path)
    if number == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL
        assert not (tmp_path / 'result.json').exists()
    else:
        assert stopped.returncode == 75, stopped.stderr
        result = json.loads((tmp_path / 'result.json').read_text())
        assert result['status'] == 'preempted'
        assert SAVE_EVERY <= result['step'] < STEPS
        assert (tmp_path / 'checkpoints' / str(result['step'])).exists()
        assert 'Traceback' not in stopped.stderr
    resumed = launch(photos_dir, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert 'resuming' in resumed.stderr
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['state_digest'] == uninterrupted[1]['state_digest']
    assert result['views'] == uninterrupted[1]['views']
    # The file reads as if nothing had happened: no step twice, evaluations at the same steps with the same numbers.
    recorded, expected = lines(tmp_path), lines(uninterrupted[0])
    assert [line for line in recorded if line['split'] == 'validation'] == [
        line for line in expected if line['split'] == 'validation'
    ]
    steps = [line['step'] for line in recorded if line['split'] == 'train']
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_colour_noise_ends_where_it_is_told_to(photos_dir, tmp_path):
    """As if the run had been stopped there and gone on without."""
    short = ('--config.eval.views=1', '--config.eval.every=100', '--config.train.steps=6')
    commands = {
        'ended': [['--config.data.color_augmentation_until=4 steps']],
        'two': [
            [f'--config.data.color={color}', f'--config.train.steps={n}'] for n, color in ((4, 'original'), (6, 'none'))
        ],
        'always': [[]],
    }

    def train(name: str) -> None:
        for flags in commands[name]:
            run = launch(photos_dir, tmp_path / name, *short, *flags)
            assert run.returncode == 0, run.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, commands))
    digests = [
        json.loads((tmp_path / name / 'result.json').read_text())['state_digest'] for name in ('ended', 'two', 'always')
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
def test_what_a_step_takes_is_on_the_devices(photos_dir, tmp_path):
    """NumPy arrays would be moved in each call; with the mean image a CPU computes the step in another thread."""
    program = """
import runpy
import sys
import jax
from alexnet_jax.training import trainer

class Guarded:
    def __init__(self, step):
        self.step = step
    def lower(self, *arguments):
        return Guarded(self.step.lower(*arguments))
    def compile(self):
        return Guarded(self.step.compile())
    def memory_analysis(self):
        return self.step.memory_analysis()
    def __call__(self, *arguments):
        with jax.transfer_guard('disallow'):
            result = self.step(*arguments)
        print('guarded')
        return result

make_train_step = trainer.make_train_step
trainer.make_train_step = lambda *arguments: Guarded(make_train_step(*arguments))
runpy.run_path('launch.py', run_name='__main__')
"""
    flags = command(photos_dir, tmp_path, '--config.train.steps=3', '--config.optimizer.warmup=2 steps')[1:]
    run = subprocess.run(
        [sys.executable, '-c', program, *flags[1:]], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('guarded') == 3


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_images(uninterrupted, photos_dir, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / 'run')
    (tmp_path / 'run' / 'result.json').unlink()
    shutil.copytree(os.path.join(photos_dir, 'prepared'), tmp_path / 'prepared')
    description = next((tmp_path / 'prepared').glob('*/prepared.json'))
    description.write_text(description.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    refused = launch(str(tmp_path), tmp_path / 'run')
    assert refused.returncode == 2
    assert 'config.data: the prepared data set is not the one that' in refused.stderr


@pytest.mark.slow
def test_a_damaged_record_is_counted_and_more_of_them_end_the_run(photos_dir, tmp_path):
    shutil.copytree(os.path.join(photos_dir, 'prepared'), tmp_path / 'prepared')
    file = next((tmp_path / 'prepared').glob('*/prepared-train.array_record-00002-of-00007'))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    short = ('--config.eval.views=1', '--config.eval.every=100')
    run = launch(str(tmp_path), tmp_path / 'run', *short)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count('is damaged and left out') == 1
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['corrupt_records'] == 1
    run = launch(str(tmp_path), tmp_path / 'strict', *short, '--config.data.max_corrupt_fraction=0.0001')
    assert run.returncode == 1
    assert '1 of 6400 records of train in' in run.stderr
    assert 'Traceback' not in run.stderr


@pytest.mark.slow
def test_the_same_command_after_the_end_says_so_at_once(uninterrupted, photos_dir):
    workdir, result, _ = uninterrupted
    start = time.monotonic()
    again = launch(photos_dir, workdir)
    assert time.monotonic() - start < 5
    assert again.returncode == 0
    assert 'is done' in again.stdout
    assert f'{result["top1_error"]:.2%}' in again.stdout


@pytest.mark.slow
def test_another_network_or_batch_is_refused_in_a_used_workdir(uninterrupted, photos_dir):
    for override, field in [
        ('--config.train.batch_size=64', 'train.batch_size: 64, but'),
        ('--config.model.lrn=False', 'model.lrn: False, but'),
    ]:
        refused = launch(photos_dir, uninterrupted[0], override)
        assert refused.returncode == 2
        assert refused.stderr.count('\n') == 1
        assert field in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ('overrides', 'what', 'rate'),
    [
        # The rate alone may leave a network whose every unit is dead, and a finite loss.
        (('--config.optimizer.learning_rate=100', f'--config.model.kernel_std={(1e9,) * 8}'), 'nan at step', '100'),
        # fc7 is dead, which leaves the loss finite.
        (
            ('--config.model.bias_init=(0.0,1.0,0.0,1.0,1.0,1.0,-1e39,0.0)', '--config.checkpoint.every=1'),
            'inf at step 1: ',
            '0.01',
        ),
    ],
)
def test_a_loss_or_weights_that_are_not_finite_end_the_run_in_one_line(photos_dir, tmp_path, overrides, what, rate):
    run = launch(photos_dir, tmp_path, *overrides)
    assert run.returncode == 1
    assert f'the loss or the weights are {what}' in run.stderr
    assert f'optimizer.learning_rate ({rate})' in run.stderr
    assert f'{tmp_path} can be resumed from step 0' in run.stderr
    assert 'Traceback' not in run.stderr
    assert not (tmp_path / 'result.json').exists()
    assert list((tmp_path / 'checkpoints').iterdir()) == []


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(photos_dir, tmp_path):
    checkpoints = tmp_path / 'checkpoints'

    def put_a_file_in_the_way():
        shutil.rmtree(checkpoints)
        checkpoints.write_text('')

    stopped = interrupt(signal.SIGCONT, photos_dir, tmp_path, before=put_a_file_in_the_way)
    assert stopped.returncode == 1
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f'alexnet_jax: {checkpoints}: a checkpoint was not written: ')
    assert 'Traceback' not in stopped.stderr
    assert not (tmp_path / 'result.json').exists()


@pytest.mark.slow
def test_what_is_no_end_of_this_run_is_not_taken_for_it(uninterrupted, photos_dir, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / 'run')
    (tmp_path / 'run' / 'result.json').write_text('{"status": "do')  # the disk was full
    again = launch(photos_dir, tmp_path / 'run')
    assert again.returncode == 0, again.stderr
    assert (
        json.loads((tmp_path / 'run' / 'result.json').read_text())['state_digest'] == uninterrupted[1]['state_digest']
    )


@pytest.mark.slow
def test_a_workdir_that_cannot_be_used_is_refused(photos_dir, tmp_path):
    (tmp_path / 'file').write_text('')
    refused = launch(photos_dir, tmp_path / 'file')
    assert refused.returncode == 2
    assert refused.stderr.startswith(f'alexnet_jax: --workdir: {tmp_path}/file cannot be used')
    (tmp_path / 'used').mkdir()
    with open(tmp_path / 'used' / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = launch(photos_dir, tmp_path / 'used')
    assert refused.returncode == 2
    assert 'another process trains in' in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ('override', 'reason'),
    [
        ('--config.model.lrm=False', 'config.model.lrm: no such field; the nearest is config.model.lrn'),
        ('--config.train.batch_size=many', "config.train.batch_size: 'many' is not int"),
        (
            '--config.data.crop_size=80',
            'config.data.crop_size: 80 is larger than data.image_size=72; the nearest is 72',
        ),
        ('--config.mesh.data=7', 'config.train.batch_size: 640 is not divisible by mesh.data=7; the nearest is 637'),
        ('--config.model.num_classes=10', 'config.model.num_classes: 10, but photos has 16 classes; the nearest is 16'),
        ('--config=configs/imagnet.py', "--config: there is no file 'configs/imagnet.py'"),
        ('--config=configs/imagenet.py:papre', 'configs/imagenet.py:papre: no such preset; there are paper'),
        ('--config=configs/quickstart.py:paper', '--config: configs/quickstart.py has no presets; leave out :paper'),
        ('--workdirs=x', "Unknown command line flag 'workdirs'"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(photos_dir, tmp_path, override, reason):
    run = launch(photos_dir, tmp_path / 'run', override)
    assert run.returncode == 2
    assert run.stderr.startswith('alexnet_jax: ' + reason)
    assert run.stderr.count('\n') == 1


def test_a_mesh_that_does_not_fit_is_refused_before_data_are_prepared(tmp_path):
    run = launch(str(tmp_path / 'data'), tmp_path / 'run', '--config.mesh.data=2')
    assert run.returncode == 2
    assert run.stderr.startswith('alexnet_jax: config.mesh: data=2 times model=1 needs 2 devices and there are 1')
    assert not (tmp_path / 'data').exists()


def test_help_names_the_flags():
    run = subprocess.run([sys.executable, 'launch.py', '--help'], cwd=ROOT, capture_output=True, text=True)
    assert '--workdir' in run.stdout
    assert '--config' in run.stdout


def said(run: subprocess.CompletedProcess, word: str) -> list[str]:
    return [line for line in run.stderr.splitlines() if word in line]


@pytest.mark.slow
def test_layers_at_each_evaluation(uninterrupted):
    """Sizes against the numbers in the checkpoint."""
    workdir, _, run = uninterrupted
    rows = [json.loads(line) for line in (workdir / 'layers.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [7, 12]
    assert len(said(run, 'update/weight')) == 2
    program = """
import json, sys
import numpy as np, orbax.checkpoint as ocp
state = ocp.StandardCheckpointer().restore(sys.argv[1] + '/checkpoints/12/state')
kernels, velocities = state['params'], state['opt_state'][-1]['trace']
sizes = lambda tree: {layer: {kind: float(np.abs(np.asarray(leaf, np.float64)).mean())
                              for kind, leaf in leaves.items()} for layer, leaves in tree.items()}
print(json.dumps([sizes(kernels), sizes(velocities)]))
"""
    read = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program, str(workdir)], capture_output=True, text=True, check=True
    )
    weights, updates = json.loads(read.stdout)
    layers = ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8']
    assert sorted(weights) == layers
    for layer in layers:
        row = rows[-1][layer]
        assert row['kernel'] == pytest.approx(weights[layer]['kernel'], rel=1e-5)
        assert row['bias'] == pytest.approx(weights[layer]['bias'], rel=1e-5)
        assert row['kernel_update'] == pytest.approx(updates[layer]['kernel'], rel=1e-5)
        assert row['bias_update'] == pytest.approx(updates[layer]['bias'], rel=1e-5)
        assert 0 <= row['dead'] < 1
    assert rows[-1]['fc8']['dead'] == 0


@pytest.mark.slow
def test_a_stalled_run_is_reported_and_a_healthy_one_not(uninterrupted, photos_dir, tmp_path):
    """fc7 is dead from the start: its biases are far below zero."""
    biases = '--config.model.bias_init=(0.0,1.0,0.0,1.0,1.0,1.0,-1e4,0.0)'
    after = '--config.train.stall_after=6 steps'
    stalled = launch(photos_dir, tmp_path / 'warn', biases, after)
    assert stalled.returncode == 0, stalled.stderr
    (line,) = said(stalled, 'stalled')
    # Six steps, looked at every fourth one.
    assert 'stalled: at step 8 the loss is 2.7' in line
    assert 'the loss of guessing among 16 classes is ln(16) = 2.7726' in line
    assert '100% of the units of fc7 are dead' in line
    for knob in ('config.model.bias_init', 'config.optimizer.warmup', 'config.model.kernel_std', 'config.seed than 0'):
        assert knob in line
    result = json.loads((tmp_path / 'warn' / 'result.json').read_text())
    assert (result['status'], result['stalled_step']) == ('done', 8)
    (row, *_) = [json.loads(line) for line in (tmp_path / 'warn' / 'layers.jsonl').read_text().splitlines()]
    assert row['fc7']['dead'] == 1

    stopped = launch(photos_dir, tmp_path / 'stop', biases, after, '--config.train.stall_action=stop')
    assert stopped.returncode == 1
    (line,) = said(stopped, 'stalled')
    assert line.startswith('alexnet_jax: stalled: at step 8 ')
    assert 'Traceback' not in stopped.stderr

    _, result, run = uninterrupted
    assert result['stalled_step'] is None
    assert not said(run, 'stalled')


@pytest.mark.slow
def test_a_goal_ends_a_run_and_kill_changes_nothing(photos_dir, tmp_path):
    """The window of log_every=4 steps whose mean training error is the first one below the goal."""
    steps = ['--config.train.steps=28', '--config.eval.every=100', '--config.eval.views=1']
    whole = launch(photos_dir, tmp_path / 'whole', *steps)
    assert whole.returncode == 0, whole.stderr
    training = [line for line in lines(tmp_path / 'whole') if line['split'] == 'train']
    means, sums, begun = {}, 0.0, 0  # of each four steps, from lines that end at checkpoints too
    for line in training:
        sums += line['top1_error'] * (line['step'] - begun)
        begun = line['step']
        if begun % 4 == 0:
            means[begun], sums = sums / 4, 0.0
    # The first window after the first that is lower than all before it.
    expected = next(at for at in means if at > 4 and means[at] < min(means[earlier] for earlier in range(4, at, 4)))
    goal = (means[expected] + min(means[earlier] for earlier in range(4, expected, 4))) / 2

    goal_flag = f'--config.train.target_error={goal}'
    run = launch(photos_dir, tmp_path / 'goal', *steps, goal_flag)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / 'goal' / 'result.json').read_text())
    assert (result['status'], result['step'], result['target_step']) == ('done', expected, expected)
    assert said(run, 'below train.target_error')
    again = launch(photos_dir, tmp_path / 'goal', *steps, goal_flag)
    assert again.returncode == 0
    assert 'is done' in again.stdout
    (tmp_path / 'goal' / 'result.json').unlink()  # as if it had been killed before the last file
    again = launch(photos_dir, tmp_path / 'goal', *steps, goal_flag)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / 'goal' / 'result.json').read_text())['state_digest'] == result['state_digest']
    further = launch(photos_dir, tmp_path / 'goal', *steps)  # without the goal it goes on
    assert further.returncode == 0, further.stderr
    ends = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'goal')]
    assert ends[1]['target_step'] is None
    assert ends[1]['state_digest'] == ends[0]['state_digest']
