"""All meshes and layouts: equal losses, checkpoints that move between meshes, and the expected collectives."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import largest_file, refusal

from alexnet_jax import augment, config, parallel
from alexnet_jax.shapes import LAYERS
from alexnet_jax.training.checkpointing import Checkpointer, CheckpointError, state_digest
from alexnet_jax.training.eval_step import make_eval_step, make_layer_stats_fn, make_predict_step, topk_errors
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import abstract_state, init_state
from alexnet_jax.training.train_step import make_train_step

# Compile faster. Optimization of machine code does not change what runs on which device.
FAST = {'xla_backend_optimization_level': 0}
MESHES = [(1, 1), (8, 1), (4, 2), (1, 2)]  # of the layout `towers`
LAYOUTS = [('towers', 8, 1), ('towers', 4, 2), ('data', 8, 1), ('hybrid', 8, 1), ('hybrid', 4, 2), ('hybrid', 2, 4)]
STATISTICS = {
    'mean_image': np.random.default_rng(0).uniform(100, 130, (72, 72, 3)),
    'mean_rgb': np.array([120.0, 115.0, 110.0]),
    'eigenvalues': np.array([100.0, 900.0, 9000.0]),
    'eigenvectors': np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0],
}


def small_config(data: int, model: int, groups=()):
    """Returns a narrow `paper` on 64-pixel crops, with augmentation and dropout."""
    settings = config.default_config()
    settings.model.widths = (16, 32, 32, 32, 32, 64, 64)
    settings.model.num_classes = 10
    settings.model.kernel_std = (0.05,) * 8
    settings.data.image_size, settings.data.crop_size = 72, 64
    settings.train.batch_size = 16
    settings.mesh.data, settings.mesh.model = data, model
    settings.update(dict(groups))
    return config.resolve(settings)


def batch(number: int, settings) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(number)
    size = settings.train.batch_size
    return {
        'image': generator.integers(0, 256, (size, 72, 72, 3), dtype=np.uint8),
        'label': generator.integers(0, 10, size, dtype=np.int32),
        'example_id': np.arange(number * size, (number + 1) * size, dtype=np.uint32),
    }


def rates(value: float):
    """The same learning rate for all kernels and biases."""
    return {layer: {'kernel': np.float32(value), 'bias': np.float32(value)} for layer in LAYERS}


def make_global_batch(settings, mesh, rows):
    return parallel.make_global_batch(parallel.batch_sharding(mesh, settings.mesh.layout), rows)


def train(settings, steps: int):
    mesh = parallel.make_mesh(settings)
    prepared = augment.make_preprocess_params(STATISTICS, settings.data)
    state, losses = init_state(settings, mesh), []
    initial = state_digest(state)
    rows = [make_global_batch(settings, mesh, batch(number, settings)) for number in range(steps)]
    lowered = make_train_step(settings, mesh).lower(state, rows[0], rates(0.01), prepared)
    train_step = lowered.compile(FAST)
    for number in range(steps):
        state, metrics = train_step(state, rows[number], rates(0.01), prepared)
        losses.append(float(metrics['loss']))
    return mesh, state, losses, initial


@functools.cache
def ten_steps(layout: str, data: int, model: int, shard_optimizer: bool):
    """Trains ten steps, once for each combination of arguments."""
    mesh = {'layout': layout, 'shard_optimizer': shard_optimizer}
    return train(small_config(data, model, {'mesh': mesh}), 10)


@pytest.fixture(scope='module')
def runs():
    """Ten steps on every mesh of the layout `towers`."""
    return {shape: ten_steps('towers', *shape, False) for shape in MESHES}


@pytest.mark.slow
def test_ten_steps_have_equal_losses_on_every_mesh(runs):
    expected = runs[1, 1][2]
    assert np.ptp(expected) > 0.05  # The loss changes by more than the tolerance.
    for shape in MESHES:
        np.testing.assert_allclose(runs[shape][2], expected, rtol=2e-5, err_msg=str(shape))
        assert runs[shape][3] == runs[1, 1][3]  # the digest of the initial state


@pytest.mark.slow
@pytest.mark.parametrize('shard_optimizer', [False, True])
@pytest.mark.parametrize(('layout', 'data', 'model'), LAYOUTS)
def test_every_layout_matches_one_device(layout, data, model, shard_optimizer):
    _, expected, losses, initial = ten_steps('towers', 1, 1, False)
    mesh, state, layout_losses, layout_initial = ten_steps(layout, data, model, shard_optimizer)
    assert mesh.size == 8
    assert layout_initial == initial
    np.testing.assert_allclose(layout_losses, losses, rtol=2e-5)
    moved = 0.0
    for (path, leaf), whole in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(whole), rtol=1e-4, atol=2e-6, err_msg=name)
        moved = max(moved, float(np.abs(np.asarray(whole)).max()) if 'trace' in name else 0.0)
    assert moved > 1e-3  # Velocities are far larger than the tolerance.


@pytest.mark.slow
@pytest.mark.parametrize(
    ('data', 'model', 'layout', 'network', 'tolerance', 'kernel_tolerance'),
    [
        (4, 2, 'towers', {'towers': 4}, 2e-5, 2e-5),  # two towers per device
        (2, 4, 'hybrid', {'num_classes': 11}, 2e-5, 2e-5),  # 11 classes cannot be sharded
        # On one device, bfloat16 changes the velocities by up to a fifth.
        (4, 2, 'hybrid', {'dtype': 'bfloat16'}, 5e-4, 0.3),
    ],
    ids=['four towers', 'eleven classes', 'bfloat16'],
)
def test_other_networks_match_one_device(data, model, layout, network, tolerance, kernel_tolerance):
    _, expected, losses, _ = train(small_config(1, 1, {'model': network}), 2)
    _, state, layout_losses, _ = train(small_config(data, model, {'mesh': {'layout': layout}, 'model': network}), 2)
    np.testing.assert_allclose(layout_losses, losses, rtol=tolerance)
    for (path, leaf), whole in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if 'kernel' in name:  # Convolution biases change only by rounding.
            difference = np.linalg.norm(np.asarray(leaf) - np.asarray(whole)) / np.linalg.norm(np.asarray(whole))
            assert difference < kernel_tolerance, name


# Shapes of the shards of kernels and biases of conv1..conv5, fc6..fc8 on one device, as expected.
WHOLE_KERNELS = [(11, 11, 3, 16), (5, 5, 8, 32), (3, 3, 32, 32), (3, 3, 16, 32), (3, 3, 16, 32)]
WHOLE_KERNELS += [(32, 64), (64, 64), (64, 10)]
WHOLE_BIASES = [(16,), (32,), (32,), (32,), (32,), (64,), (64,), (10,)]
HALF_OUTPUTS = [(*shape[:-1], shape[-1] // 2) for shape in WHOLE_KERNELS]
HELD = {
    ('towers', 8, 1): (WHOLE_KERNELS, WHOLE_BIASES),
    ('data', 8, 1): (WHOLE_KERNELS, WHOLE_BIASES),
    ('hybrid', 8, 1): (WHOLE_KERNELS, WHOLE_BIASES),
    ('towers', 4, 2): (HALF_OUTPUTS, [(8,), (16,), (16,), (16,), (16,), (32,), (32,), (5,)]),
    ('hybrid', 4, 2): ([*WHOLE_KERNELS[:5], (16, 64), (32, 64), (32, 10)], [*WHOLE_BIASES[:5], (32,), (32,), (10,)]),
    ('hybrid', 2, 4): ([*WHOLE_KERNELS[:5], (8, 64), (16, 64), (16, 10)], [*WHOLE_BIASES[:5], (16,), (16,), (10,)]),
}
# The same for kernel velocities sharded over `data` too. Bias velocities are not.
EIGHTHS = [(11, 11, 3, 2), (5, 5, 1, 32), (3, 3, 4, 32), (3, 3, 2, 32), (3, 3, 2, 32), (4, 64), (8, 64), (8, 10)]
HELD_OF_VELOCITIES = {
    ('towers', 8, 1): EIGHTHS,
    ('data', 8, 1): EIGHTHS,
    ('hybrid', 8, 1): EIGHTHS,
    ('towers', 4, 2): [
        *[(11, 11, 3, 2), (5, 5, 2, 16), (3, 3, 8, 16), (3, 3, 4, 16), (3, 3, 4, 16)],
        *[(8, 32), (16, 32), (16, 5)],
    ],
    ('hybrid', 4, 2): [
        *[(11, 11, 3, 4), (5, 5, 2, 32), (3, 3, 8, 32), (3, 3, 4, 32), (3, 3, 4, 32)],
        *[(4, 64), (8, 64), (8, 10)],
    ],
    ('hybrid', 2, 4): [
        *[(11, 11, 3, 8), (5, 5, 4, 32), (3, 3, 16, 32), (3, 3, 8, 32), (3, 3, 8, 32)],
        *[(4, 64), (8, 64), (8, 10)],
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize('shard_optimizer', [False, True])
@pytest.mark.parametrize(('layout', 'data', 'model'), LAYOUTS)
def test_shard_shapes_of_every_leaf(layout, data, model, shard_optimizer):
    state = ten_steps(layout, data, model, shard_optimizer)[1]
    kernels, biases = HELD[layout, data, model]
    velocity_kernels = HELD_OF_VELOCITIES[layout, data, model] if shard_optimizer else kernels
    layers = [f'conv{i}' for i in range(1, 6)] + ['fc6', 'fc7', 'fc8']
    velocities = list(jax.tree.leaves(state.opt_state))
    assert len(velocities) == 16
    by_path = {
        jax.tree_util.keystr(path[-2:]): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    for i, layer in enumerate(layers):
        for tree, name, shape in [
            (state.params, 'kernel', kernels[i]),
            (state.params, 'bias', biases[i]),
            (None, 'kernel', velocity_kernels[i]),
            (None, 'bias', biases[i]),
        ]:
            leaf = tree[layer][name] if tree else by_path[f"['{layer}']['{name}']"]
            held = {shard.data.shape for shard in leaf.addressable_shards}
            assert held == {shape}, (layer, name, 'weights' if tree else 'velocities')
            assert len(leaf.addressable_shards) == 8


@pytest.mark.slow
def test_grad_allreduce_dtype_bfloat16(runs):
    settings = small_config(4, 2, {'mesh': {'grad_allreduce_dtype': 'bfloat16'}})
    _, _, losses, _ = train(settings, 10)
    difference = np.abs(np.array(losses) - runs[1, 1][2])
    assert 1e-6 < difference.max() < 5e-3
    text = lowered_step(settings).as_text()
    summed = re.findall(r'"stablehlo.all_reduce".*?\}\) : \((\S+)\)', text, re.DOTALL)
    # One all-reduce per parameter and one for the metrics; only the gradients are in bfloat16.
    assert len(summed) == 17
    assert sum(kind.endswith('bf16>') for kind in summed) == 16


def moved(state, settings, mesh):
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, abstract_state(settings, mesh))


@pytest.mark.slow
@pytest.mark.parametrize('views', [1, 10])
def test_eval_sums_are_equal_on_every_mesh(runs, views):
    hybrid = {'mesh': {'layout': 'hybrid'}}
    settings_of_meshes = [small_config(*shape) for shape in MESHES]
    settings_of_meshes += [small_config(4, 2, hybrid), small_config(2, 4, hybrid)]
    sums = []
    for settings in settings_of_meshes:
        mesh = parallel.make_mesh(settings)
        rows = batch(99, settings)
        rows['label'][-3:] = -1  # padding
        state = moved(runs[1, 1][1], settings, mesh)
        prepared = augment.make_preprocess_params(STATISTICS, settings.data)
        eval_step = make_eval_step(settings, mesh, views)
        sums.append(np.asarray(eval_step(state, make_global_batch(settings, mesh, rows), prepared)))
    assert sums[0][3] == 13
    np.testing.assert_allclose(sums, np.broadcast_to(sums[0], (6, 4)), rtol=2e-5)


@pytest.mark.slow
def test_checkpoint_moves_between_meshes(runs, tmp_path):
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    state = runs[4, 2][1]
    checkpoints.save(state, RunState(step=10), error=0.5)
    checkpoints.wait()
    sharded_hybrid = {'layout': 'hybrid', 'shard_optimizer': True}
    for settings in [small_config(1, 1), small_config(8, 1), small_config(2, 4, {'mesh': sharded_hybrid})]:
        mesh = parallel.make_mesh(settings)
        checkpoint = checkpoints.restore(abstract_state(settings, mesh))
        restored = checkpoint.state
        assert checkpoint.run_state.step == 10
        assert state_digest(restored) == state_digest(state)
        assert restored.params['fc6']['kernel'].sharding.mesh == mesh
        prepared = augment.make_preprocess_params(STATISTICS, settings.data)
        rows = make_global_batch(settings, mesh, batch(10, settings))
        restored, _ = make_train_step(settings, mesh)(restored, rows, rates(0.01), prepared)
        assert int(restored.step) == 11
    checkpoints.close()


def damage(checkpoint: Path) -> None:
    """Flips one byte in the middle of the largest file."""
    largest = largest_file(checkpoint / 'state')
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)


@pytest.mark.slow
def test_corrupt_checkpoint_falls_back_to_previous(runs, tmp_path, capsys):
    settings = small_config(1, 1)
    mesh, state = runs[1, 1][:2]
    abstract = abstract_state(settings, mesh)
    checkpoints = Checkpointer(str(tmp_path), keep=2)
    for number in (10, 20):
        numbered = dataclasses.replace(state, step=np.int32(number))
        checkpoints.save(numbered, RunState(step=number), error=None)
    checkpoints.wait()
    damage(tmp_path / '20')
    assert checkpoints.restore(abstract).run_state.step == 10
    assert f'{tmp_path}/20 ' in capsys.readouterr().err
    kept, moved = sorted(path.name for path in tmp_path.iterdir())
    assert (kept, moved.isdigit()) == ('10', False)
    checkpoints.save(dataclasses.replace(state, step=np.int32(20)), RunState(step=20), error=None)
    checkpoints.wait()
    assert checkpoints.restore(abstract).run_state.step == 20

    # If no checkpoint can be read, none is moved, and the run does not restart silently.
    damage(tmp_path / '10')
    damage(tmp_path / '20')
    with pytest.raises(CheckpointError, match='no checkpoint'):
        checkpoints.restore(abstract)
    assert checkpoints.manager.all_steps() == [10, 20]
    checkpoints.close()


@pytest.mark.slow
def test_newest_and_best_checkpoints_are_kept(runs, tmp_path):
    state = runs[1, 1][1]
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    for number, error in [(1, 0.9), (2, 0.4), (3, 0.6), (4, None), (5, 0.5)]:
        checkpoints.save(dataclasses.replace(state, step=np.int32(number)), RunState(step=number), error)
    checkpoints.wait()
    assert checkpoints.manager.all_steps() == [2, 5]
    checkpoints.close()
    again = Checkpointer(str(tmp_path), keep=1)
    again.save(dataclasses.replace(state, step=np.int32(6)), RunState(step=6), 0.7)
    again.wait()
    assert again.manager.all_steps() == [2, 6]
    again.close()


def test_nan_scores_count_as_errors():
    scores = np.full((2, 10), np.nan, np.float32)
    top1, top5 = topk_errors(jax.numpy.asarray(scores), jax.numpy.array([0, 3]))
    np.testing.assert_array_equal([top1, top5], np.ones((2, 2)))
    scores = np.arange(20, dtype=np.float32).reshape(2, 10)
    top1, top5 = topk_errors(jax.numpy.asarray(scores), jax.numpy.array([9, 4]))
    np.testing.assert_array_equal([top1, top5], [[0, 1], [0, 1]])


def collectives(hlo: str) -> dict[str, list[list[tuple[int, ...]]]]:
    """Returns the output shapes of each kind of collective, one list per instruction."""
    found: dict[str, list[list[tuple[int, ...]]]] = {}
    kinds = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast'
    for line in hlo.splitlines():
        match = re.search(rf'= (.*?) ({kinds})(?:-start)?\(', line)
        if match:
            shapes = re.findall(r'\w+\[([\d,]*)\]', match[1])
            found.setdefault(match[2], []).append([tuple(map(int, filter(None, s.split(',')))) for s in shapes])
    return found


def numbers(shapes: list[tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def lowered_step(settings):
    """Lowers the train step from shapes alone."""
    mesh = parallel.make_mesh(settings)
    struct, size, rows = jax.ShapeDtypeStruct, settings.data.image_size, settings.train.batch_size
    shapes = {
        'image': struct((rows, size, size, 3), np.uint8),
        'label': struct((rows,), np.int32),
        'example_id': struct((rows,), np.uint32),
    }
    prepared = {'mean': struct((size, size, 3), np.float32), 'color': struct((3, 3), np.float32)}
    prepared |= {'divisor': struct((), np.float32), 'scale': struct((3,), np.float32)}
    train_step = make_train_step(settings, mesh)
    return train_step.lower(abstract_state(settings, mesh), shapes, rates(0.01), prepared)


def compiled_step(data: int, model: int, batch_size: int, **mesh) -> str:
    """Returns the HLO of the full `paper` step."""
    settings = config.default_config()
    settings.mesh.update({'data': data, 'model': model, **mesh})
    settings.train.batch_size = settings.eval.batch_size = batch_size
    return lowered_step(config.resolve(settings)).compile(FAST).as_text()


@pytest.mark.slow
def test_towers_collectives_are_where_the_paper_has_them():
    hlo = compiled_step(4, 2, 512)
    found = collectives(hlo)
    # Before conv3, fc6, fc7 and fc8, and for the logits, but not in conv2, conv4 and conv5. 128 images per device.
    gathered = [(128, 13, 13, 256), (128, 6, 6, 256), (128, 4096), (128, 4096), (128, 1000)]
    assert sorted(shape for [shape] in found.pop('all-gather')) == sorted(gathered)
    # Their transposes: each device keeps its shard of the channels.
    scattered = [(*shape[:-1], shape[-1] // 2) for shape in gathered]
    assert sorted(shape for [shape] in found.pop('reduce-scatter')) == sorted(scattered)
    # The gradients, half of them on each device of a pair, and three metrics.
    gradients, metrics = sorted(found.pop('all-reduce'), key=len, reverse=True)
    assert numbers(gradients) == 60_965_224 // 2
    assert metrics == [(3,)]
    assert not found
    convolutions = [line for line in hlo.splitlines() if re.search(r'= .* convolution\(', line)]
    assert convolutions
    assert not any('feature_group_count' in line for line in convolutions)


@pytest.mark.slow
def test_data_parallel_step_only_all_reduces_gradients():
    found = collectives(compiled_step(8, 1, 64))
    [summed] = found.pop('all-reduce')
    assert numbers(summed) == 60_965_224 + 3  # gradients and three metrics
    assert not found


@pytest.mark.slow
def test_hybrid_collectives_have_the_expected_shapes():
    hlo = compiled_step(4, 2, 1024, layout='hybrid')  # 128 images per device, 256 per pair
    found = collectives(hlo)
    # 128 x 9216 become 256 x 4608, and back.
    assert found.pop('all-to-all') == [[(128, 4608), (128, 4608)]] * 2
    # fc6 and fc7 leave half the channels on each device, fc8 its own images; the transposes are all-gathers.
    assert sorted(shape for [shape] in found.pop('reduce-scatter')) == [(128, 1000), (256, 2048), (256, 2048)]
    gathered = sorted(shape for [shape] in found.pop('all-gather'))
    assert gathered == [(256,), (256, 1000), (256, 4096), (256, 4096)]  # the first: example ids for the dropout masks
    dense, convolutions = sorted(found.pop('all-reduce'), key=numbers, reverse=True)
    # Halves of the three kernels and of two biases; all of conv1..conv5, fc8's bias and the three metrics.
    assert numbers(dense) == (9216 * 4096 + 4096 * 4096 + 4096 * 1000 + 4096 + 4096) // 2
    assert numbers(convolutions) == 2_334_080 + 1000 + 3
    assert not found
    # Devices 2i and 2i + 1 are a row of `model`. Since jaxlib 0.12 the groups are written by axis.
    [groups] = [
        re.search(r'replica_groups=(.*?), [a-z]', line)[1]
        for line in hlo.splitlines()
        if 'f32[4608,4096]' in line and ' all-reduce(' in line
    ]
    assert groups in ('{{0,2,4,6},{1,3,5,7}}', "mesh['data'=4,'model'=2] {'data'}")


@pytest.mark.slow
def test_sharded_optimizer_reduce_scatters_and_all_gathers():
    found = collectives(compiled_step(8, 1, 64, layout='data', shard_optimizer=True))
    assert numbers([shape for [shape] in found.pop('all-gather')]) == 60_965_224 - 10_568  # kernels, not biases
    assert numbers([shape for [shape] in found.pop('reduce-scatter')]) == (60_965_224 - 10_568) // 8
    [summed] = found.pop('all-reduce')
    assert numbers(summed) == 10_568 + 3
    assert not found


@pytest.mark.parametrize(
    ('data', 'model', 'settings', 'reason'),
    [
        (1, 3, {'mesh': {'layout': 'hybrid'}}, r'mesh.model: 3 .*32 .*fc6.* 2\b'),
        (
            1,
            4,
            {'mesh': {'layout': 'hybrid'}, 'model': {'widths': (16, 32, 32, 32, 32, 66, 64)}},
            r'widths \(fc6\): 66 .*mesh.model=4.* 64\b',
        ),
        (1, 3, {}, r'mesh.model: 3 .*model.towers=2.* 2\b'),
        (2, 2, {'mesh': {'layout': 'data'}}, r"mesh.model: 2 with mesh.layout='data'"),
        (
            4,
            2,
            {'mesh': {'layout': 'hybrid'}, 'train': {'batch_size': 12}},
            r'train.batch_size: 12 .*mesh.data x mesh.model=8.* 16\b',
        ),
    ],
)
def test_mesh_that_does_not_fit_is_rejected(data, model, settings, reason):
    assert re.search(reason, refusal(small_config, data, model, settings))


def test_too_few_devices_are_rejected():
    message = refusal(parallel.make_mesh, small_config(16, 1))
    assert re.search(r'data=16 .*model=1 .*16 .*8', message)


def test_default_mesh_uses_all_devices():
    assert dict(parallel.make_mesh(small_config(-1, 2)).shape) == {'data': 4, 'model': 2}
    message = refusal(parallel.make_mesh, small_config(-1, 1, {'train': {'batch_size': 12}}))
    assert re.search(r'train.batch_size: 12 .*mesh.data=8', message)


@pytest.mark.slow
def test_crop_group_shares_crop_and_flip():
    """An image repeated in one crop group has the loss of a single image. With separate crops, the loss differs."""
    one = small_config(1, 1, {'model': {'dropout': 0.0}, 'data': {'color': 'none'}, 'train': {'batch_size': 1}})
    loss_of_one = train(one, 1)[2][0]
    row = batch(0, one)
    losses = {}
    for chunk in (8, 1):
        groups = {
            'model': {'dropout': 0.0},
            'data': {'color': 'none', 'crop_group_size': chunk},
            'train': {'batch_size': 8},
        }
        settings = small_config(1, 1, groups)
        mesh = parallel.make_mesh(settings)
        rows = {name: np.repeat(values, 8, 0) for name, values in row.items()}
        rows['example_id'] = np.arange(8, dtype=np.uint32)
        prepared = augment.make_preprocess_params(STATISTICS, settings.data)
        train_step = make_train_step(settings, mesh)
        _, metrics = train_step(init_state(settings, mesh), make_global_batch(settings, mesh, rows), rates(0), prepared)
        losses[chunk] = float(metrics['loss'])
    np.testing.assert_allclose(losses[8], loss_of_one, rtol=1e-6)
    assert abs(losses[1] / loss_of_one - 1) > 1e-4


NORMED = ('activation pool batch_norm',) * 2 + ('activation batch_norm',) * 2 + ('activation pool',)
OTHER_NETWORKS = {
    'batch_norm_and_lars': {'model': {'conv_ops': NORMED}, 'optimizer': {'trust_coefficient': 1.0}},
    'no_exchange': {'model': {'cross_tower': ('fc8',)}},
}


@functools.cache
def four_steps(network: str, layout: str, data: int, model: int, shard_optimizer: bool):
    """Returns the state, the losses, the layer statistics, and the batch statistics on the device."""
    groups = OTHER_NETWORKS[network] | {'mesh': {'layout': layout, 'shard_optimizer': shard_optimizer}}
    settings = small_config(data, model, groups)
    mesh, state, losses, _ = train(settings, 4)
    prepared = augment.make_preprocess_params(STATISTICS, settings.data)
    images = make_global_batch(settings, mesh, batch(99, settings))['image']
    report = make_layer_stats_fn(settings, mesh)(state, images, prepared)
    return *jax.device_get((state, losses, report)), state.batch_stats


@pytest.mark.slow
@pytest.mark.parametrize(
    ('network', 'layout', 'data', 'model', 'shard_optimizer'),
    [
        ('batch_norm_and_lars', 'towers', 4, 2, True),
        ('batch_norm_and_lars', 'hybrid', 2, 4, False),
        ('no_exchange', 'towers', 4, 2, False),
    ],
)
def test_batch_norm_lars_and_towers_match_one_device(network, layout, data, model, shard_optimizer):
    state, losses, report, statistics = four_steps(network, layout, data, model, shard_optimizer)
    state1, losses1, report1, _ = four_steps(network, 'towers', 1, 1, False)
    np.testing.assert_allclose(losses, losses1, rtol=2e-5)
    assert abs(losses[0] - losses[-1]) > 0.05  # The loss changes by more than the tolerance.
    for name in report1:
        np.testing.assert_allclose(report[name], report1[name], rtol=1e-4, atol=1e-7)
    assert max(float(row[-1]) for row in report1.values()) > 0  # some units are dead
    for ours, expected in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(state1.batch_stats), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
    for ours, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(state1.params), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    if network == 'batch_norm_and_lars':
        assert sorted(statistics) == ['conv1_norm', 'conv2_norm', 'conv3_norm', 'conv4_norm']
        means = [np.asarray(leaf['mean']) for leaf in state.batch_stats.values()]
        assert all(np.abs(mean).max() > 0.1 for mean in means)


@pytest.mark.slow
@pytest.mark.parametrize(('layout', 'data', 'model'), [('towers', 4, 2), ('hybrid', 4, 2)])
def test_predictions_match_one_device(runs, layout, data, model):
    predictions = []
    for settings in (small_config(1, 1), small_config(data, model, {'mesh': {'layout': layout}})):
        mesh = parallel.make_mesh(settings)
        state = moved(runs[1, 1][1], settings, mesh)
        images = make_global_batch(settings, mesh, batch(99, settings))['image']
        prepared = augment.make_preprocess_params(STATISTICS, settings.data)
        predictions.append(np.asarray(make_predict_step(settings, mesh, 1)(state, images, prepared)))
    np.testing.assert_allclose(np.exp(predictions[0]).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(predictions[1], predictions[0], rtol=0, atol=2e-5)
