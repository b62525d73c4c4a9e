"""Photographs, prepared stores and the batches read from them."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_jax import prepare
from alexnet_jax.data import photos, pipeline

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def store(photos_dir):
    return pipeline.open_store(pipeline.store_directory(photos_dir, 'photos', 72))


def test_no_pixel_of_a_photograph_is_in_both_splits():
    for height, width in [(512, 512), (191, 384), (1411, 1411)]:
        seen = {}
        for split in ('train', 'validation'):
            seen[split] = np.zeros((height, width), bool)
            for region in photos.cells(split, height, width):
                seen[split][region] = True
        assert not (seen['train'] & seen['validation']).any()
        assert (seen['train'] | seen['validation']).all()


def test_patches_lie_inside_their_cells_and_are_always_the_same(monkeypatch):
    """A photograph whose pixels say where they are shows where every patch was cut."""
    rows, columns = np.meshgrid(np.arange(200), np.arange(240), indexing='ij')
    monkeypatch.setattr(photos, 'photograph', lambda name: np.stack([rows, columns, rows * 0], -1).astype(np.uint8))
    monkeypatch.setattr(photos, 'PHOTOGRAPHS', ('a', 'b'))
    for split, parity in (('train', 0), ('validation', 1)):
        found = list(photos.patches(split))
        assert len(found) == 2 * photos.PATCHES[split]
        cells = {(int(patch[0, 0, 0]) // 50 + int(patch[0, 0, 1]) // 60) % 2 for _, patch, _ in found}
        cells |= {(int(patch[-1, -1, 0]) // 50 + int(patch[-1, -1, 1]) // 60) % 2 for _, patch, _ in found}
        assert cells == {parity}
        for (key, patch, label), (key_again, again, _) in zip(found, photos.patches(split), strict=True):
            assert key == key_again
            assert label in (0, 1)
            np.testing.assert_array_equal(patch, again)


def test_store_of_photos(store):
    assert store.class_names == list(photos.PHOTOGRAPHS)
    assert (len(store.train), len(store.validation)) == (6400, 1600)
    example = store.train[17]
    assert example['image'].shape == (72, 72, 3)
    assert example['image'].dtype == np.uint8
    counts = np.bincount([int(store.validation[i]['label']) for i in range(1600)])
    np.testing.assert_array_equal(counts, np.full(16, 100))
    # The first patch of each photograph, scaled by Pillow alone; the store keeps the order of TFDS.
    expected = {
        Image.fromarray(patch).resize((72, 72), Image.Resampling.BICUBIC).tobytes()
        for key, patch, _ in photos.patches('validation')
        if key.endswith('_0000')
    }
    assert expected <= {store.validation[i]['image'].tobytes() for i in range(1600)}


def test_statistics_are_those_of_the_training_images(store):
    images = np.stack([store.train[i]['image'] for i in range(len(store.train))])
    pixels = images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(store.statistics['mean_image'], images.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(store.statistics['mean_rgb'], pixels.mean(0), rtol=1e-12)
    covariance = np.cov(pixels.T, bias=True)
    values, vectors = store.statistics['eigenvalues'], store.statistics['eigenvectors']
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, covariance, rtol=1e-9)
    assert values[0] < values[1] < values[2]
    np.testing.assert_array_equal(store.statistics['class_counts'], np.full(16, 400))


@pytest.mark.parametrize(('width', 'height'), [(300, 200), (200, 300), (64, 64), (40, 90), (500, 65)])
def test_square_takes_the_centre_after_scaling_the_shorter_side(width, height):
    """A ramp along the longer side: the centre keeps the middle value and the slope of the scale."""
    ramp = np.broadcast_to(np.linspace(0, 255, max(width, height)), (min(width, height), max(width, height)))
    ramp = (ramp if width >= height else ramp.T).astype(np.uint8)
    result = prepare.square(Image.fromarray(ramp), 64)
    assert result.shape == (64, 64, 3)
    along = result[32, :, 0].astype(float) if width >= height else result[:, 32, 0].astype(float)
    longer = max(width, height) / min(width, height)
    assert abs(along.mean() - 127) < 3
    assert abs((along[48] - along[16]) - 32 / 64 * 255 / longer) < 4


def test_grey_palette_transparent_and_cmyk_images_become_rgb():
    colour = (200, 80, 30)
    image = Image.new('RGB', (80, 70), colour)
    for mode, expected in [('RGB', colour), ('RGBA', colour), ('P', colour), ('CMYK', colour), ('L', (110,) * 3)]:
        result = prepare.square(image.convert(mode), 64)
        np.testing.assert_allclose(result.reshape(-1, 3).mean(0), expected, atol=3, err_msg=mode)


def test_prepare_is_done_once(photos_dir):
    folder = Path(pipeline.store_directory(photos_dir, 'photos', 72))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.prepare('photos', photos_dir, 72, 2) == str(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_killed_prepare_leaves_no_store_and_one_that_waited_makes_it(photos_dir, tmp_path):
    shutil.copytree(os.path.join(photos_dir, 'photos'), tmp_path / 'photos')
    command = [sys.executable, '-m', 'alexnet_jax.prepare', f'--data_dir={tmp_path}', '--image_size=96']
    target = Path(pipeline.store_directory(str(tmp_path), 'photos', 96))
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not list(Path(f'{target}.incomplete').rglob('*array_record*')):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as waiting:
            assert f'{target}: another process prepares it; waiting' in waiting.stderr.readline()
            waiting.send_signal(signal.SIGSTOP)  # or it may already have removed what the killed one left
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not target.exists()
            assert Path(f'{target}.incomplete').exists()
            waiting.send_signal(signal.SIGCONT)
            said = waiting.stderr.read()
    assert waiting.returncode == 0, said
    assert len(pipeline.open_store(str(target)).train) == 6400
    assert not Path(f'{target}.incomplete').exists()


def test_a_run_that_waits_for_the_data_can_be_stopped(tmp_path):
    target = Path(pipeline.store_directory(str(tmp_path), 'photos', 72))
    target.parent.mkdir()
    command = [sys.executable, 'launch.py', f'--workdir={tmp_path}/run', f'--config.data.data_dir={tmp_path}']
    with open(f'{target}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as waiting:
            assert f'{target}: another process prepares it; waiting' in waiting.stderr.readline()
            waiting.send_signal(signal.SIGTERM)
            said = waiting.stderr.read()
    assert waiting.returncode == 75, said
    assert 'stopped while preparing the data' in said


def test_an_unknown_data_set_is_refused_in_one_line(tmp_path):
    command = [sys.executable, '-m', 'alexnet_jax.prepare', f'--data_dir={tmp_path}', '--source=tfds:imagenet2013']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("alexnet_jax: config.data.source: TFDS has no data set 'imagenet2013'")
    assert run.stderr.count('\n') == 1


def test_a_store_larger_than_memory_is_sorted_in_small_parts(photos_dir, tmp_path, monkeypatch):
    """TFDS sorts what is above its buffer bucket by bucket, each in memory: no bucket may hold much of a split."""
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1 << 20)
    largest = []
    read_values = shuffle._Bucket.read_values

    def counted(bucket):
        values = list(read_values(bucket))
        largest.append(len(values))
        return iter(values)

    monkeypatch.setattr(shuffle._Bucket, 'read_values', counted)
    shutil.copytree(os.path.join(photos_dir, 'photos'), tmp_path / 'photos')
    folder = prepare.prepare('photos', str(tmp_path), 72, 2)
    assert sum(largest) == 8000
    assert max(largest) <= 10
    expected = pipeline.open_store(pipeline.store_directory(photos_dir, 'photos', 72)).train
    found = pipeline.open_store(folder).train
    for index in (0, 1, 777, 6399):
        np.testing.assert_array_equal(found[index]['image'], expected[index]['image'])


def test_a_source_without_random_access_is_refused(photos_dir, tmp_path):
    shutil.copytree(os.path.join(photos_dir, 'photos'), tmp_path / 'photos')
    info = tmp_path / 'photos' / '1.0.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(prepare.SourceError, match='in another format than array_record'):
        prepare.prepare('photos', str(tmp_path), 64, 2)


class Numbered:
    """Random access to images that say which they are."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return {'image': np.full((2, 2, 3), index, np.uint8), 'label': index}


def take(batches, count: int) -> list[dict]:
    return [next(batches) for _ in range(count)]


def training(first_step: int = 0, **options) -> list[dict]:
    settings = {'seed': 3, 'batch_size': 8, 'threads': 2} | options
    return take(pipeline.training_batches(Numbered(20), first_step=first_step, **settings), 10)


def test_every_epoch_is_another_permutation_of_all_images():
    labels = np.concatenate([batch['label'] for batch in training()])  # 80 images: four epochs
    epochs = labels.reshape(4, 20)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.broadcast_to(np.arange(20), (4, 20)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(epochs[0]) != tuple(range(20))
    np.testing.assert_array_equal(np.concatenate([batch['number'] for batch in training()]), np.arange(80))
    for batch in training():
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
        assert (batch['image'].dtype, batch['label'].dtype, batch['number'].dtype) == (np.uint8, np.int32, np.uint32)


def test_order_depends_on_the_seed_alone():
    first, again, other = training(), training(threads=1), training(seed=4)
    assert all((a['label'] == b['label']).all() for a, b in zip(first, again, strict=True))
    assert any((a['label'] != b['label']).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize('first_step', [1, 3, 7])
def test_batches_resume_in_the_middle_of_an_epoch(first_step):
    for resumed, expected in zip(training(first_step), training()[first_step:], strict=False):
        np.testing.assert_array_equal(resumed['label'], expected['label'])
        np.testing.assert_array_equal(resumed['number'], expected['number'])


def test_shares_one_after_the_other_are_the_same_global_batch():
    for first_step in (0, 3):
        shares = [training(first_step, share=share, shares=4) for share in range(4)]
        for step, whole in enumerate(training(first_step)):
            for name, rows in whole.items():
                np.testing.assert_array_equal(np.concatenate([share[step][name] for share in shares]), rows)


@pytest.mark.parametrize('count', [1, 2])
def test_validation_gives_every_image_once(count):
    shares = [
        list(pipeline.validation_batches(Numbered(20), batch_size=8, threads=2, share=share, shares=count))
        for share in range(count)
    ]
    assert {len(share) for share in shares} == {3}  # as many batches on each, or collectives would wait for ever
    labels = np.concatenate([batch['label'] for share in shares for batch in share])
    assert sorted(labels) == [-1] * 4 + list(range(20))
    assert all(batch['image'].shape == (8 // count, 2, 2, 3) for share in shares for batch in share)


def test_training_reads_without_tensorflow(photos_dir):
    program = f"""
import sys
from alexnet_jax import train
from alexnet_jax.data import pipeline
store = pipeline.open_store({pipeline.store_directory(photos_dir, 'photos', 72)!r})
next(pipeline.training_batches(store.train, seed=0, batch_size=4, first_step=0, threads=1))
print('tensorflow' in sys.modules)
"""
    run = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == 'False\n', run.stderr
