"""Feature indexes and nearest neighbors: eager layers, crops by NumPy, brute force in float64, interruptions."""

import fcntl
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import center_crop, make_run, open_dataset, small_config

from alexnet_jax.config import ConfigError
from alexnet_jax.data.dataset import PreparedDataset
from alexnet_jax.data.loader import validation_batches
from alexnet_jax.inference import feature_index, trained_model
from alexnet_jax.training.eval_step import make_activation_fn
from alexnet_jax.training.state import build_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def config(photos_dir):
    return small_config(photos_dir)


@pytest.fixture(scope='module')
def photos(config) -> PreparedDataset:
    return open_dataset(config)


@pytest.fixture(scope='module')
def loaded(config, tmp_path_factory) -> trained_model.TrainedModel:
    return trained_model.load_model(
        trained_model.parse_checkpoint_ref(make_run(tmp_path_factory.mktemp('runs') / 'run', config))
    )


@pytest.fixture(scope='module')
def index(loaded, photos) -> feature_index.FeatureIndex:
    return feature_index.build_or_load_index(loaded, photos)


def eager(loaded, image: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the activations of one image, without compilation, mesh and augment.py."""
    state = jax.device_get(loaded.state)
    model = nnx.merge(build_model(loaded.config)[0], state.params, state.batch_stats)
    outputs = model.activations(jnp.asarray(center_crop(image, loaded.config, loaded.statistics))[None])
    return {layer: np.asarray(output[0]) for layer, output in outputs.items()}


def test_features_match_eager_layers_in_order(loaded, photos, index):
    assert index.layer == 'fc7'
    assert index.features.shape == (len(photos.train), 32)
    for number in (0, 47, 48, 3000, len(photos.train) - 1):
        np.testing.assert_allclose(
            index.features[number], eager(loaded, photos.train[number]['image'])['fc7'], rtol=1e-4, atol=1e-5
        )
    assert len(np.unique(np.asarray(index.features[:500]), axis=0)) > 400


def test_nearest_neighbors_match_brute_force(index):
    numbers = np.arange(0, len(index.features), 97)
    found, distances = feature_index.nearest_neighbors(index, np.asarray(index.features[numbers]), 7)
    assert found.shape == distances.shape == (len(numbers), 7)
    every = np.asarray(index.features, np.float64)
    for row, number in enumerate(numbers):
        exact = np.sqrt(((every - every[number]) ** 2).sum(-1))
        assert distances[row, 0] == 0
        assert number in found[row][distances[row] == 0]
        np.testing.assert_allclose(distances[row], np.sort(exact)[:7], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            exact[found[row]], np.sort(exact)[:7], rtol=1e-5, atol=1e-6
        )  # recall 1 except for ties


def test_blocks_ties_and_nan_rows_in_nearest_neighbors(monkeypatch):
    monkeypatch.setattr(feature_index, 'BLOCK', 10)
    rows = np.random.default_rng(0).normal(size=(37, 5)).astype(np.float32)
    rows[20] = rows[3]
    rows[[4, 36]] = np.nan
    found, distances = feature_index.nearest_neighbors(feature_index.FeatureIndex(rows, 'fc7'), rows[[3, 35]], 35)
    assert found[0, :2].tolist() == [3, 20]  # Ties are in index order.
    assert found[1, 0] == 35
    assert not set(found.flat) & {4, 36}
    assert np.isfinite(distances).all()
    equal = feature_index.FeatureIndex(np.zeros((300, 5), np.float32), 'fc7')
    assert feature_index.nearest_neighbors(equal, rows[:1], 40)[0].tolist() == [list(range(40))]
    assert np.isinf(
        feature_index.nearest_neighbors(feature_index.FeatureIndex(rows, 'fc7'), rows[:1], 37)[1][0, -2:]
    ).all()


class Interrupted:
    """A split that raises KeyboardInterrupt after `after` reads."""

    in_memory = False

    def __init__(self, split, after: float):
        self.split, self.after, self.asked = split, after, []

    def __len__(self):
        return len(self.split)

    def __getitem__(self, number):
        self.asked.append(number)
        if len(self.asked) > self.after:
            raise KeyboardInterrupt
        return self.split[number]


def test_interrupted_index_resumes(config, photos, index, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_index, 'SAVE_SECONDS', 0.0)
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(make_run(tmp_path / 'run', config)))
    stopped = Interrupted(photos.train, 2000)
    with pytest.raises(KeyboardInterrupt):
        feature_index.build_or_load_index(loaded, PreparedDataset(stopped, None, {}, [], photos.fingerprint))
    (state,) = (tmp_path / 'run').glob('features/*/state.json')
    done = json.loads(state.read_text())['done']
    assert 0 < done <= 2000
    rest = Interrupted(photos.train, np.inf)
    again = feature_index.build_or_load_index(loaded, PreparedDataset(rest, None, {}, [], photos.fingerprint))
    np.testing.assert_array_equal(again.features, index.features)
    assert min(set(rest.asked) - {0}) >= done  # Record 0 is read for the shape of an image.
    finished = Interrupted(photos.train, 0)
    feature_index.build_or_load_index(loaded, PreparedDataset(finished, None, {}, [], photos.fingerprint))
    assert finished.asked == []


def test_validation_batches_shard_from_a_later_batch(photos):
    batches = validation_batches(
        photos.validation, batch_size=100, threads=1, shard_index=1, shard_count=2, first_batch=3
    )
    expected = np.stack([photos.validation[number]['image'] for number in range(350, 400)])
    np.testing.assert_array_equal(next(batches)['image'], expected)
    assert len(list(batches)) == 12


def test_corrupt_feature_files_and_full_disk_are_rejected(config, photos, tmp_path, monkeypatch):
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(make_run(tmp_path / 'run', config)))
    few = Interrupted(photos.train, 2000)
    with pytest.raises(KeyboardInterrupt):
        feature_index.build_or_load_index(loaded, PreparedDataset(few, None, {}, [], photos.fingerprint))
    (file,) = (tmp_path / 'run').glob('features/*/features.npy')
    (file.parent / 'state.json').write_text('{"done": 48}')
    file.write_bytes(b'no array')
    with pytest.raises(ConfigError, match=r'features\.npy .*remove'):
        feature_index.build_or_load_index(loaded, photos)
    (file.parent / 'state.json').unlink()
    monkeypatch.setattr(feature_index.shutil, 'disk_usage', lambda folder: type('Usage', (), {'free': 1000}))
    with pytest.raises(ConfigError, match=r'0\.0 GB .*0\.0 GB'):
        feature_index.build_or_load_index(loaded, photos)


WIDE = {
    'model__widths': (8, 16, 16, 16, 16, 32, 32),
    'model__conv_ops': ('activation lrn pool', 'activation', 'activation', 'activation', 'activation'),
}


@pytest.mark.parametrize(('layout', 'data', 'model'), [('towers', 4, 2), ('hybrid', 2, 4), ('data', 8, 1)])
def test_layer_activations_on_a_mesh_match_one_device(photos_dir, photos, tmp_path, layout, data, model):
    config = small_config(photos_dir, **WIDE, mesh__layout=layout, mesh__data=data, mesh__model=model)
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(make_run(tmp_path / 'run', config)))
    assert dict(loaded.mesh.shape) == {'data': data, 'model': model}
    images = [photos.train[number]['image'] for number in range(11)]
    expected = {number: eager(loaded, images[number]) for number in (0, 10)}
    for layer in ('conv1', 'conv3', 'conv5', 'fc6', 'fc7', 'fc8'):
        compiled = make_activation_fn(loaded.config, loaded.mesh, layer)
        rows = list(loaded.predict_batches(compiled, images, batch_size=8))
        assert len(rows) == 11
        for number, outputs in expected.items():
            assert rows[number].shape == outputs[layer].shape
            np.testing.assert_allclose(rows[number], outputs[layer], rtol=1e-4, atol=1e-5)


def test_features_without_hidden_dense_layers_are_conv_maps(photos_dir, photos, tmp_path):
    config = small_config(photos_dir, model__widths=(8, 0, 0, 0, 16, 0, 0))
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(make_run(tmp_path / 'run', config)))
    few = PreparedDataset(Few(photos.train), None, {}, [], photos.fingerprint)
    index = feature_index.build_or_load_index(loaded, few)
    assert (index.layer, index.features.shape) == ('conv5', (50, 8 * 8 * 16))
    expected = eager(loaded, photos.train[49]['image'])['conv5'].reshape(-1)
    np.testing.assert_allclose(index.features[49], expected, rtol=1e-4, atol=1e-5)
    queries = feature_index.extract_features(loaded, index, [photos.train[number]['image'] for number in (3, 49)])
    found, distances = feature_index.nearest_neighbors(index, queries, 2)
    assert found[:, 0].tolist() == [3, 49]
    assert distances[:, 0].tolist() == [0, 0]


class Few:
    """The first fifty records of a split."""

    in_memory = False

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 50

    def __getitem__(self, number):
        return self.split[number]


def test_complete_index_is_reused_read_only(config, photos, index, tmp_path, capfd):
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(make_run(tmp_path / 'run', config)))
    few = PreparedDataset(Few(photos.train), None, {}, [], photos.fingerprint)
    made = feature_index.build_or_load_index(loaded, few)
    (folder,) = (tmp_path / 'run' / 'features').iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = feature_index.build_or_load_index(loaded, few)
    assert isinstance(again.features, np.memmap)
    assert again.features.mode == made.features.mode == 'r'
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    other = PreparedDataset(Few(photos.train), None, {}, [], 'of other images')
    with open(tmp_path / 'run' / 'features' / 'blocked', 'w'):
        feature_index.build_or_load_index(loaded, other)
    assert f'blocked, {folder.name}' in capfd.readouterr().err


def test_only_one_process_computes_features(config, photos, tmp_path):
    loaded = trained_model.load_model(trained_model.parse_checkpoint_ref(make_run(tmp_path / 'run', config)))
    few = PreparedDataset(Few(photos.train), None, {}, [], photos.fingerprint)
    feature_index.build_or_load_index(loaded, few)
    (folder,) = (tmp_path / 'run' / 'features').iterdir()
    (folder / 'state.json').unlink()
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match='another process'):
            feature_index.build_or_load_index(loaded, few)
    assert feature_index.build_or_load_index(loaded, few).features.shape == (50, 32)


def test_import_refuses_existing_folder_and_leaves_no_trace(config, tmp_path):
    used = tmp_path / 'used'
    used.mkdir()
    (used / 'thesis.txt').write_text('...')
    with pytest.raises(ConfigError, match='/used '):
        make_run(used, config)
    with pytest.raises(ConfigError, match=r'thesis\.txt'):
        make_run(tmp_path / 'used' / 'thesis.txt' / 'run', config)
    assert [path.name for path in tmp_path.rglob('*')] == ['used', 'thesis.txt']
    assert Path(make_run(tmp_path / 'new', config)).is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {'used', 'new'}
