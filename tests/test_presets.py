"""Every published network: built, counted against published and hand-made numbers, trained for a step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import refusal
from test_model import operations

from alexnet_jax import augment, config, parallel, shapes
from alexnet_jax.model import AlexNet
from alexnet_jax.presets import PRESETS
from alexnet_jax.training.state import init_state
from alexnet_jax.training.train_step import make_train_step

# Parameters and multiply-adds of one image by layer, as products: kernel height x width x inputs x outputs (+ outputs),
# times pixels. The totals of `paper` (60,965,224; 724,406,816), of `half` (59,798,312) and of torchvision's
# (61,100,840, in its documentation; 714.2 million) are published.
CONV1, FC = (34_944, 105_415_200), {'fc7': (16_781_312, 16_777_216), 'fc8': (4_097_000, 4_096_000)}
PAPER = {
    'conv1': CONV1,
    'conv2': (307_456, 223_948_800),
    'conv3': (885_120, 149_520_384),
    'conv4': (663_936, 112_140_288),
    'conv5': (442_624, 74_760_192),
    'fc6': (37_752_832, 37_748_736),
    **FC,
}
OWT = {
    'conv1': (23_296, 70_276_800),
    'conv2': (307_392, 223_948_800),
    'conv3': (663_936, 112_140_288),
    'conv4': (884_992, 149_520_384),
    'conv5': (590_080, 99_680_256),
    'fc6': (37_752_832, 37_748_736),
    **FC,
}
HALF = {
    'conv1': (17_472, 52_707_600),
    'conv2': (153_728, 111_974_400),
    'conv3': (221_376, 37_380_096),
    'conv4': (331_968, 56_070_144),
    'conv5': (442_624, 74_760_192),
    'fc6': (37_752_832, 37_748_736),
    **FC,
}
NO_EXCHANGE = PAPER | {
    'conv3': (442_752, 74_760_192),
    'fc6': (18_878_464, 18_874_368),
    'fc7': (8_392_704, 8_388_608),
}
D2L = {
    'conv1': (11_712, 33_872_256),
    'conv2': (614_656, 415_334_400),
    'conv3': (885_120, 127_401_984),
    'conv4': (1_327_488, 191_102_976),
    'conv5': (884_992, 127_401_984),
    'fc6': (26_218_496, 26_214_400),
    'fc7': FC['fc7'],
    'fc8': (40_970, 40_960),
}
CIFAR10 = {
    'conv1': (4_864, 2_764_800),
    'conv2': (102_464, 14_745_600),
    'conv3': (664_704, 663_552),  # 36 pixels with 18,464 weights and biases each
    'conv4': (332_928, 331_776),
    'fc8': (11_530, 11_520),
}
LAYERS = {
    'paper': PAPER,
    'krizhevsky2012': PAPER,
    'half': HALF,
    'no_exchange': NO_EXCHANGE,
    'owt': OWT,
    'caffe': PAPER,
    'caffenet': PAPER,
    'torchvision': OWT,
    'modern': OWT,
    'd2l': D2L,
    'bn_lars': PAPER,
    'cifar10_13pct': CIFAR10,
    'cifar10_11pct': CIFAR10,
}
# Sides in pixels after each convolution, and after the last pooling.
SIDES = {preset: [55, 27, 13, 13, 13, 6] for preset in LAYERS}
SIDES |= {'d2l': [54, 26, 12, 12, 12, 5], 'cifar10_13pct': [24, 12, 6, 6, 6], 'cifar10_11pct': [24, 12, 6, 6, 6]}


def settings(preset, **model):
    """The preset with its recipe, resolved."""
    given = config.default_config()
    given.model.preset = preset
    config.apply_overrides(given, PRESETS[preset].recipe)
    given.model.update(model)
    return given


def convolves(equation):
    """Returns whether it is a whole convolution: inside of one, kernels get rows of zeros or only move pixels."""
    inner = equation.params['call_jaxpr'].jaxpr if equation.primitive.name == 'custom_vjp_call' else None
    return inner is not None and any(each.primitive.name == 'conv_general_dilated' for each in operations(inner))


def multiply_adds(jaxpr):
    """Counts the multiply-adds of all convolutions and matrix products of a traced program."""
    total = 0
    for equation in operations(jaxpr):
        if convolves(equation):
            kernel, output = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            total += math.prod(kernel) * math.prod(output[1:3])
        elif equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            left, output = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += math.prod(output) * math.prod(left[axis] for axis in contracted)
    return total


@pytest.mark.parametrize('preset', PRESETS)
def test_layers_parameters_and_multiply_adds(preset):
    resolved = config.resolve(settings(preset))
    model, data = resolved.model, resolved.data

    def build():
        return AlexNet(model, crop_size=data.crop_size, channels=data.channels, rngs=nnx.Rngs(params=0))

    graph, params, statistics = nnx.split(nnx.eval_shape(build), nnx.Param, nnx.BatchStat)
    images = jax.ShapeDtypeStruct((1, data.crop_size, data.crop_size, data.channels), jnp.float32)
    traced = jax.make_jaxpr(lambda params, statistics, images: nnx.merge(graph, params, statistics)(images))
    program = traced(params, statistics, images)
    expected = LAYERS[preset]

    counted = {
        name: sum(leaf.size for leaf in jax.tree.leaves(leaves)) for name, leaves in nnx.to_pure_dict(params).items()
    }
    assert counted == {name: parameters for name, (parameters, _) in expected.items()}
    assert sum(counted.values()) == PRESETS[preset].published.parameters
    table = shapes.layer_table(model, data.crop_size, data.channels)
    assert {layer.name: (layer.parameters, layer.multiply_adds) for layer in table} == expected
    assert multiply_adds(program.jaxpr) == PRESETS[preset].published.multiply_adds
    assert sum(products for _, products in expected.values()) == PRESETS[preset].published.multiply_adds

    convolutions = [layer for layer in table if layer.name.startswith('conv')]
    assert [layer.output[0] for layer in convolutions] + [convolutions[-1].pooled[0]] == SIDES[preset]
    assert program.out_avals[0].shape == (1, model.num_classes)


@pytest.mark.parametrize('preset', PRESETS)
def test_rows_of_the_resolved_config_match_the_preset(preset):
    disabled = () if PRESETS[preset].settings['lrn'] else ('lrn', 'spatial_lrn')
    rows = [row for row in PRESETS[preset].layers if row.features]
    expected = [dataclasses.replace(row, ops=tuple(op for op in row.ops if op not in disabled)) for row in rows]
    assert list(shapes.layer_specs(config.resolve(settings(preset)).model)) == expected


def test_pooling_of_a_removed_convolution_moves_up():
    given = settings('krizhevsky2012', widths=(96, 0, 384, 0, 0, 4096, 0), dropout_on_inputs_of=('fc6',))
    rows = shapes.layer_specs(config.resolve(given).model)
    assert [(row.name, row.features) for row in rows] == [('conv1', 96), ('conv3', 384), ('fc6', 4096), ('fc8', 1000)]
    assert [row.ops for row in rows] == [
        ('lrn', 'pool', 'activation', 'pool'),
        ('activation', 'pool'),
        ('activation',),
        (),
    ]
    assert [row.dropout for row in rows] == [False, False, True, False]


@pytest.mark.parametrize('preset', ['caffe', 'bn_lars'])
def test_lrn_across_towers_needs_one_device_for_both(preset):
    given = settings(preset)
    given.mesh.model = 2
    if preset == 'caffe':
        assert refusal(config.resolve, given).startswith('config.mesh.model: 2 with model.lrn_across_towers')
    else:
        assert config.resolve(given).mesh.model == 2


@pytest.mark.slow
@pytest.mark.parametrize('preset', PRESETS)
def test_steps_with_the_recipe_train(preset):
    """Narrow, on small images: the loss is finite and all weights move."""
    given = settings(preset)
    given.model.num_classes = 10
    if not preset.startswith('cifar10'):
        widths = PRESETS[preset].model['widths']
        given.model.widths = (*(width // 16 for width in widths[:5]), 32, 32)
        given.data.crop_size, given.data.image_size = 67, 72
        given.model.kernel_std = (0.05,) * 8
    given.train.batch_size = 16
    given.optimizer.warmup = '0 steps'
    given.mesh.data = 1
    resolved = config.resolve(given)
    mesh = parallel.make_mesh(resolved)
    size, channels = resolved.data.image_size, resolved.data.channels
    generator = np.random.default_rng(0)
    mean = np.full((size, size, channels), 120.0)
    moments = {
        'mean_image': mean,
        'mean_rgb': mean[0, 0],
        'eigenvalues': np.full(channels, 900.0),
        'eigenvectors': np.eye(channels),
    }
    batch = {
        'image': generator.integers(0, 256, (16, size, size, channels), np.uint8),
        'label': generator.integers(0, 10, 16, np.int32),
        'example_id': np.arange(16, dtype=np.uint32),
    }
    rows = parallel.make_global_batch(parallel.batch_sharding(mesh, 'towers'), batch)
    # Small, because narrow networks have other gradients; LARS scales them.
    rate = 0.5 if preset == 'bn_lars' else 1e-4
    rates = {name: {'kernel': np.float32(rate), 'bias': np.float32(rate)} for name in shapes.LAYERS}
    prepared = augment.make_preprocess_params(moments, resolved.data)
    state = init_state(resolved, mesh)
    lowered = make_train_step(resolved, mesh).lower(state, rows, rates, prepared)
    train_step = lowered.compile(compiler_options={'xla_backend_optimization_level': 0})  # three steps need not be fast
    before = jax.device_get(state.params)
    losses = []
    for _ in range(3):
        state, metrics = train_step(state, rows, rates, prepared)
        losses.append(float(metrics['loss']))
    assert np.isfinite(losses).all()
    after = jax.device_get(state.params)
    for layer in before:
        assert not np.array_equal(before[layer]['kernel'], after[layer]['kernel']), layer
        assert np.isfinite(after[layer]['kernel']).all()
    assert bool(jax.tree.leaves(state.batch_stats)) == (preset == 'bn_lars')


# Rates of net #145 as its notes have them (layer-params-145.cfg): first epoch, kernels, conv1's kernel, conv1's bias,
# the other biases, color noise. Epochs count the images seen, so the change "at epoch 25" follows 25 whole epochs.
NET_145 = [
    (0, 1e-2, 1e-2, 0.02, 0.02, True),
    (25, 1e-3, 1e-3, 0.02, 0.02, True),
    (51, 1e-4, 1e-4, 0.02, 0.02, True),
    (67, 1e-4, 1e-5, 0.02, 0.02, False),
    (72, 1e-4, 0.0, 0.0, 0.02, False),
    (79, 1e-5, 0.0, 0.0, 0.02, False),
]
IMAGES = 1_281_167


@pytest.mark.parametrize('batch_size', [128, 256])
def test_rates_and_color_noise_of_net_145_over_91_epochs(batch_size):
    from alexnet_jax.schedules import Schedule

    given = settings('krizhevsky2012')
    given.train.batch_size = batch_size
    resolved = config.resolve(given)
    schedule = Schedule(resolved.optimizer, resolved.train, IMAGES)
    assert schedule.total_steps == round(91 * IMAGES / batch_size)
    color_augmentation_until = config.duration_in_steps(
        resolved.data.color_augmentation_until, batch_size=batch_size, examples=IMAGES
    )
    checked = 0
    for epoch in range(91):
        *_, (_, kernels, conv1, conv1_bias, biases, color) = (row for row in NET_145 if row[0] <= epoch)
        first = round(epoch * IMAGES / batch_size)
        last = round((epoch + 1) * IMAGES / batch_size) - 1
        for at in (first, (first + last) // 2, last):
            rates = schedule.learning_rate_tree(at, decays_taken=0)
            expected = {name: {'kernel': kernels, 'bias': biases} for name in shapes.LAYERS}
            expected['conv1'] = {'kernel': conv1, 'bias': conv1_bias}
            assert rates.keys() == expected.keys()
            for name in expected:
                assert rates[name] == pytest.approx(expected[name], rel=1e-12), (epoch, name)
            assert (at < color_augmentation_until) == color
            checked += 1
    assert checked == 273
