"""The NumPy program of net #145 against finite differences, SciPy and explicit sums."""

import net145
import numpy as np
import pytest
from scipy.signal import correlate

WIDTHS = (8, 16, 12, 12, 8, 32, 24)
# Large enough for all normalizations to matter, and for a loss that is neither flat nor saturated.
STDS = {'conv1': 0.1, 'conv2': 0.2, 'conv3': 0.1, 'conv4': 0.2, 'conv5': 0.2, 'fc6': 0.2, 'fc7': 0.1, 'fc8': 0.05}
BIAS_STDS = {'conv1': 200.0, 'conv5': 20.0}  # The ReLU after a max pool gets negative inputs.


def make(size=96, batch=4, widths=WIDTHS, classes=10, seed=0):
    """Parameters, images, labels and masks; images of 96 pixels end as 2x2 maps."""
    random = np.random.default_rng(seed)
    c1, c2, c3, c4, c5, f6, f7 = widths
    side = net145.window_count(size, 11, 4, 0)
    for _ in range(3):
        side = (side - 3) // 2 + 1
    shapes = {
        'conv1': (11, 11, 3, c1),
        'conv2': (5, 5, c1 // 2, c2),
        'conv3': (3, 3, c2, c3),
        'conv4': (3, 3, c3 // 2, c4),
        'conv5': (3, 3, c4 // 2, c5),
        'fc6': (side * side * c5, f6),
        'fc7': (f6, f7),
        'fc8': (f7, classes),
    }
    params = {
        name: {
            'kernel': random.normal(0, STDS[name], shape),
            'bias': random.normal(0, BIAS_STDS.get(name, 0.5), shape[-1]),
        }
        for name, shape in shapes.items()
    }
    images = random.normal(0, 60, (batch, size, size, 3))
    labels = random.integers(0, classes, batch)
    masks = {name: random.integers(0, 2, (batch, width)) for name, width in (('fc6', f6), ('fc7', f7))}
    return params, images, labels, masks


@pytest.fixture(scope='module')
def case():
    params, images, labels, masks = make()
    return params, images, labels, masks, net145.gradients(params, images, labels, masks)


def mean_cost(params, images, labels, masks):
    logits, _ = net145.forward(params, images, masks)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return -np.mean([np.log(probs[i, label]) for i, label in enumerate(labels)])


def test_signals(case):
    """The images, weights and masks used here exercise every part."""
    params, images, _, masks, (loss, _) = case
    _, c = net145.forward(params, images, masks)
    assert 0.5 < loss < 10
    for name in ('relu1', 'relu2', 'relu3', 'relu4', 'relu5', 'relu6', 'relu7'):
        assert 0.2 < (c[name] > 0).mean() < 0.95, name
    for before, after, least in (('conv1', 'rnorm1', 2**0.75), ('relu2', 'rnorm2', 2**0.75), ('rnorm2', 'cnorm2', 1)):
        assert np.abs(c[before]).mean() > 1.3 * least * np.abs(c[after]).mean()


@pytest.mark.parametrize('kind', ['kernel', 'bias'])
@pytest.mark.parametrize('name', STDS)
def test_gradient(case, name, kind):
    params, images, labels, masks, (loss, gradients) = case
    value, gradient = params[name][kind], gradients[name][kind]
    assert gradient.shape == value.shape
    assert loss == pytest.approx(mean_cost(params, images, labels, masks), rel=1e-12)
    random = np.random.default_rng(1)
    large = np.argwhere(np.abs(gradient) > 0.3 * gradient.std())
    step = 1e-5 * value.std()  # A step ten times as large crosses a kink of a ReLU or a maximum.
    for index in map(tuple, random.permutation(large)[:6]):
        costs = []
        for sign in (1, -1):
            moved = value.copy()
            moved[index] += sign * step
            costs.append(mean_cost({**params, name: {**params[name], kind: moved}}, images, labels, masks))
        assert (costs[0] - costs[1]) / (2 * step) == pytest.approx(gradient[index], rel=1e-5), index


def test_cross_map_lrn():
    values = np.random.default_rng(0).normal(0, 300, (2, 2, 2, 12))
    wanted = np.empty_like(values)
    for maps in (range(6), range(6, 12)):
        for f in maps:
            total = sum(values[..., g] ** 2 for g in maps if abs(g - f) <= 2)
            wanted[..., f] = values[..., f] / (2 + 0.00002 * total) ** 0.75
    np.testing.assert_allclose(net145.normalize(values, net145.sum_maps, **net145.CROSS_MAP), wanted, rtol=1e-12)

    # Hand numbers: of column a's maps only the second is not 0, and 2 + 2e-5 * 1000^2 = 22; column b is alone.
    values = np.array([0.0, -1000, 0, 0, 500, 0, 0, 0]).reshape(1, 1, 1, 8)
    got = net145.normalize(values, net145.sum_maps, **net145.CROSS_MAP).ravel()
    np.testing.assert_allclose(got, [0, -1000 / 22**0.75, 0, 0, 500 / 7**0.75, 0, 0, 0], rtol=1e-12)


def test_spatial_lrn():
    values = np.random.default_rng(0).normal(0, 100, (2, 7, 7, 4))
    wanted = np.empty_like(values)
    for row in range(7):
        for column in range(7):
            near = values[:, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
            wanted[:, row, column] = values[:, row, column] / (1 + 0.00004 * (near**2).sum(axis=(1, 2))) ** 0.75
    np.testing.assert_allclose(net145.normalize(values, net145.sum_pixels, **net145.SPATIAL), wanted, rtol=1e-12)

    # Hand numbers: the corner sees 9 pixels of 50, itself among them: 1 + 4e-5 * 9 * 2500 = 1.9; the middle 25: 3.5.
    got = net145.normalize(np.full((1, 6, 6, 2), 50.0), net145.sum_pixels, **net145.SPATIAL)
    np.testing.assert_allclose(got[0, 0, 5], 50 / 1.9**0.75, rtol=1e-12)
    np.testing.assert_allclose(got[0, 3, 2], 50 / 3.5**0.75, rtol=1e-12)


def test_conv1_windows_reach_over_the_edge():
    params, _, _, _ = make(224, widths=(4, 4, 4, 4, 4, 4, 4))
    images = np.zeros((1, 224, 224, 3))
    images[0, 223, 223, 1] = 1
    images[0, 4, 8, 2] = 1
    _, c = net145.forward(params, images)
    sides = [c[name].shape[1] for name in ('conv1', 'pool1', 'conv2', 'pool2', 'conv5', 'pool5')]
    assert sides == [55, 27, 27, 13, 13, 6]
    kernel, bias = params['conv1']['kernel'], params['conv1']['bias']
    np.testing.assert_allclose(c['conv1'][0, 54, 54], bias + kernel[7, 7, 1], rtol=1e-12)  # its corner is at 216
    np.testing.assert_allclose(c['conv1'][0, 1, 0], bias + kernel[0, 8, 2], rtol=1e-12)
    np.testing.assert_allclose(c['conv1'][0, 2, 2], bias, rtol=1e-12)


def test_connections_match_scipy(case):
    """Every convolution against SciPy's, map by map: which maps a kernel sees, in which order, and its padding."""
    params, images, _, masks, _ = case
    _, c = net145.forward(params, images, masks)
    for name, inputs, own in (('conv2', 'relu1', True), ('conv3', 'pool2', False), ('conv4', 'relu3', True)):
        kernel, values = params[name]['kernel'], c[inputs][1]
        outputs, seen = kernel.shape[3], kernel.shape[2]
        for o in (0, outputs // 2 - 1, outputs // 2, outputs - 1):
            first = seen if own and o >= outputs // 2 else 0
            wanted = sum(correlate(values[..., first + i], kernel[..., i, o], 'same') for i in range(seen))
            np.testing.assert_allclose(c[name][1, ..., o], wanted + params[name]['bias'][o], rtol=1e-9, atol=1e-9)
    assert params['conv5']['kernel'].shape[2] * 2 == c['relu4'].shape[-1]

    # conv5 of column a is blind to column b of conv4
    blind = c['relu4'].copy()
    blind[..., 6:] = 0
    got = net145.convolve_columns(blind, params['conv5']['kernel'], pad=1)
    np.testing.assert_array_equal(got[..., 4:], 0)
    np.testing.assert_allclose(got[..., :4] + params['conv5']['bias'][:4], c['conv5'][..., :4], rtol=1e-12)


def test_layer_order_equals_single_windows(case):
    """The operations after the convolutions equal single windows and units."""
    params, images, _, masks, _ = case
    _, c = net145.forward(params, images, masks)
    np.testing.assert_allclose(c['relu1'][2, 3, 4], np.maximum(c['rnorm1'][2, 6:9, 8:11].max(axis=(0, 1)), 0))
    np.testing.assert_allclose(c['rnorm1'], net145.normalize(c['conv1'], net145.sum_maps, 2, 2e-5))
    assert (c['conv1'] < 0).any()
    np.testing.assert_allclose(c['rnorm2'], net145.normalize(np.maximum(c['conv2'], 0), net145.sum_maps, 2, 2e-5))
    np.testing.assert_allclose(c['cnorm2'], net145.normalize(c['rnorm2'], net145.sum_pixels, 1, 4e-5))
    np.testing.assert_allclose(c['pool2'][0, 1, 2], c['cnorm2'][0, 2:5, 4:7].max(axis=(0, 1)))
    assert c['pool5'].shape == (4, 2, 2, 8)
    np.testing.assert_allclose(c['relu5'][3, 1, 0], np.maximum(c['conv5'][3, 2:5, 0:3].max(axis=(0, 1)), 0))
    sum_6 = params['fc6']['bias'].copy()
    for row, column, f in np.ndindex(2, 2, 8):
        sum_6 += c['relu5'][1, row, column, f] * params['fc6']['kernel'][(row * 2 + column) * 8 + f]
    np.testing.assert_allclose(c['fc6'][1], sum_6, rtol=1e-9)
    np.testing.assert_array_equal(c['dropout6'], np.maximum(c['fc6'], 0) * masks['fc6'])
    np.testing.assert_array_equal(c['dropout7'], np.maximum(c['fc7'], 0) * masks['fc7'])


def test_first_of_equal_maxima_gets_the_gradient():
    inputs = np.zeros((1, 5, 5, 1))
    inputs[0, 1, 2] = inputs[0, 2, 0] = 7
    values, winners = net145.pool(inputs)
    np.testing.assert_array_equal(values[0, :, :, 0], [[7, 7], [7, 0]])
    got = net145.pool_backward(inputs, winners, np.array([1.0, 10, 100, 1000]).reshape(1, 2, 2, 1))
    wanted = np.zeros((5, 5))
    wanted[1, 2], wanted[2, 0], wanted[2, 2] = 11, 100, 1000
    np.testing.assert_array_equal(got[0, :, :, 0], wanted)


def test_update_equals_hand_numbers():
    """With momentum 0.9 and weight decay 0.0005, kernels decay, biases do not, and rate 0 freezes."""
    params = {'fc8': {'kernel': np.array([[2.0]]), 'bias': np.array([2.0])}}
    increments = {'fc8': {'kernel': np.array([[0.1]]), 'bias': np.array([0.1])}}
    gradients = {'fc8': {'kernel': np.array([[3.0]]), 'bias': np.array([3.0])}}
    after, moved = net145.update(params, increments, gradients, {'fc8': {'kernel': 0.01, 'bias': 0.02}})
    assert moved['fc8']['kernel'].item() == pytest.approx(0.09 - 0.03 - 0.00001, rel=1e-12)
    assert after['fc8']['kernel'].item() == pytest.approx(2.05999, rel=1e-12)
    assert moved['fc8']['bias'].item() == pytest.approx(0.09 - 0.06, rel=1e-12)
    assert after['fc8']['bias'].item() == pytest.approx(2.03, rel=1e-12)
    assert params['fc8']['kernel'].item() == 2
    after, moved = net145.update(after, moved, gradients, {'fc8': {'kernel': 0.0, 'bias': 0.0}})
    assert moved['fc8']['kernel'].item() == pytest.approx(0.05999, rel=1e-12)
    assert after['fc8']['bias'].item() == pytest.approx(2.03, rel=1e-12)
