"""What the train step states for GPUs and TPUs: XLA options, and the program before XLA compiles it."""

import pytest

from alexnet_jax import parallel

MIB = 1_048_576
OPTIONS_ON_GPUS = {
    'xla_gpu_experimental_parallel_collective_overlap_limit': 4,
    'xla_gpu_all_reduce_combine_threshold_bytes': 4 * MIB,
    'xla_gpu_reduce_scatter_combine_threshold_bytes': 4 * MIB,
}
OPTIONS_ON_CPUS = {'xla_disable_hlo_passes': 'cse_barrier_expander'}


@pytest.mark.parametrize(
    ('platform', 'devices', 'options'),
    [
        ('cpu', 1, OPTIONS_ON_CPUS),
        ('cpu', 8, OPTIONS_ON_CPUS),
        ('gpu', 1, {}),
        ('gpu', 2, OPTIONS_ON_GPUS),
        ('gpu', 64, OPTIONS_ON_GPUS),
        ('tpu', 1, {}),
        ('tpu', 8, {}),
        ('METAL', 2, {}),
    ],
)
def test_xla_options_of_each_platform(platform, devices, options):
    assert parallel.compiler_options(platform, devices) == options
