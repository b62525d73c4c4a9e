"""Settings that change when a run resumes: what is logged, what is refused, and where the settings are read from."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import config_flags, edit_progress, read_json, read_lines, read_result, refusal, run_command, usage_error

from alexnet_jax.config import apply_overrides, default_config, get_by_path, resolve
from alexnet_jax.runtime.workdir import (
    check_resumable,
    is_finished,
    read_config,
    read_dataset_statistics,
    resolve_written,
    write_dataset_statistics,
)

pytestmark = pytest.mark.usefixtures('compiled_programs')
SMALL = {
    'model.widths': '(8,0,0,0,16,0,32)',
    'model.lrn': False,
    'model.towers': 1,
    'train.batch_size': 64,
    'train.log_every': 2,
    'eval.every': 2,
    'eval.views': 1,
    'checkpoint.every': 2,
    'checkpoint.keep': 9,
}


def launch(data_dir: str, workdir: Path, *flags: str, **fields: object) -> subprocess.CompletedProcess:
    """Trains in `workdir`. Two underscores in the name of a field stand for a dot."""
    settings = {name.replace('__', '.'): value for name, value in fields.items()}
    values = config_flags(SMALL | {'data.data_dir': data_dir} | settings)
    return run_command('launch.py', f'--workdir={workdir}', *values, *flags)


@pytest.fixture(scope='module')
def trained(photos_dir, tmp_path_factory) -> Path:
    """Returns the folder of a run of four steps."""
    workdir = tmp_path_factory.mktemp('trained') / 'run'
    run = launch(photos_dir, workdir, train__steps=4)
    assert run.returncode == 0, run.stderr
    assert ' -> ' not in run.stderr
    return workdir


def copy(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / 'run'))


def progress_of(workdir: Path, step: int) -> Path:
    return workdir / 'checkpoints' / str(step) / 'progress' / 'metadata'


def remove_settings(workdir: Path) -> None:
    """Makes the checkpoints look like those of earlier versions, which have no settings and no digest of them."""
    for file in workdir.glob('checkpoints/*/progress/metadata'):
        new = ('config', 'progress_digest', 'statistics_digest')
        file.write_text(json.dumps({key: value for key, value in read_json(file).items() if key not in new}))


def changes(run: subprocess.CompletedProcess) -> list[str]:
    return [line.split(' ', 1)[1] for line in run.stderr.splitlines() if ' -> ' in line]


@pytest.mark.slow
def test_checkpoints_contain_the_settings_and_a_digest(trained):
    for step in (2, 4):
        progress = read_json(progress_of(trained, step))
        digest = progress.pop('progress_digest')
        assert digest == hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
        assert progress['config'] == read_json(trained / 'config.json')


@pytest.mark.slow
def test_each_changed_setting_is_logged_at_each_resume(trained, photos_dir, tmp_path):
    workdir = copy(trained, tmp_path)
    changed = launch(
        photos_dir, workdir, '--noconfig.data.flip', train__steps=6, optimizer__learning_rate=0.5, eval__every=6
    )
    assert changed.returncode == 0, changed.stderr
    assert changes(changed) == [
        'config.data.flip: True -> False',
        'config.optimizer.learning_rate: 0.01 -> 0.5',
        'config.train.steps: 4 -> 6',
        'config.eval.every: 2 -> 6',
    ]
    (workdir / 'result.json').unlink()
    (workdir / 'config.json').write_text('{')  # the checkpoint has the settings too
    back = launch(photos_dir, workdir, train__steps=6, eval__every=6)
    assert back.returncode == 0, back.stderr
    assert changes(back) == ['config.data.flip: False -> True', 'config.optimizer.learning_rate: 0.5 -> 0.01']
    assert f'{workdir}/config.json cannot be read' in back.stderr
    history = read_lines(workdir / 'config_history.jsonl')
    assert [line['step'] for line in history] == [0, 4, 6]
    assert [line['config']['optimizer']['learning_rate'] for line in history] == [0.01, 0.5, 0.01]
    assert history[1]['command'][0] == 'launch.py'
    assert history[0]['time'] < history[1]['time'] < history[2]['time']
    assert history[0]['time'].endswith('+00:00')
    assert history[-1]['config'] == read_json(workdir / 'config.json')


@pytest.mark.slow
def test_change_of_the_inputs_needs_a_flag_and_checkpoints_keep_their_own(trained, photos_dir, tmp_path):
    workdir = copy(trained, tmp_path)
    message = usage_error(launch(photos_dir, workdir, train__steps=6, data__mean='none', data__std='(2.0,)'))
    assert message.startswith('config.data.mean: image -> none, config.data.std: (1.0,) -> (2.0,): ')
    assert '--allow_changes' in message
    assert read_json(workdir / 'config.json') == read_json(trained / 'config.json')
    allowed = launch(photos_dir, workdir, '--allow_changes', train__steps=6, data__mean='none')
    assert allowed.returncode == 0, allowed.stderr
    assert 'config.data.mean: image -> none' in changes(allowed)
    # The weights of step 4 were trained with the mean image, and are used with the mean image.
    scores = {}
    for step, folder in ((4, trained), (4, workdir), (6, workdir)):
        path = folder / 'checkpoints' / str(step)
        run = run_command('-m', 'alexnet_jax.evaluate', path, '--views=1', '--json')
        assert run.returncode == 0, run.stderr
        scores[step, folder] = json.loads(run.stdout)['members'][0]['loss']
        assert ('config.data.mean: none -> image' in run.stderr) == ((step, folder) == (4, workdir))
    assert scores[4, trained] == scores[4, workdir] != scores[6, workdir]


@pytest.mark.slow
def test_settings_are_read_from_the_checkpoint_if_config_json_is_lost(trained, photos_dir, tmp_path):
    workdir = copy(trained, tmp_path)
    (workdir / 'config.json').unlink()
    (workdir / 'config.json').mkdir()
    run = run_command('-m', 'alexnet_jax.evaluate', workdir / 'best', '--views=1', '--json')
    assert run.returncode == 0, run.stderr
    assert f'the settings are those of {workdir}/checkpoints/4' in run.stderr
    assert f'{workdir}/config.json cannot be read' in run.stderr
    remove_settings(workdir)
    message = usage_error(run_command('-m', 'alexnet_jax.evaluate', workdir))
    assert f'{workdir}/config.json cannot be read' in message
    resumed = launch(photos_dir, workdir, train__steps=6)
    assert resumed.returncode == 0, resumed.stderr
    assert 'the checkpoints have no settings: the run resumes with the settings of this command' in resumed.stderr
    assert 'at step 4 of 6' in resumed.stderr
    assert read_result(workdir)['step'] == 6
    assert read_json(workdir / 'config.json')['train']['steps'] == 6


@pytest.mark.slow
def test_statistics_are_written_again_only_if_they_are_those_of_the_run(trained, photos_dir, tmp_path):
    workdir = copy(trained, tmp_path)
    path = workdir / 'dataset_statistics.npz'
    content = path.read_bytes()
    arrays, class_names = read_dataset_statistics(str(workdir))
    arrays['mean_image'] = arrays['mean_image'] + 1  # as if the weights had been imported with their own mean
    write_dataset_statistics(str(workdir), arrays, class_names)
    assert f'{path} is of another run' in usage_error(run_command('-m', 'alexnet_jax.evaluate', workdir, '--views=1'))
    path.write_bytes(content[:2000])
    (workdir / 'result.json').unlink()
    (workdir / 'result.json').mkdir()
    with open(workdir / 'metrics.jsonl', 'ab') as file:
        file.write(b'\xff\xfe\n{"step": 4, "sp')
    run = launch(photos_dir, workdir, train__steps=4)
    assert run.returncode == 0, run.stderr
    assert f'{path} cannot be read' in run.stderr
    assert 'it is written again from the prepared data set' in run.stderr
    assert f'{workdir}/result.json is a folder; moved to result.json.corrupt-' in run.stderr
    assert '2 unusable lines dropped' in run.stderr
    assert read_result(workdir)['state_digest'] == read_result(trained)['state_digest']
    assert read_lines(workdir / 'metrics.jsonl') == read_lines(trained / 'metrics.jsonl')
    for name, array in read_dataset_statistics(str(trained))[0].items():
        np.testing.assert_array_equal(read_dataset_statistics(str(workdir))[0][name], array)
    # Imported weights have a mean of their own, which the data set does not have.
    remove_settings(workdir)
    for checkpoint in (workdir / 'checkpoints').iterdir():
        edit_progress(checkpoint, dataset_fingerprint=None)
    path.unlink()
    message = usage_error(launch(photos_dir, workdir, train__steps=6))
    assert f'{path} cannot be read' in message
    assert 'the prepared data set has other statistics' in message


# Fields, without training.


def with_fields(**fields):
    config = default_config()
    apply_overrides(config, {name.replace('__', '.'): value for name, value in fields.items()})
    return resolve(config)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns the folder of a run with the default settings in config.json and none in its checkpoint."""
    (tmp_path / 'checkpoints' / '7').mkdir(parents=True)
    (tmp_path / 'config.json').write_text(json.dumps(resolve(default_config()).to_dict()))
    return tmp_path


def save_settings(folder: Path, step: int, config: object, **values: object) -> Path:
    """Writes the progress of a checkpoint with the settings `config`; returns the path of the file."""
    file = progress_of(folder, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{}')
    edit_progress(folder / 'checkpoints' / str(step), step=step, state_digest='0', config=config, **values)
    return file


@pytest.mark.parametrize(
    ('fields', 'arrow', 'fits'),
    [
        ({'data__mean': 'channel'}, 'config.data.mean: image -> channel', True),
        ({'data__mean_crop': 'center'}, 'config.data.mean_crop: matching -> center', True),
        ({'data__std': (2.0,)}, 'config.data.std: (1.0,) -> (2.0,)', True),
        ({'data__crop': False}, 'config.data.crop: True -> False', True),
        ({'data__crop_size': 225}, 'config.data.crop_size: 224 -> 225', True),
        ({'data__crop_size': 192}, 'config.data.crop_size: 224 -> 192', False),
        ({'data__channels': 1}, 'config.data.channels: 3 -> 1', False),
    ],
)
def test_changes_of_the_inputs_are_allowed_only_with_the_flag_and_if_the_weights_fit(folder, fields, arrow, fits):
    config = with_fields(**fields)
    message = refusal(check_resumable, config, str(folder))
    assert message.startswith(f'{arrow}: ')
    assert '--allow_changes' in message
    if fits:
        check_resumable(config, str(folder), allow_changes=True)
    else:
        message = refusal(check_resumable, config, str(folder), allow_changes=True)
        assert message.startswith(f'{arrow}: the weights in {folder} do not fit')
    message = refusal(check_resumable, config, str(folder), every_field=True, allow_changes=True)
    assert 'was started with' in message


def test_the_newest_readable_checkpoint_decides(folder):
    save_settings(folder, 3, with_fields(seed=3).to_dict())
    torn = save_settings(folder, 9, with_fields(seed=9).to_dict())
    check_resumable(with_fields(seed=9), str(folder))
    assert 'was started with 9' in refusal(check_resumable, with_fields(), str(folder))
    torn.write_text(torn.read_text().replace('"seed": 9', '"seed": 8'))  # the digest is another one now
    check_resumable(with_fields(seed=3), str(folder))
    for name in ('12abc', '007', '٣', ' 12', '-5', '99999999999'):
        shutil.copytree(folder / 'checkpoints' / '3', folder / 'checkpoints' / name)
        file = folder / 'checkpoints' / name / 'progress' / 'metadata'
        file.write_text(json.dumps({'state_digest': '0', 'step': 7}))  # no settings, as of an earlier version
    check_resumable(with_fields(seed=3), str(folder))


def test_config_json_names_the_data_of_imported_weights(folder):
    save_settings(folder, 7, with_fields(seed=3).to_dict(), dataset_fingerprint=None)
    check_resumable(with_fields(), str(folder))
    (folder / 'config.json').unlink()
    check_resumable(with_fields(seed=3), str(folder))
    assert 'was started with 3' in refusal(check_resumable, with_fields(), str(folder))


def test_field_that_an_older_version_did_not_have_takes_its_default(folder):
    written = read_json(folder / 'config.json')
    for group, field in (('model', 'dropout'), ('data', 'flip'), ('optimizer', 'poly_power')):
        del written[group][field]
    del written['checkpoint'], written['seed']
    (folder / 'config.json').write_text(json.dumps(written))
    assert read_config(str(folder)) == resolve_written(written) == with_fields()
    check_resumable(with_fields(data__flip=False), str(folder))
    assert 'config.model.dropout: 0.25' in refusal(check_resumable, with_fields(model__dropout=0.25), str(folder))
    # The settings in a checkpoint say that the field was there, so the file is corrupt.
    save_settings(folder, 9, with_fields(optimizer__poly_power=3.0).to_dict())
    assert read_config(str(folder)).optimizer.poly_power == 3.0


UNREADABLE = (b'', b'{"seed": ', b'\xff\xfe', b'[]', b'null', b'NaN', b'[' * 10**5, b'1' * 5000, b'{}', b'\x00' * 99)
UNUSABLE = (b'{"model": 3}', b'{"model": {"widths": ["a"], "a.b": 1}}', b'{"model": {"dropout": NaN}}')


@pytest.mark.parametrize('content', UNREADABLE + UNUSABLE)
def test_unreadable_config_json(folder, content, capfd):
    (folder / 'config.json').write_bytes(content)
    assert str(folder / 'config.json') in refusal(read_config, str(folder))
    check_resumable(with_fields(seed=4), str(folder))
    assert not is_finished(with_fields(), str(folder))
    config = with_fields(seed=5, model__dropout=0.25)
    save_settings(folder, 9, config.to_dict())
    assert read_config(str(folder)) == config
    (line,) = capfd.readouterr().err.splitlines()
    assert f'the settings are those of {folder}/checkpoints/9' in line


def test_weights_are_used_with_the_settings_of_their_checkpoint(folder, capfd):
    save_settings(folder, 9, with_fields(data__mean='channel', optimizer__learning_rate=0.5).to_dict())
    config = read_config(str(folder))
    assert (config.data.mean, config.optimizer.learning_rate) == ('channel', 0.01)
    assert 'config.data.mean: image -> channel' in capfd.readouterr().err


def test_paths_are_logged_and_make_no_other_run(folder):
    (folder / 'result.json').write_text(json.dumps({'status': 'done', 'views': {}}))
    other = with_fields(data__data_dir='/elsewhere')
    check_resumable(other, str(folder), every_field=True)
    assert is_finished(other, str(folder))
    assert get_by_path(other, 'data.data_dir') == '/elsewhere'


def test_checkpoints_that_are_no_folder_are_refused(tmp_path):
    (tmp_path / 'checkpoints').write_text('')
    assert f'{tmp_path}/checkpoints is not a folder' in refusal(check_resumable, with_fields(), str(tmp_path))
