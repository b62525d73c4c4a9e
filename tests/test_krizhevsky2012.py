"""The preset `krizhevsky2012` against a program in NumPy of net #145 (tests/net145.py): all layers, and one update."""

import jax
import net145
import numpy as np
import pytest
from flax import nnx
from test_net145 import WIDTHS, make

from alexnet_jax import augment, config, parallel, shapes
from alexnet_jax.model import AlexNet
from alexnet_jax.training.state import TrainState, init_state, state_specs
from alexnet_jax.training.train_step import make_train_step

SIZE, CLASSES, BATCH = 96, 10, 8
# The names that the NumPy program gives the outputs after ReLU.
AFTER_RELU = {'conv1': 'relu1', 'conv2': 'relu2', 'conv3': 'relu3', 'conv4': 'relu4', 'conv5': 'relu5'}
AFTER_RELU |= {'fc6': 'relu6', 'fc7': 'relu7', 'fc8': 'fc8'}


def settings(dropout, data=1, model=1):
    """Returns net #145 at the widths of the NumPy program, without augmentation."""
    given = config.default_config()
    given.model.preset = 'krizhevsky2012'
    given.model.widths, given.model.num_classes, given.model.dropout = WIDTHS, CLASSES, dropout
    given.data.image_size = given.data.crop_size = SIZE
    given.data.crop = given.data.flip = False
    given.data.color = given.data.mean = 'none'
    given.train.batch_size = BATCH
    given.mesh.data, given.mesh.model = data, model
    given.model.precision = 'float32'  # on accelerators; CPUs have no other
    return config.resolve(given)


@pytest.fixture(scope='module')
def case():
    """Parameters (float32), uint8 images, labels."""
    params, images, labels, _ = make(SIZE, BATCH, WIDTHS, CLASSES, seed=3)
    images = np.clip(np.abs(images) * 1.5, 0, 255).astype(np.uint8)
    return jax.tree.map(np.float32, params), images, np.asarray(labels, np.int32)


def close(ours, expected, tolerance):
    tolerance *= 1 if jax.default_backend() == 'cpu' else 10  # cuDNN and TPUs add in other orders than XLA for CPUs
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.accelerator
def test_every_layer(case):
    params, images, _ = case
    resolved = settings(dropout=0.5)
    graph = nnx.split(nnx.eval_shape(lambda: AlexNet(resolved.model, crop_size=SIZE, rngs=nnx.Rngs(params=0))))[0]
    ours = jax.jit(lambda params, images: nnx.merge(graph, params).activations(images))(params, np.float32(images))
    logits, expected = net145.forward(params, images)
    for layer, name in AFTER_RELU.items():
        assert (expected[name] == 0).mean() < 0.9, layer  # the signal came through
        close(ours[layer], expected[name], 2e-6)
    close(ours['fc8'], logits, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'model'), [pytest.param(1, 1, marks=pytest.mark.accelerator), (4, 2)])
def test_one_update(case, data, model):
    """Gradients through both normalizations, biases at twice the rate, decay, velocities, and a frozen layer."""
    params, images, labels = case
    resolved = settings(0.0, data, model)
    mesh = parallel.make_mesh(resolved)
    generator = np.random.default_rng(5)
    velocities = jax.tree.map(lambda leaf: np.float32(1e-3 * generator.standard_normal(leaf.shape)), params)
    rates = {name: {'kernel': np.float32(1e-2), 'bias': np.float32(2e-2)} for name in shapes.LAYERS}
    rates['conv1'] = {'kernel': np.float32(0), 'bias': np.float32(0)}
    rates['conv3']['kernel'] = np.float32(1e-3)

    state = init_state(resolved, mesh)
    place = parallel.shardings(mesh, state_specs(resolved, mesh))
    state = TrainState(
        state.step,
        jax.device_put(params, place.params),
        (*state.opt_state[:-1], state.opt_state[-1]._replace(trace=velocities)),
        state.batch_stats,
    )
    state = jax.device_put(state, place)
    moments = {'mean_image': np.zeros((SIZE, SIZE, 3)), 'mean_rgb': np.zeros(3)}
    moments |= {'eigenvalues': np.ones(3), 'eigenvectors': np.eye(3)}
    rows = {'image': images, 'label': labels, 'example_id': np.arange(BATCH, dtype=np.uint32)}
    rows = parallel.make_global_batch(parallel.batch_sharding(mesh, 'towers'), rows)
    prepared = augment.make_preprocess_params(moments, resolved.data)
    state, metrics = make_train_step(resolved, mesh)(state, rows, rates, prepared)

    ones = {'fc6': np.ones((BATCH, WIDTHS[5])), 'fc7': np.ones((BATCH, WIDTHS[6]))}
    loss, gradients = net145.gradients(params, images, labels, ones)
    expected, increments = net145.update(params, velocities, gradients, rates)
    np.testing.assert_allclose(float(metrics['loss']), loss, rtol=1e-5)
    ours, trace = jax.device_get((state.params, state.opt_state[-1].trace))
    for layer in shapes.LAYERS:
        for kind in ('kernel', 'bias'):
            close(trace[layer][kind], increments[layer][kind], 2e-5)
            close(ours[layer][kind], expected[layer][kind], 1e-6)
            assert layer == 'conv1' or np.abs(gradients[layer][kind]).max() > 1e-3
    np.testing.assert_array_equal(ours['conv1']['kernel'], params['conv1']['kernel'])
    np.testing.assert_array_equal(trace['conv1']['kernel'], velocities['conv1']['kernel'])
