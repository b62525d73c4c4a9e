"""Runs of launch.py as a user starts them: exact resume after kill -9, SIGTERM and Ctrl-C, files, refusals, NaN."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import config_flags, read_json, read_lines, read_result, run_command, start_command, usage_error, wait_for

STEPS, SAVE_EVERY = 12, 5
pytestmark = pytest.mark.usefixtures('compiled_programs')


def command(data_dir: str, workdir: Path, *overrides: str) -> list[str]:
    """Returns the command of a narrow quickstart: 12 steps of 640 images, ten per epoch.

    The run is evaluated and saved in the middle of epochs.
    """
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
    return ['launch.py', f'--workdir={workdir}', *config_flags(settings), *overrides]


def launch(*arguments) -> subprocess.CompletedProcess:
    return run_command(*command(*arguments))


def interrupt(
    number: signal.Signals, data_dir: str, workdir: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess:
    """Starts a run and sends it a signal once the checkpoint of step 5 is complete.

    Before the signal, `before` is called while the run is stopped.
    """
    process = start_command(*command(data_dir, workdir), stdout=subprocess.PIPE)
    first = workdir / 'checkpoints' / str(SAVE_EVERY)
    wait_for(lambda: first.exists() or process.poll() is not None, 240)
    assert process.poll() is None, process.stderr.read()
    if before:
        process.send_signal(signal.SIGSTOP)
        before()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def lines(workdir: Path, split: str) -> list[dict]:
    return [line for line in read_lines(workdir / 'metrics.jsonl') if line['split'] == split]


def digest(workdir: Path) -> str:
    return read_result(workdir)['state_digest']


@pytest.fixture(scope='module')
def uninterrupted(photos_dir, tmp_path_factory):
    """Returns the folder, result and output of the run that every interrupted run must equal."""
    workdir = tmp_path_factory.mktemp('uninterrupted')
    run = launch(photos_dir, workdir)
    assert run.returncode == 0, run.stderr
    return workdir, read_result(workdir), run


@pytest.mark.slow
def test_files_of_a_run(uninterrupted):
    workdir, result, run = uninterrupted
    assert (result['status'], result['step']) == ('done', STEPS)
    assert len(result['state_digest']) == 64
    assert result['corrupt_records'] == 0
    assert result['views']['1']['examples'] == result['views']['10']['examples'] == 1600
    assert result['top1_error'] == result['views']['10']['top1_error']
    assert 0 < result['top5_error'] < result['top1_error'] < 1
    training = lines(workdir, 'train')
    # Every log_every steps, and at evaluations and checkpoints.
    assert [line['step'] for line in training] == [4, 5, 7, 8, 10, 12]
    assert [line['step'] for line in lines(workdir, 'validation')] == [7, 12]
    assert {int(path.name) for path in (workdir / 'checkpoints').iterdir()} >= {12}
    for name in ('loss', 'top1_error', 'top5_error', 'learning_rate', 'images_per_second', 'input_wait'):
        assert all(isinstance(line[name], float) for line in training), name
    assert read_json(workdir / 'config.json')['model']['towers'] == 2
    assert '10 views' in run.stdout
    assert 'ETA' in run.stderr
    assert 'input wait' in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    'number', [pytest.param(signal.SIGKILL, marks=pytest.mark.accelerator), signal.SIGTERM, signal.SIGINT]
)
def test_interrupted_run_equals_the_uninterrupted_run(uninterrupted, photos_dir, tmp_path, number):
    stopped = interrupt(number, photos_dir, tmp_path)
    if number == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL
        assert not (tmp_path / 'result.json').exists()
    else:
        assert stopped.returncode == 75, stopped.stderr
        result = read_result(tmp_path)
        assert result['status'] == 'preempted'
        assert SAVE_EVERY <= result['step'] < STEPS
        assert (tmp_path / 'checkpoints' / str(result['step'])).exists()
        assert 'Traceback' not in stopped.stderr
    resumed = launch(photos_dir, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert 'resuming' in resumed.stderr
    result = read_result(tmp_path)
    assert result['state_digest'] == uninterrupted[1]['state_digest']
    assert result['views'] == uninterrupted[1]['views']
    # metrics.jsonl has no step twice, and the evaluations have the same steps and numbers.
    assert lines(tmp_path, 'validation') == lines(uninterrupted[0], 'validation')
    steps = [line['step'] for line in lines(tmp_path, 'train')]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_color_noise_ends_at_the_configured_step(photos_dir, tmp_path):
    """The run equals one that was stopped at that step and resumed without color noise."""
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
    ended, two, always = (digest(tmp_path / name) for name in ('ended', 'two', 'always'))
    assert ended == two != always


@pytest.mark.slow
def test_arguments_of_a_step_are_on_the_devices(photos_dir, tmp_path):
    """NumPy arrays would be transferred in each call."""
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
    _, *flags = command(photos_dir, tmp_path, '--config.train.steps=3', '--config.optimizer.warmup=2 steps')
    run = run_command('-c', program, *flags)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('guarded') == 3


@pytest.mark.slow
def test_run_does_not_resume_with_other_images(uninterrupted, photos_dir, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / 'run')
    (tmp_path / 'run' / 'result.json').unlink()
    shutil.copytree(os.path.join(photos_dir, 'prepared'), tmp_path / 'prepared')
    description = next((tmp_path / 'prepared').glob('*/prepared.json'))
    manifest = read_json(description)  # without digests, as earlier versions wrote it
    manifest = {name: value for name, value in manifest.items() if name not in ('digest', 'digests')}
    description.write_text(json.dumps(manifest | {'fingerprint': f'0{manifest["fingerprint"]}'}))
    message = usage_error(launch(str(tmp_path), tmp_path / 'run'))
    assert 'config.data: the prepared data set is not the one that' in message


@pytest.mark.slow
def test_corrupt_records_are_counted_and_limited(photos_dir, tmp_path):
    shutil.copytree(os.path.join(photos_dir, 'prepared'), tmp_path / 'prepared')
    file = next((tmp_path / 'prepared').glob('*/prepared-train.array_record-00002-of-00007'))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    short = ('--config.eval.views=1', '--config.eval.every=100')
    run = launch(str(tmp_path), tmp_path / 'run', *short)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count('is corrupt and skipped') == 1
    assert read_result(tmp_path / 'run')['corrupt_records'] == 1
    run = launch(str(tmp_path), tmp_path / 'strict', *short, '--config.data.max_corrupt_fraction=0.0001')
    assert run.returncode == 1
    assert '1 of 6400 records of train in' in run.stderr
    assert 'Traceback' not in run.stderr


@pytest.mark.slow
def test_command_of_a_finished_run_ends_at_once(uninterrupted, photos_dir):
    workdir, result, _ = uninterrupted
    start = time.monotonic()
    again = launch(photos_dir, workdir)
    assert time.monotonic() - start < 5
    assert again.returncode == 0
    assert 'is done' in again.stdout
    assert f'{result["top1_error"]:.2%}' in again.stdout


@pytest.mark.slow
def test_used_workdir_refuses_another_network_or_batch(uninterrupted, photos_dir):
    for override, field in [
        ('--config.train.batch_size=64', 'train.batch_size: 64, but'),
        ('--config.model.lrn=False', 'model.lrn: False, but'),
    ]:
        assert field in usage_error(launch(photos_dir, uninterrupted[0], override))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('overrides', 'what', 'rate'),
    [
        # With the learning rate alone all units may be dead, and the loss finite.
        (('--config.optimizer.learning_rate=100', f'--config.model.kernel_std={(1e9,) * 8}'), 'nan at step', '100'),
        # fc7 is dead, so the loss is finite.
        (
            ('--config.model.bias_init=(0.0,1.0,0.0,1.0,1.0,1.0,-1e39,0.0)', '--config.checkpoint.every=1'),
            'inf at step 1: ',
            '0.01',
        ),
    ],
)
def test_nonfinite_loss_or_weights_end_the_run(photos_dir, tmp_path, overrides, what, rate):
    run = launch(photos_dir, tmp_path, *overrides)
    assert run.returncode == 1
    assert f'the loss or the weights are {what}' in run.stderr
    assert f'optimizer.learning_rate ({rate})' in run.stderr
    assert f'{tmp_path} has no checkpoint yet' in run.stderr
    assert 'Traceback' not in run.stderr
    assert not (tmp_path / 'result.json').exists()
    assert list((tmp_path / 'checkpoints').iterdir()) == []


@pytest.mark.slow
def test_unwritable_checkpoint_ends_the_run(photos_dir, tmp_path):
    checkpoints = tmp_path / 'checkpoints'

    def replace_folder_by_file():
        shutil.rmtree(checkpoints)
        checkpoints.write_text('')

    stopped = interrupt(signal.SIGCONT, photos_dir, tmp_path, before=replace_folder_by_file)
    assert stopped.returncode == 1
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f'alexnet_jax: {checkpoints}: a checkpoint was not written: ')
    assert 'Traceback' not in stopped.stderr
    assert not (tmp_path / 'result.json').exists()


@pytest.mark.slow
def test_truncated_result_is_written_again(uninterrupted, photos_dir, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / 'run')
    (tmp_path / 'run' / 'result.json').write_text('{"status": "do')  # the disk was full
    again = launch(photos_dir, tmp_path / 'run')
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / 'run') == uninterrupted[1]['state_digest']


@pytest.mark.slow
def test_unusable_workdir_is_refused(photos_dir, tmp_path):
    (tmp_path / 'file').write_text('')
    message = usage_error(launch(photos_dir, tmp_path / 'file'))
    assert message.startswith(f'--workdir: {tmp_path}/file cannot be used')
    (tmp_path / 'used').mkdir()
    with open(tmp_path / 'used' / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert 'another process is training in' in usage_error(launch(photos_dir, tmp_path / 'used'))


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
        (
            '--config.model.num_classes=10',
            'config.model.num_classes: 10, but the data set prepared from photos has 16 classes (astronaut, ',
        ),
        ('--config=configs/imagnet.py', "--config: there is no file 'configs/imagnet.py'"),
        ('--config=configs/imagenet.py:papre', 'configs/imagenet.py:papre: no such preset; there are paper'),
        ('--config=configs/quickstart.py:paper', '--config: configs/quickstart.py has no presets; leave out :paper'),
        ('--workdirs=x', "Unknown command line flag 'workdirs'"),
    ],
)
def test_wrong_settings_are_refused(photos_dir, tmp_path, override, reason):
    assert usage_error(launch(photos_dir, tmp_path / 'run', override)).startswith(reason)


def test_too_large_mesh_is_refused_before_preparation(tmp_path):
    message = usage_error(launch(str(tmp_path / 'data'), tmp_path / 'run', '--config.mesh.data=2'))
    assert message.startswith('config.mesh: data=2 times model=1 needs 2 devices and there are 1')
    assert not (tmp_path / 'data').exists()


def lines_with(run: subprocess.CompletedProcess, word: str) -> list[str]:
    return [line for line in run.stderr.splitlines() if word in line]


@pytest.mark.slow
def test_layers_at_each_evaluation(uninterrupted):
    """The mean sizes of weights and updates equal those of the checkpoint."""
    workdir, _, run = uninterrupted
    rows = read_lines(workdir / 'layers.jsonl')
    assert [row['step'] for row in rows] == [7, 12]
    assert len(lines_with(run, 'update/weight')) == 2
    program = """
import json, sys
import numpy as np, orbax.checkpoint as ocp
state = ocp.StandardCheckpointer().restore(sys.argv[1] + '/checkpoints/12/state')
kernels, velocities = state['params'], state['opt_state'][-1]['trace']
sizes = lambda tree: {layer: {kind: float(np.abs(np.asarray(leaf, np.float64)).mean())
                              for kind, leaf in leaves.items()} for layer, leaves in tree.items()}
print(json.dumps([sizes(kernels), sizes(velocities)]))
"""
    weights, updates = json.loads(run_command('-W', 'ignore', '-c', program, workdir).stdout)
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
def test_only_a_stalled_run_is_reported(uninterrupted, photos_dir, tmp_path):
    """fc7 is dead from the start: its biases are far below zero."""
    biases = '--config.model.bias_init=(0.0,1.0,0.0,1.0,1.0,1.0,-1e4,0.0)'
    after = '--config.train.stall_after=6 steps'
    stalled = launch(photos_dir, tmp_path / 'warn', biases, after)
    assert stalled.returncode == 0, stalled.stderr
    (line,) = lines_with(stalled, 'stalled')
    # After six steps, at the next multiple of log_every=4.
    assert 'stalled: at step 8 the loss is 2.7' in line
    assert 'the loss of guessing among 16 classes is ln(16) = 2.7726' in line
    assert '100% of the units of fc7 are dead' in line
    for knob in ('config.model.bias_init', 'config.optimizer.warmup', 'config.model.kernel_std', 'config.seed than 0'):
        assert knob in line
    result = read_result(tmp_path / 'warn')
    assert (result['status'], result['stalled_step']) == ('done', 8)
    assert read_lines(tmp_path / 'warn' / 'layers.jsonl')[0]['fc7']['dead'] == 1

    stopped = launch(photos_dir, tmp_path / 'stop', biases, after, '--config.train.stall_action=stop')
    assert stopped.returncode == 1
    (line,) = lines_with(stopped, 'stalled')
    assert line.startswith('alexnet_jax: stalled: at step 8 ')
    assert 'Traceback' not in stopped.stderr

    _, result, run = uninterrupted
    assert result['stalled_step'] is None
    assert not lines_with(run, 'stalled')


@pytest.mark.slow
def test_target_error_ends_a_run_exactly_after_kills(photos_dir, tmp_path):
    """The run ends with the first window of log_every=4 steps whose mean training error is below the target."""
    steps = ['--config.train.steps=28', '--config.eval.every=100', '--config.eval.views=1']
    whole = launch(photos_dir, tmp_path / 'whole', *steps)
    assert whole.returncode == 0, whole.stderr
    means, sums, begun = {}, 0.0, 0  # of each four steps; checkpoints split windows into two lines
    for line in lines(tmp_path / 'whole', 'train'):
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
    result = read_result(tmp_path / 'goal')
    assert (result['status'], result['step'], result['target_step']) == ('done', expected, expected)
    assert lines_with(run, 'below train.target_error')
    again = launch(photos_dir, tmp_path / 'goal', *steps, goal_flag)
    assert again.returncode == 0
    assert 'is done' in again.stdout
    (tmp_path / 'goal' / 'result.json').unlink()  # as if the run had been killed before it wrote this file
    again = launch(photos_dir, tmp_path / 'goal', *steps, goal_flag)
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / 'goal') == result['state_digest']
    further = launch(photos_dir, tmp_path / 'goal', *steps)  # Without the target the run resumes.
    assert further.returncode == 0, further.stderr
    assert read_result(tmp_path / 'goal')['target_step'] is None
    assert digest(tmp_path / 'goal') == digest(tmp_path / 'whole')
