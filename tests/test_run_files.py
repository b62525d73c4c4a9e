"""Corrupt, missing and unwritable files of a run: each is recovered or named in one line, and no state is wrong."""

import json
import math
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_lines, refusal, run_command

from alexnet_jax.config import default_config, resolve
from alexnet_jax.plots import curves
from alexnet_jax.report import page, run_files
from alexnet_jax.runtime.checkpoint_files import read_progress
from alexnet_jax.runtime.checkpoint_ref import parse_checkpoint_ref
from alexnet_jax.runtime.workdir import quarantine_folders, read_dataset_statistics, write_dataset_statistics
from alexnet_jax.training.checkpoint_reader import resolve_step
from alexnet_jax.training.checkpointing import (
    Checkpointer,
    CheckpointError,
    checkpoint_metrics,
    restore_checkpoint,
)
from alexnet_jax.training.metrics_logger import JsonlWriter
from alexnet_jax.training.run_state import RunState, Window
from alexnet_jax.training.state import TrainState

ERRORS = {1: 0.25, 2: 0.125}


def state_of(step: int) -> TrainState:
    params = {'conv1': {'kernel': jnp.full((4, 3), step, jnp.float32)}}
    return TrainState(jnp.int32(step), params, jax.tree.map(lambda leaf: leaf / 2, params), {})


def abstract() -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_of(1))


def run_of(step: int) -> RunState:
    evaluation = {'loss': 1.5, 'top1_error': ERRORS.get(step, 0.5), 'top5_error': 0.0, 'examples': 8}
    return RunState(step=step, last_evaluated_step=step, last_evaluation=evaluation, window=Window(1, step, 0.5))


def save(checkpoints: Checkpointer, step: int) -> None:
    checkpoints.save(state_of(step), run_of(step), run_of(step).last_evaluation['top1_error'])


@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory) -> Path:
    """Returns a folder with the checkpoints of steps 1 and 2, as a run writes them."""
    folder = tmp_path_factory.mktemp('two') / 'checkpoints'
    checkpoints = Checkpointer(str(folder), keep=2, config=resolve(default_config()))
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.close()
    return folder


def resume(folder: Path) -> int:
    """Restores the newest checkpoint, checks that it is intact, saves step 5, and returns the restored step."""
    checkpoints = Checkpointer(str(folder), keep=2, config=resolve(default_config()))
    restored = checkpoints.restore(abstract())
    step = restored.run_state.step
    assert restored.run_state == run_of(step)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(step))
    save(checkpoints, 5)
    checkpoints.close()
    metrics = checkpoint_metrics(str(folder))
    assert metrics[5] == 0.5
    assert metrics[step] == ERRORS[step]
    return step


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


MUTATIONS: dict[str, Callable[[Path], object]] = {
    'flipped': lambda file: flip(file, file.stat().st_size // 2) if file.stat().st_size else None,
    'truncated': lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    'removed': lambda file: file.unlink(),
    'other JSON': lambda file: file.write_text('[]'),
}


@pytest.mark.slow
def test_any_corrupt_file_of_a_checkpoint_is_harmless_or_costs_that_checkpoint(two_checkpoints, tmp_path, capfd):
    files = [path.relative_to(two_checkpoints) for path in (two_checkpoints / '2').rglob('*') if path.is_file()]
    assert len(files) >= 10
    for file in files:
        for name, mutate in MUTATIONS.items():
            folder = Path(shutil.copytree(two_checkpoints, tmp_path / name / str(file).replace('/', '_')))
            mutate(folder / file)
            step = resume(folder)
            err = capfd.readouterr().err
            assert 'Traceback' not in err, (file, name)
            assert (f'checkpoint {folder}/2 is corrupt' in err) == (step == 1), (file, name)
            if file.parts[1] == 'progress' and file.name == 'metadata':
                assert step == 1, name
            shutil.rmtree(folder)


def test_no_flipped_bit_of_the_progress_is_accepted(two_checkpoints, tmp_path):
    folder = Path(shutil.copytree(two_checkpoints / '2', tmp_path / '2'))
    file = folder / 'progress' / 'metadata'
    content = file.read_bytes()
    for at in range(0, len(content), 11):
        flip(file, at)
        with pytest.raises((OSError, ValueError)):
            read_progress(str(folder))
        file.write_bytes(content)


@pytest.mark.parametrize(
    'text', ['{"step": "2"}', '{"plateau": 3}', '{"window": {"steps": -1}}', '{"step": 1e999}', '3']
)
def test_progress_without_a_digest_but_with_wrong_types_is_corrupt(two_checkpoints, tmp_path, text):
    folder = Path(shutil.copytree(two_checkpoints / '2', tmp_path / '2'))
    values = json.loads(text)
    values = {'state_digest': '0', 'step': 2} | values if isinstance(values, dict) else values
    (folder / 'progress' / 'metadata').write_text(json.dumps(values))
    checkpoint, problem = restore_checkpoint(str(folder), None)
    assert checkpoint is None
    assert problem.startswith('its progress is ')


def test_step_of_the_state_and_of_the_folder_must_be_that_of_the_progress(two_checkpoints, tmp_path, capfd):
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / 'checkpoints'))
    checkpoints = Checkpointer(str(folder), keep=3)
    checkpoints.save(state_of(4), run_of(7), None)
    checkpoints.wait()
    (folder / '1').rename(folder / '9')
    assert checkpoints.restore(abstract()).run_state == run_of(2)
    err = capfd.readouterr().err
    assert f'{folder}/9 is corrupt (it is a checkpoint of step 1)' in err
    assert f'{folder}/7 is corrupt (its state is of step 4, and its progress of step 7)' in err
    checkpoints.close()


@pytest.mark.parametrize('content', ['{', '[]', '{"top1_error": 0.0625}', '{"top1_error": "x"}', '{"top1_error": NaN}'])
def test_corrupt_metrics_select_no_checkpoint_and_are_repaired(two_checkpoints, tmp_path, capfd, content):
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / 'checkpoints'))
    (tmp_path / 'config.json').write_text(json.dumps(resolve(default_config()).to_dict()))
    best = parse_checkpoint_ref(str(tmp_path / 'best'))
    assert resolve_step(best) == 2
    metrics = folder / '1' / 'metrics' / 'metrics'
    metrics.write_text(content)
    with pytest.raises(CheckpointError, match=f'^{folder}: the checkpoints cannot be listed: {metrics} has '):
        resolve_step(best)
    assert resume(folder) == 2
    assert f'checkpoint {folder}/1: its metrics are written again' in capfd.readouterr().err


@pytest.mark.parametrize('kind', ['file', 'folder', 'link', 'copy'])
def test_strange_names_are_no_checkpoints(two_checkpoints, tmp_path, capfd, kind):
    ignored = ('foo', '12abc', '-5', '007', ' 7', '3.5', '0x9', 'corrupt-9-1')
    moved = ('9', '٣', '1٣', '2147483648', '99999999999999999999')
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / 'checkpoints'))
    for name in (*ignored, *moved):
        make = {
            'file': lambda path: path.write_text('x'),
            'folder': lambda path: path.mkdir(),
            'link': lambda path: path.symlink_to('/nowhere'),
            'copy': lambda path: shutil.copytree(two_checkpoints / '1', path),
        }
        make[kind](folder / name)
    assert resume(folder) == 2
    err = capfd.readouterr().err
    names = [path.name for path in folder.iterdir()]
    assert set(ignored) | {'2', '5'} <= set(names)
    for name in moved:
        assert f'checkpoint {folder}/{name} is corrupt' in err
        assert name not in names


# metrics.jsonl and layers.jsonl


GOOD = b'{"step": 2, "split": "train", "loss": 1.5}\n'


def test_unusable_lines_are_dropped_and_counted(tmp_path, capfd):
    path = tmp_path / 'metrics.jsonl'
    unusable = [b'\xff\xfe', b'[]', b'{"step": 2}', b'{"step": "2", "split": "train"}', b'{"step": 2, "split": []}']
    unusable += [b'{"step": -1, "split": "train"}', b'[' * 10**5, b'\x00' * 9, b'{"step": 2, "split": "tr']
    later = b'{"step": 9, "split": "train"}\n'
    path.write_bytes(GOOD + later + b'\n'.join(unusable[:-1]) + b'\n' + GOOD + unusable[-1])
    writer = JsonlWriter(str(path), {'train': 4, 'validation': -1})
    writer.write(step=5, split='train')
    writer.close()
    assert path.read_bytes() == GOOD + GOOD + b'{"step": 5, "split": "train"}\n'
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f'{path}: {len(unusable)} unusable lines dropped, for example of a killed process')


def test_unreadable_log_is_renamed(tmp_path, capfd):
    (tmp_path / 'metrics.jsonl').mkdir()
    writer = JsonlWriter(str(tmp_path / 'metrics.jsonl'), {'train': 4})
    writer.write(step=5, split='train')
    writer.close()
    assert read_lines(tmp_path / 'metrics.jsonl') == [{'step': 5, 'split': 'train'}]
    assert len(list(tmp_path.glob('metrics.jsonl.corrupt-*'))) == 1
    assert len(capfd.readouterr().err.splitlines()) == 1


FULL_DISK = """
    import resource, sys
    from alexnet_jax.config import default_config, resolve
    from alexnet_jax.training.metrics_logger import JsonlWriter
    from alexnet_jax.training import trackers
    from alexnet_jax.training.trackers import CompositeTracker, TrackingConfig

    def limit(size):  # a file that grows beyond raises OSError, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    path = sys.argv[1] + '/metrics.jsonl'
    tracker = CompositeTracker(TrackingConfig(tensorboard=True), sys.argv[1], 0, resolve(default_config()), True)
    writer = JsonlWriter(path, {'train': 0}, [tracker.log])
    for step in range(1, 41):
        limit(350 if 5 <= step < 30 else resource.RLIM_INFINITY)
        trackers.FLUSH_SECS = -1.0
        writer.write(step=step, split='train', loss=step / 7)
        assert open(path, 'rb').read()[-1:] == b'\\n'
    writer.close()
    tracker.close()
    print('done')
"""


def test_log_that_cannot_be_written_for_a_time_is_complete_in_the_end(tmp_path):
    run = run_command('-c', textwrap.dedent(FULL_DISK), tmp_path)
    assert (run.returncode, run.stdout) == (0, 'done\n'), run.stderr
    lines = read_lines(tmp_path / 'metrics.jsonl')
    assert lines == [{'step': step, 'split': 'train', 'loss': step / 7} for step in range(1, 41)]
    first, second = sorted(line.split(' ', 1)[1] for line in run.stderr.splitlines())
    assert first.startswith(f'{tmp_path}/metrics.jsonl cannot be written ([Errno 27]')
    assert second.startswith('training continues without TensorBoard: [Errno 27]')


# dataset_statistics.npz


def statistics() -> dict[str, np.ndarray]:
    return {
        'mean_image': np.full((6, 6, 3), 7.5),
        'mean_rgb': np.full(3, 7.5),
        'eigenvalues': np.arange(3.0),
        'eigenvectors': np.eye(3),
        'class_counts': np.array([4, 5]),
    }


def test_statistics_with_wrong_content_cannot_be_read(tmp_path):
    path = tmp_path / 'dataset_statistics.npz'
    write_dataset_statistics(str(tmp_path), statistics(), ['a', 'b'])
    content = path.read_bytes()
    assert read_dataset_statistics(str(tmp_path))[1] == ['a', 'b']
    for text in (
        b'',
        b'PK',
        content[:300],
        content[:-9],
        b'\x93NUMPY\x01\x00',
        b'[]',
        b'\x80\x04]\x94.',
        b'\x00' * 500,
    ):
        path.write_bytes(text)
        assert refusal(read_dataset_statistics, str(tmp_path)).startswith(f'{path} cannot be read (')
    wrong = {
        'mean_image': [np.full((6, 5, 3), 7.5), np.zeros(3), np.full((6, 6, 3), math.nan), np.full((6, 6, 3), 'x')],
        'mean_rgb': [np.zeros(4), np.array(1.0), np.full(3, math.inf)],
        'eigenvectors': [np.zeros((3, 2)), np.zeros((3, 3), complex)],
        'class_counts': [np.zeros(3, int), np.zeros((2, 1))],
    }
    for name, arrays in wrong.items():
        for array in arrays:
            write_dataset_statistics(str(tmp_path), statistics() | {name: array}, ['a', 'b'])
            assert str(path) in refusal(read_dataset_statistics, str(tmp_path)), (name, array)
    write_dataset_statistics(str(tmp_path), statistics(), ['a', 'b', 'c'])
    assert str(path) in refusal(read_dataset_statistics, str(tmp_path))
    np.savez(path, allow_pickle=True, class_names=np.array(['a', {}], object), **statistics())
    assert str(path) in refusal(read_dataset_statistics, str(tmp_path))
    write_dataset_statistics(str(tmp_path), statistics(), ['a', 'b'])
    assert str(path) in refusal(read_dataset_statistics, str(tmp_path), resolve(default_config()))  # 256 pixels


# Readers of a run


NESTED: list[object] = [None, True, -1, 'x', [], {}, [[1]], {'a': 1}, math.nan, math.inf, 1e308, 10**400, '\ud800']


def test_report_and_curves_of_corrupt_files(tmp_path):
    evaluation = {'loss': 1.5, 'top1_error': 0.5, 'top5_error': 0.25, 'examples': 8}
    result = {'status': 'done', 'step': 4, 'views': {'1': evaluation}, 'images_per_second': 9.5, 'corrupt_records': 0}
    line = {'step': 4, 'split': 'train', 'loss': 1.5, 'top1_error': 0.5, 'learning_rate': 0.1, 'images_per_second': 9}
    layers = {'step': 4, 'split': 'layers', 'conv1': {'kernel': 0.5, 'kernel_update': 0.1, 'dead': 0.0}}
    environment = {'versions': {'jax': '1'}, 'processor': 'one', 'command': ['launch.py', '--x']}
    files = {
        'result.json': result,
        'environment.json': environment,
        'metrics.jsonl': line | {'input_wait': 0.5},
        'layers.jsonl': layers,
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for name, content in files.items():
        texts = [b'', b'\xff\xfe', b'[' * 10**5, b'null', b'{"step": 1, "split": []}', b'{"step": 4, "spl']
        changed = [content | {key: value} for key in content for value in NESTED]
        changed += [dict.fromkeys(content, value) | {'split': 'train'} for value in NESTED]
        for text in texts + [json.dumps(each).encode() for each in changed]:
            (tmp_path / name).write_bytes(text)
            run = run_files.read_run(str(tmp_path))
            assert run_files.summary(run).startswith(f'{tmp_path}: ')
            assert run.headline
            page._layer_section(run)
            page._result_section(run)
            page._throughput_section(run)
            page.environment_section(run.environment, run.train_command)
            assert all(abs(line['step']) < 1e30 for line in run.metrics)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line | {'loss': value}) + '\n' for value in NESTED))
    assert curves.draw({'run': curves.read_metrics(str(tmp_path))})


def test_folders_in_the_place_of_files_are_renamed(tmp_path):
    names = ('config.json', 'environment.json', 'metrics.jsonl', 'wandb.json')
    for name in names:
        (tmp_path / name).mkdir()
    quarantine_folders(str(tmp_path))
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == len(names)
    assert all('.corrupt-' in name for name in left)
