"""Runs with a modern recipe: exact resume, the average of the weights in checkpoints, and the end at a plateau."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import read_lines, read_result, run_command, training_command

from alexnet_jax.inference.trained_model import load_model
from alexnet_jax.parallel import make_mesh
from alexnet_jax.runtime.workdir import read_config
from alexnet_jax.training.checkpointing import restore_checkpoint, state_digest
from alexnet_jax.training.state import abstract_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_programs')]
RECIPE = {
    'optimizer.schedule': 'cosine',
    'optimizer.warmup': '2 steps',
    'data.crop_scale': '(0.25,1.0)',
    'data.random_erasing': 0.5,
    'train.label_smoothing': 0.1,
    'train.mixup': 0.2,
    'train.cutmix': 1.0,
    'train.ema_decay': 0.5,
}
STEPS = {'train.steps': 6, 'checkpoint.every': '1 step', 'checkpoint.keep': 9, 'eval.every': '3 steps'}


def launch(data_dir: str, workdir: Path, fields: dict[str, object]):
    run = run_command(*training_command(data_dir, workdir, STEPS | fields))
    assert run.returncode == 0, run.stderr
    return run


def state_at(workdir: Path, step: int):
    """Returns the state of a checkpoint, with or without an average as in the checkpoint."""
    config = read_config(str(workdir))
    checkpoint, problem = restore_checkpoint(
        str(workdir / 'checkpoints' / str(step)), abstract_state(config, make_mesh(config))
    )
    assert checkpoint is not None, problem
    return checkpoint.state


@pytest.fixture(scope='module')
def whole(photos_dir, tmp_path_factory) -> Path:
    """Returns the folder of an uninterrupted run of six steps with all parts."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    launch(photos_dir, workdir, RECIPE)
    return workdir


def test_run_resumes_bit_for_bit(photos_dir, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(step))
    (tmp_path / 'run' / 'result.json').unlink()
    resumed = launch(photos_dir, tmp_path / 'run', RECIPE)
    assert 'at step 3 of 6' in resumed.stderr
    ours, expected = read_result(tmp_path / 'run'), read_result(whole)
    assert (ours['state_digest'], ours['views']) == (expected['state_digest'], expected['views'])


def test_checkpoints_have_the_average_that_evaluations_use(whole):
    states = [state_at(whole, step) for step in range(1, 7)]
    for before, after in itertools.pairwise(states):
        expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, before.average, after.params)
        for ours, other in zip(jax.tree.leaves(after.average), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, other, rtol=1e-6, atol=1e-9)
    last = states[-1]
    model = load_model(str(whole))
    for kind in ('kernel', 'bias'):
        np.testing.assert_array_equal(model.state.params['fc8'][kind], last.average['fc8'][kind])
        assert np.abs(np.asarray(last.average['fc8'][kind]) - np.asarray(last.params['fc8'][kind])).max() > 0
    assert not model.state.average
    # The recorded error of the last step is that of the average, as another command measures it.
    run = run_command('-m', 'alexnet_jax.evaluate', whole, '--views=1', '--json')
    assert run.returncode == 0, run.stderr
    text = json.dumps(read_result(whole)['views']['1']['top1_error'])
    assert f'"top1_error": {text}' in run.stdout
    digest = state_digest(last)
    last.average['fc8']['bias'] = last.average['fc8']['bias'] + 1
    assert state_digest(last) != digest


def test_average_is_dropped_or_started_on_resume(photos_dir, tmp_path):
    """The average does not change the training, so all runs have the same parameters."""
    for on, name in ((True, 'on'), (False, 'off')):
        workdir = tmp_path / name
        first = {'train.steps': 3, 'train.ema_decay': 0.0 if on else 0.5}
        launch(photos_dir, workdir, RECIPE | {'optimizer.schedule': 'constant'} | first)
        second = launch(
            photos_dir,
            workdir,
            RECIPE | {'optimizer.schedule': 'constant', 'train.steps': 5, 'train.ema_decay': 0.5 if on else 0.0},
        )
        assert f'config.train.ema_decay: {first["train.ema_decay"]} -> ' in second.stderr
        states = [state_at(workdir, step) for step in (3, 4, 5)]
        assert [bool(state.average) for state in states] == ([False, True, True] if on else [True, False, False])
        if on:
            kernels = [np.asarray(state.params['fc8']['kernel'], np.float64) for state in states]
            expected = 0.25 * kernels[0] + 0.25 * kernels[1] + 0.5 * kernels[2]
            np.testing.assert_allclose(states[2].average['fc8']['kernel'], expected, rtol=1e-5, atol=1e-8)
    metadata = tmp_path / 'off' / 'checkpoints' / '5' / 'state' / '_METADATA'
    keys = json.loads(metadata.read_text())['tree_metadata']
    assert {key.split("'")[1] for key in keys} == {'step', 'params', 'opt_state', 'statistics'}
    ours, others = state_at(tmp_path / 'on', 5), state_at(tmp_path / 'off', 5)
    for leaf, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(others.params), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_average_of_a_layer_frozen_on_resume_is_its_value(photos_dir, tmp_path):
    recipe = RECIPE | {'optimizer.schedule': 'constant'}
    launch(photos_dir, tmp_path / 'run', recipe | {'train.steps': 3})
    launch(photos_dir, tmp_path / 'run', recipe | {'train.steps': 5, 'optimizer.lr_multipliers': "(('conv1',0.0),)"})
    before, after = (state_at(tmp_path / 'run', step) for step in (3, 5))
    kernel = np.asarray(before.params['conv1']['kernel'])
    assert (np.asarray(before.average['conv1']['kernel']) != kernel).any()
    np.testing.assert_array_equal(after.average['conv1']['kernel'], kernel)
    assert (np.asarray(after.average['fc8']['kernel']) != np.asarray(after.params['fc8']['kernel'])).any()


def test_run_ends_when_a_further_decay_is_due(photos_dir, tmp_path):
    """The learning rate is so small that no error ever changes, so evaluation 1 is the best one."""
    fields = {
        'optimizer.learning_rate': 0.0,
        'optimizer.schedule': 'plateau',
        'optimizer.patience': 1,
        'optimizer.max_decays': 2,
        'optimizer.stop_on_plateau': True,
        'train.steps': 20,
        'eval.every': '2 steps',
        'checkpoint.every': '3 steps',
    }
    run = launch(photos_dir, tmp_path / 'run', fields)
    # Evaluations at steps 2 (the lowest error), 4 and 6 (decays), and 8, where a third decay would be due.
    result = read_result(tmp_path / 'run')
    assert (result['status'], result['step'], result['plateau_step']) == ('done', 8, 8)
    assert 'the validation error stopped improving after the last decay: the run ends at step 8' in run.stderr
    steps = [line['step'] for line in read_lines(tmp_path / 'run' / 'metrics.jsonl') if line['split'] == 'validation']
    assert steps == [2, 4, 6, 8]
    assert 'is done' in launch(photos_dir, tmp_path / 'run', fields).stdout
    (tmp_path / 'run' / 'result.json').unlink()
    shutil.copytree(tmp_path / 'run', tmp_path / 'longer')
    launch(photos_dir, tmp_path / 'run', fields)
    again = read_result(tmp_path / 'run')
    assert {name: again[name] for name in ('step', 'state_digest', 'views')} == {
        name: result[name] for name in ('step', 'state_digest', 'views')
    }
    shutil.copytree(tmp_path / 'run', tmp_path / 'killed')
    for name in ('6', '8'):
        shutil.rmtree(tmp_path / 'killed' / 'checkpoints' / name)
    (tmp_path / 'killed' / 'result.json').unlink()
    assert 'at step 3 of 20' in launch(photos_dir, tmp_path / 'killed', fields).stderr
    assert read_result(tmp_path / 'killed')['state_digest'] == result['state_digest']
    launch(photos_dir, tmp_path / 'longer', fields | {'optimizer.max_decays': 3})
    assert read_result(tmp_path / 'longer')['step'] == 12  # decays at steps 4, 6 and 10; evaluation 12 has no more
    unlimited = launch(
        photos_dir, tmp_path / 'unlimited', fields | {'optimizer.stop_on_plateau': False, 'train.steps': 9}
    )
    assert 'the run ends' not in unlimited.stderr
    assert read_result(tmp_path / 'unlimited')['plateau_step'] is None
