"""Steps that need less memory: micro-batches, rematerialization, bfloat16, and the state updated in place."""

import functools
import re

import jax
import numpy as np
import pytest
from helpers import refusal
from test_mesh import (
    NORMED,
    STATISTICS,
    batch,
    collectives,
    lowered_step,
    make_global_batch,
    rates,
    small_config,
    train,
)

from alexnet_jax import augment, parallel
from alexnet_jax.config import default_config, resolve
from alexnet_jax.layers import for_platform
from alexnet_jax.training.state import abstract_state, init_state
from alexnet_jax.training.train_step import make_train_step

pytestmark = pytest.mark.slow


def compiled(settings):
    """Compiles the step without optimization, because it is never run."""
    return lowered_step(settings).compile(compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def three_steps(**fields):
    """Returns the state and losses of three steps.

    Takes fields of `train`, and `mesh`: (layout, data, model, shard_optimizer).
    """
    layout, data, model, shard_optimizer = fields.pop('mesh', ('towers', 1, 1, False))
    groups = {'mesh': {'layout': layout, 'shard_optimizer': shard_optimizer}, 'train': fields}
    return train(small_config(data, model, groups), 3)[1:3]


@pytest.mark.parametrize(
    'fields',
    [
        {'grad_accum_steps': 4},
        {'grad_accum_steps': 2, 'mesh': ('towers', 4, 2, False)},
        {'grad_accum_steps': 2, 'remat': True, 'mesh': ('hybrid', 2, 4, True)},
        {'remat': True, 'mesh': ('towers', 4, 2, False)},
    ],
    ids=str,
)
def test_micro_batches_and_remat_do_not_change_the_numbers(fields):
    """The numbers equal those of one device with the whole batch and no rematerialization."""
    expected, losses = three_steps()
    state, found = three_steps(**fields)
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    for (path, leaf), whole in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(whole), rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize('platform', ['gpu', 'tpu'])
def test_layers_of_accelerators_give_the_same_numbers(platform, monkeypatch):
    expected, losses = three_steps()
    monkeypatch.setattr(parallel, 'for_platform', lambda _: for_platform(platform))
    state, found = train(small_config(2, 2, {'mesh': {'layout': 'towers'}}), 3)[1:3]
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-4, atol=2e-6)


def test_accelerators_loop_and_reduce_gradients_once(monkeypatch):
    """Accelerators compile a loop over micro-batches; CPUs unroll the loop."""
    settings = small_config(4, 2, {'train': {'grad_accum_steps': 2}})
    once, unrolled = (collectives(compiled(each).as_text()) for each in (small_config(4, 2), settings))
    expected, losses = three_steps()
    monkeypatch.setattr(parallel, 'for_platform', lambda _: for_platform('gpu'))
    hlo = compiled(settings).as_text()
    state, found = train(settings, 3)[1:3]
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    kernels = (np.asarray(each.params['conv1']['kernel']) for each in (state, expected))
    np.testing.assert_allclose(*kernels, rtol=1e-4, atol=2e-6)
    rolled = collectives(hlo)
    assert sorted(rolled['all-reduce']) == sorted(unrolled['all-reduce']) == sorted(once['all-reduce'])
    assert len(unrolled['all-gather']) == 2 * len(once['all-gather']) == 2 * len(rolled['all-gather'])
    loops = [
        re.search(rf'^{name} .*?^}}', hlo, re.DOTALL | re.MULTILINE)[0] for name in re.findall(r'body=(\S+),', hlo)
    ]
    [loop] = [loop for loop in loops if ' convolution(' in loop]
    assert sorted(collectives(loop)) == ['all-gather', 'reduce-scatter']


def test_micro_batch_statistics_are_averaged():
    """Each micro-batch has its own statistics, and rematerialization does not count them twice."""
    model = {'conv_ops': NORMED}
    whole = small_config(1, 1, {'model': model, 'train': {'grad_accum_steps': 2, 'remat': True}})
    half = small_config(1, 1, {'model': model, 'train': {'batch_size': 8}})
    rows, mesh, found = batch(0, whole), parallel.make_mesh(whole), []
    prepared = augment.make_preprocess_params(STATISTICS, whole.data)
    steps = {id(settings): make_train_step(settings, mesh) for settings in (whole, half)}
    for settings, part in ((whole, slice(None)), (half, slice(8)), (half, slice(8, None))):
        part_rows = make_global_batch(settings, mesh, {name: values[part] for name, values in rows.items()})
        state, metrics = steps[id(settings)](init_state(settings, mesh), part_rows, rates(0.0), prepared)
        found.append(jax.tree.leaves(jax.device_get((state.batch_stats, metrics))))
    assert len(found[0]) == 8 + 3
    for ours, first, second in zip(*found, strict=True):
        np.testing.assert_allclose(ours, (first + second) / 2, rtol=1e-5, atol=1e-7)
    assert max(np.abs(first - second).max() for first, second in zip(*found[1:], strict=True)) > 1e-2


def test_step_memory_shrinks_with_micro_batches_and_remat():
    needed = {}
    for images, count, remat in ((256, 1, False), (256, 2, False), (256, 4, False), (256, 4, True)):
        settings = default_config()
        settings.train.batch_size = images
        settings.mesh.data, settings.train.grad_accum_steps, settings.train.remat = 1, count, remat
        needed[images, count, remat] = compiled(resolve(settings)).memory_analysis().temp_size_in_bytes
    gradients = 4 * 60_965_224
    # Besides the gradients, nearly all memory is proportional to the number of images.
    assert needed[256, 2, False] - gradients < 0.7 * (needed[256, 1, False] - gradients)
    assert needed[256, 4, False] - gradients < 0.45 * (needed[256, 1, False] - gradients)
    # With rematerialization the peak is at the gradient of conv1, after the other layers have freed their memory.
    assert needed[256, 4, True] < 0.9 * needed[256, 4, False]


def test_state_is_updated_in_place():
    for mesh in ({}, {'mesh': {'layout': 'hybrid', 'shard_optimizer': True}}):
        settings = small_config(4, 2, mesh) if mesh else small_config(1, 1)
        program = compiled(settings)
        state = abstract_state(settings, parallel.make_mesh(settings))
        leaves = jax.tree.leaves(state)
        aliases = re.search(r'input_output_alias={ (.*?) }, entry', program.as_text())[1]
        pairs = re.findall(r'\{(\d+)\}: \((\d+), \{\}', aliases)
        # The state is the first argument and the first result of the step.
        assert sorted(map(int, sum(pairs, ()))) == sorted([*range(len(leaves))] * 2)
        assert all(given == taken for given, taken in pairs)
        sizes = [np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * leaf.dtype.itemsize for leaf in leaves]
        assert program.memory_analysis().alias_size_in_bytes == sum(sizes)


def test_only_products_and_convolutions_use_bfloat16():
    settings = small_config(1, 1, {'model': {'dtype': 'bfloat16'}})
    text = lowered_step(settings).as_text()
    products = re.findall(r'stablehlo\.(?:convolution|dot_general).*?: \((.*?)\) -> (\S+)', text)
    assert len(products) >= 3 * 8 - 1
    assert all('f32' not in operands.replace('bf16', '') for operands, _ in products)
    exact, losses = three_steps()
    _, state, found, _ = train(settings, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype('float32'), np.dtype('int32')}
    assert 1e-6 < np.abs(np.array(found) / losses - 1).max() < 2e-3
    for layer, kinds in state.opt_state[-1].trace.items():
        ours, expected = np.asarray(kinds['kernel']), np.asarray(exact.opt_state[-1].trace[layer]['kernel'])
        difference = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        # Rounding to 8 bits changes a value by up to 1 / 512. In lower layers, more units have another sign or maximum.
        assert 1e-3 < difference < (0.4 if layer.startswith('conv') else 0.1), layer


def test_remat_does_not_repeat_collectives():
    again, once = (
        collectives(compiled(small_config(4, 2, {'train': {'remat': on}})).as_text()) for on in (True, False)
    )
    assert {kind: sorted(shapes) for kind, shapes in again.items()} == {
        kind: sorted(shapes) for kind, shapes in once.items()
    }


@pytest.mark.parametrize(
    ('data', 'model', 'groups', 'reason'),
    [
        (1, 1, {'train': {'grad_accum_steps': 0}}, r'config.train.grad_accum_steps: 0 is outside 1 to'),
        (
            8,
            1,
            {'train': {'batch_size': 48, 'grad_accum_steps': 4}},
            r'^config.train.grad_accum_steps: 4 does not divide the 6 images of train.batch_size that each device has;'
            r' the nearest is 3$',
        ),
        (
            4,
            2,
            {'mesh': {'layout': 'hybrid'}, 'train': {'grad_accum_steps': 4}},
            r'grad_accum_steps: 4 does not divide the 2 images .*; the nearest is 2$',
        ),
    ],
)
def test_micro_batches_that_do_not_fit_are_refused(data, model, groups, reason):
    assert re.search(reason, refusal(small_config, data, model, groups))
