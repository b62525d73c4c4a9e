"""Folders as users have them, through the commands: which pictures are trained on, under which names.

Version 0.1 took the folders of splits for classes, did not see `valid/`, validated on `test/`, counted files that are
no images as corrupt images, and used a data set without a word after its source had changed.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import read_json, run_command, training_command, usage_error
from PIL import Image

RED, BLUE, GREEN, WHITE = (200, 0, 0), (0, 0, 200), (0, 200, 0), (200, 200, 200)


def write(folder: Path, count: int, color: tuple[int, int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new('RGB', (72, 72), color).save(folder / f'{i}.png')


def write_split(root: Path, count: int, cats: tuple[int, int, int] = RED) -> None:
    """Writes images of one color per class, of which only that of the cats depends on the split."""
    write(root / 'cats', count, cats)
    write(root / 'dogs', count, BLUE)


def colors(data_dir: Path) -> dict[str, dict[str, tuple[int, set[tuple]]]]:
    """Returns the number and the colors of the prepared images by split and class name."""
    (manifest,) = data_dir.glob('prepared/*/prepared.json')
    names, found = read_json(manifest)['class_names'], {}
    for split in ('train', 'validation'):
        records = list(tfds.builder_from_directory(manifest.parent).as_data_source(split))
        found[split] = {
            name: (len(images), {tuple(image[36, 36].tolist()) for image in images})
            for label, name in enumerate(names)
            if (images := [record['image'] for record in records if record['label'] == label])
        }
    return found


def prepare(root: Path, data_dir: Path, *flags: str) -> str:
    """Prepares `root` by the command, and returns what it logs."""
    command = ('-m', 'alexnet_jax.prepare', f'--source=folder:{root}', f'--data_dir={data_dir}', '--image_size=72')
    run = run_command(*command, '--workers=1', *flags)
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ('train', 'test'),
    [
        ('training_set', 'test_set'),
        ('Train', 'Test'),
        ('seg_train/seg_train', 'seg_test/seg_test'),
        ('data/TRAIN', 'data/TEST_IMAGES'),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path, train, test):
    write_split(tmp_path / 'p' / train, 10)
    write_split(tmp_path / 'p' / test, 4, WHITE)
    log = prepare(tmp_path / 'p', tmp_path / 'd')
    assert '2 classes in this order: cats, dogs' in log
    assert 'is not used; config.data.validation_split=' in log
    expected = {'cats': (9, {RED}), 'dogs': (9, {BLUE})}
    assert colors(tmp_path / 'd') == {'train': expected, 'validation': {'cats': (1, {RED}), 'dogs': (1, {BLUE})}}


@pytest.mark.slow
@pytest.mark.parametrize('has_test', [False, True])
@pytest.mark.parametrize(
    ('train', 'valid'), [('train', 'valid'), ('Train', 'Validation'), ('training', 'dev'), ('train', 'val_set')]
)
def test_valid_precedes_test_and_held_out_images(tmp_path, train, valid, has_test):
    write_split(tmp_path / 'p' / train, 10)
    write_split(tmp_path / 'p' / valid, 3, GREEN)
    if has_test:
        write_split(tmp_path / 'p' / 'test', 4, WHITE)
    log = prepare(tmp_path / 'p', tmp_path / 'd')
    assert f'20 training images ({train}/), 6 validation images ({valid}/)' in log
    assert log.count('test is not used; config.data.validation_split=test') == has_test
    validation = {'cats': (3, {GREEN}), 'dogs': (3, {BLUE})}
    assert colors(tmp_path / 'd') == {'train': {'cats': (10, {RED}), 'dogs': (10, {BLUE})}, 'validation': validation}


@pytest.mark.slow
@pytest.mark.parametrize(
    'files',
    [
        ('Thumbs.db', 'desktop.ini', 'readme.txt', 'labels.csv'),
        ('.DS_Store', '._0.png', 'Desktop.ini', 'THUMBS.DB'),
        ('notes.md', 'classes.json', 'index.html', 'image_list.xlsx'),
        ('archive.zip', 'clip.mp4', 'checksums.md5', 'script.py'),
    ],
)
def test_files_that_are_no_images_do_not_end_the_preparation(tmp_path, files):
    write_split(tmp_path / 'p', 10)
    for i, name in enumerate(files):
        (tmp_path / 'p' / ('cats', 'dogs')[i % 2] / name).write_bytes(b'path,label\n')
    log = prepare(tmp_path / 'p', tmp_path / 'd')
    (skipped,) = (tmp_path / 'd').glob('prepared/*/skipped.jsonl')
    assert skipped.read_bytes() == b''
    assert sum(number for classes in colors(tmp_path / 'd').values() for number, _ in classes.values()) == 20
    named = ' '.join(re.findall(r'(?:not read as images|ignored as .*?): (.*)', log))
    assert sum(map(int, re.findall(r'\b(\d+) [*.\w]', named))) == len(files), log


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_programs')
def test_training_says_that_the_source_has_changed(tmp_path):
    """Pictures and a class are added, a picture is replaced, a class is removed; each time the same command follows."""
    root, number = tmp_path / 'p', 0
    write_split(root, 10)

    def train(classes: int):
        nonlocal number
        number += 1
        fields = {
            'data.source': f'folder:{root}',
            'model.num_classes': classes,
            'train.steps': 1,
            'train.batch_size': 4,
        }
        fields |= {'data.image_size': 72, 'data.crop_size': 64}
        return run_command(*training_command(str(tmp_path / 'd'), tmp_path / f'run{number}', fields))

    first = train(2)
    assert (first.returncode, first.stderr.count('has changed')) == (0, 0), first.stderr
    write(root / 'cats', 14, RED)
    write(root / 'cats', 1, WHITE)
    added = train(2)
    assert added.returncode == 0, added.stderr
    assert '20 files before, 24 now: 4 more files in p/cats' in added.stderr
    write(root / 'eels', 6, GREEN)
    shutil.rmtree(root / 'dogs')
    message = usage_error(train(3))
    assert message.startswith(
        f'config.model.num_classes: 3, but the data set prepared from folder:{root} has 2 classes'
    )
    assert 'new folder p/eels (6 files)' in message
    assert 'p/dogs' in message
    assert message.endswith(' --replace')
    assert np.load(tmp_path / 'run2' / 'dataset_statistics.npz')['class_counts'].tolist() == [9, 9]
