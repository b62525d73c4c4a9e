"""What the train step states for GPUs and TPUs: XLA options, and the program before XLA compiles it."""

import re

import jax
import numpy as np
import pytest
from test_mesh import lowered_step, small_config

from alexnet_jax import layers, parallel
from alexnet_jax.config import preset_config, resolve
from alexnet_jax.training.train_step import make_train_step

MIB = 1_048_576
EARLY = 'xla_gpu_experimental_collective_start_as_early_as_possible'
OPTIONS_ON_GPUS = {
    'xla_gpu_experimental_parallel_collective_overlap_limit': 8,
    'xla_gpu_all_reduce_combine_threshold_bytes': 2 * MIB,
    'xla_gpu_reduce_scatter_combine_threshold_bytes': MIB,
}
OPTIONS_ON_TPUS = {
    'xla_enable_async_all_reduce': True,
    'xla_jf_crs_combiner_threshold_in_bytes': 4 * MIB,
    'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
    'xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions': True,
}
OPTIONS_ON_CPUS = {'xla_disable_hlo_passes': 'cse_barrier_expander'}


@pytest.mark.parametrize(
    ('platform', 'device_kind', 'devices', 'only_gradients', 'options'),
    [
        ('cpu', 'cpu', 1, True, OPTIONS_ON_CPUS),
        ('cpu', 'cpu', 8, False, OPTIONS_ON_CPUS),
        ('gpu', 'NVIDIA H100 80GB HBM3', 1, True, {}),
        ('gpu', 'NVIDIA H100 80GB HBM3', 2, True, OPTIONS_ON_GPUS | {EARLY: True}),
        ('gpu', 'NVIDIA H100 80GB HBM3', 64, False, OPTIONS_ON_GPUS | {EARLY: False}),
        ('tpu', 'TPU v5 lite', 1, True, {}),
        ('tpu', 'TPU v5 lite', 8, False, OPTIONS_ON_TPUS),
        ('tpu', 'TPU v5', 8, False, {}),
        ('tpu', 'TPU v6 lite', 8, False, {}),
        ('METAL', 'Metal', 2, False, {}),
    ],
)
def test_xla_options_of_each_device(platform, device_kind, devices, only_gradients, options):
    assert parallel.compiler_options(platform, device_kind, devices, only_gradients) == options


@pytest.mark.parametrize(
    ('preset', 'model', 'shard_optimizer', 'early'),
    [
        ('paper', 1, False, True),
        ('paper', 1, True, False),  # weights are all-gathered
        ('paper', 2, False, False),  # activations are exchanged
        ('bn_lars', 1, False, False),  # means of batch normalization are all-reduced
    ],
)
def test_gradients_start_early_unless_layers_wait_for_collectives(monkeypatch, preset, model, shard_optimizer, early):
    settings = preset_config(preset)
    settings.mesh.update(data=8 // model, model=model, shard_optimizer=shard_optimizer)
    resolved, options, seen = resolve(settings), parallel.compiler_options, []

    def record(platform, *arguments):
        seen.append(options('gpu', *arguments))
        return options(platform, *arguments)

    monkeypatch.setattr(parallel, 'compiler_options', record)
    make_train_step(resolved, parallel.make_mesh(resolved))
    assert [each[EARLY] for each in seen] == [early]


def step_program(platform: str, data: int, model: int, groups=()) -> str:
    """Returns the StableHLO of the step, traced for `platform`."""
    settings = small_config(data, model, groups)
    # The layers ask for the platform while the step is traced on the CPU devices of this process.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, 'for_platform', lambda _: layers.for_platform(platform))
        return lowered_step(settings).as_text()


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_accelerators_redistribute_over_a_leading_axis(platform):
    program = step_program(platform, 4, 2, {'model': {'dtype': 'bfloat16'}})
    gathered = re.findall(r'"stablehlo.all_gather".* -> tensor<(\S+)>', program)
    scattered = re.findall(r'"stablehlo.reduce_scatter".*?\}\) : \(\S+\) -> tensor<(\S+)>', program, re.DOTALL)
    # Before conv3, fc6, fc7, fc8, and of the logits: 4 images of a pair, half the channels of each device.
    halves = ['4x3x3x16', '4x1x1x16', '4x32', '4x32', '4x5']
    wholes = ['4x3x3x32', '4x1x1x32', '4x64', '4x64', '4x10']
    assert gathered == [
        f'{shape}xbf16' for shape in (wholes if platform == 'cpu' else [f'2x{each}' for each in halves])
    ]
    leading = '' if platform == 'cpu' else '1x'
    assert scattered == [f'{leading}{shape}xbf16' for shape in reversed(halves)]


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_dense_kernel_gradients_are_float32_from_the_product(platform, dtype):
    program = step_program(platform, 4, 2, {'model': {'dtype': dtype}})
    products = re.findall(r'stablehlo.dot_general .* -> tensor<(\S+)>', program)
    of_kernels = [each for each in products if each.startswith(('32x32x', '64x32x', '64x5x'))]
    if dtype == 'bfloat16':
        assert sorted(of_kernels) == ['32x32xf32', '64x32xf32', '64x5xf32']
        # No product is converted from bfloat16 to float32; kernels are converted the other way.
        assert not re.findall(r'convert .*tensor<(?:32x32|64x32|64x5)xbf16>\) -> tensor', program)
    else:
        assert 'bf16' not in program


@pytest.mark.parametrize(
    ('platform', 'groups', 'expected'),
    [
        ('cpu', {'model': {'dtype': 'bfloat16'}}, 0),
        ('tpu', {'model': {'dtype': 'bfloat16'}}, 0),
        ('gpu', {'model': {'dtype': 'float32'}}, 0),
        ('gpu', {'model': {'dtype': 'bfloat16'}}, 5),
        ('gpu', {'model': {'dtype': 'bfloat16'}, 'train': {'grad_accum_steps': 2}}, 0),
        ('gpu', {'model': {'dtype': 'bfloat16'}, 'mesh': {'grad_allreduce_dtype': 'float32'}}, 0),
    ],
)
def test_only_gradients_that_cudnn_rounds_are_sent_in_bfloat16(platform, groups, expected):
    program = step_program(platform, 4, 2, groups)
    summed = re.findall(r'"stablehlo.all_reduce".*?\}\) : \(tensor<(\S+)>\)', program, re.DOTALL)
    rounded = [kind for kind in summed if kind.endswith('xbf16')]
    # One all-reduce per parameter and one for the metrics; the kernels of convolutions have four dimensions.
    assert len(summed) == 17
    assert len(rounded) == expected
    assert all(len(kind.split('x')) == 5 for kind in rounded), rounded


@pytest.mark.parametrize(('platform', 'loops'), [('cpu', 0), ('gpu', 1), ('tpu', 1)])
def test_the_platform_of_the_mesh_decides_whether_micro_batches_are_a_loop(platform, loops):
    def whiles(steps: int) -> int:
        return step_program(platform, 1, 1, {'train': {'grad_accum_steps': steps}}).count('stablehlo.while')

    assert whiles(2) - whiles(1) == loops


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('shape', [(2, 3, 3, 4), (2, 5)])
def test_gather_of_channels_and_its_gradient(platform, shape):
    """Compares with concatenation and with sums over devices in NumPy; whole numbers are exact in any order."""
    generator, devices = np.random.default_rng(0), 4
    parts = generator.integers(-9, 10, (devices, *shape)).astype(np.float32)
    cotangents = generator.integers(-9, 10, (devices, *shape[:-1], devices * shape[-1])).astype(np.float32)
    mesh = jax.make_mesh((1, devices), ('data', 'model'), axis_types=(parallel.AxisType.Auto,) * 2)

    def both(x, cotangent):
        with layers.for_platform(platform):
            y, back = jax.vjp(lambda x: parallel.redistribute_features(x, devices * shape[-1], 'conv3'), x[0])
        return y[None], back(cotangent[0])[0][None]

    spec = parallel.Spec('model')
    y, gradient = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec))(parts, cotangents)
    np.testing.assert_array_equal(y, [np.concatenate(parts, -1)] * devices)
    np.testing.assert_array_equal(gradient, np.split(cotangents.sum(0), devices, -1))
