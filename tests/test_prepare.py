"""Preparing: the same to the byte however often it is killed and by however many processes; what it refuses."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zoo
from PIL import Image

from alexnet_jax.config import ConfigError
from alexnet_jax.data import dataset
from alexnet_jax.data.dataset import DatasetError
from alexnet_jax.prepare.raw_sources import ArrayExamples, SourceError
from alexnet_jax.prepare.shard_writer import _interrupts_held_back, write_shard
from alexnet_jax.prepare.shards import ImageSpec, Shard
from alexnet_jax.prepare.writer import PrepareConfig, prepare

ROOT = Path(__file__).parent.parent
CLASSES, TRAINING, VALIDATION = ('ant', 'bee', 'cow'), 150, 20

# Small shards, so that a small folder has many.
PROGRAM = """
import json, sys
from alexnet_jax.prepare import writer
if __name__ == '__main__':
    writer.SHARD_SIZE = 16
    writer.prepare(writer.PrepareConfig(**json.loads(sys.argv[1])), sys.argv[2])
"""


def jpeg(generator: np.random.Generator) -> bytes:
    height, width = (int(side) for side in generator.integers(30, 160, 2))
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height))
    file = io.BytesIO()
    coarse.save(file, 'JPEG', quality=90)
    return file.getvalue()


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    """A folder of JPEGs, two of which are cut off."""
    root, generator = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for split, count in (('train', TRAINING), ('val', VALIDATION)):
        for i in range(count):
            folder = root / split / CLASSES[i % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            content = jpeg(generator)
            (folder / f'{i:03d}.jpg').write_bytes(content[:200] if i in (7, 133) else content)
    return root


def settings(source: Path, **changes) -> dict:
    return {'source': f'folder:{source}', 'image_size': 32, 'max_corrupt_fraction': 0.02, 'workers': 2} | changes


def start(given: dict, data_dir: Path, command: list[str] | None = None) -> subprocess.Popen:
    command = command or [sys.executable, '-c', PROGRAM, json.dumps(given), str(data_dir)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def prepared(given: dict, data_dir: Path) -> Path:
    """The folder of the store of `given`, made now."""
    process = start(given, data_dir)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return store_folder(given, data_dir)


def store_folder(given: dict, data_dir: Path) -> Path:
    return Path(dataset.dataset_dir(str(data_dir), PrepareConfig(**given)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope='module')
def uninterrupted(pictures, tmp_path_factory) -> Path:
    """The store that every other one must equal."""
    return prepared(settings(pictures), tmp_path_factory.mktemp('whole'))


@pytest.mark.slow
def test_killed_ten_times_and_run_again_it_is_the_same_to_the_byte(uninterrupted, pictures, tmp_path):
    # Each is killed a random moment after it wrote none, one or two more shards, however fast the machine is.
    target, chance, begun = store_folder(settings(pictures), tmp_path), random.Random(0), []
    reports = target.with_name(target.name + '.incomplete') / 'reports'

    def shards() -> int:
        return len(list(reports.glob('*.json')))

    for i in range(10):
        process, wanted = start(settings(pictures), tmp_path), shards() + i % 3
        while shards() < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05 if wanted else 0.5))
        process.kill()
        process.communicate()
        begun.append(shards())
        if target.exists():  # it came to its end; what is there is whole
            assert content(target) == content(uninterrupted)
            shutil.rmtree(target)
    assert any(0 < count < 12 for count in begun), begun  # some were killed between shards
    assert content(prepared(settings(pictures), tmp_path)) == content(uninterrupted)
    assert [path.name for path in tmp_path.glob('prepared/*')] in (
        [target.name, f'{target.name}.lock'],
        [f'{target.name}.lock', target.name],
    )


@pytest.mark.slow
def test_a_killed_one_leaves_no_process_and_goes_on_where_it_stood(uninterrupted, pictures, tmp_path):
    process = start(settings(pictures), tmp_path)
    target = store_folder(settings(pictures), tmp_path)
    aside = target.with_name(target.name + '.incomplete')
    while len(list(aside.glob('reports/*.json'))) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    workers = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not target.exists()
    again = start(settings(pictures), tmp_path)
    said = again.communicate()[1]
    assert again.returncode == 0
    assert f'of {TRAINING + VALIDATION} images were prepared before' in said
    assert content(target) == content(uninterrupted)


def alive(pid: int) -> bool:
    """Whether there is such a process that is not merely waiting to be noticed as dead."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 4])
def test_the_number_of_processes_does_not_matter(uninterrupted, pictures, tmp_path, workers):
    given = settings(pictures, workers=workers)
    assert content(prepared(given, tmp_path)) == content(uninterrupted)


def test_what_is_in_the_store(uninterrupted, pictures):
    folder = uninterrupted
    store = dataset.open_store(str(folder), PrepareConfig(**settings(pictures)))
    assert store.class_names == list(CLASSES)
    assert (len(store.train), len(store.validation)) == (TRAINING - 2, VALIDATION - 1)
    images = np.stack([store.train[i]['image'] for i in range(len(store.train))])
    labels = [int(store.train[i]['label']) for i in range(len(store.train))]
    counts = [sum(1 for i in range(TRAINING) if i % 3 == label and i not in (7, 133)) for label in range(3)]
    assert labels == sorted(labels)
    np.testing.assert_array_equal(store.statistics['class_counts'], counts)
    check_statistics(store.statistics, images)
    for i, expected in enumerate(tfds.builder_from_directory(str(folder)).as_data_source('validation')):
        np.testing.assert_array_equal(store.validation[i]['image'], expected['image'])
        assert store.validation[i]['label'] == expected['label']
    # In the order of the files' names: Pillow alone makes the third of the second class.
    file = sorted((pictures / 'train' / 'bee').iterdir())[3]  # 001, 004, (007 is cut off,) 010
    image = Image.open(file)
    scale = 32 / min(image.size)
    width, height = (max(32, round(side * scale)) for side in image.size)
    left, top = (width - 32) // 2, (height - 32) // 2
    expected = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    np.testing.assert_array_equal(store.train[counts[0] + 2]['image'], np.asarray(expected))


def as_tfds_has_it(folder, split: str):
    """The records of a store by TFDS's own reading of it; images as they are stored."""
    builder = tfds.builder_from_directory(str(folder))
    return builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})


def check_statistics(statistics: dict, images: np.ndarray) -> None:
    pixels = images.reshape(-1, images.shape[-1]).astype(np.float64)
    np.testing.assert_allclose(statistics['mean_image'], images.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(statistics['mean_rgb'], pixels.mean(0), rtol=1e-12)
    values, vectors = statistics['eigenvalues'], statistics['eigenvectors']
    covariance = np.cov(pixels.T, bias=True).reshape(len(values), len(values))
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, covariance, rtol=1e-9)
    assert (np.diff(values) > 0).all()
    assert (vectors.sum(0) > 0).all()
    assert {array.dtype for name, array in statistics.items() if name != 'class_counts'} == {np.dtype(np.float64)}


@pytest.mark.parametrize('channels', [1, 3])
def test_jpeg_store(pictures, tmp_path, channels):
    """Read back as Pillow decodes it; statistics are those of what is read back."""
    given = PrepareConfig(**settings(pictures, encoding='jpeg', channels=channels))
    folder = prepare(given, str(tmp_path))
    store = dataset.open_store(folder, given)
    raw = PrepareConfig(**settings(pictures, channels=channels))
    originals = dataset.open_store(prepare(raw, str(tmp_path)), raw)
    images = np.stack([store.train[i]['image'] for i in range(len(store.train))])
    assert images.shape == (TRAINING - 2, 32, 32, channels)
    check_statistics(store.statistics, images)
    for i in (0, 50, 147):
        record = as_tfds_has_it(folder, 'train')[i]
        decoded = np.asarray(Image.open(io.BytesIO(record['image']))).reshape(32, 32, channels)
        assert record['label'] == store.train[i]['label']
        np.testing.assert_array_equal(images[i], decoded)
        difference = images[i].astype(int) - originals.train[i]['image']
        assert 0 < np.abs(difference).mean() < 4
        assert store.train[i]['label'] == originals.train[i]['label']
    size = sum(path.stat().st_size for path in Path(folder).glob('prepared-*'))
    assert size < sum(path.stat().st_size for path in Path(prepare(raw, str(tmp_path))).glob('prepared-*'))


@pytest.mark.slow
def test_the_zoo_in_a_folder(tmp_path):
    """Every kind of file by its rule: converted, or named with the reason in skipped.jsonl."""
    animals = zoo.zoo()
    for split in ('train', 'val'):
        (tmp_path / 'zoo' / split / 'all').mkdir(parents=True)
        for name, (content, _) in animals.items():
            if split == 'train' or not isinstance(animals[name][1], str):
                (tmp_path / 'zoo' / split / 'all' / name).write_bytes(content)
    os.symlink('/nowhere', tmp_path / 'zoo' / 'train' / 'all' / 'zz_link_to_nothing.jpg')
    given = PrepareConfig(source=f'folder:{tmp_path}/zoo', image_size=32, max_corrupt_fraction=0.5)
    folder = prepare(given, str(tmp_path))
    skipped = [json.loads(line) for line in (Path(folder) / 'skipped.jsonl').read_text().splitlines()]
    expected = {f'train/all/{name}': reason for name, (_, reason) in animals.items() if isinstance(reason, str)}
    expected['train/all/zz_link_to_nothing.jpg'] = 'No such file'
    assert [line['name'] for line in skipped] == sorted(expected)
    assert all(re.match(expected[line['name']], line['reason']) for line in skipped)
    assert {line['split'] for line in skipped} == {'train'}
    store = dataset.open_store(folder, given)
    colours = [colour for _, (_, colour) in sorted(animals.items()) if not isinstance(colour, str)]
    assert len(store.train) == len(store.validation) == len(colours)
    for index, colour in enumerate(colours):
        np.testing.assert_allclose(store.train[index]['image'].mean((0, 1)), colour, atol=3)


def test_too_many_unreadable_images_stop_it_and_it_goes_on_when_they_are_allowed(pictures, tmp_path):
    few = PrepareConfig(**settings(pictures, max_corrupt_fraction=0.01))  # of 170: one
    with pytest.raises(DatasetError) as caught:
        prepare(few, str(tmp_path))
    message = str(caught.value)
    assert '\n' not in message
    assert 'cannot be used: ' in message
    assert 'train/bee/007.jpg, damaged' in message or 'train/bee/133.jpg' in message
    assert 'data.max_corrupt_fraction=0.01 of 170 allows 1' in message
    assert 'raise --max_corrupt_fraction' in message
    listed = message.split('all are in ')[1].split(';')[0]
    names = [json.loads(line)['name'] for line in Path(listed).read_text().splitlines()]
    assert set(names) <= {'train/bee/007.jpg', 'train/bee/133.jpg', 'val/bee/007.jpg'}
    folder = prepare(PrepareConfig(**settings(pictures)), str(tmp_path))
    assert len((Path(folder) / 'skipped.jsonl').read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'validation_fraction': 0.3}, 'config.data.validation_fraction: 0.3, but .* was prepared with 0.2'),
        (
            {'class_names': ('a', 'b', 'c')},
            r"config.data.class_names: \['a', 'b', 'c'\], but .* \['ant', 'bee', 'cow'\]",
        ),
        ({}, 'is not what .* was made of: images were added, removed or changed'),
    ],
)
def test_a_store_of_other_settings_or_images_is_refused(pictures, tmp_path, changes, reason):
    root = shutil.copytree(pictures / 'train', tmp_path / 'pictures')
    given = PrepareConfig(**settings(root, max_corrupt_fraction=0.1, validation_fraction=0.2))
    folder = prepare(given, str(tmp_path))
    before = content(Path(folder))
    assert prepare(given, str(tmp_path)) == folder  # the same again is no work
    if not changes:
        (root / 'ant' / 'new.jpg').write_bytes(jpeg(np.random.default_rng(1)))
    with pytest.raises(ConfigError, match=reason):
        prepare(PrepareConfig(**vars(given) | changes), str(tmp_path))
    assert content(Path(folder)) == before


@pytest.mark.slow
@pytest.mark.parametrize('same_size', [True, False])
def test_after_mending_it_goes_on_with_what_was_mended(uninterrupted, pictures, tmp_path, same_size):
    root = shutil.copytree(pictures, tmp_path / 'pictures')
    given = settings(root, max_corrupt_fraction=0.0)
    bad = ('train/bee/007.jpg', 'train/bee/133.jpg', 'val/bee/007.jpg')
    originals = {name: jpeg(np.random.default_rng(3)) for name in bad}
    for name, whole in originals.items():
        (root / name).write_bytes(bytes(len(whole)) if same_size else whole[:200])
    target = store_folder(given, tmp_path)
    process = start(given, tmp_path)
    said = process.communicate()[1]
    assert process.returncode == 1
    assert 'too many images' in said
    reports = target.with_name(target.name + '.incomplete') / 'reports'
    before = {path.name for path in reports.glob('*.json') if not json.loads(path.read_text())['skipped']}
    for name, whole in originals.items():
        (root / name).write_bytes(whole)
    process = start(given, tmp_path)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    if before:
        assert 'images were prepared before' in said
    assert (target / 'skipped.jsonl').read_text() == ''
    fresh = prepared(given, tmp_path / 'fresh')
    assert content(fresh) == content(target)


@pytest.mark.slow
@pytest.mark.parametrize('change', ['an image', 'a class'])
def test_what_was_made_of_other_images_or_classes_is_made_again(pictures, tmp_path, change):
    """One process has made three shards of ants when it meets a bee that is cut off; then the first ant is another."""
    root = shutil.copytree(pictures, tmp_path / 'pictures')
    process = start(settings(root, max_corrupt_fraction=0.0, workers=1), tmp_path)
    process.communicate()
    assert process.returncode == 1
    given = settings(root)
    target = store_folder(given, tmp_path)
    reports = target.with_name(target.name + '.incomplete') / 'reports'
    assert {f'train-0000{i}.json' for i in range(3)} <= {path.name for path in reports.iterdir()}
    if change == 'an image':
        (root / 'train' / 'ant' / '000.jpg').write_bytes(jpeg(np.random.default_rng(4)))
    else:
        (root / 'train' / 'zebra').mkdir()
    assert content(prepared(given, tmp_path)) == content(prepared(given, tmp_path / 'fresh'))


def test_wrong_numbers_of_class_names_and_full_disks_are_refused(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r'class_names: 2 names, but .* has 3 classes'):
        prepare(PrepareConfig(**settings(pictures, class_names=('a', 'b'))), str(tmp_path))
    with pytest.raises(
        SourceError, match=r'needs [\d.]+ GB and [\d.]+ GB are free: name another data_dir or give --enc'
    ):
        prepare(PrepareConfig(**settings(pictures, image_size=2**15)), str(tmp_path))
    with pytest.raises(ConfigError, match=r"class_names: 'b ' is no printable text without blanks"):
        prepare(PrepareConfig(**settings(pictures, class_names=('a', 'b ', 'c'))), str(tmp_path))
    with pytest.raises(SourceError, match=r'gs://bucket/d: stores are made on a disk'):
        prepare(PrepareConfig(**settings(pictures)), 'gs://bucket/d')


def test_a_label_that_is_no_class_is_skipped(tmp_path):
    """As in the test splits of TFDS that come without labels."""
    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([0, -1, 5])
    shard = Shard('train', 0, 1, ArrayExamples(images, labels, np.arange(3)))
    (tmp_path / 'store').mkdir()
    report = write_shard(shard, ImageSpec(8, 3, 'raw', ('a', 'b')), str(tmp_path / 'store'), str(tmp_path))
    assert report['examples'] == 1
    assert [line['reason'] for line in report['skipped']] == ['its label is -1, no class', 'its label is 5, no class']


def command(source: str, data_dir: Path, *flags: str) -> list[str]:
    start = [sys.executable, '-m', 'alexnet_jax.prepare', f'--source={source}', f'--data_dir={data_dir}']
    return [*start, '--image_size=32', *flags]


def test_a_full_disk_is_told_in_one_line(pictures, tmp_path):
    limited = [
        'bash',
        '-c',
        'ulimit -f 100; exec "$@"',
        '-',
        *command(f'folder:{pictures}', tmp_path, '--max_corrupt_fraction=0.02'),
    ]
    run = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.count('\n') == 1, run.stderr
    assert f'{tmp_path}/prepared' in run.stderr
    assert 'File too large' in run.stderr


@pytest.mark.parametrize('delay', [0.0, 0.03, 0.3])  # seconds; in the first ones other processes are being started
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_at_once_in_one_line(pictures, tmp_path, number, delay):
    many = tmp_path / 'many'  # so many that no machine is done before the signal
    for path in pictures.rglob('*.jpg'):
        folder = many / path.parent.relative_to(pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(40):
            os.link(path, folder / f'{path.stem}_{i}.jpg')
    process = start(settings(many), tmp_path, command(f'folder:{many}', tmp_path, '--max_corrupt_fraction=0.02'))
    aside = store_folder(settings(many), tmp_path).with_name(
        store_folder(settings(many), tmp_path).name + '.incomplete'
    )
    while not (aside / 'plan.json').exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    begun = time.monotonic()
    said = process.communicate()[1]
    assert time.monotonic() - begun < 5
    assert process.returncode == 130, said
    assert said == 'alexnet_jax: stopped; rerun the same command to resume\n'


@pytest.mark.parametrize(
    ('flags', 'reason'),
    [
        (['pets'], "'pets' is not a flag"),
        (['--image_size=many'], 'flag --image_size=many'),
        (['--validation_fraction=-0.5'], 'flag --validation_fraction=-0.5'),
        (['--class_names=a,a,b'], "config.data.class_names: 'a' is there twice"),
        (['--source=tfds:a-b/c:x'], 'config.data.source: TFDS '),
    ],
)
def test_wrong_flags_are_refused_in_one_line(pictures, tmp_path, flags, reason):
    run = subprocess.run(command(f'folder:{pictures}', tmp_path, *flags), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f'alexnet_jax: {reason}')
    assert run.stderr.count('\n') == 1


@pytest.mark.slow
def test_the_summary_of_the_command(pictures, tmp_path):
    given = command(f'folder:{pictures}', tmp_path)
    run = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith('alexnet_jax: too many images')
    run = subprocess.run([*given, '--max_corrupt_fraction=0.02'], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0
    for said in ('167 images', ' GB', 'images/s with 2 processes', 'skipped 3: damaged', 'skipped.jsonl'):
        assert said in run.stderr
    assert run.stdout == ''


def test_an_interrupt_while_processes_are_started_is_not_lost_and_none_of_theirs():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with pytest.raises(KeyboardInterrupt), _interrupts_held_back():  # noqa: PT012
        child = subprocess.Popen(['sleep', '60'])
        signal.raise_signal(signal.SIGINT)
        held_back = True
    assert held_back
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert child.poll() is None
    child.terminate()
    assert child.wait() == -signal.SIGTERM


@pytest.fixture
def without_tensorflow(tmp_path_factory, monkeypatch):
    """TensorFlow cannot be imported or found by processes that are started."""
    folder = tmp_path_factory.mktemp('site')
    (folder / 'sitecustomize.py').write_text(
        """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'tensorflow':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Finder())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == 'tensorflow' else find_spec(name, package)
"""
    )
    monkeypatch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{ROOT}')


def prepared_by(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'alexnet_jax.prepare', f'--data_dir={tmp_path}/data', '--image_size=32', *flags]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_a_folder_is_prepared_without_tensorflow(without_tensorflow, tmp_path):
    for name in ('a', 'b'):
        (tmp_path / 'pictures' / name).mkdir(parents=True)
        for i in range(10):
            Image.new('RGB', (40, 40), (i, 0, 0)).save(tmp_path / 'pictures' / name / f'{i}.png')
    run = prepared_by(tmp_path, f'--source=folder:{tmp_path}/pictures')
    assert run.returncode == 0, run.stderr
    assert '20 images' in run.stderr


@pytest.mark.parametrize('name', ['imagenet2012', 'cifar10', 'oxford_flowers102'])
def test_a_builder_that_needs_tensorflow_is_refused_in_one_line_before_it_downloads(without_tensorflow, tmp_path, name):
    run = prepared_by(tmp_path, f'--source=tfds:{name}')
    assert (run.returncode, run.stdout) == (2, '')
    assert run.stderr == (
        f'alexnet_jax: tfds:{name}: its builder in TFDS needs TensorFlow, which is not installed:'
        ' pip install "alexnet_jax[imagenet]"\n'
    )
