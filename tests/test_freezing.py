"""Learning-rate multipliers against hand numbers and NumPy; frozen parameters: bytes, gradients and communication."""

import math
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import read_json, read_lines, read_result, refusal, run_command, start_command, training_command, wait_for
from test_mesh import STATISTICS, batch, lowered_step, make_global_batch, rates, small_config

from alexnet_jax import augment, parallel
from alexnet_jax.audit import step_audit
from alexnet_jax.audit.hlo import Program
from alexnet_jax.config import default_config, resolve
from alexnet_jax.lr_multipliers import frozen_names
from alexnet_jax.optimizer import make_optimizer
from alexnet_jax.runtime.checkpoint_ref import parse_checkpoint_ref
from alexnet_jax.runtime.workdir import read_config
from alexnet_jax.schedules import Schedule
from alexnet_jax.training.checkpoint_reader import restore
from alexnet_jax.training.eval_step import make_eval_step, make_layer_stats_fn
from alexnet_jax.training.state import TrainState, abstract_state, init_state
from alexnet_jax.training.train_step import make_train_step

LAYERS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8')
FAST = {'xla_backend_optimization_level': 0}  # compiles faster


def run_config(multipliers, **fields):
    config = default_config()
    config.train.batch_size = 10
    config.optimizer.update({'lr_multipliers': multipliers, **fields})
    return resolve(config)


def rates_at(config, step):
    return Schedule(config.optimizer, config.train, 100).learning_rate_tree(step, 0)


def test_factors_by_hand():
    multipliers = (('conv*', 0.5), ('conv2', 3.0), ('*/bias', 4.0), ('fc8', 10.0), ('fc8/bias', 20.0))
    config = run_config(
        multipliers,
        schedule='steps',
        learning_rate=0.8,
        milestones=('20 steps',),
        warmup='4 steps',
        bias_lr_multiplier=2.0,
        lr_overrides=(('conv1/bias', '30 steps', 0.3),),
    )
    kernels = {'conv2': 3.0, 'fc6': 1.0, 'fc7': 1.0, 'fc8': 10.0}
    for step, scheduled in ((0, 0.2), (4, 0.8), (20, 0.08), (30, 0.08)):
        found = rates_at(config, step)
        for layer in LAYERS:
            bias = 2 * scheduled * (20.0 if layer == 'fc8' else 4.0)
            if layer == 'conv1' and step == 30:
                bias = 0.3
            expected = {'kernel': scheduled * kernels.get(layer, 0.5), 'bias': bias}
            assert found[layer] == pytest.approx(expected, rel=1e-12), (step, layer)


def test_factors_multiply_the_schedule_of_biases():
    config = run_config((('fc*', 3.0),), schedule='dexp', bias_schedule='constant', learning_rate=0.1)
    last = rates_at(config, 899)
    assert last['fc7'] == pytest.approx({'kernel': 3 * 0.1 / 250, 'bias': 3 * 0.1}, rel=1e-12)
    assert last['conv5'] == pytest.approx({'kernel': 0.1 / 250, 'bias': 0.1}, rel=1e-12)


@pytest.mark.parametrize(
    ('multipliers', 'fields', 'names'),
    [
        ((('conv*', 0.0), ('fc8', 10.0)), {}, [*LAYERS[:5]]),
        ((('*/bias', 0.0), ('conv3', 0.0)), {}, [f'{layer}/bias' if layer != 'conv3' else layer for layer in LAYERS]),
        ((('*', 0.0), ('fc[78]', 1.0)), {}, [*LAYERS[:6]]),
        ((('conv*', 0), ('conv1/kernel', 1)), {}, ['conv1/bias', *LAYERS[1:5]]),
        # A learning rate above 0 at a later time needs the gradient.
        ((('fc6', 0.0),), {'lr_overrides': (('fc6/kernel', '5 steps', 0.1),)}, ['fc6/bias']),
        ((('fc6', 0.0),), {'lr_overrides': (('fc6/kernel', '5 steps', 0.0),)}, ['fc6']),
        ((('fc6', 0.5), ('fc6', 2.0)), {}, []),
        ((), {'learning_rate': 0.0}, []),
    ],
)
def test_names_of_frozen_parameters(multipliers, fields, names):
    assert frozen_names(run_config(multipliers, **fields)) == names


@pytest.mark.parametrize(
    ('multipliers', 'reason'),
    [
        (('conv*', 0.0), "'conv*' is no pattern and number from 0"),  # the missing comma
        ((('conv*',),), "('conv*',) is no pattern and number from 0"),
        ((('conv*', 0.0, 1.0),), 'is no pattern and number from 0'),
        (((0.0, 'conv*'),), "(0.0, 'conv*') is no pattern and number from 0"),
        ((('conv*', -1.0),), "('conv*', -1.0) is no pattern and number from 0"),
        ((('conv*', math.nan),), "('conv*', nan) is no pattern"),
        ((('conv*', math.inf),), "('conv*', inf) is no pattern"),
        ((('conv*', True),), "('conv*', True) is no pattern"),
        ((('conv*', '0'),), "('conv*', '0') is no pattern"),
        ((('con1', 0.0),), "'con1' matches no layer or parameter of the network; the nearest is 'conv1'"),
        ((('conv*', 0.0), ('fc9', 1.0)), "'fc9' matches no layer"),
        (
            (('fc8/kernels', 0.0),),
            "'fc8/kernels' matches no layer or parameter of the network; the nearest is 'fc8/ker",
        ),
        ((('', 0.0),), "'' matches no layer"),
        ((('*', 0.0),), "(('*', 0.0),) freezes all parameters"),
        ((('conv*', 0.0), ('fc*', 0.0)), 'freezes all parameters'),
    ],
)
def test_invalid_multipliers_are_refused(multipliers, reason):
    message = refusal(run_config, multipliers)
    assert message.startswith('config.optimizer.lr_multipliers: ')
    assert reason in message


def test_layers_that_the_network_does_not_have_are_refused():
    config = default_config()
    config.model.widths = (96, 0, 384, 384, 256, 4096, 4096)
    config.model.num_classes = 'auto'
    config.optimizer.lr_multipliers = (('conv2', 0.5),)
    assert "'conv2' matches no layer" in refusal(resolve, config)
    config.optimizer.lr_multipliers = (('fc8', 10.0), ('conv*', 0.0))
    assert frozen_names(resolve(config)) == ['conv1', 'conv3', 'conv4', 'conv5']


SHAPES = {'conv1': (2, 2, 3, 4), 'conv4': (3, 4), 'fc6': (4, 5), 'fc8': (5, 4)}
# Of kernel and bias, from the patterns of test_update().
FACTORS = {'conv1': (0.0, 0.0), 'conv4': (0.5, 0.5), 'fc6': (1.0, 0.0), 'fc8': (10.0, 10.0)}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {
        layer: {'kernel': rng.standard_normal(shape), 'bias': rng.standard_normal(shape[-1:])}
        for layer, shape in SHAPES.items()
    }


@pytest.mark.parametrize('trust', [0.0, 0.02])
def test_update(trust):
    """Against a transcription in NumPy, in float64, over six steps with a drop, also with LARS."""
    patterns = (('conv1', 0.0), ('conv4', 0.5), ('fc6/bias', 0.0), ('fc8', 10.0))
    config = run_config(
        patterns,
        schedule='steps',
        learning_rate=0.01,
        milestones=('3 steps',),
        momentum=0.9,
        weight_decay=0.05,
        bias_lr_multiplier=2.0,
        trust_coefficient=trust,
    )
    w, v = draw(0), jax.tree.map(lambda leaf: 0.1 * leaf, draw(1))
    ours = jax.tree.map(jnp.float32, w)
    state = make_optimizer(config.optimizer, 0.0).init(ours)
    state = (*state[:-1], optax.TraceState(jax.tree.map(jnp.float32, v)))
    first_w, first_v = ours, state[-1].trace
    for step in range(6):
        gradients = draw(10 + step)
        scheduled = 0.01 if step < 3 else 0.001
        for layer, (kernel_factor, bias_factor) in FACTORS.items():
            for kind, rate in (('kernel', scheduled * kernel_factor), ('bias', 2 * scheduled * bias_factor)):
                change = gradients[layer][kind].copy()
                if kind == 'kernel':
                    change += 0.05 * w[layer][kind]
                    if trust:
                        change *= trust * np.linalg.norm(w[layer][kind]) / np.linalg.norm(change)
                if rate:
                    v[layer][kind] = 0.9 * v[layer][kind] - rate * change
                    w[layer][kind] = w[layer][kind] + v[layer][kind]
        tree = rates_at(config, step)
        optimizer = make_optimizer(
            config.optimizer, {layer: jax.tree.map(jnp.float32, tree[layer]) for layer in SHAPES}
        )
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradients), state, ours)
        ours = optax.apply_updates(ours, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, w)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), state[-1].trace, v)
    for layer, kind in (('conv1', 'kernel'), ('conv1', 'bias'), ('fc6', 'bias')):
        np.testing.assert_array_equal(ours[layer][kind], first_w[layer][kind])
        np.testing.assert_array_equal(state[-1].trace[layer][kind], first_v[layer][kind])


NETWORK = {
    'widths': (16, 32, 0, 0, 32, 64, 32),
    'conv_ops': ('activation lrn pool', 'activation pool', '', '', 'activation pool'),
}


def network_config(multipliers=(), shape=(1, 1), **groups):
    """Returns a `paper` with conv1, conv2, conv5 and the dense layers in two towers."""
    optimizer = {'lr_multipliers': multipliers} | groups.pop('optimizer', {})
    return small_config(*shape, {'model': NETWORK | groups.pop('model', {}), 'optimizer': optimizer} | groups)


def steps_of(settings, learning_rates, count=2):
    """Returns the state before and after `count` steps; all velocities are 0.001 before."""
    mesh = parallel.make_mesh(settings)
    state = init_state(settings, mesh)
    velocities = jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, 1e-3, np.float32), leaf.sharding), state.opt_state
    )
    state = TrainState(state.step, state.params, velocities, state.batch_stats)
    before = jax.device_get(state)
    prepared = augment.make_preprocess_params(STATISTICS, settings.data)
    rows = [make_global_batch(settings, mesh, batch(number, settings)) for number in range(count)]
    step = make_train_step(settings, mesh).lower(state, rows[0], learning_rates, prepared).compile(FAST)
    for each in rows:
        state, _ = step(state, each, learning_rates, prepared)
    return before, jax.device_get(state)


def names_of(tree):
    return {f'{layer}/{kind}': leaf for layer, kinds in tree.items() for kind, leaf in kinds.items()}


def assert_frozen(before, after, frozen):
    """Only the parameters and velocities of `frozen` have the same bytes as before."""
    for old, new in ((before.params, after.params), (before.opt_state[-1].trace, after.opt_state[-1].trace)):
        old, new = names_of(old), names_of(new)
        assert {name for name in old if old[name].tobytes() == new[name].tobytes()} == set(frozen)


MIDDLE = (('conv2', 0.0), ('conv5/bias', 0.0), ('fc6/kernel', 0.0))
MIDDLE_NAMES = ['conv2/kernel', 'conv2/bias', 'conv5/bias', 'fc6/kernel']
TRUNK = (('conv*', 0.0), ('fc8', 10.0))
TRUNK_NAMES = [f'{layer}/{kind}' for layer in ('conv1', 'conv2', 'conv5') for kind in ('kernel', 'bias')]


@pytest.fixture(scope='module')
def whole():
    """Returns a function that trains all parameters on one device, with a learning rate of 0 for some of them."""
    found = {}

    def steps(names):
        if tuple(names) not in found:
            learning_rates = rates(0.01)
            for name in names:
                layer, kind = name.split('/')
                learning_rates[layer][kind] = np.float32(0)
            found[tuple(names)] = steps_of(network_config(optimizer={'trust_coefficient': 0.1}), learning_rates)[1]
        return found[tuple(names)]

    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ('data', 'model', 'layout', 'fields'),
    [
        (1, 1, 'towers', {'train': {'grad_accum_steps': 2, 'remat': True}}),
        (4, 2, 'towers', {'mesh': {'shard_optimizer': True}}),
        (8, 1, 'data', {}),
        (2, 4, 'hybrid', {'mesh': {'shard_optimizer': True}, 'train': {'grad_accum_steps': 2}}),
    ],
    ids=['one device', 'towers', 'data', 'hybrid'],
)
@pytest.mark.parametrize(
    ('multipliers', 'frozen'), [(TRUNK, TRUNK_NAMES), (MIDDLE, MIDDLE_NAMES)], ids=['trunk', 'middle']
)
def test_frozen_steps(whole, data, model, layout, fields, multipliers, frozen):
    """The other parameters are those of a whole step with a learning rate of 0, on one device; with LARS."""
    mesh = {'layout': layout} | fields.get('mesh', {})
    settings = network_config(
        multipliers, (data, model), optimizer={'trust_coefficient': 0.1}, **{'train': {}} | fields | {'mesh': mesh}
    )
    before, after = steps_of(settings, rates(0.01))
    assert_frozen(before, after, frozen)
    # Relative to the change: rounding of the sums over micro-batches changes the maximum of a few windows.
    for start, ours, theirs in zip(*map(jax.tree.leaves, (before, after, whole(frozen))), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs - start)


@pytest.mark.slow
def test_frozen_steps_in_bfloat16():
    settings = network_config((('*/kernel', 0.0),), model={'dtype': 'bfloat16'})
    before, after = steps_of(settings, rates(0.01), 1)
    assert_frozen(before, after, [f'{layer}/kernel' for layer in ('conv1', 'conv2', 'conv5', 'fc6', 'fc7', 'fc8')])


@pytest.mark.slow
def test_frozen_layers_have_no_gradient():
    """The compiled step has only the convolutions of the forward pass, and no gradient of the inputs of fc6."""
    text = lowered_step(network_config(TRUNK)).compile(FAST).as_text()
    program = Program(text)
    fused = {each.name for fusion in program.instructions.values() for each in fusion.fused}
    found = Counter(program.part(name) for name in program.instructions.keys() - fused if program.flops(name))
    # Each of the two towers has its convolution; conv5 of this network reads only its own tower.
    assert found == {
        ('conv1', 'forward'): 1,
        ('conv2', 'forward'): 2,
        ('conv5', 'forward'): 2,
        ('fc6', 'forward'): 1,
        ('fc6', 'backward'): 1,  # of the kernel
        ('fc7', 'forward'): 1,
        ('fc7', 'backward'): 2,  # of the kernel and of the inputs
        ('fc8', 'forward'): 1,
        ('fc8', 'backward'): 2,
    }
    # Images are augmented once, as for the gradient of conv1.
    written = [each.tensors[0][1] for each in program.instructions.values() if each.opcode == 'reduce-window']
    assert (1, 16, 64, 64, 3) in written


# Numbers in the parameters of fc6, fc7 and fc8 of `paper`, with two shards on the axis `model` half of them.
DENSE = 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000


@pytest.mark.slow
def test_frozen_layers_send_nothing():
    """Hand numbers: 2 images per device, four and two devices; gradients go around the ring twice."""
    settings = default_config()
    settings.optimizer.lr_multipliers = (('conv*', 0.0),)
    report = step_audit.audit(step_audit.audit_config(settings, 'data:4,model:2', 2))
    by_layer = Counter()
    for each in report['collectives']:
        by_layer[each.layer, each.kind] += each.bytes
    images = 4  # of each of the four shards
    assert by_layer['gradients', 'all-reduce'] == 2 * 4 * DENSE / 2 * 3 / 4
    # The inputs of conv3 and fc6 are gathered, but no gradient returns; those of fc7 and fc8 return.
    expected = {('conv3', 'all-gather'): 13 * 13 * 256, ('fc6', 'all-gather'): 9216}
    expected |= {(layer, kind): 4096 for layer in ('fc7', 'fc8') for kind in ('all-gather', 'reduce-scatter')}
    expected |= {('logits', kind): 1000 for kind in ('all-gather', 'reduce-scatter')}
    exchanged = {key: sent for key, sent in by_layer.items() if key[0] not in ('gradients', 'metrics')}
    assert exchanged == {key: images * 4 * numbers / 2 for key, numbers in expected.items()}
    assert 1 <= report['wire_bytes_per_device'] / report['analytic_minimum_bytes'] < 1.0001
    # Multiply-adds of two images: all layers forward, three dense kernels, and the inputs of fc7 and fc8.
    dense = 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    assert report['flops_per_device'] == 2 * 2 * (report['multiply_adds'] + dense + dense - 9216 * 4096)
    assert report['compiler_flops_per_device'] == pytest.approx(report['flops_per_device'], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('layout', 'multipliers'),
    [
        ('towers', (('conv1', 0.0), ('fc*/kernel', 0.0))),
        ('hybrid', (('*', 0.0), ('fc8', 1.0))),
        ('hybrid', (('*', 0.0), ('fc6/bias', 1.0))),
    ],
    ids=str,
)
def test_minimum_of_the_communication_is_reached(layout, multipliers):
    settings = default_config()
    settings.mesh.update({'layout': layout, 'shard_optimizer': True})
    settings.model.widths = (96, 256, 0, 0, 256, 512, 256)
    settings.optimizer.lr_multipliers = multipliers
    report = step_audit.audit(step_audit.audit_config(settings, 'data:2,model:2', 8))
    assert 1 <= report['wire_bytes_per_device'] / report['analytic_minimum_bytes'] < 1.001


NORMED = {'conv_ops': ('activation batch_norm pool', 'activation batch_norm pool', '', '', 'activation pool')}


def normed_state(settings, mesh):
    """Returns a state whose running statistics are far from those of any batch."""
    state = init_state(settings, mesh)
    values = jax.tree.map(lambda leaf: np.linspace(0.3, 0.7, leaf.size, dtype=np.float32), state.batch_stats)
    return TrainState(state.step, state.params, state.opt_state, values)


@pytest.mark.slow
def test_batch_norm_of_frozen_layers_uses_running_statistics():
    """Without noise and dropout, the loss in training is that of the evaluation step, which uses them."""
    fixed = {'crop': False, 'flip': False, 'color': 'none', 'image_size': 72, 'crop_size': 64}
    losses, stats = {}, {}
    for multipliers in (TRUNK, (('conv*/kernel', 0.0),)):
        settings = network_config(
            multipliers,
            model=NORMED | {'dropout': 0.0},
            data=fixed,
            train={'batch_size': 24, 'grad_accum_steps': 3},  # the mean of three equal numbers may differ from them
        )
        mesh = parallel.make_mesh(settings)
        prepared = augment.make_preprocess_params(STATISTICS, settings.data)
        rows = make_global_batch(settings, mesh, batch(0, settings))
        sums = make_eval_step(settings, mesh, 1)(normed_state(settings, mesh), rows, prepared)
        before = jax.device_get(normed_state(settings, mesh).batch_stats)
        state, metrics = make_train_step(settings, mesh)(normed_state(settings, mesh), rows, rates(0.01), prepared)
        losses[multipliers] = float(metrics['loss']), float(sums[0] / sums[3])
        after = jax.device_get(state.batch_stats)
        stats[multipliers] = [
            old.tobytes() == new.tobytes()
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        ]
    trunk, kernels = losses.values()
    assert trunk[0] == pytest.approx(trunk[1], rel=1e-5)
    assert abs(kernels[0] / kernels[1] - 1) > 1e-3
    assert list(stats.values()) == [[True] * 4, [False] * 4]


@pytest.mark.slow
def test_last_update_of_a_frozen_parameter_is_zero():
    """Although its velocity is that of the time before it was frozen."""
    settings = network_config(MIDDLE)
    mesh = parallel.make_mesh(settings)
    state = init_state(settings, mesh)
    velocities = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), state.opt_state)
    state = TrainState(state.step, state.params, velocities, state.batch_stats)
    prepared = augment.make_preprocess_params(STATISTICS, settings.data)
    stats = jax.device_get(make_layer_stats_fn(settings, mesh)(state, batch(0, settings)['image'], prepared))
    updates = {
        f'{layer}/{kind}': row[1 + 2 * i] for layer, row in stats.items() for i, kind in enumerate(('kernel', 'bias'))
    }
    assert {name for name, update in updates.items() if update == 0} == set(MIDDLE_NAMES)
    assert [update for update in updates.values() if update] == pytest.approx([1e-3] * 8, rel=1e-4)


def train_with(data_dir, workdir, steps, multipliers):
    fields = {'train.steps': steps, 'checkpoint.every': 1, 'eval.every': 2, 'data.source': 'photos'}
    fields |= {'optimizer.schedule': 'constant', 'optimizer.lr_multipliers': multipliers}
    return training_command(data_dir, workdir, fields)


def params_of(workdir, step):
    config = read_config(str(workdir))
    ref = parse_checkpoint_ref(f'{workdir}/checkpoints/{step}')
    return names_of(jax.device_get(restore(ref, abstract_state(config, parallel.make_mesh(config))).state.params))


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_programs')
def test_killed_run_resumes_and_unfreezes(photos_dir, tmp_path):
    killed, straight = tmp_path / 'killed', tmp_path / 'straight'
    process = start_command(*train_with(photos_dir, killed, 100_000, TRUNK))
    wait_for(
        lambda: [path for path in (killed / 'checkpoints').glob('*') if path.name.isdigit() and int(path.name) > 2]
    )
    process.kill()
    process.communicate()
    steps = max(int(path.name) for path in (killed / 'checkpoints').glob('*') if path.name.isdigit()) + 4
    resumed = run_command(*train_with(photos_dir, killed, steps, TRUNK))
    whole = run_command(*train_with(photos_dir, straight, steps, TRUNK))
    assert (resumed.returncode, whole.returncode) == (0, 0), resumed.stderr + whole.stderr
    assert resumed.stderr.count('config.optimizer.lr_multipliers freezes conv1, conv5\n') == 1
    assert f'resuming {killed} at step ' in resumed.stderr
    assert read_result(killed)['state_digest'] == read_result(straight)['state_digest']
    rows = read_lines(straight / 'layers.jsonl')
    assert rows
    for row in rows:
        assert [row[layer][f'{kind}_update'] for layer in ('conv1', 'conv5') for kind in ('kernel', 'bias')] == [0] * 4
        assert row['fc8']['kernel_update'] > 0
    shutil.copytree(straight, tmp_path / 'frozen')
    unfrozen = run_command(*train_with(photos_dir, straight, steps + 2, ()))
    assert unfrozen.returncode == 0, unfrozen.stderr
    assert ' freezes ' not in unfrozen.stderr
    changed = [line for line in unfrozen.stderr.splitlines() if 'config.optimizer.lr_multipliers: ' in line]
    assert len(changed) == 1
    assert changed[0].endswith(' -> ()')
    first = params_of(tmp_path / 'frozen', steps)
    last = params_of(straight, steps + 2)
    assert not [name for name in first if first[name].tobytes() == last[name].tobytes()]
    assert read_json(straight / 'config.json')['optimizer']['lr_multipliers'] == []
