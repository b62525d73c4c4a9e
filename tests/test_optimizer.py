"""The update rule against NumPy across a drop of the rate; the schedules against rates written by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.config import default_config, resolve, total_steps
from alexnet_jax.optimizer import make_optimizer, plateau_next, plateau_start, scheduled_rate

RATES = [0.1] * 6 + [0.01] * 6
SHAPES = {'convolution': (2, 2, 3, 4), 'matrix': (5, 4), 'bias': (4,)}
TOLERANCE = 1e-6


def optimizer_config(**fields):
    config = default_config()
    config.optimizer.update(fields)
    return resolve(config).optimizer


def draws():
    """Parameters, and gradients for every step."""
    rng = np.random.default_rng(0)
    return [{name: rng.standard_normal(shape) for name, shape in SHAPES.items()} for _ in range(len(RATES) + 1)]


def steps_in_numpy(momentum, decay, bias_multiplier=1.0, rate_in_velocity=True):
    """Parameters after every step, in float64."""
    w, *gradients = draws()
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    history = []
    for rate, g in zip(RATES, gradients, strict=True):
        w = dict(w)
        for name in SHAPES:
            is_bias = name == 'bias'
            lr, wd = (rate * bias_multiplier, 0) if is_bias else (rate, decay)
            if rate_in_velocity:
                v[name] = momentum * v[name] - lr * (g[name] + wd * w[name])
                w[name] = w[name] + v[name]
            else:
                v[name] = momentum * v[name] + (g[name] + wd * w[name])
                w[name] = w[name] - lr * v[name]
        history.append(w)
    return history


def steps_of_package(config):
    w, *gradients = jax.tree.map(jnp.float32, draws())
    state = make_optimizer(config, 0.0).init(w)
    history = []
    for rate, g in zip(RATES, gradients, strict=True):
        updates, state = make_optimizer(config, rate).update(g, state, w)
        w = optax.apply_updates(w, updates)
        history.append(w)
    return history


def largest_difference(history, other):
    return max(np.abs(a[name] - b[name]).max() for a, b in zip(history, other, strict=True) for name in SHAPES)


@pytest.mark.parametrize(
    ('momentum', 'decay', 'bias_multiplier'), [(0.9, 5e-4, 1.0), (0.9, 0.05, 2.0), (0.5, 0.1, 1.0), (0.0, 0.0, 0.5)]
)
def test_update_rule(momentum, decay, bias_multiplier):
    config = optimizer_config(momentum=momentum, weight_decay=decay, bias_lr_multiplier=bias_multiplier)
    history = steps_of_package(config)
    assert largest_difference(history, steps_in_numpy(momentum, decay, bias_multiplier)) < TOLERANCE


def test_rate_stands_inside_the_velocity():
    # The other form is the same until the rate drops, and far away two steps later.
    history = steps_of_package(optimizer_config())
    other = steps_in_numpy(0.9, 5e-4, rate_in_velocity=False)
    assert largest_difference(history[:6], other[:6]) < TOLERANCE
    assert largest_difference(history[6:8], other[6:8]) > 1e4 * TOLERANCE


def test_one_step_by_hand():
    config = optimizer_config(momentum=0.9, weight_decay=0.1, bias_lr_multiplier=2.0)
    w = {'kernel': jnp.array([[2.0]]), 'bias': jnp.array([2.0])}
    g = {'kernel': jnp.array([[3.0]]), 'bias': jnp.array([3.0])}
    optimizer = make_optimizer(config, 0.5)
    updates, state = optimizer.update(g, optimizer.init(w), w)
    w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w['kernel'], [[0.4]], rtol=1e-6)  # 2 - .5 * (3 + .1 * 2)
    np.testing.assert_allclose(w['bias'], [-1.0], rtol=1e-6)  # 2 - 2 * .5 * 3
    g = jax.tree.map(jnp.zeros_like, g)
    updates, _ = make_optimizer(config, 0.05).update(g, state, w)
    w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w['kernel'], [[-1.042]], rtol=1e-6)  # .4 + .9 * -1.6 - .05 * .1 * .4
    np.testing.assert_allclose(w['bias'], [-3.7], rtol=1e-6)  # -1 + .9 * -3


def test_velocities_are_the_whole_state():
    w = jax.tree.map(jnp.float32, draws()[0])
    state = make_optimizer(optimizer_config(), 0.1).init(w)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(w)]
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype('float32')}


def test_a_new_rate_needs_no_new_compilation():
    traces = []
    config = optimizer_config()

    @jax.jit
    def step(w, state, g, rate):
        traces.append(rate)
        updates, state = make_optimizer(config, rate).update(g, state, w)
        return optax.apply_updates(w, updates), state

    w, *gradients = jax.tree.map(jnp.float32, draws())
    state = make_optimizer(config, 0.0).init(w)
    history = []
    for rate, g in zip(RATES, gradients, strict=True):
        w, state = step(w, state, g, np.float32(rate))
        history.append(w)
    assert len(traces) == 1
    assert largest_difference(history, steps_in_numpy(0.9, 5e-4)) < TOLERANCE


def run_config(batch_size=10, **fields):
    config = default_config()
    config.train.batch_size = batch_size
    config.optimizer.update(fields)
    return resolve(config)


def rates_at(config, steps, examples=100, drops_taken=0):
    return [scheduled_rate(config, step, examples, drops_taken) for step in steps]


def test_constant_rate():
    config = run_config(schedule='constant', learning_rate=0.02)
    assert rates_at(config, [0, 1, 10**6], drops_taken=2) == [0.02] * 3


def test_rate_drops_by_epochs_steps_and_images():
    # 100 images in batches of 10: 2 epochs are 20 steps, 4000 images are 400.
    config = run_config(schedule='steps', learning_rate=0.8, divisor=2.0, drops=('2 epochs', '30 steps', '4000 images'))
    rates = rates_at(config, [0, 19, 20, 29, 30, 399, 400, 10**6], drops_taken=2)
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]


def test_rate_falls_with_a_power_of_what_is_left():
    config = run_config(schedule='poly', learning_rate=0.8, power=2.0)
    steps = total_steps(config, 100)
    assert steps == 900
    expected = [0.8, 0.8 * 0.75**2, 0.2, 0.8 / 900**2, 0.0, 0.0]
    np.testing.assert_allclose(rates_at(config, [0, 225, 450, 899, 900, 901]), expected, rtol=1e-12)
    straight = run_config(schedule='poly', learning_rate=0.8, power=1.0)
    np.testing.assert_allclose(rates_at(straight, [0, 450, 810]), [0.8, 0.4, 0.08], rtol=1e-12)


def test_epochs_count_by_the_data_set():
    config = run_config(schedule='steps', learning_rate=1.0, divisor=2.0, drops=('1.5 epochs',))
    assert rates_at(config, [14, 15], examples=100) == [1.0, 0.5]
    assert rates_at(config, [29, 30], examples=200) == [1.0, 0.5]


def test_rate_of_the_plateau_schedule():
    config = run_config(schedule='plateau', learning_rate=0.01, divisor=10.0)
    rates = [rates_at(config, [0, 10**6], drops_taken=drops) for drops in range(4)]
    np.testing.assert_allclose(rates, [[1e-2] * 2, [1e-3] * 2, [1e-4] * 2, [1e-5] * 2], rtol=1e-12)


@pytest.mark.parametrize('warmup', ['4 steps', '0.4 epochs', '40 images'])
def test_warmup_is_linear(warmup):
    config = run_config(schedule='constant', learning_rate=0.8, warmup=warmup)
    np.testing.assert_allclose(rates_at(config, range(6)), [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-12)


def test_warmup_scales_the_schedule():
    config = run_config(schedule='steps', learning_rate=0.8, divisor=2.0, drops=('2 steps',), warmup='4 steps')
    np.testing.assert_allclose(rates_at(config, range(5)), [0.2, 0.4, 0.3, 0.4, 0.4], rtol=1e-12)


# Patience 2, at most two drops: error, evaluations waited, drops taken.
ERRORS = [
    (0.9, 0, 0),
    (0.8, 0, 0),
    (0.8, 1, 0),  # equal is no new lowest
    (0.7, 0, 0),
    (0.75, 1, 0),
    (0.71, 0, 1),  # better than the one before, yet not the lowest: the first drop
    (0.6, 0, 1),
    (0.61, 1, 1),
    (0.65, 0, 2),  # the second
    (0.65, 1, 2),
    (0.65, 2, 2),  # there is no third
    (0.65, 3, 2),
    (0.5, 0, 2),
]


@pytest.mark.parametrize('saved', [False, True])  # through JSON and back between any two evaluations
def test_plateau_drops(saved):
    config = optimizer_config(patience=2, max_drops=2)
    state = plateau_start()
    lowest = 1.0
    for error, waited, drops_taken in ERRORS:
        if saved:
            restored = json.loads(json.dumps(state))
            assert restored == state
            state = restored
        state = plateau_next(state, error, config)
        lowest = min(lowest, error)
        assert state == {'lowest_error': lowest, 'waited': waited, 'drops_taken': drops_taken}


def test_plateau_start():
    assert plateau_start() == {'lowest_error': 1.0, 'waited': 0, 'drops_taken': 0}


def test_plateau_of_the_paper_drops_three_times():
    config = optimizer_config()
    state = plateau_start()
    drops = []
    for _ in range(20):
        state = plateau_next(state, 1.0, config)
        drops.append(state['drops_taken'])
    assert drops == [0, 0, 1, 1, 1, 2, 2, 2] + [3] * 12


def test_plateau_next_leaves_the_old_state_alone():
    state = plateau_start()
    plateau_next(state, 0.5, optimizer_config())
    assert state == plateau_start()
