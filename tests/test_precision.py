"""model.precision: each convolution and matrix product of each step is lowered with it, also in older runs."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import read_json, refusal
from test_mesh import FAST, STATISTICS, batch, make_global_batch, rates, small_config

from alexnet_jax import augment, layers, parallel
from alexnet_jax.config import Config, preset_config, resolve
from alexnet_jax.report.config_diff import published
from alexnet_jax.runtime.workdir import check_resumable, describe_changes, read_config
from alexnet_jax.training.eval_step import make_activation_fn, make_eval_step, make_layer_stats_fn, make_predict_step
from alexnet_jax.training.state import abstract_state, build_model
from alexnet_jax.training.train_step import make_train_step

LEVELS = {'default': 'DEFAULT', 'tensorfloat32': 'HIGH', 'float32': 'HIGHEST'}  # of jax.lax.Precision
OLD_RUN = Path(__file__).parent / 'data' / 'run_of_0_1'


def config_with(precision: str, mesh: tuple[str, int, int] = ('towers', 1, 1), **groups: Any) -> Config:
    layout, data, model = mesh
    groups['model'] = {'precision': precision, **groups.get('model', {})}
    return small_config(data, model, {'mesh': {'layout': layout}, **groups})


def lowered(step: str, config: Config) -> str:
    """Returns the StableHLO of a step."""
    mesh = parallel.make_mesh(config)
    state, prepared = abstract_state(config, mesh), augment.make_preprocess_params(STATISTICS, config.data)
    rows = make_global_batch(config, mesh, batch(0, config))
    if step == 'train':
        return make_train_step(config, mesh).lower(state, rows, rates(0.01), prepared).as_text()
    if step == 'eval':
        return make_eval_step(config, mesh, views=10).lower(state.for_inference(), rows, prepared).as_text()
    if step == 'module':  # in the Python API and in `alexnet convert`
        images = jax.ShapeDtypeStruct((4, config.data.crop_size, config.data.crop_size, 3), np.float32)
        graph = build_model(config)[0]
        apply = jax.jit(lambda params, means, images: nnx.merge(graph, params, means)(images))
        return apply.lower(state.params, state.batch_stats, images).as_text()
    if step == 'layer_stats':
        return make_layer_stats_fn(config, mesh).lower(state, rows['image'], prepared).as_text()
    predict, activations = make_predict_step(config, mesh, views=1), make_activation_fn(config, mesh, 'fc7')
    function = {'predict': predict, 'activations': activations}[step]
    return function.lower(state.for_inference(), rows['image'], prepared).as_text()


def precisions(text: str) -> Counter[tuple[str, str]]:
    """Counts the convolutions and products in StableHLO by name and by the precision of their operands.

    Products with ones, by which CPUs sum the gradients of biases, are named 'sum' and always have HIGHEST. Convolutions
    that copy the windows of locally connected layers are named 'copy'; their kernel of zeros and ones is not rounded.
    """
    found: Counter[tuple[str, str]] = Counter()
    for line in text.splitlines():
        if operation := re.search(r'stablehlo\.(convolution|dot_general|dot)\b', line):
            name, (first, second) = operation[1], re.findall(r'\b(DEFAULT|HIGH|HIGHEST)\b', line)
            if name != 'convolution' and re.search(r': \(tensor<1x\d+xf32>', line):
                name = 'sum'
            elif re.search(r'feature_group_count = (?!1\b)', line):
                name = 'copy'
            assert first == second or name == 'copy', line
            found[name, first] += 1
    return found


# The steps of `paper` have five convolutions and three products. The gradients of conv1 and of fc6 to fc8 add two per
# layer, but one for conv1, whose images have no gradient. With two towers on one device, conv2, conv4 and conv5 count
# twice.
FORWARD = {'convolution': 8, 'dot_general': 3}
BACKWARD = {'convolution': 2 * 8 - 1, 'dot_general': 2 * 3}
COUNTS = {
    'train': {name: FORWARD[name] + BACKWARD[name] for name in FORWARD} | {'sum': 8},
    'eval': FORWARD,
    'predict': FORWARD,
    'activations': {'convolution': 8, 'dot_general': 2},  # up to fc7
    'layer_stats': {'convolution': 8, 'dot_general': 2},  # fc8 has no dead units
    'module': FORWARD,
}


@pytest.mark.parametrize(
    ('step', 'precision'),
    [
        *(pytest.param('train', precision, marks=pytest.mark.slow) for precision in ('tensorfloat32', 'float32')),
        *((step, 'float32') for step in COUNTS if step != 'train'),
        ('predict', 'tensorfloat32'),
        ('predict', 'default'),
    ],
)
def test_every_operation_of_a_step_has_the_precision(step, precision):
    found = precisions(lowered(step, config_with(precision)))
    assert found == {
        (name, 'HIGHEST' if name == 'sum' else LEVELS[precision]): count for name, count in COUNTS[step].items()
    }


LOCAL = {
    'locally_connected': ('conv4', 'conv5'),
    'conv_ops': ('activation pool lrn', 'activation pool spatial_lrn', 'activation', 'activation batch_norm', 'pool'),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mesh', 'platform', 'groups'),
    [
        (('hybrid', 2, 4), 'cpu', {'train': {'remat': True, 'mixup': 0.2}}),
        (('data', 2, 1), 'gpu', {'model': LOCAL, 'data': {'crop_scale': (0.3, 1.0)}}),
    ],
)
def test_no_operation_of_other_train_steps_lacks_the_precision(mesh, platform, groups, monkeypatch):
    for table in layers.PLATFORMS.values():
        monkeypatch.setitem(table, 'cpu', table[platform])
    found = precisions(lowered('train', config_with('float32', mesh, **groups)))
    assert {level for _, level in found} == {'HIGHEST'}
    # Two layers with two towers; the windows, and the gradients of their pixels.
    assert found['copy', 'HIGHEST'] == (2 * 2 * 2 if platform == 'gpu' else 0)
    assert found['convolution', 'HIGHEST'] >= 5
    assert found['dot_general', 'HIGHEST'] >= 9


def test_default_leaves_the_choice_to_the_variable_of_jax():
    with jax.default_matmul_precision('tensorfloat32'):  # what JAX_DEFAULT_MATMUL_PRECISION sets at the start
        assert set(precisions(lowered('predict', config_with('default')))) == {
            (name, 'HIGH') for name in ('convolution', 'dot_general')
        }
        assert {level for _, level in precisions(lowered('predict', config_with('float32')))} == {'HIGHEST'}


def test_cpu_computes_the_same_bits_with_every_precision():
    images = np.random.default_rng(0).normal(0, 60, (4, 64, 64, 3)).astype(np.float32)
    params, means = jax.jit(build_model(config_with('default'))[1], compiler_options=FAST)(jax.random.key(0))

    def logits(precision):
        graph = build_model(config_with(precision))[0]
        apply = jax.jit(lambda *state, images: nnx.merge(graph, *state)(images), compiler_options=FAST)
        return np.asarray(apply(params, means, images=images))

    expected = logits('default')
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(logits('tensorfloat32'), expected)
    np.testing.assert_array_equal(logits('float32'), expected)


def test_bfloat16_has_no_operands_to_round():
    message = refusal(config_with, 'float32', model={'dtype': 'bfloat16'})
    assert message == (
        "config.model.precision: 'float32' with model.dtype='bfloat16', which has no operands of float32 to round; the"
        " nearest is 'default'"
    )
    config_with('default', model={'dtype': 'bfloat16'})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns the folder of a run whose settings have no model.precision, as those of earlier versions."""
    (tmp_path / 'checkpoints' / '7').mkdir(parents=True)
    written = config_with('default').to_dict()
    del written['model']['precision']
    (tmp_path / 'config.json').write_text(json.dumps(written))
    return tmp_path


def test_runs_of_earlier_versions_have_the_default(folder):
    assert read_config(str(folder)) == config_with('default')
    assert 'precision' not in read_json(OLD_RUN / 'config.json')
    assert read_config(str(OLD_RUN)).model.precision == 'default'


def test_precision_may_change_on_resume_and_is_logged(folder):
    check_resumable(config_with('float32'), str(folder))
    assert describe_changes(config_with('float32'), str(folder)) == ['config.model.precision: default -> float32']
    other = config_with('float32', model={'dropout': 0.25})
    assert refusal(check_resumable, other, str(folder)).startswith('config.model.dropout: 0.25, but')


def test_published_errors_are_compared_with_every_precision():
    settings = preset_config('paper')
    settings.model.precision = 'float32'
    assert published(resolve(settings))[0]
