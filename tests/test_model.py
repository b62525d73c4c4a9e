"""The network against an independent program in TensorFlow: outputs, shapes, parameters, ablations, dropout, towers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from flax import nnx

from alexnet_jax import shapes
from alexnet_jax.config import default_config, resolve
from alexnet_jax.model import AlexNet

# Settings for activations of about 1, so that LRN has a large effect.
SMALL = {'widths': (8, 16, 24, 16, 8, 24, 20), 'num_classes': 12, 'lrn_alpha': 0.3, 'kernel_std': (0.01,) * 8}


def model_config(**changes):
    config = default_config()
    config.model.update(changes)
    return resolve(config).model


def network(config, crop_size):
    """Returns the definition of the module, and the shapes of its parameters by layer."""
    module = nnx.eval_shape(lambda: AlexNet(config, crop_size=crop_size, rngs=nnx.Rngs(params=jax.random.key(0))))
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def random_parameters(shapes, bias_std):
    """Returns random biases, and kernels that keep the size of activations from layer to layer."""
    rng = np.random.default_rng(0)

    def one(shape):
        std = bias_std if len(shape) == 1 else np.sqrt(2 / np.prod(shape[:-1]))
        return (std * rng.standard_normal(shape, np.float32)).astype(np.float32)

    return jax.tree.map(lambda leaf: one(leaf.shape), shapes)


@functools.cache
def compiled(config, crop_size):
    graph, _ = network(config, crop_size)
    return jax.jit(lambda parameters, images, keys: nnx.merge(graph, parameters)(images, keys))


def logits_of(config, crop_size, parameters, images, keys=None):
    return np.asarray(compiled(config, crop_size)(parameters, images, keys))


def reference(
    parameters,
    images,
    *,
    towers=2,
    activation='relu',
    lrn=True,
    size=5,
    k=2.0,
    alpha=1e-4,
    beta=0.75,
    window=3,
    kept=0.5,
    zeros=None,
    after=('act lrn pool', 'act lrn pool', 'act', 'act', 'act pool'),
    cross_tower=('conv1', 'conv3', 'fc6', 'fc7', 'fc8'),
    across=False,
    halved=('fc7', 'fc8'),
):
    """Computes the paper's network at inference in TensorFlow, in float32. Layers are split only where towers matter.

    Args:
      zeros: numbers of zeros before and after the image.
      after: operations after each convolution.
      across: whether LRN sums over the maps of all towers.
      halved: layers whose inputs are multiplied by `kept`.
    """
    act = {'relu': tf.nn.relu, 'tanh': tf.math.tanh}[activation]

    def cut(x):
        return tf.split(x, towers, -1)

    def conv(layer, x, **options):
        kernel, bias = parameters[layer]['kernel'], parameters[layer]['bias']
        if layer in cross_tower:
            return tf.nn.conv2d(x, kernel, **options) + bias
        pairs = zip(cut(x), np.split(kernel, towers, 3), strict=True)
        return tf.concat([tf.nn.conv2d(part, its, **options) for part, its in pairs], 3) + bias

    def normalize(x):
        parts = [x] if across else cut(x)
        return tf.concat([tf.nn.lrn(p, depth_radius=size // 2, bias=k, alpha=alpha, beta=beta) for p in parts], 3)

    def pool(x):
        return tf.nn.max_pool2d(x, window, 2, 'VALID')

    def dense(layer, x):
        kernel, bias = parameters[layer]['kernel'], parameters[layer]['bias']
        x = x * kept if layer in halved else x
        if layer in cross_tower:
            return tf.matmul(tf.concat(x, -1), kernel) + bias
        pairs = zip(x, np.split(kernel, towers, 1), strict=True)
        return tf.concat([tf.matmul(part, its) for part, its in pairs], 1) + bias

    if zeros is None:
        # The original program has 1 + ceil((size - filter) / stride) modules, with zeros beyond the image.
        side = images.shape[1]
        modules = 1 + -(-(side - 11) // 4)
        zeros = (0, (modules - 1) * 4 + 11 - side)
    x = tf.pad(tf.constant(images), [[0, 0], zeros, zeros, [0, 0]])
    for layer, steps in zip(('conv1', 'conv2', 'conv3', 'conv4', 'conv5'), after, strict=True):
        if layer in parameters:
            options = {'strides': 4, 'padding': 'VALID'} if layer == 'conv1' else {'strides': 1, 'padding': 'SAME'}
            x = conv(layer, x, **options)
        elif 'pool' in steps:
            steps = 'pool'
        else:
            continue
        for step in steps.split():
            if step != 'lrn' or lrn:
                x = {'act': act, 'lrn': normalize, 'pool': pool}[step](x)

    def units(x):  # by tower, for layers that see only their own tower
        return [tf.reshape(part, (part.shape[0], -1)) for part in cut(x)]

    first = next(layer for layer in ('fc6', 'fc7', 'fc8') if layer in parameters)
    x = tf.reshape(x, (x.shape[0], -1)) if first in cross_tower else tf.stack(units(x))
    for layer in ('fc6', 'fc7', 'fc8'):
        if layer in parameters:
            if layer not in cross_tower and len(x.shape) == 2:
                x = tf.stack(cut(x))
            x = dense(layer, x) if layer == 'fc8' else act(dense(layer, x))
    return x.numpy()


@pytest.mark.slow
def test_paper_network_matches_the_independent_program():
    config = model_config()
    _, shapes = network(config, 224)
    parameters = random_parameters(shapes, bias_std=5)
    images = np.random.default_rng(1).uniform(-128, 128, (2, 224, 224, 3)).astype(np.float32)
    ours = logits_of(config, 224, parameters, images)
    expected = reference(parameters, images)
    assert ours.shape == (2, 1000)
    assert ours.dtype == np.float32
    assert expected.std() > 1  # The signal is large enough.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


ABLATIONS = [
    # fields of the configuration, the same for the independent program
    ({}, {}),
    ({'lrn': False}, {'lrn': False}),
    ({'lrn_size': 3}, {'size': 3}),
    ({'lrn_k': 1.0}, {'k': 1.0}),
    ({'lrn_alpha': 0.1}, {'alpha': 0.1}),
    ({'lrn_beta': 0.5}, {'beta': 0.5}),
    ({'overlapping_pool': False}, {'window': 2}),
    ({'activation': 'tanh'}, {'activation': 'tanh'}),
    ({'dropout': 0.0}, {'kept': 1.0}),
    ({'dropout': 0.2}, {'kept': 0.8}),
    ({'towers': 1}, {'towers': 1}),
    ({'towers': 4}, {'towers': 4}),
]


@pytest.mark.parametrize(('fields', 'options'), ABLATIONS)
def test_ablations_match_the_independent_program(fields, options):
    images = np.random.default_rng(2).standard_normal((2, 96, 96, 3)).astype(np.float32)

    config = model_config(**SMALL | fields)
    parameters = random_parameters(network(config, 96)[1], bias_std=0.3)
    ours = logits_of(config, 96, parameters, images)
    expected = reference(parameters, images, **{'alpha': 0.3} | options)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    unchanged = model_config(**SMALL)
    if fields and 'towers' not in fields:  # other towers have parameters of other shapes
        before = logits_of(unchanged, 96, parameters, images)
        assert np.abs(ours - before).max() > 1e-2 * np.abs(before).max()


VARIATIONS = [
    ({'conv1_padding': (0, 0)}, {'zeros': (0, 0)}),  # Caffe, where images have 227 pixels
    ({'conv1_padding': (2, 2)}, {'zeros': (2, 2)}),  # torchvision
    ({'lrn_across_towers': True}, {'across': True}),
    (
        {'conv_ops': ('activation pool lrn', 'lrn pool activation', 'activation lrn', '', 'activation pool')},
        {'after': ('act pool lrn', 'lrn pool act', 'act lrn', '', 'act pool')},
    ),
    ({'dropout_on_inputs_of': ('fc6', 'fc7')}, {'halved': ('fc6', 'fc7')}),
    ({'inverted_dropout': True}, {'halved': ()}),
    ({'cross_tower': ('fc8',)}, {'cross_tower': ('conv1', 'fc8')}),
    ({'cross_tower': ('conv4', 'fc7')}, {'cross_tower': ('conv1', 'conv4', 'fc7')}),
    (
        {'widths': (8, 16, 0, 16, 8, 24, 20), 'cross_tower': ('conv4', 'fc6', 'fc7', 'fc8')},
        {'cross_tower': ('conv1', 'conv4', 'fc6', 'fc7', 'fc8')},
    ),
    ({'widths': (8, 16, 24, 16, 0, 24, 0)}, {}),
    ({'widths': (8, 0, 24, 0, 8, 24, 20)}, {}),
]


@pytest.mark.parametrize(('fields', 'options'), VARIATIONS)
def test_variations_match_the_independent_program(fields, options):
    images = np.random.default_rng(2).standard_normal((2, 98, 98, 3)).astype(np.float32)
    config = model_config(**SMALL | fields)
    parameters = random_parameters(network(config, 98)[1], bias_std=0.3)
    ours = logits_of(config, 98, parameters, images)
    expected = reference(parameters, images, **{'alpha': 0.3} | options)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    if options and 'cross_tower' not in options:  # The paper's network with these parameters differs.
        fc6 = random_parameters(network(model_config(**SMALL), 98)[1], bias_std=0.3)['fc6']['kernel'].shape
        if fc6 == parameters['fc6']['kernel'].shape:
            paper = reference(parameters, images, alpha=0.3)
            assert np.abs(expected - paper).max() > 1e-3 * np.abs(paper).max()


def test_outputs_of_layers_without_a_nonlinearity():
    config = model_config(**SMALL, conv_ops=('lrn pool', 'activation pool', '', 'pool activation', ''))
    parameters = random_parameters(network(config, 67)[1], bias_std=0.3)
    images = np.random.default_rng(2).standard_normal((2, 67, 67, 3)).astype(np.float32)
    graph, _ = network(config, 67)
    outputs = jax.jit(lambda parameters, images: nnx.merge(graph, parameters).activations(images))(parameters, images)
    assert list(outputs) == ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8']
    negative = [name for name in ('conv1', 'conv2', 'conv3', 'conv4') if outputs[name].min() < 0]
    assert negative == ['conv1', 'conv3']


def operations(jaxpr):
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, 'jaxpr', None)
            if inner is not None:
                yield from operations(inner)
        yield equation


def observed_sizes(config, crop_size):
    """Returns the sides after conv1, pool1, conv2, pool2 and conv3 to conv5 in the traced program, and fc6's inputs.

    The input of conv1 is left out, because the program moves rows of the images into channels.
    """
    graph, shapes = network(config, crop_size)
    images = jax.ShapeDtypeStruct((2, crop_size, crop_size, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda parameters, images: nnx.merge(graph, parameters)(images))(shapes, images).jaxpr
    inputs, outputs, dense = [], [], []
    for operation in operations(jaxpr):
        shape = operation.invars[0].aval.shape if operation.invars else None
        if operation.primitive.name == 'conv_general_dilated':
            assert not outputs or shape[1] == shape[2]
            inputs.append(shape[1])
            outputs.append(operation.outvars[0].aval.shape[1])
            assert operation.outvars[0].aval.shape[2] == outputs[-1]
        elif operation.primitive.name == 'dot_general':
            dense.append(shape)
    # Towers with the same inputs share a convolution; otherwise each tower has its own.
    towers = config.towers
    assert len(outputs) == 2 + 3 * towers
    firsts = [0, 1, 1 + towers, 2 + towers, 2 + 2 * towers]
    inputs, (conv1, conv2, conv3, conv4, conv5) = [inputs[i] for i in firsts], [outputs[i] for i in firsts]
    assert inputs[3:] == [conv3, conv4]
    return [conv1, inputs[1], conv2, inputs[2], conv3, conv4, conv5], dense[0][1]


def layer_sizes(config, crop_size):
    """Returns the sides after conv1, pool1, conv2, pool2, conv3, conv4, conv5, pool5 in the layer table."""
    conv1, conv2, conv3, conv4, conv5 = shapes.layer_table(config, crop_size, 3)[:5]
    sides = [layer.output[0] for layer in (conv1, conv2, conv3, conv4, conv5)]
    return [sides[0], conv1.pooled[0], sides[1], conv2.pooled[0], *sides[2:], conv5.pooled[0]]


@pytest.mark.parametrize('overlapping_pool', [True, False])
@pytest.mark.parametrize('crop_size', [64, 65, 67, 95, 127, 224])
def test_layer_table_matches_the_network(crop_size, overlapping_pool):
    config = model_config(**SMALL, overlapping_pool=overlapping_pool)
    sizes, fc6_inputs = observed_sizes(config, crop_size)
    *expected, last = layer_sizes(config, crop_size)
    assert sizes == expected
    assert fc6_inputs == last * last * config.widths[4]


def test_one_tower_parameter_count():
    _, shapes = network(model_config(towers=1), 224)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 62_378_344


def test_parameters_and_kernel_shapes_of_the_paper():
    _, shapes = network(model_config(), 224)
    kernels = {layer: leaves['kernel'].shape for layer, leaves in shapes.items()}
    assert kernels == {
        'conv1': (11, 11, 3, 96),
        'conv2': (5, 5, 48, 256),
        'conv3': (3, 3, 256, 384),
        'conv4': (3, 3, 192, 384),
        'conv5': (3, 3, 192, 256),
        'fc6': (9216, 4096),
        'fc7': (4096, 4096),
        'fc8': (4096, 1000),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('fields', 'stds', 'biases'),
    [
        ({}, [0.01] * 8, [0, 1, 0, 1, 1, 1, 1, 0]),  # sections 5 and 3 of the paper
        (
            {'kernel_std': tuple(0.01 * i for i in range(1, 9)), 'bias_init': tuple(0.1 * i for i in range(8))},
            [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08],
            [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        ),
    ],
)
def test_initial_values(fields, stds, biases):
    config = model_config(widths=(24, 64, 96, 96, 96, 128, 256), num_classes=100, **fields)

    def build(seed):
        module = AlexNet(config, crop_size=64, rngs=nnx.Rngs(params=jax.random.key(seed)))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    layers = build(3)
    names = ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8']
    assert sorted(layers) == names
    for name, std, bias in zip(names, stds, biases, strict=True):
        kernel = np.asarray(layers[name]['kernel'], np.float64)
        np.testing.assert_array_equal(layers[name]['bias'], np.full(kernel.shape[-1], bias, np.float32))
        error = 4 / np.sqrt(kernel.size)  # four standard errors, or more
        assert abs(kernel.mean()) < error * std
        assert abs(kernel.std() / std - 1) < error
        assert abs(np.mean((kernel / std) ** 4) - 3) < 10 * error  # normal, not truncated
    fourth, fifth = (np.asarray(layers[name]['kernel']).ravel() for name in ('conv4', 'conv5'))
    assert abs(np.corrcoef(fourth, fifth)[0, 1]) < 4 / np.sqrt(fourth.size)  # Layers are independent.
    other = build(4)
    assert not np.array_equal(other['fc8']['kernel'], layers['fc8']['kernel'])


@pytest.mark.slow
@pytest.mark.parametrize(
    ('initializer', 'kernel', 'bias'),
    [  # standard deviation of a kernel with 3 x 3 x 48 inputs and 96 outputs; bound of the biases
        ('glorot_uniform', (2 / (9 * 48 + 9 * 96)) ** 0.5, 0),
        ('he_normal', (2 / (9 * 48)) ** 0.5, 0),
        ('torch_default', (1 / (3 * 9 * 48)) ** 0.5, (9 * 48) ** -0.5),
    ],
)
def test_initializers(initializer, kernel, bias):
    """The initial values of conv4; each tower sees half of its 96 inputs."""
    widths = (24, 64, 96, 96, 96, 128, 256)
    config = model_config(widths=widths, num_classes=100, initializer=initializer, bias_init=(0.0,) * 8)
    module = AlexNet(config, crop_size=64, rngs=nnx.Rngs(params=1))
    conv4 = jax.device_get(nnx.to_pure_dict(nnx.state(module, nnx.Param)))['conv4']
    assert conv4['kernel'].shape == (3, 3, 48, 96)
    assert abs(conv4['kernel'].std() / kernel - 1) < 4 / np.sqrt(conv4['kernel'].size)
    if initializer != 'he_normal':
        assert np.abs(conv4['kernel']).max() == pytest.approx(kernel * np.sqrt(3), rel=1e-3)  # uniform
    assert np.abs(conv4['bias']).max() == pytest.approx(bias, rel=0.05)


@pytest.mark.slow
def test_locally_connected_weights_have_the_fan_of_one_pixel():
    config = model_config(
        widths=(24, 64, 96, 96, 96, 128, 256),
        num_classes=100,
        locally_connected=('conv3',),
        initializer='he_normal',
        towers=1,
    )
    module = AlexNet(config, crop_size=64, rngs=nnx.Rngs(params=1))
    kernel = nnx.to_pure_dict(nnx.state(module, nnx.Param))['conv3']['kernel']
    assert kernel.shape == (3, 3, 64 * 9, 96)
    assert abs(kernel.std() / (2 / (64 * 9)) ** 0.5 - 1) < 4 / np.sqrt(kernel.size)


def test_inverted_dropout_scales_kept_units():
    config, parameters = masks_network(0.2)
    inverted = dataclasses.replace(config, inverted_dropout=True)
    images, keys = np.zeros((8, 64, 64, 3), np.float32), jax.random.split(jax.random.key(5), 8)
    plain = logits_of(config, 64, parameters, images, keys)
    np.testing.assert_allclose(logits_of(inverted, 64, parameters, images, keys), plain / 0.8**2, rtol=1e-6)
    np.testing.assert_array_equal(logits_of(inverted, 64, parameters, images), np.full((8, 16), 2**16 - 1))


def masks_network(dropout):
    """A network that shows its dropout masks, of 16 units each: logits[j] = mask7[j] * sum of 2**i * mask6[i]."""
    config = model_config(widths=(2, 2, 2, 2, 2, 16, 16), num_classes=16, dropout=dropout)
    parameters = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), network(config, 64)[1])
    parameters['fc6']['bias'] += 1  # every unit of fc6 gives 1
    parameters['fc7']['kernel'] += 2.0 ** np.arange(16, dtype=np.float32)[:, None]
    parameters['fc8']['kernel'] += np.eye(16, dtype=np.float32)
    return config, parameters


@pytest.mark.parametrize('rate', [0.5, 0.2])
def test_dropout_keeps_units_unscaled(rate):
    config, parameters = masks_network(rate)
    images = np.zeros((256, 64, 64, 3), np.float32)
    keys = jax.random.split(jax.random.key(5), 256)
    logits = logits_of(config, 64, parameters, images, keys)

    code = logits.max(1)
    mask7 = logits != 0
    np.testing.assert_array_equal(logits, mask7 * code[:, None])  # what fc7 keeps is unscaled
    np.testing.assert_array_equal(code, np.round(code))  # and what fc6 keeps
    mask6 = code.astype(np.int64)[:, None] >> np.arange(16) & 1
    for mask in (mask6, mask7):
        assert abs(mask.mean() - (1 - rate)) < 0.03  # four standard errors of 4096
        assert np.abs(mask.mean(0) - (1 - rate)).max() < 0.13  # of each unit
        assert len({tuple(row) for row in mask.tolist()}) > 128  # every image has its own
    same = (mask6 == mask7).mean()
    assert abs(same - (rate**2 + (1 - rate) ** 2)) < 0.04  # the layers drop independently


def test_dropout_depends_only_on_the_key_of_the_image():
    config, parameters = masks_network(0.5)
    images = np.zeros((256, 64, 64, 3), np.float32)
    keys = jax.random.split(jax.random.key(6), 256)
    logits = logits_of(config, 64, parameters, images, keys)
    np.testing.assert_array_equal(logits_of(config, 64, parameters, images, keys[::-1]), logits[::-1])
    assert not np.array_equal(logits[::-1], logits)


@pytest.mark.parametrize('rate', [0.5, 0.2, 0.0])
def test_outputs_are_scaled_at_inference(rate):
    config, parameters = masks_network(rate)
    logits = logits_of(config, 64, parameters, np.zeros((2, 64, 64, 3), np.float32))
    np.testing.assert_allclose(logits, np.full((2, 16), (1 - rate) ** 2 * (2**16 - 1)), rtol=1e-6)


def test_keys_have_no_effect_without_dropout():
    config, parameters = masks_network(0.0)
    images = np.zeros((2, 64, 64, 3), np.float32)
    logits = logits_of(config, 64, parameters, images, jax.random.split(jax.random.key(7), 2))
    np.testing.assert_array_equal(logits, np.full((2, 16), 2**16 - 1))


@pytest.mark.parametrize('layer', ['conv1', 'conv2'])
@pytest.mark.parametrize('seen', [0, 1])
def test_normalization_stays_within_a_tower(layer, seen):
    config = model_config(**SMALL)
    parameters = random_parameters(network(config, 64)[1], bias_std=0.3)
    # conv3 sees only one tower, so the other one changes the logits only through a leak.
    hidden = np.split(parameters['conv3']['kernel'], 2, 2)[1 - seen]
    hidden[...] = 0
    images = np.random.default_rng(3).standard_normal((2, 64, 64, 3)).astype(np.float32)
    before = logits_of(config, 64, parameters, images)

    maps = len(parameters[layer]['bias'])
    edges = {0: maps // 2 - 1, 1: maps // 2}  # the maps at the boundary, of each tower

    def with_larger_bias(tower):
        changed = parameters | {layer: {name: leaf.copy() for name, leaf in parameters[layer].items()}}
        changed[layer]['bias'][edges[tower]] += 10
        return logits_of(config, 64, changed, images)

    np.testing.assert_array_equal(with_larger_bias(1 - seen), before)
    assert np.abs(with_larger_bias(seen) - before).max() > 1e-2 * np.abs(before).max()


@pytest.mark.parametrize('norm', ['lrn', 'batch_norm'])
def test_bfloat16_is_near_float32(norm):
    small = SMALL | {'conv_ops': (f'activation {norm} pool', f'activation {norm} pool', *('activation',) * 2, 'pool')}
    parameters = random_parameters(network(model_config(**small), 96)[1], bias_std=0.3)
    for layer in filter(lambda layer: layer.endswith('_norm'), parameters):
        parameters[layer]['var'] = 1 + np.abs(parameters[layer]['var'])
    images = np.random.default_rng(4).standard_normal((4, 96, 96, 3)).astype(np.float32)
    exact = logits_of(model_config(**small), 96, parameters, images)
    rounded = logits_of(model_config(**small, dtype='bfloat16'), 96, parameters, images)
    assert rounded.dtype == np.float32
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 2e-2
