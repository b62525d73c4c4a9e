"""The oracles that must also hold on GPUs and TPUs: layers, one update, all meshes, bfloat16. See docs/accelerators.md.

The tests use the devices of JAX: eight simulated CPU devices or, with JAX_PLATFORMS=cuda or tpu, the accelerators. With
model.precision=float32, sums on accelerators differ from the oracles only by the order of their terms.
"""

import functools

import jax
import jax.numpy as jnp
import net145
import numpy as np
import pytest
from test_mesh import FAST, STATISTICS, batch, make_global_batch, rates, small_config

from alexnet_jax import augment, parallel
from alexnet_jax.layers import add_bias, convolution, local_response_norm, max_pool, within_channel_lrn
from alexnet_jax.training.checkpointing import state_digest
from alexnet_jax.training.state import init_state
from alexnet_jax.training.train_step import make_train_step

pytestmark = pytest.mark.accelerator
STEPS = 3
# Constants of net145.normalize(), in the terms of layers.local_response_norm().
CROSS_MAP, SPATIAL = (
    {'k': c['constant'], 'n': 5, 'alpha': c['scale'], 'beta': 0.75} for c in (net145.CROSS_MAP, net145.SPATIAL)
)


def normal(seed, *shape, scale=1.0):
    return np.float32(scale * np.random.default_rng(seed).standard_normal(shape))


def close(found, expected, tolerance=1e-5):
    """Compares arrays to `tolerance` of the largest number."""
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def forward_and_gradients(function, *arguments):
    """Returns the value of `function`, a cotangent and its gradients by all arguments, in full float32 precision."""
    with jax.default_matmul_precision('float32'):
        value, back = jax.jit(lambda *arguments: jax.vjp(function, *arguments))(*map(jnp.asarray, arguments))
        cotangent = normal(9, *value.shape)
        return value, cotangent, jax.jit(lambda back, cotangent: back(cotangent))(back, jnp.asarray(cotangent))


@pytest.mark.parametrize(
    ('side', 'maps', 'window', 'stride', 'pad', 'outputs'),
    [(67, 3, 11, 4, 0, 24), (13, 16, 5, 1, 2, 32), (13, 64, 3, 1, 1, 48)],
)
def test_convolution(side, maps, window, stride, pad, outputs):
    x, kernel = normal(1, 8, side, side, maps), normal(2, window, window, maps, outputs)
    apply = functools.partial(convolution, stride=stride, padding=((pad, pad), (pad, pad)))
    y, cotangent, (dx, dw) = forward_and_gradients(apply, x, kernel)
    arguments = np.float64(x), np.float64(kernel)
    close(y, net145.convolve(*arguments, stride=stride, pad=pad))
    expected_dx, expected_dw = net145.convolve_backward(*arguments, np.float64(cotangent), stride=stride, pad=pad)
    close(dx, expected_dx)
    close(dw, expected_dw)


@pytest.mark.parametrize(
    ('norm', 'constants', 'sums', 'expected_constants'),
    [
        (local_response_norm, CROSS_MAP, net145.sum_maps, net145.CROSS_MAP),
        (within_channel_lrn, SPATIAL, net145.sum_pixels, net145.SPATIAL),
    ],
)
def test_response_normalization(norm, constants, sums, expected_constants):
    x = normal(3, 4, 13, 13, 32, scale=100)

    def of_towers(x):
        return jnp.concatenate([norm(part, **constants) for part in jnp.split(x, 2, -1)], -1)

    y, cotangent, (dx,) = forward_and_gradients(of_towers, x)
    close(y, net145.normalize(np.float64(x), sums, **expected_constants))
    close(dx, net145.normalize_backward(np.float64(x), np.float64(cotangent), sums, **expected_constants))


def test_max_pool_of_values_with_ties():
    x = np.float32(np.random.default_rng(4).integers(-3, 4, (4, 27, 27, 16)))  # the first of equal values counts
    y, cotangent, (dx,) = forward_and_gradients(lambda x: max_pool(x, 3, 2), x)
    expected, winners = net145.pool(x)
    np.testing.assert_array_equal(y, expected)
    close(dx, net145.pool_backward(np.float64(x), winners, np.float64(cotangent)), 1e-6)


def test_product_with_bias():
    x, kernel, bias = normal(5, 64, 1024), normal(6, 1024, 256), normal(7, 256)
    y, cotangent, (dx, dw, db) = forward_and_gradients(
        lambda x, kernel, bias: add_bias(x @ kernel, bias), x, kernel, bias
    )
    x, kernel, cotangent = np.float64(x), np.float64(kernel), np.float64(cotangent)
    for found, expected in (
        (y, x @ kernel + bias),
        (dx, cotangent @ kernel.T),
        (dw, x.T @ cotangent),
        (db, cotangent.sum(0)),
    ):
        close(found, expected, 2e-6)


@functools.cache
def train(layout, data, model, dtype='float32'):
    """Trains STEPS steps; returns the losses, the digest of the initial state and the final parameters."""
    precision = 'float32' if dtype == 'float32' else 'default'
    groups = {'mesh': {'layout': layout}, 'model': {'dtype': dtype, 'precision': precision}}
    settings = small_config(data, model, groups)
    mesh, prepared = parallel.make_mesh(settings), augment.make_preprocess_params(STATISTICS, settings.data)
    state = init_state(settings, mesh)
    digest, losses = state_digest(state), []
    rows = [make_global_batch(settings, mesh, batch(number, settings)) for number in range(STEPS)]
    lowered = make_train_step(settings, mesh).lower(state, rows[0], rates(0.01), prepared)
    step = lowered.compile(FAST if jax.default_backend() == 'cpu' else None)
    for each in rows:
        state, metrics = step(state, each, rates(0.01), prepared)
        losses.append(float(metrics['loss']))
    return losses, digest, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize(('layout', 'model'), [('data', 1), ('towers', 2), ('hybrid', 2)])
def test_mesh_of_all_devices_equals_one_device(layout, model):
    devices = jax.device_count()
    data = max(size for size in (1, 2, 4, 8, 16) if size * model <= devices or size == 1)
    if data * model > devices or devices == 1:
        pytest.skip(f'{devices} device: there is no mesh of several')
    losses, digest, params = train('towers', 1, 1)
    found, found_digest, found_params = train(layout, data, model)
    assert found_digest == digest
    assert np.ptp(losses) > 0.01  # more than the tolerance
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    for ours, expected in zip(jax.tree.leaves(found_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_losses_of_bfloat16_are_close():
    losses, digest, _ = train('towers', 1, 1)
    found, found_digest, _ = train('towers', 1, 1, 'bfloat16')
    assert found_digest == digest
    assert found != losses
    np.testing.assert_allclose(found, losses, rtol=2e-2)
