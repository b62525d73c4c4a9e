"""The same pictures in every form: equal data sets, also after kills and with a corrupt picture."""

import io
import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import picture_sets
import pytest
import tensorflow_datasets as tfds
from helpers import read_json, read_lines, refusal, start_command, wait_for
from PIL import Image

from alexnet_jax.prepare.writer import PrepareConfig, prepare

pytestmark = pytest.mark.slow

SIZE, SHARDS = 32, 13

# Small shards, so that 200 pictures have many of them.
PROGRAM = """
import json, sys
from alexnet_jax.prepare import writer
if __name__ == '__main__':
    writer.SHARD_SIZE = 16
    writer.prepare(writer.PrepareConfig(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3])
"""


@pytest.fixture(scope='module')
def roots(tmp_path_factory) -> dict[str, Path]:
    """Returns one folder with the pictures per form."""
    folder = tmp_path_factory.mktemp('forms')
    for name, form in picture_sets.FORMS.items():
        form.write(folder / name)
    return {name: folder / name for name in picture_sets.FORMS}


@pytest.fixture(scope='module')
def expected(roots, tmp_path_factory) -> Path:
    """Returns the data set of the class folders, which the data sets of the other forms must equal."""
    return prepared('folders', roots['folders'], tmp_path_factory.mktemp('expected'), workers=1)


def start(form: str, root: Path, prepared_dir: Path, **settings) -> subprocess.Popen:
    given = picture_sets.FORMS[form].settings_of(root) | {'image_size': SIZE} | settings
    return start_command('-c', PROGRAM, json.dumps(given), root, prepared_dir)


def prepared(form: str, root: Path, prepared_dir: Path, **settings) -> Path:
    """Prepares the pictures and returns the folder of the data set."""
    process = start(form, root, prepared_dir, **settings)
    log = process.communicate()[1]
    assert process.returncode == 0, log
    [folder] = [path for path in prepared_dir.iterdir() if path.is_dir()]
    return folder


def check_equal(folder: Path, expected: Path) -> None:
    """Checks that two data sets have the same shards, statistics, class names and fingerprint."""
    names = sorted(path.name for path in expected.glob('prepared-*'))
    assert sorted(path.name for path in folder.glob('prepared-*')) == names
    assert len(names) == SHARDS
    for name in (*names, 'statistics.npz'):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    found, wanted = read_json(folder / 'prepared.json'), read_json(expected / 'prepared.json')
    for field in ('class_names', 'images', 'fingerprint'):
        assert found[field] == wanted[field], field
    assert (folder / 'skipped.jsonl').read_text() == ''


def examples(folder: Path, split: str) -> list[tuple[bytes, int]]:
    """Reads pixels and labels with TFDS alone."""
    data = tfds.builder_from_directory(str(folder)).as_data_source(split)
    return [(example['image'].tobytes(), int(example['label'])) for example in data]


def test_class_folders_match_pillow(expected):
    for split, stored in (('train', 'train'), ('val', 'validation')):
        wanted = picture_sets.pictures(split)
        found = examples(expected, stored)
        assert [label for _, label in found] == [picture.label for picture in wanted]
        for (pixels, _), picture in list(zip(found, wanted, strict=True))[::7]:
            image = Image.open(io.BytesIO(picture.content))
            width, height = (max(SIZE, round(side * SIZE / min(image.size))) for side in image.size)
            left, top = (width - SIZE) // 2, (height - SIZE) // 2
            resized = image.resize((width, height), Image.Resampling.BICUBIC)
            assert pixels == np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))).tobytes()
    assert read_json(expected / 'prepared.json')['class_names'] == list(picture_sets.CLASSES)


@pytest.mark.parametrize('form', [name for name in picture_sets.FORMS if name != 'folders'])
def test_every_form_gives_the_same_bytes(form, roots, expected, tmp_path):
    check_equal(prepared(form, roots[form], tmp_path, workers=1), expected)


@pytest.mark.parametrize('form', picture_sets.FORMS)
def test_every_form_resumes_after_a_kill(form, roots, expected, tmp_path):
    """Three processes write the shards, while one process has written those of the expected data set."""
    chance, begun, workers = random.Random(form), [], {'workers': 3}

    def shards() -> int:
        return len(list(tmp_path.glob('*.incomplete/reports/*.json')))

    while not any(0 < count < SHARDS for count in begun):  # until a process was killed between two shards
        assert len(begun) < 20, begun
        process, wanted = start(form, roots[form], tmp_path, **workers), shards() + chance.randint(1, 5)
        wait_for(lambda process=process, wanted=wanted: shards() >= wanted or process.poll() is not None, every=0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.communicate()
        begun.append(shards())
        for folder in tmp_path.iterdir():
            if folder.is_dir() and folder.suffix != '.incomplete':  # The process completed the data set.
                shutil.rmtree(folder)
    check_equal(prepared(form, roots[form], tmp_path, **workers), expected)


@pytest.mark.parametrize('form', picture_sets.FORMS)
def test_a_corrupt_picture_of_every_form_is_named(form, roots, expected, tmp_path):
    root = shutil.copytree(roots[form], tmp_path / 'pictures')
    name = picture_sets.FORMS[form].corrupt(root)
    folder = prepared(form, root, tmp_path / 'prepared', max_corrupt_fraction=0.005)  # of 200: one
    [skipped] = read_lines(folder / 'skipped.jsonl')
    assert skipped['split'] == 'train'
    assert name in skipped['name']
    assert skipped['reason']
    assert examples(folder, 'validation') == examples(expected, 'validation')
    rest = examples(expected, 'train')
    del rest[picture_sets.BAD]
    assert examples(folder, 'train') == rest


@pytest.mark.parametrize('form', picture_sets.FORMS)
def test_every_form_refuses_another_number_of_classes_before_the_preparation(form, roots, tmp_path):
    given = PrepareConfig(**picture_sets.FORMS[form].settings_of(roots[form]), image_size=SIZE, num_classes=7)
    message = refusal(prepare, given, str(roots[form]), str(tmp_path / 'prepared'))
    assert message.startswith('config.model.num_classes: 7, but ')
    assert f'has 5 classes ({", ".join(picture_sets.CLASSES)}); the nearest is 5' in message
    assert not [path for path in (tmp_path / 'prepared').iterdir() if path.suffix != '.lock']


@pytest.mark.parametrize('form', ['folders', 'csv', 'tfrecord', 'parquet', 'tars'])
def test_every_form_names_prepared_dir_if_its_folder_is_read_only(form, roots, tmp_path):
    read_only = tmp_path / 'file'
    read_only.touch()  # no folder can be created below a file, also not by root
    given = PrepareConfig(**picture_sets.FORMS[form].settings_of(roots[form]), image_size=SIZE)
    assert 'config.data.prepared_dir: ' in refusal(prepare, given, str(roots[form]), str(read_only / 'prepared'))
