"""The measurements of accelerator.py that are its own. Each prints one line of JSON per result.

JAX_PLATFORMS=cuda python benchmarks/accelerator_parts.py device|steps|precision [--rehearsal]
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import runner

BATCH_SIZES, REHEARSED_BATCH_SIZES = (128, 1024), (4,)
# model.dtype and model.precision.
ROUNDINGS = (('float32', 'default'), ('bfloat16', 'default'), ('float32', 'float32'))
# Settings of a network that a CPU compiles and runs within seconds.
SMALL = (
    '--config.model.widths=(16,32,32,32,32,64,64)',
    '--config.model.num_classes=10',
    '--config.data.image_size=72',
    '--config.data.crop_size=64',
)
WARMUP, BLOCKS, STEPS = 3, 5, 20  # steps before the timing; blocks of steps that are timed as a whole

Row = dict[str, Any]


def device(rehearsal: bool) -> Iterator[Row]:
    """Yields the names, versions and memory of the devices that JAX finds."""
    import jax
    import jax.extend
    import jaxlib

    first = jax.devices()[0]
    yield {
        'kind': first.device_kind,
        'platform': first.platform,
        'count': jax.device_count(),
        'client': ' '.join(jax.extend.backend.get_backend().platform_version.split()),
        'jax': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'memory_stats': first.memory_stats(),
        'machine': runner.machine(),
    }


def steps(rehearsal: bool) -> Iterator[Row]:
    """Yields speed and memory of train steps of `paper` on one device, which are dispatched without waiting for each.

    images_per_second: of the median block; best_images_per_second: of the fastest block. The bytes of `state` and
    `temporary` are those of the compiler; memory_stats are the allocator's, since the process started.
    """
    import jax

    from alexnet_jax import parallel
    from benchmarks.project import RATE, Project, paper_config

    blocks, count, warmup = (1, 2, 1) if rehearsal else (BLOCKS, STEPS, WARMUP)
    for batch_size in REHEARSED_BATCH_SIZES if rehearsal else BATCH_SIZES:
        for dtype, precision in ROUNDINGS[-1:] if rehearsal else ROUNDINGS:
            flags = [*(SMALL if rehearsal else ()), f'--config.model.precision={precision}']
            project = Project(paper_config(batch_size, flags, dtype))
            begin = time.perf_counter()
            step = project.train_step.lower(*project.train_arguments).compile()
            compile_seconds = time.perf_counter() - begin
            rates = parallel.replicate(project.mesh, project.rates(RATE))
            state, seconds = project.state, []
            for block in range(-1, blocks):
                begin = time.perf_counter()
                for _ in range(warmup if block < 0 else count):
                    state, metrics = step(state, project.batch, rates, project.preprocessing)
                loss = float(jax.block_until_ready(metrics)['loss'])
                seconds.append((time.perf_counter() - begin) / count)
            speeds = [batch_size / each for each in seconds[1:]]
            memory = step.memory_analysis()
            yield {
                'batch_size': batch_size,
                'dtype': dtype,
                'precision': precision,
                'images_per_second': statistics.median(speeds),
                'best_images_per_second': max(speeds),
                'compile_seconds': compile_seconds,
                'loss': loss,
                'state': memory.argument_size_in_bytes,
                'temporary': memory.temp_size_in_bytes,
                'memory_stats': jax.devices()[0].memory_stats(),
            }
            del project, state


def precision(rehearsal: bool) -> Iterator[Row]:
    """Yields the errors of a convolution and a product for each rounding, relative to NumPy's float64, as norms."""
    import jax

    sys.path.append(os.path.join(runner.ROOT, 'tests'))
    import net145  # type: ignore[import-not-found]

    from alexnet_jax.layers import convolution
    from benchmarks.check import distance

    random = np.random.default_rng(0)
    images, side, width = (2, 7, 64) if rehearsal else (32, 27, 4096)
    cases: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any], tuple[int, ...], tuple[int, ...]]] = {
        'convolution': (
            lambda x, kernel: convolution(x, kernel, padding=((2, 2), (2, 2))),
            lambda x, kernel: net145.convolve(x, kernel, pad=2),
            (images, side, side, 48),
            (5, 5, 48, 128),
        ),
        'product': (lambda x, kernel: x @ kernel, lambda x, kernel: x @ kernel, (images, width), (width, width)),
    }
    for operation, (function, oracle, *shapes) in cases.items():
        arrays = [random.standard_normal(shape, np.float32) for shape in shapes]
        expected = oracle(*(array.astype(np.float64) for array in arrays))
        for name in ('default', 'tensorfloat32', 'float32', 'bfloat16'):
            inputs = [jax.numpy.asarray(array, 'bfloat16' if name == 'bfloat16' else 'float32') for array in arrays]
            with jax.default_matmul_precision(name if name in ('tensorfloat32', 'float32') else None):
                found = jax.jit(function)(*inputs)
            yield {'operation': operation, 'precision': name, 'error': distance(found.astype('float32'), expected)}


if __name__ == '__main__':
    part = {'device': device, 'steps': steps, 'precision': precision}[sys.argv[1]]
    for row in part('--rehearsal' in sys.argv):
        print(json.dumps(row), flush=True)
