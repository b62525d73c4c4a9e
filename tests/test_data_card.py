"""The data card: what `prepare --show`, a dry run and the log of `prepare` say before anything is chosen."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import config_flags, read_json, refusal, run_command, usage_error
from PIL import Image

from alexnet_jax.config import shown_classes
from alexnet_jax.data import dataset
from alexnet_jax.prepare import writer
from alexnet_jax.prepare.data_card import card_of_source
from alexnet_jax.prepare.describe import describe
from alexnet_jax.prepare.raw_sources import ArrayExamples, FileExamples, Source
from alexnet_jax.prepare.writer import PrepareConfig, prepare


def write_pictures(folder: Path, counts: dict[str, int]) -> Path:
    """Writes so many images per path of a class, such as 'train/cat'; returns `folder`."""
    for path, count in counts.items():
        (folder / path).mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (40, 40), (len(path), i, 7)).save(folder / path / f'{i}.png')
    return folder


def show(*flags: str, **variables: str) -> list[str]:
    run = run_command('-m', 'alexnet_jax.prepare', *flags, '--show', **variables)
    assert (run.returncode, run.stderr) == (0, '')
    return run.stdout.splitlines()


def listing(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob('*')]}


def test_card_before_and_after_the_preparation(tmp_path):
    counts = {'train/cat': 30, 'train/dog': 12, 'train/eel': 5, 'valid/cat': 3, 'valid/dog': 2, 'test/cat': 4}
    source = f'folder:{write_pictures(tmp_path / "pets", counts)}'
    flags = [f'--source={source}', f'--data_dir={tmp_path}/d', '--image_size=32']
    before = listing(tmp_path)
    folder, size, *lines = show(*flags)
    assert listing(tmp_path) == before
    target = next(word for word in re.split(r'[ :]', folder) if word.startswith(str(tmp_path)))
    assert folder == f'{target}: not prepared yet; the command prepares it from {source}'
    assert size.startswith(f'the data set takes about {52 * 32 * 32 * 3 / 1e3:.0f} kB; ')
    card = [
        '47 training images (train/)',
        '5 validation images (valid/)',
        '3 classes in this order: cat, dog, eel',
        'smallest class: eel, 5 training images; largest class: cat, 30',
    ]
    assert lines[:4] == card
    assert any('test' in line and 'not used' in line for line in lines[4:])
    found = json.loads(show(*flags, '--json')[0])
    assert (found['images'], found['class_counts']) == ({'train': 47, 'validation': 5}, [30, 12, 5])
    assert (found['origins'], found['prepared']) == ({'train': 'train/', 'validation': 'valid/'}, False)
    # The preparation says the same before it starts.
    run = run_command('-m', 'alexnet_jax.prepare', *flags)
    assert run.returncode == 0
    said, ignored, *_ = (line.partition(' ')[2] for line in run.stderr.splitlines())
    assert said == f'{source}: {card[0]}, {card[1]}; {card[2]}'
    assert ignored.startswith(f'{source}: test')
    assert 'not used' in ignored
    before = listing(tmp_path)
    after = show(*flags)
    assert listing(tmp_path) == before
    assert after[0].startswith(f'{target}: prepared, ')
    assert after[1:5] == card
    assert json.loads(show(*flags, '--json')[0])['class_counts'] == [30, 12, 5]


def test_one_class_is_refused_before_the_preparation(tmp_path):
    source = f'folder:{write_pictures(tmp_path / "one", {"all": 9})}'
    for flags in ([], ['--show']):
        run = run_command('-m', 'alexnet_jax.prepare', f'--source={source}', f'--data_dir={tmp_path}/d', *flags)
        assert usage_error(run) == f'config.data.source: {source} has 1 class (all); at least 2 are needed'


def test_names_with_a_comma_are_in_quotation_marks():
    assert shown_classes(['tench, Tinca tinca', 'eel']) == '"tench, Tinca tinca", eel'


def test_card_names_what_is_odd(tmp_path):
    source = f'folder:{write_pictures(tmp_path / "odd", {"a": 40, "b": 10, "c": 0})}'
    lines = show(f'--source={source}', f'--data_dir={tmp_path}/d')
    share = 5 / 50  # 4 of 40 and 1 of 10
    assert any(line.startswith('45 training images') for line in lines)
    assert any(line.startswith(f'5 validation images (held out, {share:.1%} of all images') for line in lines)
    assert 'smallest class: c, 0 training images; largest class: a, 36' in lines
    assert 'a class has no training image: c' in lines


@pytest.mark.parametrize(
    ('names', 'sorted_names'),
    [
        (('1', '2', '10'), '1, 10, 2'),
        (('class_9', 'class_10', 'class_11'), 'class_10, class_11, class_9'),
        (('apple', 'Banana', 'cherry'), 'Banana, apple, cherry'),
        (('ant', 'zebra', 'ähre'), 'ant, zebra, ähre'),
        (('-1', '0', '01'), '-1, 0, 01'),
    ],
)
def test_classes_are_sorted_as_text_and_class_names_change_the_order(tmp_path, names, sorted_names):
    counts = {f'train/{name}': 3 for name in names} | {f'val/{name}': 1 for name in names}
    source = f'folder:{write_pictures(tmp_path / "classes", counts)}'
    flags = [f'--source={source}', f'--data_dir={tmp_path}/d']
    assert f'3 classes in this order: {sorted_names}' in show(*flags)
    given = names[2], names[0], names[1]
    assert f'3 classes in this order: {", ".join(given)}' in show(*flags, f'--class_names={",".join(given)}')


def test_interrupted_preparation_of_a_relative_path_is_found(tmp_path, monkeypatch):
    write_pictures(tmp_path / 'pets', {'cat': 10, 'dog': 10})
    monkeypatch.chdir(tmp_path)
    settings = PrepareConfig('folder:pets', image_size=32, workers=1)
    monkeypatch.setattr(writer, '_write_metadata', lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, 'd')
    assert '20 images were prepared by an earlier run' in describe(settings, 'd', None).state[1]


def test_many_classes_are_shortened():
    names = [f'class {i}' for i in range(20)]
    labels = np.repeat(np.arange(20, dtype=np.int32), 2)
    examples = FileExamples('/', ['x'] * 40, [1] * 40, labels)
    card = card_of_source('folder:X', Source({'train': examples, 'validation': examples}, names, False))
    assert card.class_sizes() == ['2 training images in each class']
    assert card.classes() == '20 classes in this order: class 0, class 1, class 2, class 3, class 4, ..., class 19'
    assert len(card.to_json()['class_names']) == 20


def test_labels_that_are_no_class_do_not_count():
    examples = ArrayExamples(np.zeros((4, 8, 8), np.uint8), np.array([0, -1, 1, 7], np.int32), np.arange(4))
    card = card_of_source('idx:X', Source({'train': examples, 'validation': examples}, ['a', 'b'], False))
    assert card.to_json()['class_counts'] == [1, 1]
    assert card.class_names == ('a', 'b')


def test_card_of_tfds_data_that_is_missing(tmp_path):
    lines = show('--source=tfds:fashion_mnist', f'--data_dir={tmp_path}/d')
    assert 'TFDS downloads 31 MB' in lines[1]
    assert 'the number of images is unknown until TFDS has downloaded the data' in lines
    assert 'training images per class: unknown before the preparation' in lines
    assert not (tmp_path / 'd').exists()


def test_show_refuses_what_prepare_refuses(tmp_path):
    source = f'folder:{write_pictures(tmp_path / "two", {"train/a": 3, "train/b": 3, "val/a": 1})}'
    flags = ['-m', 'alexnet_jax.prepare', f'--source={source}', f'--data_dir={tmp_path}/d']
    expected = f'config.model.num_classes: 3, but {source} has 2 classes (a, b); the nearest is 2'
    for more in (['--show'], []):
        assert usage_error(run_command(*flags, '--num_classes=3', *more)).startswith(expected)
    assert usage_error(run_command(*flags, '--json')).startswith('--json: only --show prints')
    one = PrepareConfig(f'folder:{write_pictures(tmp_path / "one", {"train/a": 3, "val/a": 1})}', num_classes=0)
    assert 'auto, but folder:' in refusal(prepare, one, str(tmp_path / 'e'))


@pytest.mark.slow
def test_training_says_where_the_validation_images_come_from(tmp_path):
    root = write_pictures(tmp_path / 'p', {'train/a': 4, 'train/b': 4, 'valid/a': 2, 'valid/b': 2, 'test/a': 1})
    fields = {
        'data.source': f'folder:{root}',
        'data.data_dir': tmp_path / 'd',
        'model.widths': '(8,0,0,0,16,0,32)',
        'model.lrn': False,
        'model.towers': 1,
        'model.num_classes': 2,
        'train.steps': 1,
        'train.batch_size': 4,
        'eval.batch_size': 4,
        'data.image_size': 72,
        'data.crop_size': 64,
    }
    settings = PrepareConfig(f'folder:{root}', image_size=72)
    folder = prepare(settings, str(tmp_path / 'd'))
    run = run_command('launch.py', *config_flags(fields), f'--workdir={tmp_path}/w')  # finds the data set prepared
    assert run.returncode == 0, run.stderr
    assert f'folder:{root}: 8 training and 4 validation images (valid/); ' in run.stderr
    for line in (
        '2 classes in this order: a, b',
        'test is not used; config.data.validation_split=test validates on it',
    ):
        assert run.stderr.count(f'folder:{root}: {line}\n') == 1
    # Training inside the folder of the classes does not make a class of the folder of the run.
    inner = fields | {
        'data.source': f'folder:{root}/train',
        'data.data_dir': root / 'train',
        'data.validation_fraction': 0.5,
    }
    run = run_command('launch.py', *config_flags(inner), f'--workdir={root}/train/w')
    assert run.returncode == 0, run.stderr
    assert '; 2 classes in this order: a, b' in run.stderr
    shutil.rmtree(root / 'train/w')
    shutil.rmtree(root / 'train/prepared')
    # The advice names the command that the user must give.
    fields['data.validation_split'] = 'test'
    message = usage_error(run_command('launch.py', *config_flags(fields), f'--workdir={tmp_path}/w2'))
    command = message.partition('prepare the data set anew: ')[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read_json(Path(folder) / 'prepared.json')['images'] == {'train': 8, 'validation': 1}
    prepare(settings, str(tmp_path / 'd'), replace=True)
    # Data sets of earlier versions do not have the field, and their runs resume: the fingerprint is the same.
    data = dataset.open_prepared(folder, settings)
    file = Path(folder) / 'prepared.json'
    content = read_json(file)
    del content['origins'], content['notes'], content['digest']
    text = json.dumps(content, sort_keys=True)
    file.write_text(json.dumps(content | {'digest': hashlib.sha256(text.encode()).hexdigest()}))
    old = dataset.open_prepared(folder, settings)
    assert (old.origins, old.fingerprint) == ({}, data.fingerprint)
