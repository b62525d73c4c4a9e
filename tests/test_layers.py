"""Every implementation of every layer against plain NumPy loops, TensorFlow and numbers computed by hand."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from alexnet_jax.layers import (
    MODULES,
    PLATFORMS,
    add_bias,
    convolution,
    dense,
    local_response_norm,
    locally_connected,
    materialize,
    max_pool,
    within_channel_lrn,
)
from alexnet_jax.layers.custom_gradient import compute_after

PAPER = {'k': 2.0, 'n': 5, 'alpha': 1e-4, 'beta': 0.75}
NORMS = [
    PAPER,
    {'k': 1.0, 'n': 5, 'alpha': 2e-5, 'beta': 0.75},
    {'k': 2.0, 'n': 3, 'alpha': 1e-3, 'beta': 0.5},
    {'k': 0.5, 'n': 7, 'alpha': 1e-4, 'beta': 1.2},
]


def implementations(operation):
    """Runs a test with each implementation of an operation."""
    names = [name for name, module in MODULES.items() if hasattr(module, operation)]
    return pytest.mark.parametrize('implementation', names)


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def device_array(shape, seed):
    return jnp.asarray(normal(shape, seed))


def lrn_loop(x, k, n, alpha, beta):
    """Computes the formula of section 3.3 in float64, map by map."""
    x = np.asarray(x, np.float64)
    maps = x.shape[-1]
    y = np.empty_like(x)
    for i in range(maps):
        total = 0
        for j in range(max(0, i - n // 2), min(maps - 1, i + n // 2) + 1):
            total = total + x[..., j] ** 2
        y[..., i] = x[..., i] / (k + alpha * total) ** beta
    return y


def tf_lrn(x, k, n, alpha, beta):
    return tf.nn.lrn(x, depth_radius=n // 2, bias=k, alpha=alpha, beta=beta)


def gradients(function, tf_function, x, cotangent):
    """Returns the gradients of a function of this package and of a TensorFlow function for the same cotangent."""
    ours = jax.jit(lambda x, cotangent: jax.vjp(function, x)[1](cotangent)[0])(x, cotangent)
    with tf.GradientTape() as tape:
        variable = tf.Variable(x)
        y = tf_function(variable)
    theirs = tape.gradient(y, variable, output_gradients=tf.constant(cotangent))
    return np.asarray(ours), theirs.numpy()


def check_gradient(function, loop, x, cotangent):
    """Compares the value under differentiation with `loop`, and the gradient with central differences of `loop`."""
    y, back = jax.jit(jax.vjp, static_argnums=0)(function, x)
    np.testing.assert_allclose(y, loop(x), rtol=1e-6)
    differences = np.empty(x.shape)
    for index in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[index] = 1e-3
        differences[index] = (cotangent * (loop(x + step) - loop(x - step))).sum() / 2e-3
    np.testing.assert_allclose(back(jnp.asarray(cotangent))[0], differences, rtol=1e-5, atol=1e-7)


# Values around 100, so that the sum of squares weighs as much as k.


@implementations('local_response_norm')
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('maps', [1, 2, 16])
def test_lrn_equals_the_formula(norm, maps, implementation):
    x = normal((2, 3, 4, maps), maps, 100)
    ours = jax.jit(lambda x: local_response_norm(x, **norm, implementation=implementation))(x)
    np.testing.assert_allclose(ours, lrn_loop(x, **norm), rtol=1e-6)
    np.testing.assert_allclose(ours, tf_lrn(x, **norm), rtol=1e-5)


@implementations('local_response_norm')
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('maps', [1, 2, 16])
def test_lrn_gradient_equals_tensorflow(norm, maps, implementation):
    x, cotangent = normal((2, 3, 4, maps), 1, 100), normal((2, 3, 4, maps), 2)
    norm_of = partial(local_response_norm, **norm, implementation=implementation)
    ours, theirs = gradients(norm_of, lambda x: tf_lrn(x, **norm), x, cotangent)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@implementations('local_response_norm')
@pytest.mark.parametrize('norm', NORMS)
def test_lrn_gradient_equals_differences(norm, implementation):
    x, cotangent = normal((2, 9), 3, 100), normal((2, 9), 4)
    norm_of = partial(local_response_norm, **norm, implementation=implementation)
    check_gradient(norm_of, partial(lrn_loop, **norm), x, cotangent)


@implementations('local_response_norm')
def test_lrn_window_is_truncated_at_the_edges(implementation):
    ones = jnp.ones((1, 1, 1, 7))
    y = local_response_norm(ones, k=1.0, n=5, alpha=1.0, beta=1.0, implementation=implementation)
    np.testing.assert_allclose(y[0, 0, 0], [1 / 4, 1 / 5, 1 / 6, 1 / 6, 1 / 6, 1 / 5, 1 / 4], rtol=1e-6)


@implementations('local_response_norm')
@pytest.mark.parametrize('beta', [0.75, 0.6])
def test_lrn_of_bfloat16_computes_in_float32(beta, implementation):
    x = jnp.asarray(normal((4, 5, 6, 16), 5, 100), jnp.bfloat16)
    norm = PAPER | {'beta': beta}
    y = local_response_norm(x, **norm, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    # A single rounding, of the result: half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.asarray(y, np.float64), lrn_loop(x, **norm), rtol=2**-8 * 1.001)


@pytest.mark.parametrize('norm', [local_response_norm, within_channel_lrn])
def test_lrn_rejects_an_even_window(norm):
    with pytest.raises(ValueError, match='n=4 is even'):
        norm(jnp.ones((1, 8, 8, 8)), k=2.0, n=4, alpha=1e-4, beta=0.75)


def pool_loop(x, window, stride):
    batch, height, width, maps = x.shape
    y = np.empty((batch, (height - window) // stride + 1, (width - window) // stride + 1, maps), x.dtype)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            top, left = i * stride, j * stride
            y[:, i, j] = x[:, top : top + window, left : left + window].max((1, 2))
    return y


def distinct(shape, seed=0):
    """Returns whole numbers without ties, half of them negative."""
    count = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(count) - count // 2).reshape(shape).astype(np.float32)


POOLS = [(3, 2), (2, 2), (3, 1)]
SIDES = [(7, 9), (8, 7), (13, 13)]  # Some leave pixels over at the lower or right edge.


@implementations('max_pool')
@pytest.mark.parametrize(('window', 'stride'), POOLS)
@pytest.mark.parametrize('sides', SIDES)
def test_max_pool_equals_the_loop_and_tensorflow(window, stride, sides, implementation):
    x = distinct((2, *sides, 3))
    ours = np.asarray(jax.jit(lambda x: max_pool(x, window, stride, implementation=implementation))(x))
    np.testing.assert_array_equal(ours, pool_loop(x, window, stride), strict=True)
    np.testing.assert_array_equal(ours, tf.nn.max_pool2d(x, window, stride, 'VALID').numpy(), strict=True)


@implementations('max_pool')
@pytest.mark.parametrize(('window', 'stride'), POOLS)
@pytest.mark.parametrize('sides', SIDES)
def test_max_pool_gradient_equals_tensorflow(window, stride, sides, implementation):
    x = distinct((2, *sides, 3), 1)
    cotangent = distinct(pool_loop(x, window, stride).shape, 2)
    ours, theirs = gradients(
        lambda x: max_pool(x, window, stride, implementation=implementation),
        lambda x: tf.nn.max_pool2d(x, window, stride, 'VALID'),
        x,
        cotangent,
    )
    np.testing.assert_array_equal(ours, theirs)  # sums of whole numbers are exact


@implementations('max_pool')
def test_max_pool_equals_hand_numbers(implementation):
    x = jnp.array([[1, 2, 0, 5, 3], [4, 3, 1, 0, 2], [9, 0, 7, 1, 1], [0, 8, 2, 2, 6], [1, 1, 3, 0, 4]], jnp.float32)
    overlapping = max_pool(x[None, :, :, None], 3, 2, implementation=implementation)
    apart = max_pool(x[None, :, :, None], 2, 2, implementation=implementation)
    np.testing.assert_array_equal(overlapping[0, :, :, 0], [[9, 7], [9, 7]])
    np.testing.assert_array_equal(apart[0, :, :, 0], [[4, 5], [9, 7]])


@implementations('max_pool')
@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ([[1, 0], [1, 0]], [[1, 0], [0, 0]]),
        ([[0, 1], [1, 0]], [[0, 1], [0, 0]]),
        ([[1, 2], [2, 2]], [[0, 1], [0, 0]]),
        ([[0, 0], [0, 0]], [[1, 0], [0, 0]]),
        ([[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0, 1, 0], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_max_pool_gradient_of_ties_goes_to_the_first(values, expected, implementation):
    x = jnp.asarray(values, jnp.float32)[None, :, :, None]
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, len(values), 2, implementation=implementation).sum()))(x)
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)


@implementations('max_pool')
@pytest.mark.parametrize('ceil_mode', [False, True])
def test_max_pool_keeps_bfloat16(implementation, ceil_mode):
    x = jnp.asarray(distinct((1, 5, 5, 4)), jnp.bfloat16)
    y, back = jax.vjp(lambda x: max_pool(x, 3, 2, ceil_mode=ceil_mode, implementation=implementation), x)
    [gradient] = back(y)
    assert (y.dtype, gradient.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y, np.float32), pool_loop(np.asarray(x, np.float32), 3, 2))


def kept_for_gradient(function, x):
    """Returns sizes and dtypes of the arrays that are saved for the backward pass."""
    return sorted((leaf.size, str(leaf.dtype)) for leaf in jax.tree.leaves(jax.vjp(function, x)[1]))


def test_lrn_saves_only_its_input():
    x = jnp.asarray(normal((2, 5, 5, 16)))
    norm_of = partial(local_response_norm, **PAPER, implementation='custom_gradient')
    assert kept_for_gradient(norm_of, x) == [(x.size, 'float32')]


@pytest.mark.parametrize('implementation', ['custom_gradient', 'cpu'])
def test_max_pool_saves_one_byte_per_window(implementation):
    x = jnp.asarray(distinct((2, 7, 9, 5)))
    pool = partial(max_pool, window=3, stride=2, implementation=implementation)
    assert kept_for_gradient(pool, x) == [(2 * 3 * 4 * 5, 'int8')]


@implementations('add_bias')
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('own_of_pixels', [False, True])
def test_add_bias_and_its_gradient_are_sums(own_of_pixels, dtype, implementation):
    # Whole numbers of at most 8 bits, and their sums.
    x, cotangent = (np.random.default_rng(seed).integers(-2, 3, (2, 3, 4, 5)).astype(np.float32) for seed in (20, 21))
    bias = distinct((3, 4, 5) if own_of_pixels else (5,), 22)

    def both(x, bias, cotangent):
        y, back = jax.vjp(partial(add_bias, implementation=implementation), x, bias)
        return y, *back(cotangent)

    y, to_x, to_bias = jax.jit(both)(*(jnp.asarray(each, dtype) for each in (x, bias, cotangent)))
    assert {each.dtype for each in (y, to_x, to_bias)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(np.asarray(y, np.float32), x + bias)
    np.testing.assert_array_equal(np.asarray(to_x, np.float32), cotangent)
    expected = np.zeros(bias.shape)
    for index in np.ndindex(*x.shape):
        expected[index[4 - bias.ndim :]] += cotangent[index]
    np.testing.assert_array_equal(np.asarray(to_bias, np.float32), expected)


def test_cpu_bias_gradient_product_is_not_rounded():
    bias_of = partial(add_bias, jnp.ones((2, 3, 3, 4)), implementation='cpu')
    assert 'Precision.HIGHEST' in str(jax.make_jaxpr(jax.grad(lambda bias: bias_of(bias).sum()))(jnp.ones(4)))


@implementations('add_bias')
def test_bfloat16_bias_gradient_is_summed_in_float32(implementation):
    x, bias = jnp.ones((4, 32, 32, 1), jnp.bfloat16), jnp.ones(1, jnp.bfloat16)
    _, back = jax.vjp(lambda bias: add_bias(x, bias, implementation=implementation), bias)
    np.testing.assert_array_equal(np.asarray(back(x)[0], np.float32), [4096])  # in bfloat16 the sum would stop at 256


@pytest.mark.parametrize(
    'values',
    [
        np.float32([[-np.inf, -1.5, 0.0], [3.5, np.inf, -1e-30]]),
        np.int8([[-128, -1, 0], [127, 5, -7]]),
        jnp.asarray([[-3.0, -1.5, 0.25]], jnp.bfloat16),
    ],
    ids=['float32', 'int8', 'bfloat16'],
)
def test_materialize_is_the_identity(values):
    y = jax.jit(materialize)(values)
    assert (y.shape, y.dtype) == (values.shape, values.dtype)
    np.testing.assert_array_equal(np.asarray(y, np.float64), np.asarray(values, np.float64))


@implementations('dense')
def test_dense_and_its_gradients_are_products(implementation):
    x, kernel, cotangent = distinct((4, 3), 23), distinct((3, 5), 24), distinct((4, 5), 25)

    def both(x, kernel, cotangent):
        y, back = jax.vjp(partial(dense, implementation=implementation), x, kernel)
        return y, *back(cotangent)

    y, to_x, to_kernel = jax.jit(both)(x, kernel, cotangent)
    np.testing.assert_array_equal(y, x @ kernel)
    np.testing.assert_array_equal(to_x, cotangent @ kernel.T)
    np.testing.assert_array_equal(to_kernel, x.T @ cotangent)


@pytest.mark.parametrize('implementation', ['custom_gradient', 'cpu'])
def test_dense_kernel_gradient_of_bfloat16_is_not_rounded(implementation):
    x, cotangent = jnp.ones((257, 3), jnp.bfloat16), jnp.ones((257, 5), jnp.bfloat16)
    y, back = jax.vjp(partial(dense, implementation=implementation), x, jnp.full((3, 5), 1 + 2**-10))
    to_x, to_kernel = back(cotangent)
    assert (y.dtype, to_x.dtype, to_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.full((257, 5), 3))  # of the rounded kernel
    np.testing.assert_array_equal(np.asarray(to_x, np.float32), np.full((257, 3), 5))
    np.testing.assert_array_equal(to_kernel, np.full((3, 5), 257))  # 256 or 258 in bfloat16


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('other', [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan])
def test_compute_after_keeps_every_bit(other, dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan], dtype)
    y = jax.jit(compute_after)(x, jnp.full((2, 3), other, dtype))
    assert (y.dtype, np.asarray(y).tobytes()) == (x.dtype, np.asarray(x).tobytes())


def test_lrn_gradient_recomputes_its_sums():
    def both(x, cotangent):
        y, back = jax.vjp(partial(local_response_norm, **PAPER, implementation='custom_gradient'), x)
        return y, *back(cotangent)

    x = jnp.ones((2, 3, 3, 16))
    text = jax.jit(both).lower(x, x).compile().as_text()
    # Sums of squares in the forward and again in the backward pass, and a sum of the scaled gradient.
    assert len(re.findall(r' reduce-window\(', text)) == 3


def convolution_loop(x, kernel, stride, padding):
    """Computes one group in float64, pixel by pixel."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = kernel.shape[:2]
    rows, columns = ((x.shape[i] - kernel.shape[i - 1]) // stride + 1 for i in (1, 2))
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            patch = x[:, i * stride : i * stride + height, j * stride : j * stride + width]
            y[:, i, j] = np.tensordot(patch, kernel, 3)
    return y


@implementations('convolution')
def test_convolution_of_groups_equals_hand_numbers(implementation):
    x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])
    kernel = jnp.array([[[[1.0, 10.0, 100.0, 1000.0], [5.0, 50.0, 500.0, 5000.0]]]])  # (1, 1, 2, 4)
    # 1*1 + 2*5, 1*10 + 2*50 | 3*100 + 4*500, 3*1000 + 4*5000
    y = convolution(x, kernel, implementation=implementation)
    np.testing.assert_array_equal(y[0, 0, 0], [11, 110, 2300, 23000])


# Kernels smaller than the stride, equal to it, and not a multiple of it; images with remaining rows and columns.
STRIDED = [
    ((24, 24), (11, 11), 4, ((0, 3), (0, 3))),
    ((31, 22), (11, 11), 4, ((2, 2), (1, 0))),
    ((13, 16), (5, 3), 3, ((0, 0), (2, 1))),
    ((14, 11), (2, 2), 3, ((1, 0), (0, 0))),
    ((12, 9), (2, 4), 2, ((0, 0), (0, 0))),
]


@implementations('convolution')
@pytest.mark.parametrize(('size', 'window', 'stride', 'padding'), [((6, 7), (5, 5), 1, ((2, 2), (2, 2))), *STRIDED])
def test_convolution_of_two_groups_equals_the_loop(size, window, stride, padding, implementation):
    x, kernel = (jnp.asarray(each) for each in (normal((2, *size, 6), 8), normal((*window, 3, 4), 9)))
    ours = convolution(x, kernel, stride=stride, padding=padding, implementation=implementation)
    first = convolution_loop(x[..., :3], kernel[..., :2], stride, padding)
    second = convolution_loop(x[..., 3:], kernel[..., 2:], stride, padding)
    np.testing.assert_allclose(ours, np.concatenate([first, second], -1), rtol=1e-5, atol=1e-4)


@implementations('convolution')
@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize('stride', [2, 3])
def test_convolution_named_padding_equals_tensorflow(stride, padding, implementation):
    x, kernel = normal((2, 13, 10, 3), 8), normal((5, 4, 3, 4), 9)
    strided = partial(convolution, stride=stride, padding=padding, implementation=implementation)
    ours = strided(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(ours, tf.nn.conv2d(x, kernel, stride, padding).numpy(), rtol=1e-5, atol=1e-4)


@implementations('convolution')
@pytest.mark.parametrize('images', [2, 32])  # the weight gradient of 32 images with a stride is a sum of four on CPUs
@pytest.mark.parametrize(('size', 'window', 'stride', 'padding'), [((6, 5), (3, 3), 1, ((1, 1), (1, 1))), *STRIDED[:3]])
def test_convolution_gradient_equals_tensorflow(images, size, window, stride, padding, implementation):
    x, kernel = normal((images, *size, 4), 10), normal((*window, 2, 6), 11)

    def tf_convolution(x, kernel):
        x = tf.pad(x, [[0, 0], *padding, [0, 0]])
        groups = zip(tf.split(x, 2, -1), tf.split(kernel, 2, -1), strict=True)
        return tf.concat([tf.nn.conv2d(part, part_kernel, stride, 'VALID') for part, part_kernel in groups], -1)

    with tf.GradientTape() as tape:
        variables = tf.Variable(x), tf.Variable(kernel)
        y = tf_convolution(*variables)
    cotangent = normal(y.shape, 12)
    theirs = tape.gradient(y, variables, output_gradients=tf.constant(cotangent))
    strided = partial(convolution, stride=stride, padding=padding, implementation=implementation)
    ours = jax.jit(lambda x, kernel, cotangent: jax.vjp(strided, x, kernel)[1](cotangent))(x, kernel, cotangent)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their.numpy(), rtol=1e-5, atol=1e-6 * np.abs(their).max())


@pytest.mark.parametrize(
    ('implementation', 'images', 'together'),
    [('cpu', 128, 8), ('cpu', 96, 24), ('cpu', 256, 16), ('cpu', 48, 48), ('reference', 128, 128)],
)
def test_cpu_weight_gradient_of_a_stride_chunks_the_batch(implementation, images, together):
    strided = partial(convolution, stride=4, implementation=implementation)
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((images, 16, 16, 3), (11, 11, 3, 5)))
    text = jax.jit(jax.grad(lambda kernel, x: strided(x, kernel).sum())).lower(kernel, x).as_text()
    batches = re.findall(r'convolution.*\(tensor<(\d+)x16x16x3xf32>, tensor<\1x4x4x5xf32>\)', text)
    assert batches == [str(together)] * (images // together)


@implementations('convolution')
def test_convolution_keeps_bfloat16(implementation):
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2), jnp.bfloat16)
    y = convolution(x, kernel, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    assert y[0, 1, 1, 0] == 9


@pytest.mark.parametrize(
    ('channels', 'inputs', 'outputs'),
    [(7, 2, 4), (4, 2, 3), (2, 4, 4)],  # no multiple of the inputs; outputs no multiple of the groups; too few
)
def test_convolution_rejects_channels_that_do_not_fit(channels, inputs, outputs):
    with pytest.raises(ValueError, match=f'{channels} channels do not fit a kernel of {inputs} inputs and {outputs}'):
        convolution(jnp.ones((1, 5, 5, channels)), jnp.ones((3, 3, inputs, outputs)))


# Height, width, stride and padding; 5 x 6 windows of 3 pixels a side, 3 x 4 and 2 x 3.
LOCAL = [
    (5, 6, 1, ((1, 1), (1, 1))),
    (6, 5, 2, ((0, 1), (2, 2))),
    (4, 5, 2, ((0, 2), (3, 0))),
    (4, 3, 1, ((0, 0), (0, 2))),
]


def local_terms(kernel, size, stride):
    """Yields the pixel and channel of the padded image, the output pixel and the weight's index of every product."""
    rows, columns, weights = kernel.shape[:3]
    for i, j, channel, row, column in np.ndindex(rows, columns, weights // size**2, size, size):
        yield (i * stride + row, j * stride + column, channel), (i, j), channel * size**2 + row * size + column


def local_loop(x, kernel, stride, padding, size=3):
    """Computes the layer in float64, product by product."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    y = np.zeros((x.shape[0], *kernel.shape[:2], kernel.shape[3]))
    for (top, left, channel), (i, j), weight in local_terms(kernel, size, stride):
        y[:, i, j] += np.outer(x[:, top, left, channel], kernel[i, j, weight].astype(np.float64))
    return y


def local_gradients(x, kernel, stride, padding, cotangent, size=3):
    """Computes the gradients of local_loop(): the derivative of a product by one factor is the other factor."""
    height, width = x.shape[1:3]
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    to_x, to_kernel = np.zeros(x.shape), np.zeros(kernel.shape)
    for (top, left, channel), (i, j), weight in local_terms(kernel, size, stride):
        to_x[:, top, left, channel] += cotangent[:, i, j] @ kernel[i, j, weight].astype(np.float64)
        to_kernel[i, j, weight] += x[:, top, left, channel] @ cotangent[:, i, j]
    (top, _), (left, _) = padding
    return to_x[:, top : top + height, left : left + width], to_kernel


def local_case(height, width, stride, padding):
    rows, columns = ((side + sum(pad) - 3) // stride + 1 for side, pad in zip((height, width), padding, strict=True))
    return normal((2, height, width, 3), 13), normal((rows, columns, 3 * 9, 4), 14), normal((2, rows, columns, 4), 15)


@pytest.mark.parametrize(('height', 'width', 'stride', 'padding'), LOCAL)
def test_locally_connected_and_its_gradient_equal_the_loop(height, width, stride, padding):
    x, kernel, cotangent = local_case(height, width, stride, padding)

    def both(x, kernel, cotangent):
        y, back = jax.vjp(lambda x, kernel: locally_connected(x, kernel, 3, stride=stride, padding=padding), x, kernel)
        return y, *back(cotangent)

    y, *ours = jax.jit(both)(x, kernel, cotangent)
    np.testing.assert_allclose(y, local_loop(x, kernel, stride, padding), rtol=1e-5, atol=1e-5)
    for our, expected in zip(ours, local_gradients(x, kernel, stride, padding, cotangent), strict=True):
        np.testing.assert_allclose(our, expected, rtol=1e-5, atol=1e-5)


def test_locally_connected_equals_hand_numbers():
    # Two channels of 2 x 3 pixels. The weights of the first window copy its pixels; those of the second double them.
    x = jnp.array([[[1, 10], [2, 20], [3, 30]], [[4, 40], [5, 50], [6, 60]]], jnp.float32)[None]
    kernel = jnp.stack([jnp.eye(8), 2 * jnp.eye(8)])[None]
    y = locally_connected(x, kernel, 2, padding=((0, 0), (0, 0)))
    expected = [[1, 2, 4, 5, 10, 20, 40, 50], [4, 6, 10, 12, 40, 60, 100, 120]]
    np.testing.assert_array_equal(y[0, 0], expected)


SPATIAL_NORMS = [
    {'k': 1.0, 'n': 5, 'alpha': 2e-5, 'beta': 0.75},
    {'k': 2.0, 'n': 3, 'alpha': 1e-3, 'beta': 0.5},
    {'k': 0.5, 'n': 3, 'alpha': 1e-4, 'beta': 0.75},
    {'k': 1.5, 'n': 5, 'alpha': 1e-4, 'beta': 0.5},
]


def spatial_loop(x, k, n, alpha, beta):
    """Computes the norm in float64, pixel by pixel; pixels outside of the image do not count."""
    x = np.asarray(x, np.float64)
    y = np.empty_like(x)
    for i, j in np.ndindex(*x.shape[1:3]):
        rows = slice(max(0, i - n // 2), i + n // 2 + 1)
        columns = slice(max(0, j - n // 2), j + n // 2 + 1)
        y[:, i, j] = x[:, i, j] / (k + alpha * (x[:, rows, columns] ** 2).sum((1, 2))) ** beta
    return y


@implementations('within_channel_lrn')
@pytest.mark.parametrize('norm', SPATIAL_NORMS)
@pytest.mark.parametrize('sides', [(6, 7), (2, 9)])
def test_within_channel_lrn_equals_the_loop(norm, sides, implementation):
    x = normal((2, *sides, 3), 16, 100)
    ours = jax.jit(lambda x: within_channel_lrn(x, **norm, implementation=implementation))(x)
    np.testing.assert_allclose(ours, spatial_loop(x, **norm), rtol=1e-6)


@implementations('within_channel_lrn')
@pytest.mark.parametrize('norm', SPATIAL_NORMS)
def test_within_channel_lrn_gradient_equals_differences(norm, implementation):
    x, cotangent = normal((1, 6, 4, 2), 17, 100), normal((1, 6, 4, 2), 18)
    norm_of = partial(within_channel_lrn, **norm, implementation=implementation)
    check_gradient(norm_of, partial(spatial_loop, **norm), x, cotangent)


@implementations('within_channel_lrn')
def test_within_channel_lrn_window_is_truncated_at_the_edges(implementation):
    ones = jnp.ones((1, 3, 4, 1))
    y = within_channel_lrn(ones, k=1.0, n=3, alpha=1.0, beta=1.0, implementation=implementation)
    expected = [[1 / 5, 1 / 7, 1 / 7, 1 / 5], [1 / 7, 1 / 10, 1 / 10, 1 / 7], [1 / 5, 1 / 7, 1 / 7, 1 / 5]]
    np.testing.assert_allclose(y[0, :, :, 0], expected, rtol=1e-6)


@implementations('within_channel_lrn')
@pytest.mark.parametrize('norm', SPATIAL_NORMS[:2])
def test_within_channel_lrn_of_bfloat16_computes_in_float32(norm, implementation):
    x = jnp.asarray(normal((2, 6, 5, 3), 19, 100), jnp.bfloat16)
    y = within_channel_lrn(x, **norm, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), spatial_loop(x, **norm), rtol=2**-8 * 1.001)


def ceil_mode_windows(sides, window, stride):
    """Yields (output pixel, slices) of the windows of cuda-convnet, 1 + ceil((side - window) / stride) per side."""
    counts = [1 + int(np.ceil((side - window) / stride)) for side in sides]
    for i, j in np.ndindex(*counts):
        rows, columns = (
            slice(at * stride, min(at * stride + window, side)) for at, side in zip((i, j), sides, strict=True)
        )
        yield (i, j), (slice(None), rows, columns)


# Window, stride, sides, output sides. Windows extend over the lower edge, the right edge, both or none.
CEIL_MODE = [
    (3, 2, (24, 24), (12, 12)),
    (3, 2, (12, 12), (6, 6)),
    (3, 2, (7, 8), (3, 4)),
    (3, 2, (8, 9), (4, 4)),
    (3, 2, (9, 7), (4, 3)),
    (2, 2, (5, 4), (3, 2)),
    (3, 2, (2, 3), (1, 1)),
    (4, 3, (8, 6), (3, 2)),  # two pixels over the lower edge, one over the right
]


@implementations('max_pool')
@pytest.mark.parametrize(('window', 'stride', 'sides', 'pooled'), CEIL_MODE)
def test_ceil_mode_max_pool_and_its_gradient_equal_the_loop(window, stride, sides, pooled, implementation):
    mixed, cotangent = distinct((2, *sides, 3), 3), distinct((2, *pooled, 3), 4)

    def both(x, cotangent):
        pool = partial(max_pool, window=window, stride=stride, ceil_mode=True, implementation=implementation)
        y, back = jax.vjp(pool, x)
        return y, *back(cotangent)

    both = jax.jit(both)
    for x in (mixed, mixed - mixed.max() - 1):  # where all are negative, zeros around the image would win
        y, gradient = np.full(cotangent.shape, np.nan, np.float32), np.zeros_like(x)
        for (i, j), pixels in ceil_mode_windows(sides, window, stride):
            y[:, i, j] = x[pixels].max((1, 2))
            gradient[pixels] += (x[pixels] == y[:, i : i + 1, j : j + 1]) * cotangent[:, i : i + 1, j : j + 1]
        ours, our_gradient = both(x, cotangent)
        np.testing.assert_array_equal(np.asarray(ours), y, strict=True)
        np.testing.assert_array_equal(our_gradient, gradient)


def test_auto_takes_the_implementation_of_the_platform(monkeypatch):
    x = jnp.asarray(distinct((1, 5, 5, 2)))
    programs = {
        name: str(jax.make_jaxpr(partial(max_pool, window=3, stride=2, implementation=name))(x))
        for name in ('reference', 'custom_gradient')
    }
    for platform, name in (('gpu', 'custom_gradient'), ('tpu', 'reference'), ('metal', 'reference')):
        monkeypatch.setattr(jax, 'default_backend', lambda platform=platform: platform)
        assert str(jax.make_jaxpr(partial(max_pool, window=3, stride=2))(x)) == programs[name]


def test_every_platform_takes_an_implementation_that_exists():
    for operation, platforms in PLATFORMS.items():
        assert platforms.keys() == {'cpu', 'gpu', 'tpu'}
        assert all(hasattr(MODULES[name], operation) for name in platforms.values())


def test_unknown_implementation_is_rejected():
    with pytest.raises(ValueError, match=r"implementation='fast': max_pool has reference, custom_gradient, cpu$"):
        max_pool(jnp.ones((1, 3, 3, 1)), 3, 2, implementation='fast')
    with pytest.raises(
        ValueError, match=r"implementation='cpu': local_response_norm has reference, custom_gradient, gpu$"
    ):
        local_response_norm(jnp.ones((1, 8)), **PAPER, implementation='cpu')


# Functions of activations (3, 7, 6, 4), for each operation.
FUNCTIONS = {
    'convolution': partial(convolution, kernel=device_array((3, 3, 2, 4), 30)),
    'strided convolution': partial(convolution, kernel=device_array((5, 4, 4, 3), 31), stride=3, padding='VALID'),
    'locally_connected': partial(
        locally_connected, kernel=device_array((5, 4, 4 * 9, 3), 32), size=3, padding=((0, 0), (0, 0))
    ),
    'add_bias': partial(add_bias, bias=device_array(4, 33)),
    'local_response_norm': partial(local_response_norm, **PAPER),
    'within_channel_lrn': partial(within_channel_lrn, **PAPER | {'n': 3}),
    'max_pool': partial(max_pool, window=3, stride=2),
    'ceil_mode max_pool': partial(max_pool, window=3, stride=2, ceil_mode=True),
    'dense': lambda x, implementation: dense(
        x.reshape(3, -1), device_array((7 * 6 * 4, 5), 34), implementation=implementation
    ),
}
PATHS = [
    pytest.param(partial(function, implementation=name), id=f'{operation}-{name}')
    for operation, function in FUNCTIONS.items()
    for name, module in MODULES.items()
    if hasattr(module, operation.split()[-1])
]


@cache
def value_and_gradient(function):
    def both(x, cotangent):
        y, back = jax.vjp(function, x)
        return y, *back(cotangent)

    return jax.jit(both)


def with_bad_value(x, bad, example=0):
    """Replaces the first number of example 0, or the middle number of any other example."""
    x = x.copy()
    x[example].flat[x[example].size // 2 if example else 0] = bad
    return x


@pytest.mark.parametrize('function', PATHS)
@pytest.mark.parametrize('bad', [np.inf, np.nan])
@pytest.mark.parametrize('example', [0, 1])
def test_nonfinite_values_stay_within_their_example(example, bad, function):
    """An infinite or NaN activation or incoming gradient changes no bit of the other examples."""
    both, x = value_and_gradient(function), normal((3, 7, 6, 4), 35)
    cotangent = normal(jax.eval_shape(function, x).shape, 36)
    clean, others = both(x, cotangent), [i for i in range(3) if i != example]
    cases = [(with_bad_value(x, bad, example), cotangent), (x, with_bad_value(cotangent, bad, example))]
    for where, arguments in enumerate(cases):
        found = both(*arguments)
        assert not np.isfinite(found[where][example]).all()
        for ours, expected in zip(found, clean, strict=True):
            np.testing.assert_array_equal(np.asarray(ours)[others], np.asarray(expected)[others])


@pytest.mark.parametrize('bad', [np.inf, np.nan])
@implementations('convolution')
def test_nonfinite_gradients_stay_within_their_weights(bad, implementation):
    """A kernel's gradient is a sum over examples, but only of the gradients of its own output channel."""
    for stride in (1, 2):
        strided = partial(convolution, stride=stride, implementation=implementation)
        x, kernel, bias = device_array((2, 8, 8, 4), 37), device_array((3, 3, 4, 6), 38), device_array(6, 39)

        def layer(kernel, bias, x=x, strided=strided):
            return add_bias(strided(x, kernel), bias, implementation=implementation)

        y, back = jax.jit(jax.vjp, static_argnums=0)(layer, kernel, bias)
        for gradient in back(jnp.asarray(with_bad_value(np.ones_like(y), bad))):
            assert not np.isfinite(gradient[..., 0]).all()
            assert np.isfinite(gradient[..., 1:]).all()


@pytest.mark.parametrize('bad', [np.inf, np.nan])
@implementations('dense')
def test_nonfinite_input_gradient_leaves_weight_gradient(bad, implementation):
    x, kernel, cotangent = distinct((4, 3), 40), distinct((3, 5), 41), distinct((4, 5), 42)
    _, back = jax.vjp(partial(dense, implementation=implementation), x, with_bad_value(kernel, bad))
    to_x, to_kernel = back(jnp.asarray(cotangent))
    assert not np.isfinite(to_x[0, 0])
    np.testing.assert_array_equal(to_kernel, x.T @ cotangent)
