"""Identity of prepared data sets: which source, which images, what changed since, and data sets of earlier versions."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import (
    ROOT,
    as_earlier_version,
    edit_manifest,
    edit_progress,
    read_json,
    refusal,
    run_command,
    start_command,
    training_command,
    usage_error,
)
from PIL import Image

from alexnet_jax.config import apply_overrides, resolve
from alexnet_jax.data import dataset, inventory
from alexnet_jax.data.manifest import load_manifest
from alexnet_jax.data.open_or_prepare import find_prepared, open_or_prepare
from alexnet_jax.prepare import writer
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.prepare.writer import PrepareConfig, prepare
from alexnet_jax.runtime.workdir import check_resumable, is_finished
from configs.quickstart import get_config

SIZE = 8
RED, BLUE, GREEN, WHITE = (200, 0, 0), (0, 0, 200), (0, 200, 0), (200, 200, 200)


def prepared_folder(config: Any) -> str | None:
    """Returns find_prepared() for the data set of a configuration."""
    return find_prepared(config.data, config.data.data_dir, config.data.prepared_dir)


def write_pictures(root: Path, colors: dict[str, tuple[int, int, int]], train: int = 4, val: int = 2) -> Path:
    """Writes uniform BMPs, whose sizes in bytes are equal, so that sources differ in nothing but pixels."""
    for split, count in (('train', train), ('val', val)):
        for name, color in colors.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((SIZE, SIZE, 3), color, np.uint8)
                pixels[0, 0] = i
                Image.fromarray(pixels).save(root / split / name / f'{i}.bmp')
    return root


def given(source: Path, **changes) -> PrepareConfig:
    return PrepareConfig(
        f'folder:{source}', **{'image_size': SIZE, 'workers': 1, 'max_corrupt_fraction': 0.0} | changes
    )


def prepared(source: Path, data_dir: Path, **changes) -> Path:
    return Path(prepare(given(source, **changes), str(data_dir)))


def configuration(source: object, data_dir: Path, **fields):
    """Returns the resolved configuration of a run; two underscores in the name of a field stand for a dot."""
    config = get_config()
    values = {'data__source': f'folder:{source}', 'data__data_dir': str(data_dir), 'data__image_size': SIZE}
    values |= {'data__crop_size': SIZE, 'model__num_classes': 2, 'model__preset': 'cifar10_13pct'} | fields
    apply_overrides(config, {name.replace('__', '.'): value for name, value in values.items()})
    return resolve(config)


def opened(config) -> dataset.PreparedDataset:
    """Opens a prepared data set as a run does, without a child process."""
    assert prepared_folder(config) is not None
    data = open_or_prepare(config, preemption=None)
    assert data is not None
    return data


def red_and_blue(root: Path) -> Path:
    return write_pictures(root, {'cats': RED, 'dogs': BLUE})


# Different sources never share a data set.


def test_sources_of_the_same_name_do_not_share(tmp_path, monkeypatch):
    """Relative paths, letter case, links and `..`: each folder has its own data set, each spelling the same one."""
    monkeypatch.setenv('HOME', str(tmp_path / 'a'))
    data_dir = tmp_path / 'd'
    colors = {'a/pictures': RED, 'b/pictures': GREEN, 'b/Pictures': WHITE}
    for name, color in colors.items():
        write_pictures(tmp_path / name, {'cats': color, 'dogs': BLUE})
    (tmp_path / 'b' / 'link').symlink_to('pictures')
    found = {}
    for folder, name in (('a', 'pictures'), ('b', 'pictures'), ('b', 'Pictures'), ('b', 'link')):
        monkeypatch.chdir(tmp_path / folder)
        found[f'{folder}/{name}'] = prepared(Path(name), data_dir)
        assert (found[f'{folder}/{name}'] / 'prepared.json').exists()
    assert len(set(found.values())) == 4
    monkeypatch.chdir(tmp_path / 'b')
    for spelling, name in {
        'pictures/': 'b/pictures',
        './x/../pictures': 'b/pictures',
        '../a/pictures//': 'a/pictures',
        '~/pictures': 'a/pictures',
        f'{tmp_path}/b/Pictures/.': 'b/Pictures',
    }.items():
        assert prepared_folder(configuration(spelling, data_dir)) == str(found[name])
    for name, color in {**colors, 'b/link': GREEN}.items():
        statistics = np.load(found[name] / 'statistics.npz')
        expected = (np.array(color) + BLUE) / 2 * (1 - 1 / SIZE**2) + np.mean(range(4)) / SIZE**2
        np.testing.assert_allclose(statistics['mean_rgb'], expected)


def test_manifest_of_another_source_is_refused(tmp_path):
    """If two paths had the same digest in the name of the folder, the manifest would still tell them apart."""
    first = prepared(red_and_blue(tmp_path / 'a' / 'pictures'), tmp_path / 'd')
    other = configuration(red_and_blue(tmp_path / 'b' / 'pictures'), tmp_path / 'd').data
    shutil.copytree(first, dataset.dataset_dir(str(tmp_path / 'd'), other))
    message = refusal(opened, configuration(tmp_path / 'b' / 'pictures', tmp_path / 'd'))
    assert message.startswith(f"config.data.source: 'folder:{tmp_path}/b/pictures', but ")
    assert f"'folder:{tmp_path}/a/pictures'" in message


def test_validation_split_of_the_data_set_is_compared(tmp_path):
    root = red_and_blue(tmp_path / 'pictures')
    (root / 'val').rename(root / 'test')
    prepared(root, tmp_path / 'd', validation_split='test')
    fields = {'data__validation_split': 'test'}
    assert len(opened(configuration(root, tmp_path / 'd', **fields)).train) == 8
    assert refusal(opened, configuration(root, tmp_path / 'd')).startswith('config.data.validation_split: None, but')


@pytest.fixture(scope='module')
def projects(tmp_path_factory) -> Path:
    """A folder with two projects, each with a run on its own folder `pictures`, and with one data_dir."""
    folder = tmp_path_factory.mktemp('projects')
    for name, color in (('a', RED), ('b', GREEN)):
        write_pictures(folder / name / 'pictures', {'cats': color, 'dogs': BLUE})
        run = train(folder / name, 3)
        assert run.returncode == 0, run.stderr
        assert 'prepared ' in run.stderr
    return folder


def train(project: Path, steps: int, *more: str) -> subprocess.CompletedProcess:
    fields = {'data.source': 'folder:pictures', 'model.num_classes': 2, 'train.steps': steps, 'train.batch_size': 4}
    fields |= {'data.image_size': 72, 'data.crop_size': 64}
    _, *flags = training_command('../d', Path('run'), fields, *more)
    return run_command(ROOT / 'launch.py', *flags, cwd=project)


@pytest.mark.slow
def test_projects_train_on_their_own_pictures(projects):
    for name, color in (('a', RED), ('b', GREEN)):
        mean = np.load(projects / name / 'run' / 'dataset_statistics.npz')['mean_rgb']
        np.testing.assert_allclose(mean, (np.array(color) + BLUE) / 2, atol=4)


def start_evaluation(run: Path, *flags: str, cwd: str | Path = '/') -> subprocess.CompletedProcess:
    command = ('-m', 'alexnet_jax', 'evaluate', run, '--views=1', '--json', *flags)
    return run_command(*command, cwd=cwd, PYTHONPATH=str(ROOT))


def evaluate(run: Path, *flags: str) -> dict:
    done = start_evaluation(run, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[0])


@pytest.mark.slow
def test_run_is_evaluated_from_another_folder_without_its_source(projects):
    (projects / 'b' / 'pictures').rename(projects / 'b' / 'moved')
    source = read_json(projects / 'b' / 'run' / 'config.json')['data']['source']
    assert source == f'folder:{projects}/b/pictures'
    assert evaluate(projects / 'b' / 'run')


@pytest.mark.slow
def test_run_of_an_earlier_version_is_evaluated_and_resumes(projects, tmp_path):
    """The settings and the data set have the relative path of the source, which has changed since."""
    folder = Path(shutil.copytree(projects / 'a', tmp_path / 'a'))
    (data_set,) = (path for path in (projects / 'd' / 'prepared').iterdir() if has_source(path, projects / 'a'))
    (tmp_path / 'd' / 'prepared').mkdir(parents=True)
    old = as_earlier_version(
        Path(shutil.copytree(data_set, tmp_path / 'd' / 'prepared' / 'new')),
        folder / 'pictures',
        'folder:pictures',
        'folder_pictures_72px',
    )
    names = ('source', 'fingerprint', 'validation_fraction', 'image_size', 'channels', 'encoding', 'class_names')
    content = {name: read_json(old / 'prepared.json')[name] for name in (*names, 'images', 'files')}
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    run = folder / 'run'
    settings = read_json(run / 'config.json')
    settings['data'] |= {'source': 'folder:pictures', 'data_dir': '../d'}
    (run / 'config.json').write_text(json.dumps(settings))
    for checkpoint in (run / 'checkpoints').iterdir():
        edit_progress(checkpoint, dataset_fingerprint=fingerprint, config=settings)
    expected = f"{run}: its data_dir is the relative path '../d', which does not exist in {run}; change to the folder "
    assert usage_error(start_evaluation(run, cwd=run)).startswith(expected)
    assert evaluate(run, f'--data_dir={tmp_path}/d')
    for name in ('cats', 'dogs'):
        (folder / 'pictures' / 'train' / name / '0.bmp').unlink()
    plan = train(folder, 5, '--dry_run')
    assert f'{old}: prepared, ' in plan.stdout
    assert 'resumes run at step 3' in plan.stdout
    resumed = train(folder, 5)
    assert resumed.returncode == 0, resumed.stderr
    assert 'resuming run at step 3 of 5' in resumed.stderr
    assert f'folder:{folder}/pictures: 8 training and 4 validation images' in resumed.stderr
    assert os.listdir(old.parent) == [old.name]


def has_source(data_set: Path, project: Path) -> bool:
    manifest = data_set / 'prepared.json'
    return manifest.exists() and read_json(manifest)['source'] == f'folder:{project}/pictures'


# The fingerprint is that of the images.


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> Path:
    """Returns a folder with a source and its data set."""
    folder = tmp_path_factory.mktemp('base')
    prepared(red_and_blue(folder / 'pictures'), folder / 'd')
    return folder


@pytest.fixture(scope='module')
def base_set(base) -> Path:
    return Path(dataset.dataset_dir(str(base / 'd'), given(base / 'pictures')))


def fingerprints(folder: Path) -> tuple[str, str]:
    """Returns the fingerprint of the images, and that of the images in their order."""
    manifest = load_manifest(str(folder))
    return manifest.fingerprint, manifest.fingerprint_of_images()


def test_fingerprint_is_the_sum_of_the_digests_of_the_images(base_set):
    total = 0
    for split in ('train', 'validation'):
        for record in tfds.builder_from_directory(str(base_set)).as_data_source(split):
            name = ('cats', 'dogs')[record['label']]
            total += int(hashlib.sha256(f'{split}\0{name}\0'.encode() + record['image'].tobytes()).hexdigest(), 16)
    content = {'class_names': ['cats', 'dogs'], 'images': f'{total % 2**256:064x}'}
    assert fingerprints(base_set)[0] == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def test_place_names_and_dates_do_not_change_the_data_set(base, base_set, tmp_path):
    """All files but the manifest are equal to the byte."""
    root = Path(shutil.copytree(base / 'pictures', tmp_path / 'elsewhere'))
    for path in sorted(root.rglob('*.bmp')):
        os.utime(path, (1, 1))
        path.rename(path.with_name(f'picture {path.name}'))
    other = prepared(root, tmp_path / 'd')
    assert other.name != base_set.name
    assert fingerprints(other) == fingerprints(base_set)
    files = {path.name: path.read_bytes() for path in base_set.iterdir() if path.name != 'prepared.json'}
    assert {name: (other / name).read_bytes() for name in files} == files
    assert str(base).encode() not in b''.join(files.values())


def test_order_changes_only_the_second_fingerprint(base, base_set, tmp_path):
    root = Path(shutil.copytree(base / 'pictures', tmp_path / 'pictures'))
    for path in (root / 'train' / 'cats').iterdir():
        path.rename(path.with_name(f'{9 - int(path.stem)}.bmp'))
    found, expected = fingerprints(prepared(root, tmp_path / 'd')), fingerprints(base_set)
    assert found[0] == expected[0]
    assert found[1] != expected[1]


def change_pixel(root: Path) -> None:
    pixels = np.array(Image.open(root / 'val' / 'dogs' / '0.bmp'))
    pixels[3, 3, 1] += 1
    Image.fromarray(pixels).save(root / 'val' / 'dogs' / '0.bmp')


@pytest.mark.parametrize(
    'change',
    [
        change_pixel,
        lambda root: (root / 'train' / 'cats' / '3.bmp').rename(root / 'train' / 'dogs' / '9.bmp'),
        lambda root: [(root / split / 'dogs').rename(root / split / 'dots') for split in ('train', 'val')],
        lambda root: (root / 'train' / 'cats' / '3.bmp').rename(root / 'val' / 'cats' / '3.bmp'),
        lambda root: shutil.copy(root / 'train' / 'cats' / '3.bmp', root / 'train' / 'cats' / '9.bmp'),
        lambda root: [(root / split / 'eels').mkdir() for split in ('train', 'val')],
    ],
    ids=['pixel', 'label', 'class name', 'split', 'repeated image', 'class without images'],
)
def test_other_images_or_labels_change_both_fingerprints(base, base_set, tmp_path, change):
    root = Path(shutil.copytree(base / 'pictures', tmp_path / 'pictures'))
    change(root)
    found, expected = fingerprints(prepared(root, tmp_path / 'd')), fingerprints(base_set)
    assert found[0] != expected[0]
    assert found[1] != expected[1]


def test_folder_and_idx_files_give_equal_data_sets(tmp_path):
    rng = np.random.default_rng(0)
    for split, files, count in (('train', 'train', 6), ('test', 't10k', 4)):
        images, labels = rng.integers(0, 256, (count, SIZE, SIZE), np.uint8), np.repeat([0, 1], count // 2)
        (tmp_path / 'idx').mkdir(exist_ok=True)
        for what, array in (('images-idx3', images), ('labels-idx1', labels.astype(np.uint8))):
            header = struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / 'idx' / f'{files}-{what}-ubyte.gz').write_bytes(gzip.compress(header + array.tobytes()))
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            (tmp_path / 'folder' / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / 'folder' / split / str(label) / f'{i}.bmp')
    found = []
    for kind in ('idx', 'folder'):
        settings = PrepareConfig(f'{kind}:{tmp_path}/{kind}', SIZE, 1, validation_split='test', workers=1)
        found.append(Path(prepare(settings, str(tmp_path / 'd'))))
    assert fingerprints(found[0]) == fingerprints(found[1])
    names = {path.name for path in found[0].iterdir()} - {'prepared.json'}
    assert all((found[0] / name).read_bytes() == (found[1] / name).read_bytes() for name in names)


# A source that has changed since.


@pytest.fixture
def changing(base, base_set, tmp_path) -> Path:
    """A source, and a data set that was prepared from it, in `tmp_path`/d."""
    root = Path(shutil.copytree(base / 'pictures', tmp_path / 'pictures'))
    settings = given(root)
    target = Path(dataset.dataset_dir(str(tmp_path / 'd'), settings))
    shutil.copytree(base_set, target)
    taken = inventory.take_inventory([str(root)], str(target.parent))
    edit_manifest(target, source=settings.source, inventory=json.loads(json.dumps(vars(taken))))
    return root


def rewrite(path: Path) -> None:
    """Replaces the content by as many other bytes."""
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, (10, 10))


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda root: None, None),
        (lambda root: (root / 'train' / 'cats' / '.DS_Store').touch(), None),
        (lambda root: (root / 'train' / 'cats' / 'Thumbs.db').touch(), None),
        (lambda root: (root / 'notes.txt').touch(), None),
        (lambda root: (root / 'train' / 'cats' / 'LABELS.CSV').touch(), None),
        (lambda root: shutil.rmtree(root), None),
        (lambda root: root.rename(root.with_name('elsewhere')), None),
        (
            lambda root: shutil.copy(root / 'train' / 'cats' / '0.bmp', root / 'train' / 'cats' / '7.bmp'),
            '12 files before, 13 now: 1 more file in pictures/train/cats',
        ),
        (
            lambda root: [(root / 'val' / 'dogs' / f'{i}.bmp').unlink() for i in range(2)],
            '12 files before, 10 now: 2 fewer files in pictures/val/dogs',
        ),
        (
            lambda root: rewrite(root / 'val' / 'dogs' / '0.bmp'),
            '12 files before, 12 now: changed files in pictures/val/dogs',
        ),
        (
            lambda root: (root / 'train' / 'eels').mkdir(),
            '12 files before, 12 now: new folder pictures/train/eels (0 files)',
        ),
        (
            lambda root: [path.rename(f'{path}_') for path in root.glob('*/*')],
            r'12 files before, 12 now: new folder pictures/train/cats_ \(4 files\), .*dogs_ .*, .*val/cats_ \(2 files\)'
            ', and changes in 5 more folders',
        ),
    ],
)
def test_change_of_the_source_is_said_in_one_line(changing, tmp_path, capfd, change, expected):
    change(changing)
    data = opened(configuration(changing, tmp_path / 'd'))
    assert (len(data.train), len(data.validation)) == (8, 4)
    log = capfd.readouterr().err
    if expected is None:
        assert log == ''
        return
    assert log.count('\n') == 1
    expected = expected if '\\' in expected else re.escape(expected)
    assert re.search(rf'folder:{changing} has changed since {tmp_path}/d/prepared/\w+ was prepared .*{expected}\)', log)
    assert ' prepare ' in log
    assert log.endswith(' --replace\n')


def test_change_of_a_table_is_said(base, tmp_path, capfd):
    root = Path(shutil.copytree(base / 'pictures', tmp_path / 'pictures'))
    files = sorted(root.glob('train/*/*'))
    rows = [f'{path.relative_to(root)},{path.parent.name}' for path in files]
    (root / 'labels.csv').write_text('\n'.join(['path,label', *rows]))
    prepare(given(root, validation_fraction=0.5), str(tmp_path / 'd'))
    config = configuration(root, tmp_path / 'd', data__validation_fraction=0.5)
    capfd.readouterr()
    opened(config)
    assert capfd.readouterr().err == ''
    (root / 'labels.csv').write_text('\n'.join(['path,label', *rows[:-1], rows[-1].replace(',dogs', ',cats')]))
    opened(config)
    assert 'has changed since' in capfd.readouterr().err


def test_large_source_is_compared_by_its_folders_first(changing, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(inventory, 'MANY_FILES', 11)
    (changing / 'train' / 'cats' / '0.bmp').write_bytes(b'in place')
    opened(configuration(changing, tmp_path / 'd'))
    assert capfd.readouterr().err == ''
    shutil.copy(changing / 'train' / 'cats' / '0.bmp', changing / 'train' / 'cats' / 'x.bmp')
    opened(configuration(changing, tmp_path / 'd'))
    assert '12 files before, 13 now: 1 more file in pictures/train/cats' in capfd.readouterr().err


def test_data_set_and_runs_in_the_folder_of_the_source_are_no_change(tmp_path, capfd):
    root = red_and_blue(tmp_path / 'pictures')
    prepared(root, root)
    for run in ('runs/quickstart', 'run'):
        (root / run / 'checkpoints' / '3').mkdir(parents=True)
        (root / run / 'config.json').touch()
    capfd.readouterr()
    opened(configuration(root, root))
    assert capfd.readouterr().err == ''


def test_links_that_lead_to_their_parent_end_the_walk(tmp_path):
    root = red_and_blue(tmp_path / 'pictures')
    before = inventory.take_inventory([str(root)], '')
    (root / 'train' / 'cats' / 'loop').symlink_to('..')
    assert inventory.take_inventory([str(root)], '').files == before.files == 12


def test_files_in_the_folder_of_another_root_count_with_it(tmp_path):
    for name in ('1.jpg', 'labels.csv'):
        (tmp_path / name).touch()
    roots = [str(tmp_path), str(tmp_path / 'labels.csv')]
    before = inventory.take_inventory(roots, '')
    assert before.files == 2
    (tmp_path / '2.jpg').touch()
    assert inventory.take_inventory(roots, '').files == 3
    (tmp_path / '2.jpg').unlink()
    os.utime(tmp_path / 'labels.csv', (1, 1))
    after = inventory.take_inventory(roots, '')
    assert (after.files, after.digest != before.digest) == (2, True)


def test_links_to_themselves_and_system_files_are_no_part_of_a_source(tmp_path):
    root = red_and_blue(tmp_path / 'pictures')
    before = inventory.take_inventory([str(root)], '')
    for name in ('lost+found/1', 'System Volume Information/1', 'train/cats/THUMBS.DB'):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    assert inventory.take_inventory([str(root)], '').digest == before.digest
    (root / 'train' / 'cats' / 'loop.png').symlink_to('loop.png')
    assert inventory.take_inventory([str(root)], '').files == before.files + 1


def test_new_class_is_said_with_the_command_that_prepares_it(changing, tmp_path):
    """The command is run as the user would run it. Training with three classes then works."""
    for split in ('train', 'val'):
        shutil.copytree(changing / split / 'dogs', changing / split / 'eels')
    config = configuration(changing, tmp_path / 'd', model__num_classes=3)
    message = refusal(opened, config)
    assert message.startswith('config.model.num_classes: 3, but the data set prepared from folder:')
    assert 'has 2 classes' in message
    assert 'new folder pictures/train/eels (4 files), new folder pictures/val/eels (2 files)' in message
    command = message[message.index('anew: ') + 6 :]
    old = prepared_folder(config)
    done = subprocess.run(['sh', '-c', command], cwd='/', capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert prepared_folder(config) == old
    assert opened(config).class_names == ['cats', 'dogs', 'eels']
    assert not list(Path(old).parent.glob('*.replaced')) + list(Path(old).parent.glob('*.incomplete'))


def test_prepare_refuses_a_changed_source_and_names_replace(changing, tmp_path):
    before = fingerprints(Path(prepare(given(changing), str(tmp_path / 'd'))))
    change_pixel(changing)
    message = refusal(prepare, given(changing), str(tmp_path / 'd'))
    assert 'changed files in pictures/val/dogs' in message
    assert message.endswith(' --replace')
    assert 'remove' not in message
    target = prepare(given(changing), str(tmp_path / 'd'), replace=True)
    assert fingerprints(Path(target)) != before
    assert prepare(given(changing), str(tmp_path / 'd')) == target


# Exchange of data sets.


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize('renames', [0, 1, 2])
def test_killed_exchange_leaves_a_data_set(changing, tmp_path, monkeypatch, renames):
    """The process ends before it gives names to the old and the new data set; another command finds one of them."""
    old = Path(prepare(given(changing), str(tmp_path / 'd')))
    change_pixel(changing)
    new = fingerprints(prepared(changing, tmp_path / 'other'))
    rename, done = os.rename, []

    def limited(*paths):
        if len(done) == renames:
            raise Killed
        done.append(paths)
        rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, 'rename', limited)
        patch.setattr(writer.shutil, 'rmtree', lambda *arguments, **options: None)
        if renames < 2:
            with pytest.raises(Killed):
                prepare(given(changing), str(tmp_path / 'd'), replace=True)
        else:
            prepare(given(changing), str(tmp_path / 'd'), replace=True)
    assert old.exists() == (renames != 1)
    if renames == 0:
        assert 'has changed' in refusal(prepare, given(changing), str(tmp_path / 'd'))
        assert len(opened(configuration(changing, tmp_path / 'd')).train) == 8
        prepare(given(changing), str(tmp_path / 'd'), replace=True)
    else:
        assert prepare(given(changing), str(tmp_path / 'd')) == str(old)
    assert fingerprints(old) == new
    assert {path.name for path in old.parent.iterdir()} == {old.name, f'{old.name}.lock'}


@pytest.mark.slow
def test_replace_killed_at_random(tmp_path):
    root = write_pictures(tmp_path / 'pictures', {'cats': RED, 'dogs': BLUE}, train=40)
    old = fingerprints(prepared(root, tmp_path / 'd'))
    change_pixel(root)
    new = fingerprints(prepared(root, tmp_path / 'other'))
    flags = ['--workers=1', f'--image_size={SIZE}', f'--source=folder:{root}', f'--data_dir={tmp_path}/d']
    target, chance = Path(dataset.dataset_dir(str(tmp_path / 'd'), given(root))), random.Random(0)
    seconds = None
    for _ in range(5):
        started = time.monotonic()
        process = start_command('-m', 'alexnet_jax.prepare', *flags, '--replace')
        if seconds is not None:
            time.sleep(chance.uniform(0.5, 1.1) * seconds)
            process.kill()
        process.communicate()
        seconds = seconds or time.monotonic() - started
        if target.exists():
            assert fingerprints(target) in (old, new)
            assert len(dataset.open_prepared(str(target), given(root)).train) == 80
    done = run_command('-m', 'alexnet_jax.prepare', *flags, '--replace')
    assert done.returncode == 0, done.stderr
    assert fingerprints(target) == new
    assert {path.name for path in target.parent.iterdir()} == {target.name, f'{target.name}.lock'}


@pytest.mark.slow
def test_interrupted_replace_leaves_the_old_data_set(changing, tmp_path):
    target = Path(dataset.dataset_dir(str(tmp_path / 'd'), given(changing)))
    before = fingerprints(target)
    flags = ['--workers=1', f'--image_size={SIZE}', f'--source=folder:{changing}', f'--data_dir={tmp_path}/d']
    process = start_command('-m', 'alexnet_jax.prepare', *flags, '--replace')
    while not Path(f'{target}.incomplete', 'plan.json').exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    log = process.communicate()[1]
    assert process.returncode == 130, log
    assert fingerprints(target) == before
    opened(configuration(changing, tmp_path / 'd'))


# Data sets of earlier versions.


@pytest.fixture
def earlier(base, base_set, tmp_path):
    """Returns a function that makes a data set of an earlier version, and the folder of its source."""
    root = Path(shutil.copytree(base / 'pictures', tmp_path / 'x' / 'pictures'))
    (tmp_path / 'd' / 'prepared').mkdir(parents=True)

    def make(source: str, **values) -> Path:
        name = re.sub(r'\W+', '_', source).strip('_') + f'_{SIZE}px'
        copy = Path(shutil.copytree(base_set, tmp_path / 'd' / 'prepared' / 'copy'))
        return as_earlier_version(copy, root, source, name, **values)

    return make, root


def earlier_fingerprint(folder: Path) -> str:
    manifest = read_json(folder / 'prepared.json')
    content = {name: value for name, value in manifest.items() if name not in ('digests', 'digest')}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize('spelling', ['{root}', '{root}/', '~/x/pictures'])
def test_data_set_with_the_absolute_path_is_used_where_it_is(earlier, tmp_path, monkeypatch, capfd, spelling):
    make, root = earlier
    monkeypatch.setenv('HOME', str(tmp_path))
    old = make(f'folder:{spelling.format(root=root)}')
    expected = earlier_fingerprint(old)
    config = configuration(root, tmp_path / 'd')
    assert prepared_folder(config) == str(old)
    assert opened(config).fingerprint == expected
    assert prepare(given(root), str(tmp_path / 'd')) == str(old)
    shutil.rmtree(root)
    assert opened(config).fingerprint == expected
    assert capfd.readouterr().err == ''
    assert old.exists()


@pytest.mark.parametrize('source', ['pictures', './pictures/', '../x/pictures', '.'])
def test_data_set_with_a_relative_path_is_adopted(earlier, tmp_path, capfd, source):
    make, root = earlier
    old = make(f'folder:{source}')
    expected = earlier_fingerprint(old)
    config = configuration(root, tmp_path / 'd')
    assert prepared_folder(config) is None
    target = prepare(given(root), str(tmp_path / 'd'))
    assert target == dataset.dataset_dir(str(tmp_path / 'd'), given(root))
    log = capfd.readouterr().err
    assert log.count('\n') == 1
    assert f'adopted {old}' in log
    assert not old.exists()
    assert opened(config).fingerprint == expected
    assert prepare(given(root), str(tmp_path / 'd')) == target
    assert capfd.readouterr().err == ''


def repaint(root: Path) -> None:
    """Replaces red by green in files of the same names and sizes."""
    for path in root.glob('*/cats/*.bmp'):
        size = path.stat().st_size
        pixels = np.array(Image.open(path))
        Image.fromarray(pixels[..., [1, 0, 2]]).save(path)
        assert path.stat().st_size == size


@pytest.mark.parametrize('typed', ['pictures', './pictures', 'x/pictures', '{root}'])
def test_run_of_an_earlier_version_accepts_the_data_set_prepared_again(earlier, tmp_path, typed):
    """The fingerprint in its checkpoints is that of the manifest that the earlier version would have written."""
    make, root = earlier
    old = make(f'folder:{typed.format(root=root)}')
    text = read_json(old / 'prepared.json')['source']
    info = (old / 'dataset_info.json').read_bytes()
    described = info.replace(b'"description": "', f'"description": "{text}, '.encode())
    assert len(described) == len(info) + len(text) + 2
    files = read_json(old / 'prepared.json')['files'] | {'dataset_info.json': len(described)}
    edit_manifest(old, files=files)
    recorded = earlier_fingerprint(old)
    shutil.rmtree(old)
    prepared(root, tmp_path / 'd')
    data = opened(configuration(root, tmp_path / 'd'))
    assert data.fingerprint != recorded
    assert data.has_fingerprint(recorded)
    assert not data.has_fingerprint('0' * 64)


def test_source_of_a_run_may_be_moved(tmp_path):
    """The weights depend on the images, not on their place; another source that exists is refused at once."""
    root = red_and_blue(tmp_path / 'pictures')
    run = tmp_path / 'run'
    (run / 'checkpoints' / '1').mkdir(parents=True)
    (run / 'config.json').write_text(json.dumps(configuration(root, tmp_path / 'd').to_dict()))
    (run / 'result.json').write_text('{"status": "done"}')
    other = configuration(red_and_blue(tmp_path / 'other'), tmp_path / 'd')
    assert refusal(check_resumable, other, str(run)).startswith('config.data.source: ')
    root.rename(tmp_path / 'moved')
    moved = configuration(tmp_path / 'moved', tmp_path / 'd')
    check_resumable(moved, str(run))
    assert is_finished(moved, str(run))
    for source in (tmp_path / 'missing', f'{tmp_path}/pictures/../nothing'):
        assert 'was started with' in refusal(check_resumable, configuration(source, tmp_path / 'd'), str(run))


@pytest.mark.parametrize(
    ('change', 'values', 'reason'),
    [
        (repaint, {}, 'train/cats/0.bmp in .* is another image'),
        (lambda root: (root / 'train' / 'cats' / '0.bmp').unlink(), {}, 'have other names, sizes'),
        (lambda root: (root / 'train' / 'eels').mkdir(), {}, 'have other names, sizes'),
        (lambda root: None, {'validation_fraction': 0.3}, 'its validation_fraction is 0.3 and not 0.1'),
    ],
)
def test_data_set_of_other_images_is_named_and_left_alone(earlier, tmp_path, capfd, change, values, reason):
    make, root = earlier
    old = make('folder:pictures', **values)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    change(root)
    target = Path(prepare(given(root), str(tmp_path / 'd')))
    log = capfd.readouterr().err.splitlines()
    assert re.search(f'{old}, prepared from folder:pictures by an earlier version, is left alone .*{reason}', log[0])
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert read_json(target / 'prepared.json')['version'] == 2
    color = GREEN if change is repaint else RED
    first = dataset.open_prepared(str(target), given(root)).train[0]['image']
    assert first[3, 3].tolist() == list(color)


def test_missing_source_names_the_command_that_adopts(earlier, tmp_path):
    make, root = earlier
    old = make('folder:pictures')
    shutil.rmtree(root)
    with pytest.raises(SourceError) as error:
        prepare(given(root), str(tmp_path / 'd'))
    message = str(error.value)
    assert message.startswith(f'config.data.source: {root} is not a folder; {old} was prepared from folder:pictures')
    subprocess.run(['sh', '-c', message[message.index('mv ') :]], check=True)
    assert len(opened(configuration(root, tmp_path / 'd')).train) == 8


@pytest.mark.parametrize('source', ['folder:pictures', 'folder:{root}'])
@pytest.mark.parametrize('is_missing', [False, True])
def test_swapped_labels_are_refused(earlier, tmp_path, source, is_missing):
    """Earlier versions gave label 0 to the images in cats/ and called it dogs."""
    make, root = earlier
    make(source.format(root=root), class_names=['dogs', 'cats'])
    if is_missing:
        shutil.rmtree(root)
    with pytest.raises((SourceError, ValueError)) as error:
        prepare(given(root, class_names=('dogs', 'cats')), str(tmp_path / 'd'))
    if source == 'folder:{root}' or not is_missing:
        assert str(error.value).startswith('config.data: ')
        assert str(error.value).endswith(' --class_names=dogs,cats --replace')
    if source == 'folder:{root}':
        names = {'data__class_names': ('dogs', 'cats')}
        assert 'may be swapped' in refusal(opened, configuration(root, tmp_path / 'd', **names))


@pytest.mark.parametrize(
    'names', [['test_set', 'training_set'], ['Train', 'Val'], ['TEST', 'train2017'], ['images_train', 'valid']]
)
def test_splits_that_an_earlier_version_took_for_classes_are_refused(earlier, tmp_path, names):
    make, root = earlier
    old = make(f'folder:{root}', class_names=names)
    for name, split in zip(sorted(names, key=lambda name: 'rain' not in name), ('train', 'val'), strict=True):
        (root / split).rename(root / name)
    config = configuration(root, tmp_path / 'd', data__validation_fraction=0.5)
    message = refusal(prepared_folder, config)
    assert message.startswith(f'config.data: {old} is not used, because an earlier version took the splits {names[0]}')
    done = subprocess.run(['sh', '-c', message[message.index('anew: ') + 6 :]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert opened(config).class_names == ['cats', 'dogs']


@pytest.mark.parametrize('name', ['valid', 'Val', 'dev', 'val_set'])
def test_validation_images_that_an_earlier_version_ignored_are_said(earlier, tmp_path, capfd, name):
    make, root = earlier
    old = make(f'folder:{root}', validation_fraction=0.1)
    (root / 'val').rename(root / name)
    assert prepared_folder(configuration(root, tmp_path / 'd')) == str(old)
    log = capfd.readouterr().err
    assert log.count('\n') == 1
    assert f'{old}: an earlier version held out training images and ignored {name}/; for a new run ' in log
    assert log.endswith(' --replace\n')


@pytest.mark.parametrize('source', ['folder:pictures', 'folder:{root}'])
def test_names_that_replace_other_names_are_no_swap(earlier, tmp_path, source):
    make, root = earlier
    make(source.format(root=root), class_names=['zebra', 'ant'])
    prepare(given(root, class_names=('zebra', 'ant')), str(tmp_path / 'd'))
    assert opened(configuration(root, tmp_path / 'd')).class_names == ['zebra', 'ant']


def test_other_class_names_are_named(earlier, tmp_path, capfd):
    make, root = earlier
    make('folder:pictures', class_names=['zebra', 'ant'])
    prepare(given(root, class_names=('cats', 'dogs')), str(tmp_path / 'd'))
    assert "its class_names is ['zebra', 'ant'] and not ['cats', 'dogs']" in capfd.readouterr().err
    assert opened(configuration(root, tmp_path / 'd')).class_names == ['cats', 'dogs']


def test_validation_on_test_images_is_said(earlier, tmp_path, capfd):
    make, root = earlier
    old = make(f'folder:{root}')
    (root / 'val').rename(root / 'test')
    assert prepared_folder(configuration(root, tmp_path / 'd', data__validation_split='test')) == str(old)
    assert capfd.readouterr().err == ''
    assert prepared_folder(configuration(root, tmp_path / 'd')) == str(old)
    log = capfd.readouterr().err
    assert log.count('\n') == 1
    assert '--config.data.validation_split=test' in log
    assert log.endswith(' --replace\n')


@pytest.mark.parametrize('source', ['folder:pictures', 'folder:{root}'])
def test_run_uses_the_data_set_on_which_it_was_trained(earlier, tmp_path, capfd, source):
    """Whatever a new run would use: the pictures have changed, or the labels may be swapped, which a line says."""
    make, root = earlier
    names = {'data__class_names': ('dogs', 'cats')}
    for class_names, fields in ((['cats', 'dogs'], {}), (['dogs', 'cats'], names)):
        old = make(source.format(root=root), class_names=class_names)
        config = configuration(root, tmp_path / 'd', **fields)
        recorded = earlier_fingerprint(old)
        (root / 'train' / 'cats' / '0.bmp').unlink(missing_ok=True)
        capfd.readouterr()
        data = open_or_prepare(config, preemption=None, trained_on=recorded)
        assert (data.fingerprint, data.class_names, len(data.train)) == (recorded, class_names, 8)
        log = capfd.readouterr().err
        assert log.count('\n') == bool(fields)
        assert not fields or re.search(r'with dogs, cats, so .* swapped; .* --class_names=dogs,cats --replace', log)
        # A data set of the changed pictures does not hide it.
        new = prepare(given(root, class_names=tuple(class_names)), str(tmp_path / 'd'), replace=True)
        if not old.exists():
            continue
        assert opened(config).fingerprint != recorded
        assert open_or_prepare(config, preemption=None, trained_on=recorded).fingerprint == recorded
        shutil.rmtree(old)
        shutil.rmtree(new)


def test_replaced_data_set_of_an_earlier_version_is_removed(earlier, tmp_path):
    make, root = earlier
    old = make(f'folder:{root}')
    target = prepare(given(root), str(tmp_path / 'd'), replace=True)
    assert os.listdir(target)
    assert not old.exists()
