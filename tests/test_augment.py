"""Augmentation and the ten views against NumPy with the same random numbers, and the statistics of the noise."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from alexnet_jax.augment import augment, disable_color_augmentation, eval_crop, example_keys, make_preprocess_params
from alexnet_jax.config import default_config
from alexnet_jax.config_schema import DataConfig
from alexnet_jax.layers import for_platform

SIZE, CROP, BATCH = 20, 14, 6


def data_config(**fields):
    return DataConfig(**{'image_size': SIZE, 'crop_size': CROP} | fields)


def statistics():
    """Returns invented training-set statistics; the eigenvectors, in columns, are a rotation without symmetry."""
    rng = np.random.default_rng(0)
    return {
        'mean_image': rng.uniform(90, 140, (SIZE, SIZE, 3)),
        'mean_rgb': np.array([127.3, 119.7, 104.9]),
        'eigenvalues': np.array([400.0, 1600.0, 14400.0]),
        'eigenvectors': np.linalg.qr(rng.standard_normal((3, 3)))[0],
    }


def random_images():
    return np.random.default_rng(1).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)


def keys_of(count, seed=0, purpose=1):
    return example_keys(seed, jnp.arange(count, dtype=jnp.uint32), purpose)


def augmented(images, keys, config, parts=None, crop_keys=None):
    crop_keys = keys if crop_keys is None else crop_keys
    parts = make_preprocess_params(statistics(), config) if parts is None else parts
    return np.asarray(
        jax.jit(lambda images, both, parts: augment(images, *both, parts, config))(images, (keys, crop_keys), parts)
    )


def augmented_in_numpy(images, keys, config, figures=None, crop_keys=None):
    """Augments one image after the other; only the random numbers come from JAX."""
    figures = figures or statistics()
    far = SIZE - CROP
    result = []
    for image, key, window_key in zip(images, keys, keys if crop_keys is None else crop_keys, strict=True):
        top, left = far // 2, far // 2
        if config.crop:
            top, left = np.asarray(jax.random.randint(jax.random.fold_in(window_key, 0), (2,), 0, far + 1))
        window = np.s_[top : top + CROP, left : left + CROP]
        middle = np.s_[far // 2 : far // 2 + CROP, far // 2 : far // 2 + CROP]
        cut = figures['mean_image'][middle if config.mean_crop == 'center' else window]
        mean = {'image': cut, 'channel': figures['mean_rgb'], 'none': 0}[config.mean]
        x = image[window].astype(np.float32) - np.float32(mean)
        if config.flip and jax.random.bernoulli(jax.random.fold_in(window_key, 1)):
            x = np.flip(x, 1)
        if config.color != 'none':
            normal = np.asarray(jax.random.normal(jax.random.fold_in(key, 2), image.shape[2:]), np.float64)
            variances = figures['eigenvalues']
            strength = {'original': np.sqrt(variances), 'fb': variances / 255, 'paper': variances}[config.color]
            x = x + figures['eigenvectors'] @ (0.1 * strength * normal)
        x = x / 1.1 if config.color == 'original' else x
        result.append(x if config.std == (1.0,) else x / np.array(config.std))
    return np.stack(result)


@pytest.mark.parametrize(
    ('color', 'strengths'),
    [
        ('none', [0, 0, 0]),
        ('original', [2, 4, 12]),  # a tenth of the roots of 400, 1600 and 14400
        ('fb', [40 / 255, 160 / 255, 1440 / 255]),
        ('paper', [40, 160, 1440]),
    ],
)
def test_color_matrix_equals_hand_numbers(color, strengths):
    # A rotation about the last axis by 36.87 degrees.
    figures = statistics() | {'eigenvectors': np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])}
    a, b, c = strengths
    expected = [[0.8 * a, -0.6 * b, 0], [0.6 * a, 0.8 * b, 0], [0, 0, c]]
    matrix = make_preprocess_params(figures, data_config(color=color))['color']
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)


def test_color_of_an_eigenvalue_rounded_below_zero():
    figures = statistics() | {'eigenvalues': np.array([-1e-9, 1.0, 4.0]), 'eigenvectors': np.eye(3)}
    matrix = make_preprocess_params(figures, data_config(color='original'))['color']
    np.testing.assert_allclose(matrix, np.diag([0, 0.1, 0.2]), rtol=1e-6)


def test_means_equal_hand_numbers():
    figures = statistics()
    for mean, expected in {
        'image': figures['mean_image'],
        'channel': np.tile([127.3, 119.7, 104.9], (SIZE, SIZE, 1)),
        'none': np.zeros((SIZE, SIZE, 3)),
    }.items():
        array = make_preprocess_params(figures, data_config(mean=mean))['mean']
        np.testing.assert_array_equal(array, expected.astype(np.float32), strict=True)


@pytest.mark.parametrize('mean', ['image', 'channel', 'none'])
@pytest.mark.parametrize(('crop', 'flip'), [(True, True), (False, True), (True, False), (False, False)])
def test_crops_and_flips_match_numpy(crop, flip, mean):
    config = data_config(crop=crop, flip=flip, mean=mean, color='none')
    keys = keys_of(BATCH)
    ours = augmented(random_images(), keys, config)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, augmented_in_numpy(random_images(), keys, config))


@pytest.mark.parametrize('mean_crop', ['matching', 'center'])
def test_the_program_for_tpus_crops_float32(mean_crop):
    """XLA for TPUs would copy the whole batch of uint8 for each crop; the values are those of the other platforms."""
    config = data_config(mean_crop=mean_crop)
    arguments = random_images(), keys_of(BATCH), make_preprocess_params(statistics(), config)
    expected = augmented(random_images(), keys_of(BATCH), config)
    for name, dtype in (('cpu', 'ui8'), ('gpu', 'ui8'), ('tpu', 'f32')):

        def augment_for(images, keys, parts, name=name):
            with for_platform(name):
                return augment(images, keys, keys, parts, config)

        lowered = jax.jit(augment_for).lower(*arguments)
        gathers = re.findall(r'"stablehlo\.gather"\(.*\) <.*> : \(tensor<6x20x20x3x(\w+)>', lowered.as_text())
        assert gathers == [dtype]
        np.testing.assert_array_equal(lowered.compile()(*arguments), expected)


@pytest.mark.parametrize('color', ['original', 'fb', 'paper'])
@pytest.mark.parametrize('mean', ['image', 'none'])
def test_color_noise_matches_numpy(color, mean):
    config = data_config(color=color, mean=mean)
    keys = keys_of(BATCH)
    ours = augmented(random_images(), keys, config)
    expected = augmented_in_numpy(random_images(), keys, config)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-7 * np.abs(expected).max())


@pytest.mark.parametrize('color', ['original', 'fb'])
def test_one_channel_matches_numpy(color):
    config, keys = data_config(color=color), keys_of(BATCH)
    figures = {
        'mean_image': statistics()['mean_image'][..., :1],
        'mean_rgb': np.array([111.0]),
        'eigenvalues': np.array([3000.0]),
        'eigenvectors': np.array([[1.0]]),
    }
    images = random_images()[..., :1]
    ours = augmented(images, keys, config, make_preprocess_params(figures, config))
    expected = augmented_in_numpy(images, keys, config, figures)
    assert ours.shape == (BATCH, CROP, CROP, 1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-7 * np.abs(expected).max())


def test_shared_crop_key_keeps_noise_per_image():
    """With crop_group_size, a group shares the key of crop and flip; every image has its own key for the noise."""
    config, keys = data_config(), keys_of(BATCH)
    shared = example_keys(0, jnp.arange(BATCH, dtype=jnp.uint32) // 3, 1)
    ours = augmented(random_images(), keys, config, crop_keys=shared)
    expected = augmented_in_numpy(random_images(), keys, config, crop_keys=shared)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-7 * np.abs(expected).max())


def test_disable_color_adds_and_divides_nothing():
    config, keys = data_config(color='original'), keys_of(BATCH)
    ours = augmented(
        random_images(), keys, config, disable_color_augmentation(make_preprocess_params(statistics(), config))
    )
    np.testing.assert_array_equal(ours, augmented_in_numpy(random_images(), keys, data_config(color='none')))


@pytest.mark.slow
def test_augmentation_does_not_depend_on_the_batch():
    config = data_config()
    images, keys = random_images(), keys_of(BATCH)
    whole = augmented(images, keys, config)
    halves = [augmented(images[part], keys[part], config) for part in (slice(0, 2), slice(2, BATCH))]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(augmented(images[order], keys[order], config), whole[order])


def test_wrong_shapes_and_types_are_refused():
    """In tests, the hook of jaxtyping checks the annotations at run time; see addopts in pyproject.toml."""
    parts = make_preprocess_params(statistics(), data_config())
    eval_crop(jnp.asarray(random_images()), parts, data_config(), 0)
    for images in (random_images()[:, 1:], random_images().astype(np.float32), random_images()[0]):
        with pytest.raises(TypeCheckError):
            eval_crop(jnp.asarray(images), parts, data_config(), 0)
    with pytest.raises(TypeCheckError):
        eval_crop(jnp.asarray(random_images()), parts, default_config().data, 0)


def test_keys_depend_on_seed_purpose_and_example_id():
    keys = jax.random.key_data(keys_of(8))
    numbers = jnp.array([5, 2], jnp.uint32)
    np.testing.assert_array_equal(jax.random.key_data(example_keys(0, numbers, 1)), keys[numbers])
    others = [keys_of(8, seed=1), keys_of(8, purpose=2), example_keys(0, jnp.arange(8, 16, dtype=jnp.uint32), 1)]
    every = np.concatenate([keys, *map(jax.random.key_data, others)])
    assert len({tuple(row) for row in every.tolist()}) == 32  # Seed, purpose and example id each change the key.


def positions(count):
    """Returns images whose red channel is the row and whose green channel is the column of a pixel."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[..., 0], image[..., 1] = np.indices((SIZE, SIZE))
    return np.broadcast_to(image, (count, SIZE, SIZE, 3))


def test_crops_and_flips_are_uniform():
    count, far = 4000, SIZE - CROP
    x = augmented(positions(count), keys_of(count), data_config(color='none', mean='none'))
    top, left = x[:, 0, 0, 0].astype(int), x[:, 0, :, 1].min(1).astype(int)
    flipped = x[:, 0, 0, 1] > x[:, 0, 1, 1]
    share = 1 / (far + 1)
    errors = 4 * np.sqrt(share * (1 - share) / count)  # four standard errors
    for offset in (top, left):
        shares = np.bincount(offset) / count
        assert len(shares) == far + 1  # The last offset is included.
        assert np.abs(shares - share).max() < errors
    assert len(set(zip(top, left, strict=True))) == (far + 1) ** 2
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(count)
    for a, b in ((top, left), (top, flipped), (left, flipped)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(count)


# Standard deviations of ImageNet's RGB values in the original program, and of the noise along the first axis, in gray
# levels: .1 * 121.78 / 1.1, .1 * 121.78**2 / 255 and .1 * 121.78**2.
@pytest.mark.parametrize(('color', 'deviation'), [('original', 11.07), ('fb', 5.816), ('paper', 1483.0)])
def test_noise_standard_deviation(color, deviation):
    count = 4000
    config = data_config(color=color, mean='none', crop=False, flip=False, crop_size=1)
    figures = statistics() | {'eigenvalues': np.array([19.72, 37.09, 121.78]) ** 2}
    x = augmented(np.zeros((count, 3, 3, 3), np.uint8), keys_of(count), config, make_preprocess_params(figures, config))
    along = x[:, 0, 0] @ figures['eigenvectors']
    error = 4 / np.sqrt(count)
    assert abs(along[:, 2].std() / deviation - 1) < error
    assert np.abs(along.mean(0) / along.std(0)).max() < error
    correlations = np.corrcoef(along.T) - np.eye(3)
    assert np.abs(correlations).max() < error


def test_noise_is_one_color_per_image():
    config = data_config(mean='none', crop=False, flip=False)
    x = augmented(np.zeros((2, SIZE, SIZE, 3), np.uint8), keys_of(2), config)
    np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1, :1], x.shape))
    assert np.abs(x[0] - x[1]).min() > 0.1


@pytest.mark.parametrize('crop', [CROP, CROP + 1])  # With an odd margin the center is rounded up and to the left.
def test_ten_views_match_numpy(crop):
    images = random_images()
    config = data_config(crop_size=crop)
    parts = make_preprocess_params(statistics(), config)
    far = SIZE - crop
    middle = far // 2
    corners = [(middle, middle), (0, 0), (0, far), (far, 0), (far, far)]
    difference = images.astype(np.float32) - statistics()['mean_image'].astype(np.float32)
    windows = [difference[:, top : top + crop, left : left + crop] for top, left in corners]
    expected = windows + [np.flip(window, 2) for window in windows]
    one = jax.jit(lambda index: eval_crop(jnp.asarray(images), parts, config, index))
    for index in range(10):
        np.testing.assert_array_equal(one(index), expected[index], strict=True)
    np.testing.assert_array_equal(
        eval_crop(jnp.asarray(images), parts, config, 7), expected[7]
    )  # The index is not traced.


def test_mean_crop_center_in_every_crop():
    config = data_config(mean_crop='center', color='none')
    images, keys = np.concatenate([random_images(), np.zeros_like(random_images())]), keys_of(2 * BATCH)
    ours = augmented(images, keys, config)
    np.testing.assert_array_equal(ours, augmented_in_numpy(images, keys, config))
    # Images of zeros give the negative mean: the same for every crop, flipped or not.
    middle = statistics()['mean_image'].astype(np.float32)[3:17, 3:17]
    assert {x.tobytes() for x in -ours[BATCH:]} == {middle.tobytes(), middle[:, ::-1].tobytes()}


DIVISORS = [(1.0,), (58.0,), (58.4, 57.1, 57.4)]


def test_std_divides_after_noise():
    """std divides after the noise and the divisor 1.1; without color augmentation, it divides the centered crop."""
    keys, images = keys_of(BATCH), random_images()
    train = jax.jit(lambda images, parts: augment(images, keys, keys, parts, data_config(color='original')))
    plain = make_preprocess_params(statistics(), data_config(color='original'))
    assert plain['divisor'] == np.float32(1.1)
    for divisor in DIVISORS:
        config = data_config(color='original', std=divisor)
        parts = make_preprocess_params(statistics(), config)
        np.testing.assert_array_equal(
            parts['scale'], np.float32(1 / np.array(divisor)) * np.ones(3, np.float32), strict=True
        )
        for name in ('mean', 'color', 'divisor'):
            np.testing.assert_array_equal(parts[name], plain[name])
        expected = augmented_in_numpy(images, keys, config)
        np.testing.assert_allclose(train(images, parts), expected, rtol=0, atol=4e-7 * np.abs(expected).max())
        expected = augmented_in_numpy(images, keys, data_config(color='none', std=divisor))
        ours = train(images, disable_color_augmentation(parts))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=4e-7 * np.abs(expected).max())


def test_std_equals_hand_numbers():
    figures = {'mean_image': np.full((1, 1, 3), 100.0), 'mean_rgb': np.full(3, 90.0)}
    figures |= {'eigenvalues': np.zeros(3), 'eigenvectors': np.eye(3)}
    image = jnp.array([[[[144, 122, 56]]]], jnp.uint8)
    config = data_config(image_size=1, crop_size=1, crop=False, flip=False, std=(2.0, 4.0, 5.0))
    parts = make_preprocess_params(figures, config)
    np.testing.assert_allclose(eval_crop(image, parts, config, 0)[0, 0, 0], [22, 5.5, -8.8], rtol=1e-6)
    ours = augmented(image, keys_of(1), config, parts)[0, 0, 0]
    np.testing.assert_allclose(ours, [20, 5, -8], rtol=1e-6)  # also divided by 1.1


@pytest.mark.parametrize('crop', [CROP, CROP + 1])
@pytest.mark.parametrize('divisor', DIVISORS)
def test_ten_views_with_centered_mean_and_std(crop, divisor):
    images, mean = random_images(), statistics()['mean_image'].astype(np.float32)
    config = data_config(crop_size=crop, mean_crop='center', std=divisor)
    parts = make_preprocess_params(statistics(), config)
    far = SIZE - crop
    middle = far // 2
    one = jax.jit(lambda index: eval_crop(jnp.asarray(images), parts, config, index))
    for index, (top, left) in enumerate([(middle, middle), (0, 0), (0, far), (far, 0), (far, far)]):
        x = images[:, top : top + crop, left : left + crop] - mean[middle : middle + crop, middle : middle + crop]
        expected = (x / np.array(divisor)).astype(np.float32)
        np.testing.assert_allclose(one(index), expected, rtol=2e-7)
        np.testing.assert_allclose(one(index + 5), np.flip(expected, 2), rtol=2e-7)
