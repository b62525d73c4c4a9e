"""data.class_weights: the weighted loss and its gradient against NumPy, on all layouts; weights kept by a run."""

import jax
import numpy as np
import pytest
from helpers import config_flags, read_result, run_command, training_command
from PIL import Image
from test_mesh import FAST, STATISTICS, batch, make_global_batch, rates, small_config

from alexnet_jax import augment, parallel
from alexnet_jax.shapes import LAYERS
from alexnet_jax.training.eval_step import make_activation_fn
from alexnet_jax.training.state import init_state
from alexnet_jax.training.train_step import balanced_class_weights, make_train_step

COUNTS = np.array([40, 1, 7, 0, 12, 3, 25, 90, 2, 20])
# Without crops, flips, noise and dropout, the train step sees what an evaluation of the center crop sees.
PLAIN = {
    'data': {'crop': False, 'flip': False, 'color': 'none', 'image_size': 72, 'crop_size': 64},
    'model': {'dropout': 0.0, 'num_classes': 10},
    'optimizer': {'weight_decay': 0.0},
}


def test_weights_are_those_of_the_formula():
    images, classes = 200, 9  # the fourth class has no images
    expected = [0 if not count else images / (classes * count) for count in COUNTS.tolist()]
    weights = balanced_class_weights(COUNTS)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights.dtype == np.float32
    assert np.average(weights, weights=COUNTS) == pytest.approx(1, rel=1e-6)  # the mean over the images


def weighted_step(settings, weights):
    """Returns the loss and the state after one step of learning rate 1, and the logits before the step."""
    mesh = parallel.make_mesh(settings)
    prepared = augment.make_preprocess_params(STATISTICS, settings.data)
    rows = make_global_batch(settings, mesh, batch(0, settings))
    state = init_state(settings, mesh)
    logits = np.asarray(make_activation_fn(settings, mesh, 'fc8')(state, rows['image'], prepared), np.float64)
    constants = prepared if weights is None else prepared | {'class_weights': weights}
    step = make_train_step(settings, mesh).lower(state, rows, rates(1.0), constants).compile(FAST)
    state, metrics = step(state, rows, rates(1.0), constants)
    return {name: float(value) for name, value in metrics.items()}, jax.device_get(state), logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ('layout', 'data', 'model', 'sharded', 'micro_batches'),
    [
        ('towers', 1, 1, False, 1),
        ('towers', 1, 1, False, 2),
        ('towers', 4, 2, False, 2),
        ('towers', 4, 2, True, 1),
        ('hybrid', 2, 4, False, 1),
    ],
)
def test_loss_and_gradient_are_those_of_numpy(layout, data, model, sharded, micro_batches):
    groups = PLAIN | {
        'mesh': {'layout': layout, 'data': data, 'model': model, 'shard_optimizer': sharded},
        'train': {'batch_size': 16, 'grad_accum_steps': micro_batches},
    }
    settings = small_config(data, model, groups)
    weights = balanced_class_weights(COUNTS)
    metrics, state, logits = weighted_step(settings, weights)
    labels = batch(0, settings)['label']
    largest = logits.max(-1, keepdims=True)
    log_probabilities = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    factors = np.array([0 if not n else 200 / (9 * n) for n in COUNTS.tolist()])[labels]
    assert len(set(factors)) > 4
    losses = -log_probabilities[np.arange(16), labels]
    assert metrics['loss'] == pytest.approx((factors * losses).sum() / 16, rel=1e-5)
    assert metrics['top1_error'] == np.mean(logits.argmax(-1) != labels)
    gradient = (factors[:, None] * (np.exp(log_probabilities) - np.eye(10)[labels])).sum(0) / 16
    bias = state.params['fc8']['bias']  # the initial bias is 0, the learning rate is 1
    np.testing.assert_allclose(-bias, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_no_weights_are_weights_of_one():
    settings = small_config(2, 1, PLAIN | {'train': {'batch_size': 16}})
    plain, weighted = (weighted_step(settings, weights) for weights in (None, np.ones(10, np.float32)))
    assert plain[0] == weighted[0]
    for layer in set(LAYERS) & set(plain[1].params):
        np.testing.assert_array_equal(plain[1].params[layer]['kernel'], weighted[1].params[layer]['kernel'])


def write_uneven_pictures(folder) -> None:
    """Writes 12, 3 and 0 training images and one validation image of each of three classes."""
    generator = np.random.default_rng(0)
    for split, name, count in (
        ('train', 'a', 12),
        ('train', 'b', 3),
        ('train', 'c', 0),
        *(('val', n, 1) for n in 'abc'),
    ):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 255, (72, 72, 3), np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f'{i}.png')


@pytest.mark.slow
def test_run_takes_the_weights_from_its_statistics_and_resumes_exactly(tmp_path, compiled_programs):
    write_uneven_pictures(tmp_path / 'pictures')
    fields = {
        'data.source': f'folder:{tmp_path}/pictures',
        'data.class_weights': 'balanced',
        'model.num_classes': 3,
        'train.batch_size': 5,
        'train.steps': 6,
        'checkpoint.every': '2 steps',
        'eval.every': '3 steps',
        'eval.batch_size': 3,
    }
    whole = run_command(*training_command(tmp_path / 'd', tmp_path / 'whole', fields))
    assert whole.returncode == 0, whole.stderr
    # 15 images, 2 classes with images: 15 / (2 * 12) and 15 / (2 * 3).
    assert 'config.data.class_weights=balanced: 0.625 (a) to 2.5 (b)' in whole.stderr
    assert 'config.data.class_weights: 0 for the classes without training images: c' in whole.stderr
    for steps in (3, 6):
        command = training_command(tmp_path / 'd', tmp_path / 'parts', fields, f'--config.train.steps={steps}')
        assert run_command(*command).returncode == 0
    whole, parts = (read_result(tmp_path / name)['state_digest'] for name in ('whole', 'parts'))
    assert whole == parts


def test_allowed_values():
    run = run_command('launch.py', *config_flags({'data.class_weights': 'balance'}))
    assert run.returncode == 2
    assert "config.data.class_weights: 'balance' is not one of none, balanced; the nearest is 'balanced'" in run.stderr
