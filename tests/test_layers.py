"""Response normalisation, pooling and convolution against plain NumPy loops, TensorFlow and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from alexnet_jax.layers import convolution, local_response_norm, max_pool

PAPER = {'k': 2.0, 'n': 5, 'alpha': 1e-4, 'beta': 0.75}
NORMS = [
    PAPER,
    {'k': 1.0, 'n': 5, 'alpha': 2e-5, 'beta': 0.75},
    {'k': 2.0, 'n': 3, 'alpha': 1e-3, 'beta': 0.5},
    {'k': 0.5, 'n': 7, 'alpha': 1e-4, 'beta': 1.2},
]


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def lrn_loop(x, k, n, alpha, beta):
    """The formula of section 3.3 in float64, map by map."""
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
    """Of a package function and of one of TensorFlow, for the same gradient of the output."""
    ours = jax.jit(lambda x, cotangent: jax.vjp(function, x)[1](cotangent)[0])(x, cotangent)
    with tf.GradientTape() as tape:
        variable = tf.Variable(x)
        y = tf_function(variable)
    theirs = tape.gradient(y, variable, output_gradients=tf.constant(cotangent))
    return np.asarray(ours), theirs.numpy()


# Values around 100, so that the sum of squares weighs as much as k.


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('maps', [1, 2, 16])
def test_lrn_is_the_formula(norm, maps):
    x = normal((2, 3, 4, maps), maps, 100)
    ours = jax.jit(lambda x: local_response_norm(x, **norm))(x)
    np.testing.assert_allclose(ours, lrn_loop(x, **norm), rtol=1e-6)
    np.testing.assert_allclose(ours, tf_lrn(x, **norm), rtol=1e-5)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('maps', [1, 2, 16])
def test_lrn_gradient_is_that_of_tensorflow(norm, maps):
    x, cotangent = normal((2, 3, 4, maps), 1, 100), normal((2, 3, 4, maps), 2)
    ours, theirs = gradients(lambda x: local_response_norm(x, **norm), lambda x: tf_lrn(x, **norm), x, cotangent)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('norm', NORMS)
def test_lrn_gradient_is_that_of_the_loop(norm):
    x, cotangent = normal((2, 9), 3, 100), normal((2, 9), 4)
    ours = jax.jit(jax.grad(lambda x: (local_response_norm(x, **norm) * cotangent).sum()))(x)
    differences = np.empty(x.shape)
    for index in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[index] = 1e-3
        rise = lrn_loop(x + step, **norm) - lrn_loop(x - step, **norm)
        differences[index] = (cotangent * rise).sum() / 2e-3
    np.testing.assert_allclose(ours, differences, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('norm', NORMS)
def test_lrn_gives_the_same_where_its_gradient_is_asked_for(norm):
    x = normal((3, 16), 5, 100)
    ours, _ = jax.jit(jax.vjp, static_argnums=0)(lambda x: local_response_norm(x, **norm), x)
    np.testing.assert_allclose(ours, lrn_loop(x, **norm), rtol=1e-6)


def test_lrn_window_is_cut_off_at_the_first_and_the_last_map():
    ones = jnp.ones((1, 1, 1, 7))
    y = local_response_norm(ones, k=1.0, n=5, alpha=1.0, beta=1.0)
    np.testing.assert_allclose(y[0, 0, 0], [1 / 4, 1 / 5, 1 / 6, 1 / 6, 1 / 6, 1 / 5, 1 / 4], rtol=1e-6)


@pytest.mark.parametrize('beta', [0.75, 0.6])
def test_lrn_computes_in_float32_for_bfloat16(beta):
    x = jnp.asarray(normal((4, 5, 6, 16), 5, 100), jnp.bfloat16)
    norm = PAPER | {'beta': beta}
    y = local_response_norm(x, **norm)
    assert y.dtype == jnp.bfloat16
    # A single rounding, of the result: half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.asarray(y, np.float64), lrn_loop(x, **norm), rtol=2**-8 * 1.001)


@pytest.mark.parametrize('n', [2, 4])
def test_lrn_refuses_an_even_window(n):
    with pytest.raises(ValueError, match=f'n={n} is even'):
        local_response_norm(jnp.ones((1, 1, 1, 8)), k=2.0, n=n, alpha=1e-4, beta=0.75)


def pool_loop(x, window, stride):
    batch, height, width, maps = x.shape
    y = np.empty((batch, (height - window) // stride + 1, (width - window) // stride + 1, maps), x.dtype)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            top, left = i * stride, j * stride
            y[:, i, j] = x[:, top : top + window, left : left + window].max((1, 2))
    return y


def distinct(shape, seed=0):
    """Whole numbers without ties, half of them negative."""
    count = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(count) - count // 2).reshape(shape).astype(np.float32)


POOLS = [(3, 2), (2, 2), (3, 1)]
SIDES = [(7, 9), (8, 7), (13, 13)]  # a rest at the lower and the right edge in some of them


@pytest.mark.parametrize(('window', 'stride'), POOLS)
@pytest.mark.parametrize('sides', SIDES)
def test_max_pool_is_the_loop_and_tensorflow(window, stride, sides):
    x = distinct((2, *sides, 3))
    ours = np.asarray(jax.jit(max_pool, static_argnums=(1, 2))(x, window, stride))
    np.testing.assert_array_equal(ours, pool_loop(x, window, stride), strict=True)
    np.testing.assert_array_equal(ours, tf.nn.max_pool2d(x, window, stride, 'VALID').numpy(), strict=True)


@pytest.mark.parametrize(('window', 'stride'), POOLS)
@pytest.mark.parametrize('sides', SIDES)
def test_max_pool_gradient_is_that_of_tensorflow(window, stride, sides):
    x = distinct((2, *sides, 3), 1)
    cotangent = distinct(pool_loop(x, window, stride).shape, 2)
    ours, theirs = gradients(
        lambda x: max_pool(x, window, stride), lambda x: tf.nn.max_pool2d(x, window, stride, 'VALID'), x, cotangent
    )
    np.testing.assert_array_equal(ours, theirs)  # sums of whole numbers are exact


def test_max_pool_by_hand():
    x = jnp.array([[1, 2, 0, 5, 3], [4, 3, 1, 0, 2], [9, 0, 7, 1, 1], [0, 8, 2, 2, 6], [1, 1, 3, 0, 4]], jnp.float32)
    overlapping = max_pool(x[None, :, :, None], 3, 2)
    apart = max_pool(x[None, :, :, None], 2, 2)
    np.testing.assert_array_equal(overlapping[0, :, :, 0], [[9, 7], [9, 7]])
    np.testing.assert_array_equal(apart[0, :, :, 0], [[4, 5], [9, 7]])


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        # Half each where two tie; first the rows are compared, from above, then the columns, from the left.
        ([[1, 0], [1, 0]], [[0.5, 0], [0.5, 0]]),
        ([[0, 1], [1, 0]], [[0, 0.5], [0.5, 0]]),
        ([[2, 2], [1, 2]], [[0.5, 0.25], [0, 0.25]]),
        ([[0, 0], [0, 0]], [[0.25, 0.25], [0.25, 0.25]]),
        ([[0] * 3] * 3, [[1 / 16, 1 / 16, 1 / 8], [1 / 16, 1 / 16, 1 / 8], [1 / 8, 1 / 8, 1 / 4]]),
    ],
)
def test_max_pool_shares_the_gradient_among_ties(values, expected):
    x = jnp.asarray(values, jnp.float32)[None, :, :, None]
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, len(values), 2).sum()))(x)
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)
    assert gradient.sum() == 1


def test_max_pool_keeps_bfloat16():
    x = jnp.asarray(distinct((1, 5, 5, 4)), jnp.bfloat16)
    y = max_pool(x, 3, 2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), pool_loop(np.asarray(x, np.float32), 3, 2))


def convolution_loop(x, kernel, stride, padding):
    """One group in float64, pixel by pixel."""
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


def test_convolution_of_two_groups_is_two_convolutions():
    x, kernel = normal((2, 6, 7, 8), 6), normal((5, 5, 4, 6), 7)
    ours = convolution(jnp.asarray(x), jnp.asarray(kernel))
    same = ((2, 2), (2, 2))
    first = convolution_loop(x[..., :4], kernel[..., :3], 1, same)
    second = convolution_loop(x[..., 4:], kernel[..., 3:], 1, same)
    np.testing.assert_allclose(ours, np.concatenate([first, second], -1), rtol=1e-5, atol=1e-5)


def test_convolution_of_two_groups_by_hand():
    x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])
    kernel = jnp.array([[[[1.0, 10.0, 100.0, 1000.0], [5.0, 50.0, 500.0, 5000.0]]]])  # (1, 1, 2, 4)
    # 1*1 + 2*5, 1*10 + 2*50 | 3*100 + 4*500, 3*1000 + 4*5000
    np.testing.assert_array_equal(convolution(x, kernel)[0, 0, 0], [11, 110, 2300, 23000])


def test_convolution_is_not_flipped():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    kernel = jnp.array([[1.0, 10.0], [100.0, 1000.0]]).reshape(2, 2, 1, 1)
    y = convolution(x, kernel, padding='VALID')
    np.testing.assert_array_equal(y[0, :, :, 0], [[4310, 5421], [7643, 8754]])


@pytest.mark.parametrize(('size', 'side'), [(24, 5), (32, 7), (31, 6)])
def test_convolution_with_stride_and_zeros_at_the_lower_right(size, side):
    x, kernel = normal((2, size, size, 3), 8), normal((11, 11, 3, 5), 9)
    padding = ((0, 3), (0, 3))
    ours = convolution(jnp.asarray(x), jnp.asarray(kernel), stride=4, padding=padding)
    assert ours.shape == (2, side, side, 5)
    np.testing.assert_allclose(ours, convolution_loop(x, kernel, 4, padding), rtol=1e-5, atol=1e-4)


def test_convolution_gradient_is_that_of_tensorflow():
    x, kernel = normal((2, 6, 5, 4), 10), normal((3, 3, 2, 6), 11)
    cotangent = normal((2, 6, 5, 6), 12)
    ours = jax.jit(lambda x, kernel, cotangent: jax.vjp(convolution, x, kernel)[1](cotangent))(x, kernel, cotangent)
    with tf.GradientTape() as tape:
        x, kernel = tf.Variable(x), tf.Variable(kernel)
        groups = zip(tf.split(x, 2, -1), tf.split(kernel, 2, -1), strict=True)
        y = tf.concat([tf.nn.conv2d(part, part_kernel, 1, 'SAME') for part, part_kernel in groups], -1)
    theirs = tape.gradient(y, [x, kernel], output_gradients=tf.constant(cotangent))
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their.numpy(), rtol=1e-5, atol=1e-5)


def test_convolution_keeps_bfloat16():
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2), jnp.bfloat16)
    y = convolution(x, kernel)
    assert y.dtype == jnp.bfloat16
    assert y[0, 1, 1, 0] == 9


@pytest.mark.parametrize(
    ('channels', 'inputs', 'outputs'),
    [(7, 2, 4), (4, 2, 3), (2, 4, 4)],  # no multiple of the inputs; outputs no multiple of the groups; too few
)
def test_convolution_refuses_channels_that_do_not_fit(channels, inputs, outputs):
    with pytest.raises(ValueError, match=f'{channels} channels do not fit a kernel of {inputs} inputs and {outputs}'):
        convolution(jnp.ones((1, 5, 5, channels)), jnp.ones((3, 3, inputs, outputs)))
