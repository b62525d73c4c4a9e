"""Runs each row of the table "What you have, and what you type" in docs/data.md on a small data set of that form."""

import gzip
import re
import shlex
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import picture_sets
import pytest
from helpers import ROOT, SMALL_NETWORK, config_flags, read_json, read_result, run_command, usage_error
from picture_sets import CLASSES, pictures, write
from test_imagenet import SYNSETS, write_tars

pytestmark = pytest.mark.slow

SMALL = SMALL_NETWORK | {
    'data.image_size': 72,
    'data.crop_size': 64,
    'train.steps': 2,
    'train.batch_size': 8,
    'eval.views': 1,
    'eval.batch_size': 40,
}
NETWORK = '(needs a network)'


def rows() -> list[tuple[str, str]]:
    """Returns the cells of the table."""
    section = (ROOT / 'docs' / 'data.md').read_text().split('## What you have, and what you type\n')[1]
    lines = [line for line in section.split('\n## ')[0].splitlines() if line.startswith('|')]
    assert lines[0] == '| what you have | what you type |'
    return [re.fullmatch(r'\| (.*) \| `(.*)` \|', line).groups() for line in lines[2:]]


def write_pictures(root: Path, *splits: str) -> None:
    """Writes class folders in `splits`, or directly in `root`, with the training pictures first."""
    for i, split in enumerate(splits or ('',)):
        for picture in pictures('train' if i == 0 else 'val'):
            write(root / split / picture.wnid / f'{i}_{picture.train_name}', picture.content)


def write_idx(root: Path) -> None:
    """Writes files in the format of MNIST: 40 training images, 20 test images, 10 classes."""
    for name, count in (('train', 40), ('t10k', 20)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        content = struct.pack('>IIII', 0x803, count, 28, 28) + images.tobytes()
        write(root / f'{name}-images-idx3-ubyte.gz', gzip.compress(content))
        labels = bytes(i % 10 for i in range(count))
        write(root / f'{name}-labels-idx1-ubyte.gz', gzip.compress(struct.pack('>II', 0x801, count) + labels))


def write_tfds(root: Path) -> None:
    """Writes the data set `fishes` of TFDS as TFRecord into the folder D beside `root`."""
    picture_sets.FORMS['tfrecord'].write(root.parent / 'D')


def nothing(root: Path) -> None:
    """The images of the row are not on the disk."""


WHOLE, HELD_OUT = ('160 training images', '40 validation images'), ('144 training images', '16 validation images')
Row = tuple[Callable[[Path], None], tuple[str, ...]]
# The pictures of each row, by the beginning of the row, and what the program must say of them.
FORMS: dict[str, Row] = {
    'class folders: ': (write_pictures, HELD_OUT),
    'class folders in `DIR/train`, `DIR/valid`': (
        lambda root: write_pictures(root, 'train', 'valid', 'test'),
        (*WHOLE, 'test is not used'),
    ),
    'class folders in `DIR/train` and `DIR/test`': (lambda root: write_pictures(root, 'train', 'test'), WHOLE),
    'ImageNet from Kaggle': (picture_sets.write_kaggle, WHOLE),
    'ImageNet, extracted': (picture_sets.write_devkit, WHOLE),
    'the same without the development kit': (picture_sets.write_unlabeled_val, WHOLE),
    'Tiny ImageNet': (picture_sets.write_tiny, WHOLE),
    'a table `DIR/labels.csv`': (picture_sets.write_csv, WHOLE),
    'the tar files of ImageNet': (
        lambda root: write_tars(root.parent / 'D' / 'downloads' / 'manual'),
        ('1,000 classes', SYNSETS[0]),
    ),
    'a data set of TFDS in `D`': (write_tfds, WHOLE),
    f'no images yet; TFDS downloads them {NETWORK}': (nothing, ('n01440764', 'download')),
    'files in the format of MNIST': (write_idx, ('40 training images', '20 validation images')),
    'parquet files': (picture_sets.write_parquet, WHOLE),
    f'no images yet; `pip install huggingface_hub` {NETWORK}': (nothing, ('huggingface_hub',)),
    'tar files of WebDataset': (picture_sets.write_tars, WHOLE),
    'a folder `D` that is read-only': (write_tfds, WHOLE),
    'classes of very different sizes': (write_pictures, HELD_OUT),
    'a question: which splits': (write_pictures, HELD_OUT),
    'a question: what would the training do?': (write_pictures, (*HELD_OUT, 'memory  about', 'disk    a checkpoint')),
    'an unknown number of classes': (write_pictures, HELD_OUT),
    'images to prepare now': (write_pictures, ('160 images',)),
    'images that were changed': (write_pictures, ('161 images',)),
}
TRAINED = ('a folder `D` that is read-only', 'classes of very different sizes', 'tar files of WebDataset')


def form_of(what: str) -> Row:
    """Returns the pictures of a row and what the program must say of them."""
    [found] = [row for beginning, row in FORMS.items() if what.startswith(beginning)]
    return found


def row_name(cell: str) -> str:
    """Returns the name of a test: the first words of the row."""
    return '' if '--' in cell else re.sub(r'\W+', '_', cell)[:50].strip('_')


def arguments(command: str, folder: Path) -> list[str]:
    """Returns the arguments of Python for a command of the table, with folders in `folder` for its placeholders."""
    command = re.sub(r'\b(DIR|D|P)\b', lambda found: f'{folder}/{found[0]}', command).replace(
        'tfds:NAME', 'tfds:fishes'
    )
    program, rest = command.split()[:2], shlex.split(command)[2:]
    return {'python': ['launch.py'], 'alexnet': ['-m', 'alexnet_jax', 'prepare']}[program[0]] + rest


def made(tmp_path: Path, what: str) -> tuple[str, ...]:
    write_form, said = form_of(what)
    write_form(tmp_path / 'DIR')
    return said


def test_table_and_forms_have_the_same_rows():
    for what, command in rows():
        form_of(what)
        assert command.startswith(('python launch.py --', 'alexnet prepare --'))
        is_remote = 'ORG/NAME' in command or 'imagenette' in command
        assert what.endswith(NETWORK) == is_remote
    assert len(rows()) == len(FORMS)


@pytest.mark.parametrize(('what', 'command'), rows(), ids=row_name)
def test_row(what, command, tmp_path):
    """Prepares the images, or shows the plan of the training."""
    said = made(tmp_path, what)
    flags = arguments(command, tmp_path)
    if flags[0] == 'launch.py':
        flags += ['--dry_run', f'--workdir={tmp_path}/run']
        if 'num_classes' not in command and 'DIR' in command and 'idx:' not in command:
            flags.append('--config.model.num_classes=auto')  # the small ImageNet has five classes
    elif '--show' not in command:
        flags.append('--image_size=72')
    if '--replace' in command:
        assert run_command(*(flag for flag in flags if flag != '--replace')).returncode == 0
        write(tmp_path / 'DIR' / CLASSES[0] / 'new.jpg', pictures('val')[0].content)
    run = run_command(*flags, HF_HUB_OFFLINE='1')
    text = usage_error(run) if 'ORG/NAME' in command else run.stdout + run.stderr
    assert run.returncode == (2 if 'ORG/NAME' in command else 0), run.stderr
    for words in said:
        assert words in text, text
    assert not (tmp_path / 'run').exists()
    assert bool(list(tmp_path.glob('D/prepared/*'))) == ('prepar' in what)


@pytest.mark.parametrize(('what', 'command'), [row for row in rows() if row[0].startswith(TRAINED)], ids=row_name)
def test_row_trains(what, command, tmp_path):
    made(tmp_path, what)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob('D/**/*')}
    flags = [*arguments(command, tmp_path), *config_flags(SMALL), f'--workdir={tmp_path}/run']
    run = run_command(*flags)
    assert run.returncode == 0, run.stderr
    result = read_result(tmp_path / 'run')
    assert (result['status'], result['step']) == ('done', 2)
    assert read_json(tmp_path / 'run' / 'config.json')['model']['num_classes'] == len(CLASSES)
    if 'read-only' in what:
        assert list(tmp_path.glob('P/*/prepared.json'))
        assert {path: path.stat().st_mtime_ns for path in tmp_path.glob('D/**/*')} == before
