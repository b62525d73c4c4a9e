"""The update rule against NumPy across a drop of the rate, and optax.lars; the schedules against hand numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refusal

from alexnet_jax.config import default_config, resolve, total_steps
from alexnet_jax.optimizer import make_optimizer
from alexnet_jax.schedules import PlateauState, Schedule

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
    state = make_optimizer(config, RATES[0]).init(w)
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


def test_velocity_includes_the_rate():
    # The other form is equal until the rate drops, and differs two steps later.
    history = steps_of_package(optimizer_config())
    other = steps_in_numpy(0.9, 5e-4, rate_in_velocity=False)
    assert largest_difference(history[:6], other[:6]) < TOLERANCE
    assert largest_difference(history[6:8], other[6:8]) > 1e4 * TOLERANCE


def test_two_steps_equal_hand_numbers():
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


def test_state_has_only_velocities():
    w = jax.tree.map(jnp.float32, draws()[0])
    state = make_optimizer(optimizer_config(), 0.1).init(w)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(w)]
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype('float32')}


def test_new_rate_needs_no_recompilation():
    traces = []
    config = optimizer_config()

    @jax.jit
    def step(w, state, g, rate):
        traces.append(rate)
        updates, state = make_optimizer(config, rate).update(g, state, w)
        return optax.apply_updates(w, updates), state

    w, *gradients = jax.tree.map(jnp.float32, draws())
    state = make_optimizer(config, RATES[0]).init(w)
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


def rates_at(config, steps, examples=100, decays_taken=0):
    schedule = Schedule(config.optimizer, config.train, examples)
    return [schedule.learning_rate(step, decays_taken) for step in steps]


def test_rate_drops_by_epochs_steps_and_images():
    # 100 images in batches of 10: 2 epochs are 20 steps, 4000 images are 400.
    config = run_config(
        schedule='steps', learning_rate=0.8, decay_factor=2.0, milestones=('2 epochs', '30 steps', '4000 images')
    )
    rates = rates_at(config, [0, 19, 20, 29, 30, 399, 400, 10**6], decays_taken=2)
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]


def test_poly_rate_is_a_power_of_the_remaining_fraction():
    config = run_config(schedule='poly', learning_rate=0.8, poly_power=2.0)
    steps = total_steps(config.train, 100)
    assert steps == 900
    expected = [0.8, 0.8 * 0.75**2, 0.2, 0.8 / 900**2, 0.0, 0.0]
    np.testing.assert_allclose(rates_at(config, [0, 225, 450, 899, 900, 901]), expected, rtol=1e-12)
    straight = run_config(schedule='poly', learning_rate=0.8, poly_power=1.0)
    np.testing.assert_allclose(rates_at(straight, [0, 450, 810]), [0.8, 0.4, 0.08], rtol=1e-12)


def test_epochs_depend_on_the_size_of_the_data_set():
    config = run_config(schedule='steps', learning_rate=1.0, decay_factor=2.0, milestones=('1.5 epochs',))
    assert rates_at(config, [14, 15], examples=100) == [1.0, 0.5]
    assert rates_at(config, [29, 30], examples=200) == [1.0, 0.5]


def test_rate_of_the_plateau_schedule():
    config = run_config(schedule='plateau', learning_rate=0.01, decay_factor=10.0)
    rates = [rates_at(config, [0, 10**6], decays_taken=drops) for drops in range(4)]
    np.testing.assert_allclose(rates, [[1e-2] * 2, [1e-3] * 2, [1e-4] * 2, [1e-5] * 2], rtol=1e-12)


@pytest.mark.parametrize('warmup', ['4 steps', '0.4 epochs', '40 images'])
def test_warmup_is_linear(warmup):
    config = run_config(schedule='constant', learning_rate=0.8, warmup=warmup)
    np.testing.assert_allclose(rates_at(config, range(6)), [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-12)


def test_warmup_scales_the_schedule():
    config = run_config(
        schedule='steps', learning_rate=0.8, decay_factor=2.0, milestones=('2 steps',), warmup='4 steps'
    )
    np.testing.assert_allclose(rates_at(config, range(5)), [0.2, 0.4, 0.3, 0.4, 0.4], rtol=1e-12)


# Patience 2, at most two decays: error, evaluations waited, decays taken.
ERRORS = [
    (0.9, 0, 0),
    (0.8, 0, 0),
    (0.8, 1, 0),  # An equal error is not lower.
    (0.7, 0, 0),
    (0.75, 1, 0),
    (0.71, 0, 1),  # lower than before, but not the lowest: the first decay
    (0.6, 0, 1),
    (0.61, 1, 1),
    (0.65, 0, 2),  # the second
    (0.65, 1, 2),
    (0.65, 2, 2),  # no third decay
    (0.65, 3, 2),
    (0.5, 0, 2),
]


def test_plateau_decays():
    config = optimizer_config(patience=2, max_decays=2)
    state = PlateauState()
    lowest = 1.0
    for error, waited, decays_taken in ERRORS:
        state = state.update(error, config)
        lowest = min(lowest, error)
        assert state == PlateauState(lowest_error=lowest, waited=waited, decays_taken=decays_taken)


def test_plateau_of_the_paper_decays_three_times():
    config = optimizer_config()
    state = PlateauState()
    decays = []
    for _ in range(20):
        state = state.update(1.0, config)
        decays.append(state.decays_taken)
    assert decays == [0, 0, 1, 1, 1, 2, 2, 2] + [3] * 12


# cuda-convnet2's rates: from 0.01 in four equal parts to 0.01 / 250; of biases from 0.02 in two to 0.002.
DEXP = {'schedule': 'dexp', 'learning_rate': 0.01, 'bias_schedule': 'dexp', 'bias_lr_multiplier': 2.0}
NAMES = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8')


def all_rates(config, steps, examples=100, decays_taken=0):
    """Returns the rates of kernels and of biases at `steps`; they must be equal in all layers."""
    schedule = Schedule(config.optimizer, config.train, examples)
    every = [schedule.learning_rate_tree(step, decays_taken) for step in steps]
    for rates in every:
        assert tuple(rates) == NAMES
        assert all(layer == rates['conv1'] for layer in rates.values())
    return [[rates['conv1'][kind] for rates in every] for kind in ('kernel', 'bias')]


def test_dexp_over_90_epochs():
    # 900 steps. A part begins at the step before which its share of the run is over: 225, counted from 0.
    config = run_config(**DEXP)
    kernels = np.repeat([0.01, 0.01 / 250 ** (1 / 3), 0.01 / 250 ** (2 / 3), 0.00004], 225)
    biases = np.repeat([0.02, 0.002], 450)
    np.testing.assert_allclose(all_rates(config, range(900)), [kernels, biases], rtol=1e-12)
    np.testing.assert_allclose(rates_at(config, range(900)), kernels, rtol=1e-12)
    np.testing.assert_allclose(all_rates(config, [900, 10**6]), [[0.00004] * 2, [0.002] * 2], rtol=1e-12)


def rate_of_lr_cu(rate, factor, parts, progress):
    """The loops of cuda-convnet2's lr.cu."""
    rates = [rate * (1 / factor) ** (i / (parts - 1)) for i in range(parts - 1)] + [rate / factor]
    return next(rates[i] for i in range(parts) if progress <= (i + 1) / parts)


@pytest.mark.parametrize(
    ('factor', 'parts', 'steps', 'late'),
    [(250.0, 4, 900, [225, 450, 675]), (250.0, 4, 901, []), (10.0, 2, 7, []), (8.0, 3, 9, [3, 6])],
)
def test_dexp_matches_lr_cu(factor, parts, steps, late):
    # If a part ends exactly before a step, lr.cu gives that step the old rate.
    config = default_config()
    config.train.steps = steps
    config.optimizer.update({'schedule': 'dexp', 'dexp_factor': factor, 'dexp_parts': parts})
    ours = rates_at(resolve(config), range(steps))
    expected = [rate_of_lr_cu(0.01, factor, parts, (step + (step in late)) / steps) for step in range(steps)]
    theirs = [rate_of_lr_cu(0.01, factor, parts, step / steps) for step in range(steps)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert [step for step in range(steps) if abs(ours[step] / theirs[step] - 1) > 1e-6] == late


def test_biases_of_the_same_schedule():
    config = run_config(
        schedule='steps', learning_rate=0.8, decay_factor=2.0, milestones=('20 steps',), bias_lr_multiplier=2.0
    )
    assert all_rates(config, [19, 20]) == [[0.8, 0.4], [1.6, 0.8]]
    dexp = run_config(**DEXP | {'bias_schedule': 'same'})
    np.testing.assert_allclose(all_rates(dexp, [0, 899]), [[0.01, 0.00004], [0.02, 0.00008]], rtol=1e-12)


@pytest.mark.parametrize('schedule', ['steps', 'plateau', 'dexp', 'poly'])
def test_constant_biases_stay_while_kernels_drop(schedule):
    fields = {'schedule': schedule, 'learning_rate': 0.01, 'milestones': ('20 steps',), 'bias_lr_multiplier': 2.0}
    kernels, biases = all_rates(run_config(bias_schedule='constant', **fields), [0, 450, 899], decays_taken=1)
    assert kernels[2] < 0.0011
    assert biases == [0.02] * 3


def test_dexp_biases_with_another_schedule_of_kernels():
    config = run_config(**DEXP | {'schedule': 'constant', 'bias_dexp_factor': 27.0, 'bias_dexp_parts': 4})
    biases = [0.02, 0.02, 0.02 / 3, 0.02 / 9, 0.02 / 27]
    np.testing.assert_allclose(all_rates(config, [0, 224, 225, 450, 899]), [[0.01] * 5, biases], rtol=1e-12)


@pytest.mark.parametrize('bias_schedule', ['same', 'dexp', 'constant'])
def test_warmup_applies_to_biases(bias_schedule):
    config = run_config(**DEXP | {'bias_schedule': bias_schedule, 'warmup': '4 steps'})
    shares = np.array([0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(all_rates(config, range(6)), [0.01 * shares, 0.02 * shares], rtol=1e-12)


def test_lr_overrides():
    # Steps of 10 images, epochs of 10 steps.
    entries = (
        ('conv1/kernel', '2 epochs', 1e-5),
        ('conv1/kernel', '30 steps', 0.0),
        ('conv1/bias', '400 images', 0.3),
        ('fc8/bias', '60 steps', 0.5),
        ('fc8/bias', '50', 0.7),  # The later entry wins, also from step 60 on.
    )
    config = run_config(schedule='constant', learning_rate=0.8, bias_lr_multiplier=2.0, lr_overrides=entries)
    schedule = Schedule(config.optimizer, config.train, 100)
    others = {name: {'kernel': 0.8, 'bias': 1.6} for name in NAMES}
    expected = {
        19: {},
        20: {'conv1': (1e-5, 1.6)},
        29: {'conv1': (1e-5, 1.6)},
        30: {'conv1': (0.0, 1.6)},
        39: {'conv1': (0.0, 1.6)},
        40: {'conv1': (0.0, 0.3)},
        49: {'conv1': (0.0, 0.3)},
        50: {'conv1': (0.0, 0.3), 'fc8': (0.8, 0.7)},
        60: {'conv1': (0.0, 0.3), 'fc8': (0.8, 0.7)},
        10**6: {'conv1': (0.0, 0.3), 'fc8': (0.8, 0.7)},
    }
    for step, changed in expected.items():
        changed = {name: {'kernel': kernel, 'bias': bias} for name, (kernel, bias) in changed.items()}
        assert schedule.learning_rate_tree(step, 0) == others | changed


def test_lr_overrides_count_epochs_and_have_no_warmup():
    entries = (('fc7/kernel', '1 epoch', 0.5),)
    config = run_config(schedule='constant', learning_rate=0.8, warmup='40 steps', lr_overrides=entries)
    for examples, first in ((100, 10), (200, 20)):
        schedule = Schedule(config.optimizer, config.train, examples)
        before, after = (schedule.learning_rate_tree(step, 0)['fc7']['kernel'] for step in (first - 1, first))
        np.testing.assert_allclose([before, after], [0.8 * first / 40, 0.5], rtol=1e-12)


@pytest.mark.parametrize(
    'entry',
    [
        ('conv9/kernel', '1 epoch', 0.1),
        ('conv1/scale', '1 epoch', 0.1),
        ('conv1/kernel', '1 epoch', -0.1),
        ('conv1/kernel', '1 epoch', '0.1'),
        ('conv1/kernel', '1 epoch'),
        'conv1/kernel',
    ],
)
def test_invalid_lr_overrides_are_refused(entry):
    message = refusal(run_config, lr_overrides=(('conv1/bias', '1 epoch', 0.0), entry))
    assert message.startswith('config.optimizer.lr_overrides: ')
    assert ' is no parameter, time and rate' in message


@pytest.mark.parametrize(
    ('time', 'answer'),
    [('soon', "'soon' is no duration"), ('-1 epochs', 'is no duration'), ('0 steps', "the nearest is '1 step'")],
)
def test_lr_overrides_with_an_invalid_time_are_refused(time, answer):
    message = refusal(run_config, lr_overrides=(('conv1/bias', '1 epoch', 0.0), ('fc8/bias', time, 0.1)))
    assert message.startswith('config.optimizer.lr_overrides[1]: ')
    assert answer in message


NET_SHAPES = {
    'conv1': {'kernel': (2, 2, 3, 4), 'bias': (4,)},
    'fc6': {'kernel': (5, 4), 'bias': (4,)},
    'fc7': {'kernel': (4, 3), 'bias': (3,)},
}


def net_draw(seed):
    rng = np.random.default_rng(seed)
    is_shape = {'is_leaf': lambda leaf: isinstance(leaf, tuple)}
    return jax.tree.map(lambda shape: rng.standard_normal(shape).astype(np.float32), NET_SHAPES, **is_shape)


def net_steps(make, w, gradients, rates):
    """Parameters and states before the first step and after each; `make` gives an optimizer for a traced rate."""

    @jax.jit
    def step(w, state, g, rate):
        updates, state = make(rate).update(g, state, w)
        return optax.apply_updates(w, updates), state

    state = make(jax.tree.map(jnp.float32, rates[0])).init(w)
    history = [(w, state)]
    for g, rate in zip(gradients, rates, strict=True):
        history.append(step(*history[-1], g, jax.tree.map(np.float32, rate)))
    return jax.tree.map(np.asarray, history)


def one_update(config, w, g, rate, *reduce_norms):
    optimizer = make_optimizer(config, rate, *reduce_norms)
    return optimizer.update(g, optimizer.init(w), w)[0]


@pytest.mark.parametrize('decay_biases', [False, True])
@pytest.mark.parametrize('by_layer', [False, True])
def test_weight_decays_equal_hand_numbers(by_layer, decay_biases):
    decays = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.0) if by_layer else None
    config = optimizer_config(
        weight_decay=0.0625, layer_weight_decay=decays, decay_biases=decay_biases, bias_lr_multiplier=4.0
    )
    w = {name: {'kernel': jnp.full((1, 1), 2.0), 'bias': jnp.full((1,), 3.0)} for name in NAMES}
    updates = one_update(config, w, jax.tree.map(jnp.zeros_like, w), 0.5)
    for name, decay in zip(NAMES, decays or [0.0625] * 8, strict=True):
        assert updates[name]['kernel'][0, 0] == -0.5 * decay * 2
        assert updates[name]['bias'][0] == (-0.5 * 4 * decay * 3 if decay_biases else 0)


def test_rates_by_parameter_are_not_scaled():
    # They include the multiplier of the biases, see learning_rate_tree().
    config = optimizer_config(weight_decay=0.0, bias_lr_multiplier=4.0)
    w = {name: {'kernel': jnp.ones((1, 1)), 'bias': jnp.ones((1,))} for name in ('conv1', 'fc8')}
    rates = {
        'conv1': {'kernel': jnp.float32(0.5), 'bias': jnp.float32(2**-20)},  # however small
        'fc8': {'kernel': jnp.float32(0.125), 'bias': jnp.float32(2)},
    }
    updates = jax.tree.map(lambda leaf: leaf.item(), one_update(config, w, w, rates))
    assert updates == {'conv1': {'kernel': -0.5, 'bias': -(2**-20)}, 'fc8': {'kernel': -0.125, 'bias': -2.0}}


def bits(tree):
    return [leaf.view(np.int32).tolist() for leaf in jax.tree.leaves(tree)]


def test_rate_0_freezes_a_parameter_and_its_velocity():
    config = optimizer_config(momentum=0.9, weight_decay=0.1)
    gradients = [net_draw(seed) for seed in range(1, 6)]
    gradients[2]['conv1']['kernel'][0, 0] = np.inf  # has no effect
    rates = [jax.tree.map(lambda leaf: 0.1, gradients[0]) for _ in gradients]
    rates[2]['conv1']['kernel'] = rates[3]['conv1']['kernel'] = 0.0
    rates[3]['fc6']['bias'] = 0.0
    history = net_steps(lambda rate: make_optimizer(config, rate), net_draw(0), gradients, rates)
    frozen = {(2, 'conv1', 'kernel'), (3, 'conv1', 'kernel'), (3, 'fc6', 'bias')}
    assert np.isfinite(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(history)])).all()
    for step, g in enumerate(gradients):
        (w, (_, _, old)), (new_w, (_, _, new)) = history[step], history[step + 1]
        for layer in NET_SHAPES:
            for kind in ('kernel', 'bias'):
                before, after = (
                    [tree[layer][kind] for tree in trees] for trees in ((w, old.trace), (new_w, new.trace))
                )
                if (step, layer, kind) in frozen:
                    assert bits(before) == bits(after)
                    continue
                # After a rate of 0 the velocity is the one before it.
                decay = 0.1 if kind == 'kernel' else 0.0
                weights, velocity = (np.asarray(leaf, np.float64) for leaf in before)
                velocity = 0.9 * velocity - 0.1 * (g[layer][kind] + decay * weights)
                np.testing.assert_allclose(after, [weights + velocity, velocity], rtol=1e-5, atol=1e-6)


def test_scalar_rate_0_freezes_everything():
    config = optimizer_config(momentum=0.9, weight_decay=0.1)
    gradients = [net_draw(seed) for seed in range(1, 4)]
    history = net_steps(lambda rate: make_optimizer(config, rate), net_draw(0), gradients, [0.1, 0.0, 0.1])
    assert bits(history[1]) == bits(history[2])
    assert all(a != b for a, b in zip(bits(history[2]), bits(history[3]), strict=True))


@pytest.mark.parametrize('decay', [0.0, 0.05])
def test_lars_matches_optax(decay):
    """Across a drop of the rate; a kernel of zeros, and one whose first update is zero, have a ratio of 1."""
    fields = {'momentum': 0.9, 'trust_coefficient': 0.02}
    config = optimizer_config(weight_decay=decay, **fields)
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', net_draw(0))
    masks = {'weight_decay_mask': kernels, 'trust_ratio_mask': kernels}
    w, gradients, rates = net_draw(0), [net_draw(seed) for seed in range(1, 7)], [2.0] * 3 + [0.2] * 3
    w['fc6']['kernel'][:] = 0
    gradients[0]['fc7']['kernel'][:] = 0
    ours = net_steps(lambda rate: make_optimizer(config, rate), w, gradients, rates)
    theirs = net_steps(lambda rate: optax.lars(rate, decay, eps=0.0, **masks, **fields), w, gradients, rates)
    for (our, _), (their, _) in zip(ours, theirs, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), our, their)
    first = ours[1][0]
    np.testing.assert_allclose(first['fc6']['kernel'], -2 * gradients[0]['fc6']['kernel'], rtol=1e-6)
    if not decay:
        np.testing.assert_array_equal(first['fc7']['kernel'], w['fc7']['kernel'])


def test_lars_equals_hand_numbers():
    config = optimizer_config(trust_coefficient=0.5, weight_decay=1.0, bias_lr_multiplier=2.0)
    w = {'fc8': {'kernel': jnp.array([[3.0], [4.0]]), 'bias': jnp.array([8.0])}}
    g = {'fc8': {'kernel': jnp.array([[2.0], [8.0]]), 'bias': jnp.array([8.0])}}
    updates = one_update(config, w, g, 0.1)
    # g + w = (5, 12) is 13 long, w 5: -.1 * .5 * 5 / 13 * (5, 12).
    np.testing.assert_allclose(updates['fc8']['kernel'], [[-0.25 * 5 / 13], [-0.25 * 12 / 13]], rtol=1e-6)
    np.testing.assert_allclose(updates['fc8']['bias'], [-1.6], rtol=1e-6)  # -.1 * 2 * 8


def test_lars_uses_norms_of_whole_kernels():
    """This device's share of a kernel is 5 and of its update 9; the bias is not scaled."""
    config = optimizer_config(trust_coefficient=0.5, weight_decay=0.0)
    w = {'fc8': {'kernel': jnp.array([[5.0]]), 'bias': jnp.array([7.0])}}
    g = {'fc8': {'kernel': jnp.array([[9.0]]), 'bias': jnp.array([3.0])}}
    seen = []

    def update(change):
        def reduce_norms(sums):
            seen.append(jax.tree.map(float, sums))
            return jax.tree.map(change, sums)

        updates = one_update(config, w, g, 0.1, reduce_norms)['fc8']
        assert updates['bias'][0] == np.float32(-0.1) * 3
        return updates['kernel'][0, 0]

    # -.1 * .5 * |w| / |update| * 9: 5 / 9, and 13 / 15 where other devices' shares add 144 to 25 and to 81.
    np.testing.assert_allclose(update(lambda total: total), -0.25, rtol=1e-6)
    np.testing.assert_allclose(update(lambda total: total + 144), -0.39, rtol=1e-6)
    # Twice the sums of both, as from two devices with equal shares, leave the ratio as it is.
    np.testing.assert_allclose(update(lambda total: 2 * total), -0.25, rtol=1e-6)
    # Twice the sum of the kernel alone, which is the smaller one: sqrt(2) * 5 / 9.
    np.testing.assert_allclose(update(lambda total: 2 * total if total == 25 else total), -0.35355339, rtol=1e-6)
    assert sorted(sums['fc8']['kernel'] for sums in seen) == [25.0] * 4 + [81.0] * 4
    assert sorted(sums['fc8']['bias'] for sums in seen) == [9.0] * 4 + [49.0] * 4
