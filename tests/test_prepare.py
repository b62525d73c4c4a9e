"""Preparing data sets: identical bytes after kills and with any number of workers, and what is rejected."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zoo
from helpers import read_json, read_lines, refusal, run_command, start_command, usage_error, wait_for
from picture_sets import jpeg
from PIL import Image

from alexnet_jax.config import ConfigError
from alexnet_jax.data import dataset
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.prepare.raw_sources import ArrayExamples, SourceError
from alexnet_jax.prepare.shard_writer import _interrupts_blocked, write_shard
from alexnet_jax.prepare.shards import ImageSpec, Shard
from alexnet_jax.prepare.writer import PrepareConfig, prepare

CLASSES, TRAINING, VALIDATION = ('ant', 'bee', 'cow'), 150, 20

# Small shards, so that a small folder has many of them.
PROGRAM = """
import json, sys
from alexnet_jax.prepare import writer
if __name__ == '__main__':
    writer.SHARD_SIZE = 16
    writer.prepare(writer.PrepareConfig(**json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    """Returns a folder of JPEGs, three of which are truncated."""
    root, generator = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for split, count in (('train', TRAINING), ('val', VALIDATION)):
        for i in range(count):
            folder = root / split / CLASSES[i % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            content = jpeg(generator, 30, 160)
            (folder / f'{i:03d}.jpg').write_bytes(content[:200] if i in (7, 133) else content)
    return root


def settings(source: Path, **changes) -> dict:
    return {'source': f'folder:{source}', 'image_size': 32, 'max_corrupt_fraction': 0.02, 'workers': 2} | changes


def start(given: dict, data_dir: Path, command: tuple[str, ...] = ()) -> subprocess.Popen:
    command = command or ('-c', PROGRAM, json.dumps(given), str(data_dir))
    return start_command(*command, start_new_session=True)


def prepared(given: dict, data_dir: Path) -> Path:
    """Prepares the data set of `given` and returns its folder."""
    process = start(given, data_dir)
    log = process.communicate()[1]
    assert process.returncode == 0, log
    return dataset_folder(given, data_dir)


def dataset_folder(given: dict, data_dir: Path) -> Path:
    return Path(dataset.dataset_dir(str(data_dir), PrepareConfig(**given)))


def shard_reports(folder: Path) -> Path:
    """Returns the folder with one JSON file per finished shard of an incomplete data set."""
    return folder.with_name(folder.name + '.incomplete') / 'reports'


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope='module')
def uninterrupted(pictures, tmp_path_factory) -> Path:
    """Returns the data set that every other one must equal."""
    return prepared(settings(pictures), tmp_path_factory.mktemp('whole'))


@pytest.mark.slow
def test_ten_kills_and_reruns_give_identical_bytes(uninterrupted, pictures, tmp_path):
    # Each process is killed a random time after it has written zero, one or two more shards.
    target, chance, begun = dataset_folder(settings(pictures), tmp_path), random.Random(0), []
    reports = shard_reports(target)

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
        if target.exists():  # The process finished, so the data set is complete.
            assert content(target) == content(uninterrupted)
            shutil.rmtree(target)
    assert any(0 < count < 12 for count in begun), begun  # Some were killed between shards.
    assert content(prepared(settings(pictures), tmp_path)) == content(uninterrupted)
    assert [path.name for path in tmp_path.glob('prepared/*')] in (
        [target.name, f'{target.name}.lock'],
        [f'{target.name}.lock', target.name],
    )


@pytest.mark.slow
def test_killed_prepare_leaves_no_worker_and_resumes(uninterrupted, pictures, tmp_path):
    process = start(settings(pictures), tmp_path)
    target = dataset_folder(settings(pictures), tmp_path)
    wait_for(lambda: len(list(shard_reports(target).glob('*.json'))) >= 2 or process.poll() is not None)
    assert process.poll() is None
    workers = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(pid) for pid in workers), 10)
    assert not target.exists()
    again = start(settings(pictures), tmp_path)
    log = again.communicate()[1]
    assert again.returncode == 0
    assert f'of {TRAINING + VALIDATION} images' in log
    assert content(target) == content(uninterrupted)


def alive(pid: int) -> bool:
    """Returns whether the process exists and is not a zombie."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 4])
def test_number_of_workers_does_not_change_bytes(uninterrupted, pictures, tmp_path, workers):
    given = settings(pictures, workers=workers)
    assert content(prepared(given, tmp_path)) == content(uninterrupted)


def test_prepared_data_set_matches_pillow_and_numpy(uninterrupted, pictures):
    folder = uninterrupted
    data = dataset.open_prepared(str(folder), PrepareConfig(**settings(pictures)))
    assert data.class_names == list(CLASSES)
    assert (len(data.train), len(data.validation)) == (TRAINING - 2, VALIDATION - 1)
    images = np.stack([data.train[i]['image'] for i in range(len(data.train))])
    labels = [int(data.train[i]['label']) for i in range(len(data.train))]
    counts = [sum(1 for i in range(TRAINING) if i % 3 == label and i not in (7, 133)) for label in range(3)]
    assert labels == sorted(labels)
    np.testing.assert_array_equal(data.statistics['class_counts'], counts)
    check_statistics(data.statistics, images)
    for i, expected in enumerate(tfds.builder_from_directory(str(folder)).as_data_source('validation')):
        np.testing.assert_array_equal(data.validation[i]['image'], expected['image'])
        assert data.validation[i]['label'] == expected['label']
    # Records are in the order of the file names. Pillow alone computes the third of the second class.
    file = sorted((pictures / 'train' / 'bee').iterdir())[3]  # 001, 004, (007 is truncated,) 010
    image = Image.open(file)
    scale = 32 / min(image.size)
    width, height = (max(32, round(side * scale)) for side in image.size)
    left, top = (width - 32) // 2, (height - 32) // 2
    expected = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    np.testing.assert_array_equal(data.train[counts[0] + 2]['image'], np.asarray(expected))


def as_tfds_has_it(folder, split: str):
    """Reads the records with TFDS itself, without decoding the images."""
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
def test_jpeg_data_set_matches_pillow(pictures, tmp_path, channels):
    """Images are read as Pillow decodes them, and the statistics are those of the decoded images."""
    given = PrepareConfig(**settings(pictures, encoding='jpeg', channels=channels))
    folder = prepare(given, str(tmp_path))
    data = dataset.open_prepared(folder, given)
    raw = PrepareConfig(**settings(pictures, channels=channels))
    originals = dataset.open_prepared(prepare(raw, str(tmp_path)), raw)
    images = np.stack([data.train[i]['image'] for i in range(len(data.train))])
    assert images.shape == (TRAINING - 2, 32, 32, channels)
    check_statistics(data.statistics, images)
    for i in (0, 50, 147):
        record = as_tfds_has_it(folder, 'train')[i]
        decoded = np.asarray(Image.open(io.BytesIO(record['image']))).reshape(32, 32, channels)
        assert record['label'] == data.train[i]['label']
        np.testing.assert_array_equal(images[i], decoded)
        difference = images[i].astype(int) - originals.train[i]['image']
        assert 0 < np.abs(difference).mean() < 4
        assert data.train[i]['label'] == originals.train[i]['label']
    size = sum(path.stat().st_size for path in Path(folder).glob('prepared-*'))
    assert size < sum(path.stat().st_size for path in Path(prepare(raw, str(tmp_path))).glob('prepared-*'))


@pytest.mark.slow
def test_every_kind_of_image_file_in_a_folder(tmp_path):
    """Every file is converted, or listed with a reason in skipped.jsonl."""
    animals = zoo.zoo()
    for split in ('train', 'val'):
        (tmp_path / 'zoo' / split / 'all').mkdir(parents=True)
        for name, (content, _) in animals.items():
            if split == 'train' or not isinstance(animals[name][1], str):
                (tmp_path / 'zoo' / split / 'all' / name).write_bytes(content)
        (tmp_path / 'zoo' / split / 'other').mkdir()  # a data set has at least two classes
        (tmp_path / 'zoo' / split / 'other' / 'plain.jpg').write_bytes(animals['plain.jpg'][0])
    os.symlink('/nowhere', tmp_path / 'zoo' / 'train' / 'all' / 'zz_link_to_nothing.jpg')
    given = PrepareConfig(source=f'folder:{tmp_path}/zoo', image_size=32, max_corrupt_fraction=0.5)
    folder = prepare(given, str(tmp_path))
    skipped = read_lines(Path(folder) / 'skipped.jsonl')
    expected = {f'train/all/{name}': reason for name, (_, reason) in animals.items() if isinstance(reason, str)}
    expected['train/all/zz_link_to_nothing.jpg'] = 'No such file'
    assert [line['name'] for line in skipped] == sorted(expected)
    assert all(re.search(expected[line['name']], line['reason']) for line in skipped)
    assert {line['split'] for line in skipped} == {'train'}
    data = dataset.open_prepared(folder, given)
    colors = [color for _, (_, color) in sorted(animals.items()) if not isinstance(color, str)]
    assert len(data.train) == len(data.validation) == len(colors) + 1
    for index, color in enumerate(colors):
        np.testing.assert_allclose(data.train[index]['image'].mean((0, 1)), color, atol=3)


def test_max_corrupt_fraction_stops_and_resumes(pictures, tmp_path):
    few = PrepareConfig(**settings(pictures, max_corrupt_fraction=0.01))  # of 170: one
    with pytest.raises(DatasetError) as caught:
        prepare(few, str(tmp_path))
    message = str(caught.value)
    assert '\n' not in message
    assert re.search('train/bee/(007|133).jpg', message)
    assert 'data.max_corrupt_fraction=0.01 of 170' in message
    listed = re.search(rf'{tmp_path}\S+jsonl', message)[0]
    names = {line['name'] for line in read_lines(listed)}
    assert names <= {'train/bee/007.jpg', 'train/bee/133.jpg', 'val/bee/007.jpg'}
    folder = prepare(PrepareConfig(**settings(pictures)), str(tmp_path))
    assert len(read_lines(Path(folder) / 'skipped.jsonl')) == 3


@pytest.mark.parametrize(
    ('changes', 'pattern'),
    [
        ({'validation_fraction': 0.3}, 'config.data.validation_fraction: 0.3, .*0.2'),
        ({'class_names': ('a', 'b', 'c')}, r"config.data.class_names: .*'a', 'b', 'c'.*'ant', 'bee', 'cow'"),
        ({}, r'\(150 files before, 151 now: 1 more file in pictures/ant\).* --replace$'),
    ],
)
def test_data_set_of_other_config_or_images_is_rejected(pictures, tmp_path, changes, pattern):
    root = shutil.copytree(pictures / 'train', tmp_path / 'pictures')
    given = PrepareConfig(**settings(root, max_corrupt_fraction=0.1, validation_fraction=0.2))
    folder = prepare(given, str(tmp_path))
    before = content(Path(folder))
    assert prepare(given, str(tmp_path)) == folder  # Preparing again does nothing.
    if not changes:
        (root / 'ant' / 'new.jpg').write_bytes(jpeg(np.random.default_rng(1)))
    assert re.search(pattern, refusal(prepare, PrepareConfig(**vars(given) | changes), str(tmp_path)))
    assert content(Path(folder)) == before


@pytest.mark.slow
@pytest.mark.parametrize('same_size', [True, False])
def test_prepare_resumes_after_files_are_repaired(uninterrupted, pictures, tmp_path, same_size):
    root = shutil.copytree(pictures, tmp_path / 'pictures')
    given = settings(root, max_corrupt_fraction=0.0)
    bad = ('train/bee/007.jpg', 'train/bee/133.jpg', 'val/bee/007.jpg')
    originals = {name: jpeg(np.random.default_rng(3)) for name in bad}
    for name, whole in originals.items():
        (root / name).write_bytes(bytes(len(whole)) if same_size else whole[:200])
    target = dataset_folder(given, tmp_path)
    process = start(given, tmp_path)
    log = process.communicate()[1]
    assert process.returncode == 1
    assert 'max_corrupt_fraction' in log
    before = [path for path in shard_reports(target).glob('*.json') if not read_json(path)['skipped']]
    for name, whole in originals.items():
        (root / name).write_bytes(whole)
    process = start(given, tmp_path)
    log = process.communicate()[1]
    assert process.returncode == 0, log
    if before:
        assert 'were prepared by an earlier run' in log
    assert (target / 'skipped.jsonl').read_text() == ''
    assert content(prepared(given, tmp_path / 'fresh')) == content(target)


@pytest.mark.slow
@pytest.mark.parametrize('change', ['an image', 'a class'])
def test_shards_of_changed_images_or_classes_are_rebuilt(pictures, tmp_path, change):
    """A single worker stops at a truncated bee after three shards of ants; then the first ant or the classes change."""
    root = shutil.copytree(pictures, tmp_path / 'pictures')
    process = start(settings(root, max_corrupt_fraction=0.0, workers=1), tmp_path)
    process.communicate()
    assert process.returncode == 1
    given = settings(root)
    reports = shard_reports(dataset_folder(given, tmp_path))
    assert {f'train-0000{i}.json' for i in range(3)} <= {path.name for path in reports.iterdir()}
    if change == 'an image':
        (root / 'train' / 'ant' / '000.jpg').write_bytes(jpeg(np.random.default_rng(4)))
    else:
        (root / 'train' / 'zebra').mkdir()
    assert content(prepared(given, tmp_path)) == content(prepared(given, tmp_path / 'fresh'))


def test_bad_class_names_full_disk_and_bucket_are_rejected(pictures, tmp_path):
    def message(**changes):
        with pytest.raises((ConfigError, SourceError)) as error:
            prepare(PrepareConfig(**settings(pictures, **changes)), str(tmp_path))
        return str(error.value)

    assert re.search("class_names: 'a' is not a class of folder:", message(class_names=('a', 'b')))
    assert re.search(r'[\d.]+ GB .*[\d.]+ GB', message(image_size=2**15))
    assert re.search("class_names: 'b '", message(class_names=('a', 'b ', 'c')))
    with pytest.raises(SourceError, match='gs://bucket/d'):
        prepare(PrepareConfig(**settings(pictures)), 'gs://bucket/d')


def test_labels_outside_the_classes_are_skipped(tmp_path):
    """Test splits of TFDS without labels have the label -1."""
    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([0, -1, 5])
    shard = Shard('train', 0, 1, ArrayExamples(images, labels, np.arange(3)))
    (tmp_path / 'shards').mkdir()
    report = write_shard(shard, ImageSpec(8, 3, 'raw', ('a', 'b')), str(tmp_path / 'shards'), str(tmp_path))
    assert report['examples'] == 1
    for line, label in zip(report['skipped'], ('-1', '5'), strict=True):
        assert f'label {label}' in line['reason']


def command(source: str, data_dir: Path, *flags: str) -> tuple[str, ...]:
    return '-m', 'alexnet_jax.prepare', f'--source={source}', f'--data_dir={data_dir}', '--image_size=32', *flags


def test_file_size_limit_is_reported_in_one_line(pictures, tmp_path):
    limited = 'import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, 100 << 10));'
    limited += 'os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
    run = run_command('-c', limited, *command(f'folder:{pictures}', tmp_path, '--max_corrupt_fraction=0.02'))
    assert run.returncode == 1
    card, error = run.stderr.splitlines()
    assert '150 training images (train/)' in card
    assert f'{tmp_path}/prepared' in error
    assert 'File too large' in error


@pytest.mark.parametrize('delay', [0.0, 0.03, 0.3])  # in seconds; at first, workers are still starting
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_prepare_at_once(pictures, tmp_path, number, delay):
    many = tmp_path / 'many'  # so many images that no machine finishes before the signal
    for path in pictures.rglob('*.jpg'):
        folder = many / path.parent.relative_to(pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(40):
            os.link(path, folder / f'{path.stem}_{i}.jpg')
    process = start(settings(many), tmp_path, command(f'folder:{many}', tmp_path, '--max_corrupt_fraction=0.02'))
    plan = shard_reports(dataset_folder(settings(many), tmp_path)).with_name('plan.json')
    while not plan.exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    begun = time.monotonic()
    log = process.communicate()[1]
    assert time.monotonic() - begun < 5
    assert process.returncode == 130, log
    card, end = log.splitlines()
    assert '3 classes in this order' in card
    assert 'same command' in end


@pytest.mark.parametrize(
    ('flag', 'word'),
    [
        ('pets', "'pets'"),
        ('--image_size=many', '--image_size=many'),
        ('--validation_fraction=-0.5', '--validation_fraction=-0.5'),
        ('--class_names=a,a,b', "config.data.class_names: 'a'"),
        ('--source=tfds:a-b/c:x', 'config.data.source: '),
    ],
)
def test_invalid_flags_are_rejected(pictures, tmp_path, flag, word):
    assert word in usage_error(run_command(*command(f'folder:{pictures}', tmp_path, flag)))


@pytest.mark.slow
def test_prepare_prints_a_summary(pictures, tmp_path):
    given = command(f'folder:{pictures}', tmp_path)
    run = run_command(*given)
    assert run.returncode == 1
    assert 'max_corrupt_fraction' in run.stderr.splitlines()[-1]
    run = run_command(*given, '--max_corrupt_fraction=0.02')
    assert run.returncode == 0
    for word in ('167 images', ' GB', 'images/s with 2 processes', 'skipped 3', 'skipped.jsonl'):
        assert word in run.stderr
    assert run.stdout == ''


@pytest.mark.parametrize('another_thread', [False, True])  # whether another thread receives the signal
def test_interrupt_is_deferred_while_workers_start(another_thread):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGINT is ignored when tests run in the background.
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    with pytest.raises(KeyboardInterrupt), _interrupts_blocked():  # noqa: PT012
        child = subprocess.Popen(['sleep', '60'])
        signal.pthread_kill(thread.ident if another_thread else threading.get_ident(), signal.SIGINT)
        time.sleep(0.1)
        held_back = True
    end.set()
    assert held_back
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert child.poll() is None
    child.terminate()
    assert child.wait() == -signal.SIGTERM


def prepared_by(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    given = ('-m', 'alexnet_jax.prepare', f'--data_dir={tmp_path}/data', '--image_size=32')
    return run_command(*given, *flags, cwd=tmp_path)


def test_folder_is_prepared_without_tensorflow(without_tensorflow, tmp_path):
    for name in ('a', 'b'):
        (tmp_path / 'pictures' / name).mkdir(parents=True)
        for i in range(10):
            Image.new('RGB', (40, 40), (i, 0, 0)).save(tmp_path / 'pictures' / name / f'{i}.png')
    run = prepared_by(tmp_path, f'--source=folder:{tmp_path}/pictures')
    assert run.returncode == 0, run.stderr
    assert '20 images' in run.stderr


@pytest.mark.parametrize('name', ['imagenet2012', 'cifar10', 'oxford_flowers102'])
def test_builder_that_needs_tensorflow_is_rejected_early(without_tensorflow, tmp_path, name):
    run = prepared_by(tmp_path, f'--source=tfds:{name}')
    message = usage_error(run)
    assert message.startswith(f'tfds:{name}: ')
    assert 'alexnet_jax[imagenet]' in message
