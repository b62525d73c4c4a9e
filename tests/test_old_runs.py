"""Runs of version 0.1: data/run_of_0_1 was preempted at step 6 of 12 by that version, and this version resumes it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import config_flags, read_json, read_lines, read_result, run_command, usage_error

from alexnet_jax.runtime.workdir import dataset_statistics_path, read_config, read_dataset_statistics, read_result_json
from alexnet_jax.schedules import PlateauState
from alexnet_jax.training.run_state import RunState, Window

OLD_RUN = Path(__file__).parent / 'data' / 'run_of_0_1'
# The command of the run in the field names of this version.
OVERRIDES = {
    'model.conv1_stride': 8,
    'model.widths': '(8,0,0,0,16,0,32)',
    'model.kernel_std': '(0.15,0.15,0.15,0.15,0.15,0.15,0.15,0.15)',
    'model.conv_ops': "('activation lrn','','','','activation batch_norm pool')",
    'model.cross_tower': "('conv5','fc7','fc8')",
    'model.dropout_on_inputs_of': "('fc7','fc8')",
    'model.initializer': 'he_normal',
    'data.std': '(64.0,)',
    'data.mean_crop': 'center',
    'data.color_augmentation_until': '5 steps',
    'data.crop_group_size': 4,
    'optimizer.schedule': 'plateau',
    'optimizer.patience': 1,
    'optimizer.decay_factor': 5.0,
    'optimizer.lr_overrides': "(('fc7/kernel','9 steps',0.002),)",
    'optimizer.layer_weight_decay': '(0.0,0.0,0.0,0.0,0.001,0.0,0.001,0.004)',
    'train.grad_accum_steps': 2,
    'train.batch_size': 640,
    'train.steps': 12,
    'train.log_every': 4,
    'eval.every': '3 steps',
    'checkpoint.every': 5,
    'eval.batch_size': 200,
}
# Results of version 0.1 without an interruption.
VIEWS = {
    '1': {'loss': 2.7053314208984376, 'top1_error': 0.921875, 'top5_error': 0.5075},
    '10': {'loss': 2.6930171203613282, 'top1_error': 0.935625, 'top5_error': 0.51375},
}
TRAIN_LOSSES = {8: 3.407488703727722, 9: 3.3148179054260254, 10: 3.273682117462158, 12: 3.198918581008911}
VALIDATION_LOSSES = {6: 2.8777259826660155, 9: 2.770811767578125, 12: 2.7053314208984376}
LEARNING_RATES = {6: 0.002, 9: 0.0004, 12: 0.0004}  # after the evaluations
LAYER_STATS = {  # mean |kernel|, |velocity of the kernel|, |bias|, |velocity of the bias|
    'conv1': (0.06078062951564789, 0.00024168408708646894, 0.0046003349125385284, 0.0003314544155728072),
    'conv5': (0.14368318021297455, 0.0002376017509959638, 1.0036442279815674, 0.0002636607678141445),
    'fc7': (0.09760549664497375, 0.0003615636087488383, 0.9906572699546814, 0.0006898816209286451),
    'fc8': (0.18907243013381958, 0.000669565168209374, 0.011850757524371147, 0.0008356237085536122),
}


def launch(workdir: Path, data_dir: str, *overrides: str) -> subprocess.CompletedProcess:
    flags = config_flags({'data.data_dir': data_dir, **OVERRIDES})
    return run_command('launch.py', f'--workdir={workdir}', *flags, *overrides)


@pytest.fixture
def workdir(tmp_path) -> Path:
    return Path(shutil.copytree(OLD_RUN, tmp_path / 'run'))


def test_run_state_of_version_0_1_is_read():
    progress = read_json(OLD_RUN / 'checkpoints' / '6' / 'progress' / 'metadata')
    digest = progress.pop('state_digest')
    assert digest == read_result(OLD_RUN)['state_digest']
    state = RunState.from_json(progress)
    assert state == RunState(
        step=6,
        dataset_fingerprint='f640eddcf9098b617958a3598d4d6aa7c3a0568fcb7fdf405552d8f200c998c5',
        last_evaluated_step=3,
        last_evaluation={'loss': 3.029608268737793, 'top1_error': 0.95375, 'top5_error': 0.700625, 'examples': 1600},
        plateau=PlateauState(lowest_error=0.95375, waited=0, decays_taken=0),
        window=Window(steps=2, loss=7.17026948928833, top1_error=1.8875000476837158),
        stopping_criteria=(0.0, '3 epochs', 'warn'),
        target_step=None,
        stalled_step=None,
        images_per_second=12944.635277306767,
    )
    written = json.loads(json.dumps(state.to_json()))
    assert not {'goal_step', 'store', 'evaluated', 'errors'} & set(written)
    assert RunState.from_json(written) == state


def test_run_state_keeps_its_values_through_json():
    state = RunState(
        step=7,
        dataset_fingerprint='ab',
        last_evaluated_step=6,
        last_evaluation={'loss': 1.5},
        plateau=PlateauState(0.25, 2, 1),
        window=Window(3, 4.5, 1.75),
        stopping_criteria=(0.5, '1 epoch', 'stop'),
        target_step=7,
        stalled_step=5,
        images_per_second=1.25,
    )
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert RunState.from_json({}) == RunState()
    assert RunState.from_json({'goal_step': 7, 'stalled_step': 5}).target_step == 7
    assert RunState.from_json({'judged_by': [0.0, '3 epochs', 'warn']}).stopping_criteria == (0.0, '3 epochs', 'warn')


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'stepp': 1}, "RunState has no field 'stepp'"),
        ({'plateau': {'drops': 1}}, "PlateauState has no field 'drops'"),
        ({'window': {'top5_error': 1.0}}, "Window has no field 'top5_error'"),
    ],
)
def test_run_state_rejects_unknown_keys(values, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        RunState.from_json(values)


def test_new_stopping_criteria_invalidate_old_results():
    state = RunState(stopping_criteria=(0.5,), target_step=4, stalled_step=2)
    assert state.with_stopping_criteria((0.5,)) == state
    assert state.with_stopping_criteria((0.4,)) == RunState(stopping_criteria=(0.4,))


def test_files_of_version_0_1_are_read(workdir):
    assert os.path.basename(dataset_statistics_path(str(workdir))) == 'inputs.npz'
    statistics, class_names = read_dataset_statistics(str(workdir))
    assert statistics['mean_image'].shape == (72, 72, 3)
    assert len(class_names) == 16
    assert read_config(str(workdir)).model.cross_tower == ('conv5', 'fc7', 'fc8')
    result = read_result_json(str(workdir))
    assert result['corrupt_records'] == 0
    assert 'target_step' in result
    assert not {'goal_step', 'damaged_records'} & set(result)


def test_old_field_names_are_refused(tmp_path):
    run = launch(tmp_path / 'run', 'data', "--config.model.exchange=('conv5','fc7','fc8')")
    assert usage_error(run) == 'config.model.exchange was renamed to config.model.cross_tower'


@pytest.mark.slow
def test_run_of_version_0_1_resumes_with_equal_results(photos_dir, workdir):
    run = launch(workdir, photos_dir)
    assert run.returncode == 0, run.stderr
    assert f'resuming {workdir} at step 6 of 12' in run.stderr
    result = read_result(workdir)
    assert (result['status'], result['step'], result['target_step']) == ('done', 12, None)
    for views, expected in VIEWS.items():
        assert result['views'][views]['loss'] == pytest.approx(expected['loss'], rel=1e-4)
        for name in ('top1_error', 'top5_error'):
            assert result['views'][views][name] == pytest.approx(expected[name], abs=0.01)
    recorded = read_lines(workdir / 'metrics.jsonl')
    assert recorded[:5] == read_lines(OLD_RUN / 'metrics.jsonl')
    training = {line['step']: line['loss'] for line in recorded[5:] if line['split'] == 'train'}
    assert training == pytest.approx(TRAIN_LOSSES, rel=1e-4)
    validation = {line['step']: line for line in recorded[5:] if line['split'] == 'validation'}
    assert {step: line['loss'] for step, line in validation.items()} == pytest.approx(VALIDATION_LOSSES, rel=1e-4)
    assert {step: line['learning_rate'] for step, line in validation.items()} == pytest.approx(LEARNING_RATES)
    stats = read_lines(workdir / 'layers.jsonl')[-1]
    assert stats['step'] == 12
    for layer, expected in LAYER_STATS.items():
        found = [stats[layer][name] for name in ('kernel', 'kernel_update', 'bias', 'bias_update')]
        assert found == pytest.approx(expected, rel=1e-4), layer
    assert (workdir / 'dataset_statistics.npz').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('checkpoint', 'expected'),
    [
        ('', {'step': 6, 'loss': 2.8777259826660155, 'top1_error': 0.96375, 'top5_error': 0.619375}),
        ('best', {'step': 3, 'loss': 3.029608268737793, 'top1_error': 0.95375, 'top5_error': 0.700625}),
    ],
)
def test_checkpoints_of_version_0_1_can_be_evaluated(photos_dir, workdir, checkpoint, expected):
    path = str(workdir / checkpoint)
    evaluated = run_command('-m', 'alexnet_jax.evaluate', path, '--views=1', '--json', f'--data_dir={photos_dir}')
    assert evaluated.returncode == 0, evaluated.stderr
    (result,) = json.loads(evaluated.stdout)['members']
    assert result['step'] == expected['step']
    assert result['loss'] == pytest.approx(expected['loss'], rel=1e-4)
    assert result['top1_error'] == pytest.approx(expected['top1_error'], abs=0.01)
    assert result['top5_error'] == pytest.approx(expected['top5_error'], abs=0.01)
    predicted = run_command('-m', 'alexnet_jax.predict', path, '--validation=4', f'--data_dir={photos_dir}', '--json')
    assert predicted.returncode == 0, predicted.stderr
    assert len(predicted.stdout.splitlines()) == 4
    assert not (workdir / 'dataset_statistics.npz').exists()
