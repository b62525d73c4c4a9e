"""Photographs, prepared data sets, and the batches that are read from them."""

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import refusal, run_command, start_command
from PIL import Image

from alexnet_jax.config import default_config
from alexnet_jax.data import dataset, loader, split_reader
from alexnet_jax.prepare import photos
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.prepare.writer import PrepareConfig, prepare

PHOTOS = PrepareConfig('photos', image_size=72)


def open_photos(data_dir: str) -> dataset.PreparedDataset:
    return dataset.open_prepared(dataset.dataset_dir(data_dir, PHOTOS), PHOTOS)


@pytest.fixture(scope='module')
def data(photos_dir):
    return open_photos(photos_dir)


def test_photo_splits_share_no_pixel():
    for height, width in [(512, 512), (191, 384), (1411, 1411)]:
        seen = {}
        for split in ('train', 'validation'):
            seen[split] = np.zeros((height, width), bool)
            for region in photos.cells(split, height, width):
                seen[split][region] = True
        assert not (seen['train'] & seen['validation']).any()
        assert (seen['train'] | seen['validation']).all()


def test_patches_stay_in_their_cells_and_are_deterministic(monkeypatch):
    """A photograph whose pixels are their own coordinates shows where every patch was cut."""
    rows, columns = np.meshgrid(np.arange(200), np.arange(240), indexing='ij')
    monkeypatch.setattr(photos, 'photograph', lambda name: np.stack([rows, columns, rows * 0], -1).astype(np.uint8))
    monkeypatch.setattr(photos, 'PHOTOGRAPHS', ('a', 'b'))
    for split, parity in (('train', 0), ('validation', 1)):
        found = list(photos.patches(split))
        assert len(found) == 2 * photos.PATCHES_PER_IMAGE[split]
        cells = {(int(patch[0, 0, 0]) // 50 + int(patch[0, 0, 1]) // 60) % 2 for _, patch, _ in found}
        cells |= {(int(patch[-1, -1, 0]) // 50 + int(patch[-1, -1, 1]) // 60) % 2 for _, patch, _ in found}
        assert cells == {parity}
        for (key, patch, label), (key_again, again, _) in zip(found, photos.patches(split), strict=True):
            assert key == key_again
            assert label in (0, 1)
            np.testing.assert_array_equal(patch, again)


@pytest.mark.slow
def test_photos_data_set_matches_pillow(data):
    assert data.class_names == list(photos.PHOTOGRAPHS)
    assert (len(data.train), len(data.validation)) == (6400, 1600)
    example = data.train[17]
    assert example['image'].shape == (72, 72, 3)
    assert example['image'].dtype == np.uint8
    counts = np.bincount([int(data.validation[i]['label']) for i in range(1600)])
    np.testing.assert_array_equal(counts, np.full(16, 100))
    # The first patch of each photograph, scaled by Pillow alone; TFDS sets the order of the records.
    expected = {
        Image.fromarray(patch).resize((72, 72), Image.Resampling.BICUBIC).tobytes()
        for key, patch, _ in photos.patches('validation')
        if key.endswith('_0000')
    }
    assert expected <= {data.validation[i]['image'].tobytes() for i in range(1600)}


@pytest.mark.slow
def test_prepare_is_done_once(photos_dir):
    folder = Path(dataset.dataset_dir(photos_dir, PHOTOS))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(PHOTOS, photos_dir) == str(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow
def test_waiting_prepare_replaces_a_killed_one(photos_dir, tmp_path):
    shutil.copytree(os.path.join(photos_dir, 'photos'), tmp_path / 'photos')
    command = ['-m', 'alexnet_jax.prepare', f'--data_dir={tmp_path}', '--image_size=96']
    given = PrepareConfig('photos', image_size=96)
    target = Path(dataset.dataset_dir(str(tmp_path), given))
    with start_command(*command) as process:
        while not list(Path(f'{target}.incomplete').rglob('*.json')):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        with start_command(*command) as waiting:
            assert f'{target}: ' in waiting.stderr.readline()
            waiting.send_signal(signal.SIGSTOP)  # Otherwise it may already have removed the unfinished files.
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not target.exists()
            assert Path(f'{target}.incomplete').exists()
            waiting.send_signal(signal.SIGCONT)
            log = waiting.stderr.read()
    assert waiting.returncode == 0, log
    assert len(dataset.open_prepared(str(target), given).train) == 6400
    assert not Path(f'{target}.incomplete').exists()


def test_run_waiting_for_data_stops_on_sigterm(tmp_path):
    target = Path(dataset.dataset_dir(str(tmp_path), PHOTOS))
    target.parent.mkdir()
    with open(f'{target}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with start_command('launch.py', f'--workdir={tmp_path}/run', f'--config.data.data_dir={tmp_path}') as waiting:
            assert f'{target}: ' in waiting.stderr.readline()
            waiting.send_signal(signal.SIGTERM)
            log = waiting.stderr.read()
    assert waiting.returncode == 75, log
    assert 'preparing' in log


@pytest.mark.slow
def test_source_without_random_access_is_rejected(photos_dir, tmp_path):
    shutil.copytree(os.path.join(photos_dir, 'photos'), tmp_path / 'photos')
    info = tmp_path / 'photos' / '1.0.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'riegeli'))
    with pytest.raises(SourceError, match='riegeli'):
        prepare(PrepareConfig('photos', image_size=64), str(tmp_path))


class Numbered:
    """Random access to images whose pixels are their index."""

    in_memory = False

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return {'image': np.full((2, 2, 3), index, np.uint8), 'label': np.int32(index)}

    def take_cached(self, indices: np.ndarray) -> None:
        return None


def take(batches, count: int) -> list[dict]:
    return [next(batches) for _ in range(count)]


def training(first_step: int = 0, **options) -> list[dict]:
    settings = {'seed': 3, 'batch_size': 8, 'threads': 2} | options
    return take(loader.training_batches(Numbered(20), first_step=first_step, **settings), 10)


def test_each_epoch_is_a_new_permutation():
    labels = np.concatenate([batch['label'] for batch in training()])  # 80 images, which are four epochs
    epochs = labels.reshape(4, 20)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.broadcast_to(np.arange(20), (4, 20)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(epochs[0]) != tuple(range(20))
    np.testing.assert_array_equal(np.concatenate([batch['example_id'] for batch in training()]), np.arange(80))
    for batch in training():
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
        assert (batch['image'].dtype, batch['label'].dtype, batch['example_id'].dtype) == (
            np.uint8,
            np.int32,
            np.uint32,
        )


def test_order_depends_only_on_the_seed():
    first, again, other = training(), training(threads=1), training(seed=4)
    assert all((a['label'] == b['label']).all() for a, b in zip(first, again, strict=True))
    assert any((a['label'] != b['label']).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize('first_step', [1, 3, 7])
def test_batches_resume_mid_epoch(first_step):
    for resumed, expected in zip(training(first_step), training()[first_step:], strict=False):
        np.testing.assert_array_equal(resumed['label'], expected['label'])
        np.testing.assert_array_equal(resumed['example_id'], expected['example_id'])


def test_shards_concatenate_to_the_global_batch():
    for first_step in (0, 3):
        shares = [training(first_step, shard_index=share, shard_count=4) for share in range(4)]
        for step, whole in enumerate(training(first_step)):
            for name, rows in whole.items():
                np.testing.assert_array_equal(np.concatenate([share[step][name] for share in shares]), rows)


@pytest.mark.parametrize('count', [1, 2])
def test_validation_yields_every_image_once(count):
    shares = [
        list(loader.validation_batches(Numbered(20), batch_size=8, threads=2, shard_index=share, shard_count=count))
        for share in range(count)
    ]
    assert {len(share) for share in shares} == {3}  # Equal numbers of batches, or collectives would wait forever.
    labels = np.concatenate([batch['label'] for share in shares for batch in share])
    assert sorted(labels) == [-1] * 4 + list(range(20))
    assert all(batch['image'].shape == (8 // count, 2, 2, 3) for share in shares for batch in share)


READER = """
import hashlib, json, sys, time
from alexnet_jax.runtime import backend
backend.configure_cpu_backend()
import jax, numpy as np
from alexnet_jax.augment import augment, example_keys, make_preprocess_params
from alexnet_jax.config import default_config
from alexnet_jax.data import dataset, loader
first_step, share, shares = map(int, sys.argv[2:])
config = default_config()
config.data.update(source='photos', image_size=72, crop_size=64)
data = dataset.open_prepared(dataset.dataset_dir(sys.argv[1], config.data), config.data)
parts = make_preprocess_params(data.statistics, config.data)
step = jax.jit(lambda images, keys: augment(images, keys, keys, parts, config.data))
for batch in loader.training_batches(
    data.train, seed=3, batch_size=640, first_step=first_step, threads=2, shard_index=share, shard_count=shares
):
    pixels = np.asarray(step(batch['image'], example_keys(3, batch['example_id'], 1)))
    digests = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in pixels]
    print(json.dumps([batch['example_id'].tolist(), batch['label'].tolist(), digests]), flush=True)
"""


def read(data_dir: str, steps: int, first_step: int = 0, shard_index: int = 0, shard_count: int = 1) -> list[list]:
    """Returns ids, labels and pixel digests of `steps` augmented batches, and kills the process that reads them."""
    arguments = (READER, data_dir, first_step, shard_index, shard_count)
    with start_command('-c', *arguments, stdout=subprocess.PIPE, JAX_NUM_CPU_DEVICES='8') as process:
        lines = [json.loads(process.stdout.readline()) for _ in range(steps)]
        process.kill()
    return lines


@pytest.mark.slow
def test_kill_and_resharding_keep_order_and_pixels(photos_dir):
    """Six batches of 640, ten per epoch: killed after three, then read by two processes."""
    expected = read(photos_dir, 6)
    killed = read(photos_dir, 3)
    halves = [read(photos_dir, 3, first_step=3, shard_index=share, shard_count=2) for share in (0, 1)]
    resumed = [[first + second for first, second in zip(*parts, strict=True)] for parts in zip(*halves, strict=True)]
    assert killed + resumed == expected
    digests = [digest for _, _, batch in expected for digest in batch]
    assert len(set(digests)) == 6 * 640


@pytest.mark.slow
def test_training_does_not_import_tensorflow(photos_dir):
    program = f"""
import sys
from alexnet_jax.training import trainer
from alexnet_jax.config import default_config
from alexnet_jax.data import dataset, loader
config = default_config().data
config.update(source='photos', image_size=72)
data = dataset.open_prepared(dataset.dataset_dir({photos_dir!r}, config), config)
next(loader.training_batches(data.train, seed=0, batch_size=4, first_step=0, threads=1))
print('tensorflow' in sys.modules)
"""
    run = run_command('-c', program)
    assert run.stdout == 'False\n', run.stderr


def flip_a_byte(file: Path, pixels: np.ndarray) -> None:
    """Changes one byte in the middle of the record of an image."""
    content = bytearray(file.read_bytes())
    content[content.index(pixels.tobytes()[6000:6100])] ^= 0xFF
    file.write_bytes(content)


@pytest.fixture
def corrupt(photos_dir, data, tmp_path):
    """Copies the data set, with one wrong byte in record 1030 of training and in record 5 of validation."""
    shutil.copytree(os.path.join(photos_dir, 'prepared'), tmp_path / 'prepared')
    for file, split, record in (
        ('prepared-train.array_record-00001-of-00007', data.train, 1030),
        ('prepared-validation.array_record-00000-of-00002', data.validation, 5),
    ):
        path = Path(dataset.dataset_dir(str(tmp_path), PHOTOS)) / file
        flip_a_byte(path, split[record]['image'])
    return str(tmp_path)


@pytest.mark.slow
def test_corrupt_record_is_replaced_by_the_next_one(corrupt, data, capfd):
    copy = open_photos(corrupt)
    options = {'seed': 0, 'batch_size': 640, 'first_step': 0, 'threads': 2}
    whole, found = (take(loader.training_batches(split.train, **options), 20) for split in (data, copy))
    differ = []
    for expected, batch in zip(whole, found, strict=True):
        np.testing.assert_array_equal(batch['example_id'], expected['example_id'])
        rows = np.flatnonzero((batch['image'] != expected['image']).any((1, 2, 3)))
        differ += [(expected['image'][row], batch['image'][row]) for row in rows]
    assert len(differ) == 2  # once in each of the two epochs
    for expected, got in differ:
        np.testing.assert_array_equal(expected, data.train[1030]['image'])
        np.testing.assert_array_equal(got, data.train[1031]['image'])
    assert copy.train.corrupt == {1030}
    log = capfd.readouterr().err
    assert log.count('\n') == 1
    assert log.startswith(f'alexnet_jax: record 1030 of train in {corrupt}')


@pytest.mark.slow
def test_corrupt_record_is_excluded_from_validation(corrupt):
    copy = open_photos(corrupt)
    batches = list(loader.validation_batches(copy.validation, batch_size=200, threads=2))
    labels = np.concatenate([batch['label'] for batch in batches])
    assert (labels >= 0).sum() == 1599
    assert labels[5] == -1
    assert copy.validation.corrupt == {5}


@pytest.mark.slow
def test_too_many_corrupt_records_stop_reading(corrupt):
    given = PrepareConfig('photos', image_size=72, max_corrupt_fraction=0.0001)  # of 6,400: none
    copy = dataset.open_prepared(dataset.dataset_dir(corrupt, given), given)
    with pytest.raises(split_reader.DatasetError, match=r'1 of 6400 .*data\.max_corrupt_fraction=0\.0001'):
        take(loader.training_batches(copy.train, seed=0, batch_size=640, first_step=0, threads=2), 10)


@pytest.mark.slow
def test_cached_batches_match_reads_and_are_zero_copy(photos_dir, monkeypatch):
    kept = open_photos(photos_dir).train
    monkeypatch.setattr(split_reader, 'IN_MEMORY_LIMIT_BYTES', 0)
    read = open_photos(photos_dir).train
    assert (kept.in_memory, read.in_memory) == (True, False)
    options = {'seed': 0, 'batch_size': 640, 'first_step': 0, 'threads': 2}
    found = [take(loader.training_batches(split, **options), 15) for split in (read, kept)]
    for expected, batch in zip(*found, strict=True):
        for name in ('image', 'label', 'example_id'):
            np.testing.assert_array_equal(batch[name], expected[name])
        for images in (batch['image'], expected['image']):
            assert jax.device_put(images, jax.devices()[0]).unsafe_buffer_pointer() == images.ctypes.data
    assert kept.cached.all()
    assert not read.cached.any()


@pytest.mark.parametrize(('limit', 'reads'), [(3 * 192, 1), (3 * 192 - 1, 2)])
def test_small_split_is_read_once(monkeypatch, limit, reads):
    class Records(list):
        read = ()

        def __getitem__(self, index):
            self.read += (index,)
            return super().__getitem__(index)

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    image = tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8, encoding='bytes')
    features = tfds.features.FeaturesDict({'image': image, 'label': tfds.features.ClassLabel(num_classes=3)})
    monkeypatch.setattr(split_reader, 'IN_MEMORY_LIMIT_BYTES', limit)
    records = Records(features.serialize_example({'image': images[i], 'label': i}) for i in range(3))
    split = split_reader.SplitReader(records, (8, 8, 3), 'raw', 'here', 0.0)
    for _ in range(2):
        for index in (2, 0, 1):
            np.testing.assert_array_equal(split[index]['image'], images[index])
            assert split[index]['label'] == index
    assert records.read == ((2, 0, 1) if reads == 1 else (2, 2, 0, 0, 1, 1) * 2)


def test_undecodable_jpeg_counts_as_corrupt():
    jpeg = io.BytesIO()
    Image.new('RGB', (8, 8), (200, 80, 30)).save(jpeg, 'JPEG')
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=(8, 8, 3), encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=2),
        }
    )
    contents = [io.BytesIO(jpeg.getvalue()), io.BytesIO(jpeg.getvalue()[:100])]
    records = [features.serialize_example({'image': content, 'label': 1}) for content in contents]
    split = split_reader.SplitReader(records, (8, 8, 3), 'jpeg', 'here', 0.5)
    assert split[0]['image'].shape == (8, 8, 3)
    assert split[1] is None
    assert split.corrupt == {1}


def write_zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('damage', 'word'),
    [
        (lambda folder: os.truncate(folder / 'prepared-train.array_record-00003-of-00007', 1000), '1000 bytes'),
        (lambda folder: (folder / 'prepared-validation.array_record-00001-of-00002').unlink(), '00001-of-00002'),
        (lambda folder: (folder / 'prepared.json').unlink(), 'prepared'),
        (lambda folder: (folder / 'prepared.json').write_text('{"sour'), 'prepared'),
        (lambda folder: (folder / 'prepared.json').write_text('{}'), 'prepared'),
        (lambda folder: os.truncate(folder / 'statistics.npz', 0), 'statistics.npz is 0 bytes'),
        (lambda folder: (folder / 'features.json').unlink(), 'features.json'),
        (lambda folder: write_zeros(folder / 'statistics.npz'), 'statistics.npz'),
    ],
)
def test_incomplete_data_set_is_rejected(photos_dir, tmp_path, damage, word):
    shutil.copytree(os.path.join(photos_dir, 'prepared'), tmp_path / 'prepared')
    damage(Path(dataset.dataset_dir(str(tmp_path), PHOTOS)))
    assert word in refusal(open_photos, str(tmp_path))


def test_dataset_dir_of_a_config():
    data = default_config().data
    where = dataset.dataset_dir
    assert where('/d', data) == '/d/prepared/imagenet2012_256px'
    assert where('gs://bucket/d', data) == 'gs://bucket/d/prepared/imagenet2012_256px'  # not a local folder
    data.update(source='tfds:imagenette:320px-v2', channels=1, encoding='jpeg', image_size=64)
    assert where('/d', data) == '/d/prepared/imagenette_320px_v2_64px_grey_jpeg'
    data.update(source='folder:/pets/of 2024/')
    digest = hashlib.sha256(b'folder:/pets/of 2024').hexdigest()[:8]
    assert where('/d', data) == f'/d/prepared/of_2024_{digest}_64px_grey_jpeg'
