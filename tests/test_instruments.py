"""TensorBoard's event files read by TensorFlow, a run of Weights & Biases without network, a trace, and refusals."""

import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import config_flags, read_json, read_lines, refusal, run_command
from PIL import Image

from alexnet_jax.training.profiler import StepProfiler, parse_profile
from alexnet_jax.training.trackers import as_scalars, check_wandb

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_programs')]


def launch(data_dir: str, workdir: Path, *flags: str) -> subprocess.CompletedProcess:
    settings = {
        'data.data_dir': data_dir,
        'model.widths': '(16,0,0,0,32,0,64)',
        'train.log_every': 3,
        'eval.every': 6,
        'eval.views': 1,
    }
    wandb = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    command = ('-X', 'importtime', 'launch.py', f'--workdir={workdir}', *config_flags(settings), *flags)
    return run_command(*command, JAX_NUM_CPU_DEVICES='2', **wandb)


@pytest.fixture(scope='module')
def watched(photos_dir, tmp_path_factory) -> tuple[Path, str]:
    """Returns a run of 12 steps that a second command extends to 18, and the standard error of the first command."""
    workdir = tmp_path_factory.mktemp('watched') / 'run'
    everything = ('--tensorboard', '--wandb=alexnet', '--profile=steps 8:10')
    first = launch(photos_dir, workdir, '--config.train.steps=12', *everything)
    assert first.returncode == 0, first.stderr
    second = launch(photos_dir, workdir, '--config.train.steps=18', *everything)
    assert second.returncode == 0, second.stderr
    return workdir, first.stderr


def events(workdir: Path) -> list:
    import tensorflow as tf

    files = sorted((workdir / 'tensorboard').iterdir(), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    return [list(tf.compat.v1.train.summary_iterator(str(file))) for file in files]


def test_event_files_have_the_numbers_of_the_log(watched):
    workdir, _ = watched
    found = {
        (value.tag, event.step): value.simple_value
        for file in events(workdir)
        for event in file
        for value in event.summary.value
        if value.HasField('simple_value')
    }
    expected = {}
    for line in read_lines(workdir / 'metrics.jsonl'):
        expected |= {(f'{line["split"]}/{name}', line['step']): line[name] for name in set(line) - {'split', 'step'}}
    for line in read_lines(workdir / 'layers.jsonl'):
        for layer in set(line) - {'split', 'step'}:
            expected |= {(f'layers/{layer}/{name}', line['step']): value for name, value in line[layer].items()}
    assert set(found) == set(expected)
    assert {('train/loss', 18), ('validation/top1_error', 12), ('layers/conv1/dead', 6)} < set(found)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_event_files_have_images_of_each_evaluation(watched):
    workdir, _ = watched
    pictures: dict = {}
    for file in events(workdir):
        for event in file:
            for value in event.summary.value:
                if value.HasField('image'):
                    pictures[value.tag, event.step] = np.asarray(
                        Image.open(io.BytesIO(value.image.encoded_image_string))
                    )
    assert set(pictures) == {(name, step) for name in ('kernels', 'predictions') for step in (6, 12, 18)}
    for pixels in pictures.values():
        assert pixels.shape[2] == 3
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert (pictures['kernels', 6] != pictures['kernels', 18]).any()
    assert (pictures['predictions', 6] != pictures['predictions', 18]).any()


def test_resumed_run_hides_later_events_of_its_first_part(watched):
    second = events(watched[0])[1]
    assert [event.step for event in second if event.HasField('session_log')] == [13]
    assert min(event.step for event in second if event.summary.value) == 15


def test_training_with_tensorboard_does_not_import_tensorflow(watched):
    imported = set(re.findall(r'\| +([\w.]+)$', watched[1], re.MULTILINE))
    assert {'jax', 'tensorboardX'} <= imported
    assert not [name for name in imported if name.split('.')[0] in ('tensorflow', 'tensorboard')]


def test_weights_and_biases_resumes_the_same_run(watched):
    workdir, _ = watched
    identity = read_json(workdir / 'wandb.json')['id']
    folders = sorted((workdir / 'wandb').glob('offline-run-*'))
    assert [folder.name.endswith(f'-{identity}') for folder in folders] == [True, True]
    assert [len(list(folder.glob('files/media/images/*.png'))) for folder in folders] == [4, 2]
    content = b''.join((folder / f'run-{identity}.wandb').read_bytes() for folder in folders)
    for name in (b'train/loss', b'validation/top1_error', b'layers/conv1/dead', b'image_size'):
        assert name in content


def test_trace_has_the_requested_steps(watched):
    workdir, log = watched
    (trace,) = (workdir / 'profile').rglob('perfetto_trace.json.gz')
    names = [event.get('name', '') for event in json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']]
    assert names.count('PjitFunction(jit(train_step))') == 2 * 2  # the profiler has each call twice
    assert list((workdir / 'profile').rglob('*.xplane.pb'))
    assert f'{workdir}/profile: trace for TensorBoard' in log


def test_trace_that_never_started_is_logged(capfd, tmp_path):
    profile = StepProfiler((5000, 5005), str(tmp_path))
    profile.on_step(3, None)
    profile.close(None)
    assert 'no trace was written: the run ended before step 5000 of --profile' in capfd.readouterr().err
    StepProfiler(None, str(tmp_path)).close(None)
    assert capfd.readouterr().err == ''


def test_scalars_of_a_line():
    line = {'step': 3, 'split': 'layers', 'conv1': {'kernel': 1.5, 'dead': 0}, 'loss': 2, 'name': 'text'}
    assert as_scalars(line) == {'layers/conv1/kernel': 1.5, 'layers/conv1/dead': 0.0, 'layers/loss': 2.0}


@pytest.mark.parametrize('text', ['steps 20:25', '20:25', ' steps  20:25'])
def test_ranges_of_steps(text):
    assert parse_profile(text) == (20, 25)
    assert parse_profile(None) is None


@pytest.mark.parametrize('text', ['', 'steps', 'steps 25:20', 'steps 20:20', 'epochs 1:2', '20', '-1:2', '1.5:2'])
def test_invalid_ranges_of_steps_are_refused(text):
    message = rf"^--profile: {re.escape(repr(text))} is not a range of steps; for example .*'$"
    assert re.match(message, refusal(parse_profile, text))


def test_wrong_flags_are_refused_before_a_folder_exists(photos_dir, tmp_path):
    done = launch(photos_dir, tmp_path / 'run', '--profile=20')  # -X importtime prints lines before the error
    assert done.returncode == 2
    assert "--profile: '20' is not a range of steps" in done.stderr.splitlines()[-1]
    assert not (tmp_path / 'run').exists()


def test_missing_package_is_named(monkeypatch):
    check_wandb('project')
    check_wandb(None)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    message = refusal(check_wandb, 'project')
    assert message.startswith('--wandb=project: the package wandb is not installed: pip install')
