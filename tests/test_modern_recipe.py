"""The parts of a modern recipe against NumPy, Pillow and Optax with the same random numbers, on four meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import config_flags, refusal, run_command
from PIL import Image
from test_augment import BATCH, CROP, SIZE, augmented, data_config, keys_of, random_images, statistics
from test_mesh import FAST, STATISTICS, batch, make_global_batch, rates, small_config, train

from alexnet_jax import augment, parallel
from alexnet_jax.config import apply_overrides, default_config, preset_config, resolve
from alexnet_jax.config_schema import TrainConfig
from alexnet_jax.schedules import PlateauState, Schedule
from alexnet_jax.training.mixing import mix_pairs, smoothed_losses, swap_pairs
from alexnet_jax.training.state import build_model, init_state
from alexnet_jax.training.train_step import RngStream, make_train_step
from configs import modern

ERASING = ((0.02, 0.33), (0.3, 3.3))  # torchvision's area, and height / width


def resolved(**fields):
    """Returns the defaults with `fields`, in whose names two underscores stand for a dot."""
    config = default_config()
    apply_overrides(config, {name.replace('__', '.'): value for name, value in fields.items()})
    return resolve(config)


def fold(key, *numbers):
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


# Schedules


@pytest.mark.parametrize('warmup', [0, 10])
def test_cosine_is_that_of_optax(warmup):
    config = resolved(
        optimizer__schedule='cosine', optimizer__learning_rate=0.3, optimizer__warmup=f'{warmup} steps', train__steps=50
    )
    schedule = Schedule(config.optimizer, config.train, 1000)
    ours = [schedule.learning_rate(step, 0) for step in range(warmup, 53)]
    theirs = optax.cosine_decay_schedule(0.3, 50 - warmup)
    np.testing.assert_allclose(ours, [float(theirs(step)) for step in range(53 - warmup)], rtol=1e-5, atol=1e-8)
    rising = [schedule.learning_rate(step, 0) for step in range(warmup)]
    np.testing.assert_allclose(rising, [0.3 * (step + 1) / 10 for step in range(warmup)], rtol=1e-12)
    assert schedule.learning_rate((50 + warmup) // 2, 0) == pytest.approx(0.15)
    assert schedule.learning_rate_tree((50 + warmup) // 2, 0)['fc8']['bias'] == pytest.approx(0.15)


def test_cosine_of_a_run_that_ends_in_the_warmup():
    config = resolved(optimizer__schedule='cosine', optimizer__warmup='10 steps', train__steps=4)
    schedule = Schedule(config.optimizer, config.train, 1000)
    assert [schedule.learning_rate(step, 0) for step in range(4)] == pytest.approx([0.001, 0.002, 0.003, 0.004])


def test_plateau_is_exhausted_when_a_further_decay_would_be_due():
    config = resolved(optimizer__patience=2, optimizer__max_decays=1).optimizer
    state, exhausted = PlateauState(), []
    for error in (0.9, 0.9, 0.9, 0.8, 0.8, 0.7, 0.75, 0.7, 0.7):  # the decay is at the third evaluation
        state = state.update(error, config)
        exhausted.append(state.is_exhausted(config))
    assert exhausted == [False] * 7 + [True, True]
    assert not PlateauState(waited=2).is_exhausted(config)
    assert not PlateauState(waited=1, decays_taken=1).is_exhausted(config)


# Crops of random size and random erasing


def window_in_numpy(key, side, area, log_ratio, is_crop):
    """Transcribes get_params() of RandomResizedCrop or RandomErasing; returns (top, left, height, width) or None.

    The uniform numbers come from JAX. `log_ratio` are the limits of log(width / height).
    """
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    areas, ratios = (np.asarray(jax.random.uniform(each, (10,)), np.float64) for each in (area_key, ratio_key))
    for i in range(10):
        target = side * side * (area[0] + areas[i] * (area[1] - area[0]))
        ratio = math.exp(log_ratio[0] + ratios[i] * (log_ratio[1] - log_ratio[0]))
        width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if (0 < width <= side and 0 < height <= side) if is_crop else (0 < width < side and 0 < height < side):
            limits = np.array([side - height + 1, side - width + 1])
            return (*np.asarray(jax.random.randint(place_key, (2,), 0, limits)).tolist(), height, width)
    return None


def crop_in_numpy(key, config):
    """Returns (top, left, height, width) of a crop of random size, with the central fallback of torchvision."""
    log_ratio = [math.log(ratio) for ratio in config.crop_aspect_ratio]
    found = window_in_numpy(key, SIZE, config.crop_scale, log_ratio, True)
    if found:
        return found
    width = height = SIZE
    if config.crop_aspect_ratio[0] > 1:
        height = round(SIZE / config.crop_aspect_ratio[0])
    elif config.crop_aspect_ratio[1] < 1:
        width = round(SIZE * config.crop_aspect_ratio[1])
    return (SIZE - height) // 2, (SIZE - width) // 2, height, width


def scaled_by_pillow(image, window):
    """Returns the window of a float32 image (S, S, C), scaled to CROP pixels by Pillow."""
    top, left, height, width = window
    box = (left, top, left + width, top + height)
    planes = [Image.fromarray(plane).resize((CROP, CROP), Image.Resampling.BILINEAR, box) for plane in image.T]
    return np.stack([np.asarray(plane) for plane in planes]).T


def transposed(window):
    """Returns a window for images whose rows and columns are exchanged, as in scaled_by_pillow()."""
    top, left, height, width = window
    return left, top, width, height


@pytest.mark.parametrize(
    ('scale', 'ratio'),
    [
        ((0.08, 1.0), (3 / 4, 4 / 3)),
        ((0.5, 0.5), (1.0, 1.0)),
        ((0.95, 1.0), (1.5, 2.0)),  # no try fits: the largest central crop of 20 x 13
        ((0.95, 1.0), (0.5, 0.7)),
    ],
)
@pytest.mark.parametrize('mean_crop', ['matching', 'center'])
def test_resized_crops_are_those_of_torchvision_and_pillow(scale, ratio, mean_crop):
    config = data_config(crop_scale=scale, crop_aspect_ratio=ratio, mean_crop=mean_crop, color='none')
    keys, images, mean = keys_of(BATCH), random_images(), statistics()['mean_image'].astype(np.float32)
    ours = augmented(images, keys, config)
    assert ours.dtype == np.float32
    middle = np.s_[(SIZE - CROP) // 2 : (SIZE + CROP) // 2]
    for image, key, x in zip(images, keys, ours, strict=True):
        window = transposed(crop_in_numpy(fold(key, 3), config))
        if mean_crop == 'matching':
            expected = scaled_by_pillow(image.astype(np.float32) - mean, window)
        else:
            expected = scaled_by_pillow(image.astype(np.float32), window) - mean[middle, middle]
        expected = expected[:, ::-1] if jax.random.bernoulli(fold(key, 1)) else expected
        np.testing.assert_allclose(x, expected, atol=2e-3)
    # Pillow rounds images of bytes, as torchvision has them, to whole gray levels.
    plain = data_config(crop_scale=scale, crop_aspect_ratio=ratio, mean='none', color='none', flip=False)
    for image, key, x in zip(images, keys, augmented(images, keys, plain), strict=True):
        top, left, height, width = crop_in_numpy(fold(key, 3), plain)
        box = (left, top, left + width, top + height)
        pillow = np.asarray(Image.fromarray(image).resize((CROP, CROP), Image.Resampling.BILINEAR, box))
        assert np.abs(x - pillow).max() < 1.1


def test_images_of_a_group_have_the_same_resized_crop():
    config = data_config(crop_scale=(0.08, 1.0), color='none', mean='none')
    image = np.repeat(random_images()[:1], BATCH, 0)
    first = augmented(image, keys_of(BATCH), config, crop_keys=keys_of(1)[jnp.zeros(BATCH, jnp.int32)])
    np.testing.assert_array_equal(first, np.repeat(first[:1], BATCH, 0))
    assert len(np.unique(augmented(image, keys_of(BATCH), config), axis=0)) == BATCH


@pytest.mark.parametrize(
    ('side', 'area', 'ratio', 'is_crop'),
    [(256, (0.08, 1.0), (3 / 4, 4 / 3), True), (64, *ERASING, False)],
    ids=['crop', 'erasing'],
)
def test_distribution_of_windows(side, area, ratio, is_crop):
    """The mean area, shape and position of 4,000 windows against those of torchvision's loop with NumPy's numbers."""
    limits = ratio if is_crop else augment.ERASED_ASPECT_RATIO
    draw = jax.jit(jax.vmap(lambda key: augment.random_window(key, side, area, limits, side - (not is_crop))))
    offset, size, fits = map(np.asarray, draw(keys_of(4000)))
    assert fits.all()
    rng, sizes = np.random.default_rng(0), []
    while len(sizes) < 4000:
        target = side * side * rng.uniform(*area)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        pair = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))  # height, width of RandomErasing
        pair = pair[::-1] if is_crop else pair
        if max(pair) <= side - (not is_crop):
            sizes.append(pair)
    expected = np.array(sizes)
    for ours, theirs in (
        (size.prod(1) / side**2, expected.prod(1) / side**2),
        (np.log(size[:, 0] / size[:, 1]), np.log(expected[:, 0] / expected[:, 1])),
        (size[:, 0] / side, expected[:, 0] / side),
    ):
        assert abs(ours.mean() - theirs.mean()) < 4 * theirs.std() * math.sqrt(2 / 4000)
        assert ours.std() == pytest.approx(theirs.std(), rel=0.06)
    assert (offset >= 0).all()
    assert (offset + size <= side).all()
    inner = (size < side).all(1)
    places = offset[inner] / (side - size[inner])
    np.testing.assert_allclose(places.mean(0), 0.5, atol=0.03)
    assert np.ptp(places, 0).min() == 1  # both edges are reached


@pytest.mark.parametrize('probability', [0.5, 1.0])
def test_erasing_is_that_of_torchvision(probability):
    plain = data_config(crop=False, flip=False, color='original', std=(2.0,))
    config = dataclasses.replace(plain, random_erasing=probability)
    images, keys = np.repeat(random_images(), 5, 0), keys_of(5 * BATCH)
    crop_keys = keys_of(5 * BATCH, seed=1)
    whole = augmented(images, keys, plain, crop_keys=crop_keys)
    ours, erased = augmented(images, keys, config, crop_keys=crop_keys), 0
    log_ratio = -math.log(3.3), -math.log(0.3)
    for x, before, key in zip(ours, whole, keys, strict=True):
        expected = before.copy()
        if jax.random.bernoulli(fold(key, 4, 1), probability):
            top, left, height, width = window_in_numpy(fold(key, 4, 0), CROP, ERASING[0], log_ratio, False)
            expected[top : top + height, left : left + width] = 0
            erased += 1
        np.testing.assert_array_equal(x, expected)
    assert erased == 5 * BATCH if probability == 1 else 5 < erased < 25


def test_erased_rectangles_are_smaller_than_the_input():
    """About 20 of 2,000 rectangles would otherwise have the height or width of the input."""
    config = data_config(crop=False, flip=False, mean='none', color='none', random_erasing=1.0)
    erased = augmented(np.full((2000, SIZE, SIZE, 3), 9, np.uint8), keys_of(2000), config)[..., 0] == 0
    assert erased.any((1, 2)).all()
    assert erased.any(2).sum(1).max() == erased.any(1).sum(1).max() == CROP - 1


# Mixup and CutMix


def mixed_in_numpy(images, keys, config):
    """Mixes one image after the other; only the random numbers come from JAX. Returns (images, factors)."""
    side, mixed, factors = images.shape[1], [], []
    for i, key in enumerate(keys):
        image, partner = images[i], images[i + 1 if i % 2 == 0 else i - 1]
        is_cut = config.cutmix and (not config.mixup or bool(jax.random.bernoulli(fold(key, 2))))
        if is_cut:
            ratio = math.sqrt(1 - float(jax.random.beta(fold(key, 1, 0), config.cutmix, config.cutmix)))
            size = int(side * ratio)
            row, column = np.asarray(jax.random.randint(fold(key, 1, 1), (2,), 0, side)).tolist()
            top, bottom = (min(max(row + sign * (size // 2), 0), side) for sign in (-1, 1))
            left, right = (min(max(column + sign * (size // 2), 0), side) for sign in (-1, 1))
            x = image.copy()
            x[top:bottom, left:right] = partner[top:bottom, left:right]
            factor = 1 - (bottom - top) * (right - left) / side**2
        else:
            factor = float(jax.random.beta(fold(key, 0), config.mixup, config.mixup))
            x = factor * image.astype(np.float64) + (1 - factor) * partner.astype(np.float64)
        mixed.append(x)
        factors.append(factor)
    return np.stack(mixed), np.array(factors)


MIXTURES = [{'mixup': 0.2}, {'cutmix': 1.0}, {'mixup': 0.4, 'cutmix': 0.7}]


@pytest.mark.parametrize('mixture', MIXTURES, ids=str)
def test_mixtures_are_those_of_a_loop(mixture):
    config, keys = TrainConfig(**mixture), keys_of(24, purpose=3)
    images = np.random.default_rng(0).normal(0, 60, (24, CROP, CROP, 3)).astype(np.float32)
    ours, factors = jax.jit(lambda images, keys: mix_pairs(images, keys, config))(images, keys)
    expected, expected_factors = mixed_in_numpy(images, keys, config)
    np.testing.assert_allclose(factors, expected_factors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert np.ptp(factors) > 0.5
    np.testing.assert_array_equal(swap_pairs(jnp.arange(6)), [1, 0, 3, 2, 5, 4])


def test_distribution_of_factors():
    images, keys = jnp.zeros((4000, CROP, CROP, 1)), keys_of(4000, purpose=3)

    def moments(**mixture):
        factors = np.asarray(mix_pairs(images, keys, TrainConfig(**mixture))[1], np.float64)
        assert ((factors >= 0) & (factors <= 1)).all()
        return factors.mean(), factors.var()

    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)).
    for parameter in (0.2, 1.0, 4.0):
        mean, variance = moments(mixup=parameter)
        assert mean == pytest.approx(0.5, abs=0.02)
        assert variance == pytest.approx(1 / (4 * (2 * parameter + 1)), rel=0.06)
    cut, both = moments(cutmix=1.0)[0], moments(mixup=1.0, cutmix=1.0)[0]
    assert 0.65 < cut < 0.8  # above 1/2, because boxes are clipped
    assert both == pytest.approx((cut + 0.5) / 2, abs=0.02)
    assert moments(mixup=1e-6)[1] == pytest.approx(0.25, abs=0.01)  # whole images


# The loss


PLAIN = {
    'data': {'crop': False, 'flip': False, 'color': 'none'},
    'model': {'dropout': 0.0},
    'optimizer': {'weight_decay': 0.0},
}


def one_step(settings, weights):
    """Returns metrics and state after one step of learning rate 1, and the state before the step."""
    mesh = parallel.make_mesh(settings)
    prepared = augment.make_preprocess_params(STATISTICS, settings.data)
    if weights is not None:
        prepared = prepared | {'class_weights': weights}
    rows = make_global_batch(settings, mesh, batch(0, settings))
    state = init_state(settings, mesh)
    before = jax.device_get(state)
    step = make_train_step(settings, mesh).lower(state, rows, rates(1.0), prepared).compile(FAST)
    state, metrics = step(state, rows, rates(1.0), prepared)
    return {name: float(value) for name, value in metrics.items()}, jax.device_get(state), before


def loss_in_numpy(settings, params, weights):
    """Returns the loss, the top-1 error and the gradient of fc8's bias, in float64 except for the logits."""
    rows, smoothing = batch(0, settings), settings.train.label_smoothing
    mean = STATISTICS['mean_image'].astype(np.float32)[4:68, 4:68]
    images, factors = rows['image'][:, 4:68, 4:68].astype(np.float32) - mean, np.ones(len(rows['label']))
    if settings.train.mixup or settings.train.cutmix:
        keys = augment.example_keys(settings.seed, jnp.asarray(rows['example_id']), RngStream.MIXING)
        images, factors = mixed_in_numpy(images, keys, settings.train)
    model = nnx.merge(build_model(settings)[0], params, {})
    logits = np.asarray(model(jnp.asarray(images, jnp.float32)), np.float64)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    loss, wrong, gradient = 0.0, 0, np.zeros(10)
    for i, factor in enumerate(factors):
        pair = rows['label'][i], rows['label'][i + 1 if i % 2 == 0 else i - 1]
        for label, share in zip(pair, (factor, 1 - factor), strict=True):
            target = np.full(10, smoothing / 10)
            target[label] += 1 - smoothing
            weight = share * (1 if weights is None else weights[label])
            loss += weight * -(target * np.log(probabilities[i])).sum()
            gradient += weight * (probabilities[i] - target)
        wrong += logits[i].argmax() != pair[0 if factor >= 0.5 else 1]
    return loss / len(factors), wrong / len(factors), gradient / len(factors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('recipe', 'weighted', 'mesh'),
    [
        ({'label_smoothing': 0.1}, True, ('towers', 1, 1)),
        ({'mixup': 1.0, 'grad_accum_steps': 2}, False, ('towers', 1, 1)),
        ({'label_smoothing': 0.2, 'mixup': 0.4, 'cutmix': 1.0}, True, ('hybrid', 2, 4)),
    ],
    ids=['smoothing', 'mixup', 'all'],
)
def test_loss_errors_and_gradient_are_those_of_numpy(recipe, weighted, mesh):
    layout, data, model = mesh
    groups = PLAIN | {'train': recipe, 'mesh': {'layout': layout}}
    settings = small_config(data, model, groups)
    weights = np.linspace(0, 2, 10).astype(np.float32) if weighted else None
    metrics, state, before = one_step(settings, weights)
    loss, error, gradient = loss_in_numpy(settings, before.params, weights)
    assert metrics['loss'] == pytest.approx(loss, rel=2e-5)
    assert metrics['top1_error'] == error
    np.testing.assert_allclose(-state.params['fc8']['bias'], gradient, rtol=1e-3, atol=1e-6)  # initially 0


def test_smoothing_is_that_of_optax():
    logits = np.random.default_rng(0).normal(0, 3, (5, 10)).astype(np.float32)
    targets = optax.smooth_labels(jnp.eye(10)[jnp.array([0, 3, 3, 9, 1])], 0.3)
    ours = smoothed_losses(jnp.asarray(logits), jnp.array([0, 3, 3, 9, 1]), 0.3)
    np.testing.assert_allclose(ours, optax.softmax_cross_entropy(logits, targets), rtol=1e-6)
    spread = -0.03 * jax.nn.log_softmax(logits).sum(1)
    plain = smoothed_losses(jnp.asarray(logits), jnp.array([0, 3, 3, 9, 1]), 0.0)
    np.testing.assert_allclose(ours, 0.7 * plain + spread, rtol=1e-5)


# The whole recipe on several meshes


WHOLE = {
    'data': {'crop_scale': (0.25, 1.0), 'random_erasing': 0.5},
    'train': {'label_smoothing': 0.1, 'mixup': 0.2, 'cutmix': 1.0, 'ema_decay': 0.7},
}


@pytest.fixture(scope='module')
def one_device():
    return train(small_config(1, 1, WHOLE), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('layout', 'data', 'model', 'more'),
    [
        ('data', 8, 1, {}),
        ('towers', 4, 2, {'mesh': {'shard_optimizer': True}}),
        ('hybrid', 2, 4, {}),
        ('towers', 1, 1, {'train': {'grad_accum_steps': 2}}),
    ],
)
def test_whole_recipe_is_the_same_on_every_mesh(one_device, layout, data, model, more):
    groups = WHOLE | {
        'mesh': {'layout': layout} | more.get('mesh', {}),
        'train': WHOLE['train'] | more.get('train', {}),
    }
    mesh, state, losses, initial = train(small_config(data, model, groups), 3)
    _, expected, one_losses, one_initial = one_device
    assert (mesh.size, initial) == (data * model, one_initial)
    np.testing.assert_allclose(losses, one_losses, rtol=2e-5)
    for (path, leaf), whole in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(whole), rtol=1e-4, atol=2e-6, err_msg=name)
    kernel, average = (np.asarray(tree['fc8']['kernel']) for tree in (state.params, state.average))
    assert np.abs(kernel - average).max() > 1e-3  # far above the tolerance
    assert jax.tree.map(lambda leaf: leaf.sharding, state.average) == jax.tree.map(
        lambda leaf: leaf.sharding, state.params
    )


@pytest.mark.slow
def test_average_is_that_of_numpy():
    settings = small_config(1, 1, {'train': {'ema_decay': 0.7}})
    mesh = parallel.make_mesh(settings)
    prepared = augment.make_preprocess_params(STATISTICS, settings.data)
    state = init_state(settings, mesh)
    average = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.average)
    jax.tree.map(np.testing.assert_array_equal, state.average, state.params)
    rows = [make_global_batch(settings, mesh, batch(number, settings)) for number in range(3)]
    step = make_train_step(settings, mesh).lower(state, rows[0], rates(0.01), prepared).compile(FAST)
    for number in range(3):
        state, _ = step(state, rows[number], rates(0.01), prepared)
        average = jax.tree.map(lambda old, new: 0.7 * old + 0.3 * np.asarray(new, np.float64), average, state.params)
    jax.tree.map(
        lambda ours, other: np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-7), state.average, average
    )
    assert state.for_inference().params is state.average
    assert not state.for_inference().average


# Settings


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (
            {'data__crop_scale': (1.0, 0.08)},
            'data.crop_scale: (1.0, 0.08) is not ascending; the nearest is (0.08, 1.0)',
        ),
        (
            {'data__crop_scale': (0.5, 1.5)},
            'data.crop_scale: (0.5, 1.5) allows crops larger than the image; the nearest is (0.5, 1.0)',
        ),
        ({'data__crop_scale': (0.5,)}, 'data.crop_scale: 1 values; 2 are needed'),
        ({'data__crop_scale': (0.0, 1.0)}, 'data.crop_scale: 0.0 is not a number from 0.0001'),
        ({'data__crop_scale': ('a', 1.0)}, "data.crop_scale: 'a' is not a number from 0.0001"),
        (
            {'data__crop_aspect_ratio': (2.0, 0.5)},
            'data.crop_aspect_ratio: (2.0, 0.5) is not ascending; the nearest is (0.5, 2.0)',
        ),
        (
            {'data__crop_scale': (0.5, 1.0), 'data__crop': False},
            'data.crop_scale: (0.5, 1.0) with data.crop=False, which turns random crops off; the nearest is None',
        ),
        ({'data__random_erasing': 1.5}, 'data.random_erasing: 1.5 is outside 0 to 1; the nearest is 1'),
        ({'train__label_smoothing': 1.0}, 'train.label_smoothing: 1.0 is outside 0 to 0.99; the nearest is 0.99'),
        ({'train__mixup': -1.0}, 'train.mixup: -1.0 is outside 0 to 100; the nearest is 0'),
        ({'train__ema_decay': 1.0}, 'train.ema_decay: 1.0 is outside 0 to 0.999999; the nearest is 0.999999'),
        (
            {'optimizer__stop_on_plateau': True, 'optimizer__schedule': 'steps'},
            "optimizer.stop_on_plateau: True with optimizer.schedule='steps', which has no plateau; the nearest is"
            " 'plateau'",
        ),
        (
            {'train__mixup': 0.2, 'train__batch_size': 24, 'mesh__data': 8},
            'train.batch_size: 24 with mixup or CutMix gives each device 3 images at a time, and pairs need an even'
            ' number; the nearest is 32',
        ),
        (
            {'train__cutmix': 1.0, 'train__batch_size': 12, 'mesh__data': 2, 'train__grad_accum_steps': 2},
            'train.batch_size: 12 with mixup or CutMix gives each device 3 images at a time, and pairs need an even'
            ' number; the nearest is 16',
        ),
    ],
)
def test_settings_that_contradict_each_other(fields, message):
    assert refusal(resolved, **fields) == f'config.{message}'


def test_pairs_are_checked_when_the_number_of_devices_is_known(tmp_path):
    config = resolved(train__mixup=0.2, train__batch_size=24)  # mesh.data is -1
    assert parallel.mesh_shape(config, 4) == (4, 1)
    assert 'train.batch_size: 24 with mixup or CutMix gives each device 3' in refusal(parallel.mesh_shape, config, 8)
    hybrid = resolved(train__mixup=0.2, train__batch_size=24, mesh__layout='hybrid', mesh__model=2)
    assert 'gives each device 3 images' in refusal(parallel.mesh_shape, hybrid, 8)
    flags = config_flags({'train.mixup': 0.2, 'train.batch_size': 7})
    run = run_command('launch.py', f'--workdir={tmp_path}', *flags)
    assert run.returncode == 2
    assert run.stderr.startswith('alexnet_jax: config.train.batch_size: 7 with mixup')
    assert run.stderr.count('\n') == 1


def test_preset_and_sweep():
    both = [resolve(preset_config(name)) for name in ('torchvision', 'modern')]
    assert [each.data.crop_scale for each in both] == [(0.08, 1.0)] * 2
    assert dataclasses.replace(both[0].model, preset='modern') == both[1].model
    assert (both[1].optimizer.schedule, both[1].train.label_smoothing) == ('cosine', 0.1)
    for data, count in (('photos', 80), ('imagenet', 16)):
        rows = modern.sweep(data)
        assert len(rows) == count
        overrides = {row.name: row.overrides for row in rows}
        parts = modern.PARTS[data]
        assert overrides['base'] == {}
        for part, fields in parts.items():
            assert overrides[part] == fields
            assert overrides['all'] == overrides[f'all_without_{part}'] | fields
            assert not set(fields) & set(overrides[f'all_without_{part}'])
        for row in rows[:16]:
            config = modern.get_config(data)
            assert config.data.crop_scale is None
            apply_overrides(config, row.overrides)
            resolve(config)
