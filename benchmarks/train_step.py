"""Times one `paper` train step and forward pass, in turn with the same passes in TensorFlow and PyTorch.

    python benchmarks/train_step.py [--batch_size=128] [--rounds=6] [--torch_python=PATH] [--json]
    python benchmarks/train_step.py --platform=gpu --dtype=bfloat16 --batch_size=1024
    python benchmarks/train_step.py --platform=gpu --precision=float32

Each pass is timed with the batch in memory, until its result is ready:
  train    forward with LRN and dropout, gradient, momentum update with weight decay. The project runs the step of its
           training loop on uint8 images of 256 pixels, which includes augmentation and error rates. The peers start
           from float images of 224 pixels, so the project does more work.
  forward  logits without dropout. The project runs its evaluation of the center view, which includes the crop, the mean
           subtraction, softmax, loss and errors. The peers sum their logits.
  product  a product of two square matrices. The best rate over all libraries and sizes is the machine's peak. The FLOPs
           of a step are those of its convolutions and matrix products.

Before the timing, the project's losses, logits, velocities and updated weights are compared with those of a plain
implementation (plain.py). If they differ by more than rounding errors, nothing is timed.

Each side has its own process. The sides take turns step by step, so that a change in the machine's speed affects all of
them; waiting sides are stopped. A ratio is the peer's median time over the project's: above 1 the project is faster.

--config.a.b=value applies to the project's side. A TPU has no peers. Neither GPU nor TPU was tested. On these
platforms all sides hold device memory at the same time, so their allocators do not preallocate it. By default, products
and convolutions of float32 round their inputs as JAX does: on GPUs from Ampere on, all sides round to TF32; on TPUs, to
bfloat16. With --precision=float32, no side rounds them.
"""

import argparse
import contextlib
import functools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import peers, runner

PROJECT, *PEERS = SIDES = ('jax', 'tensorflow', 'torch')  # the names of the packages
PASSES = ('train', 'forward')
PLATFORMS = {
    'cpu': runner.NO_GPU | {'TF_ENABLE_ONEDNN_OPTS': '1'},
    # All sides share the device.
    'gpu': {'JAX_PLATFORMS': 'cuda', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'TF_FORCE_GPU_ALLOW_GROWTH': 'true'},
    'tpu': {'JAX_PLATFORMS': 'tpu'},
}
# Rows of the square matrices. On accelerators they are larger, to make launch and transfer times negligible.
PRODUCTS = {'cpu': (2048, 4096), 'gpu': (8192, 16384), 'tpu': (8192, 16384)}

Times = dict[str, dict[str, list[float]]]  # seconds of each round, by pass and side


def start(arguments: argparse.Namespace, flags: list[str]) -> tuple[str | None, Callable[[str], Any]]:
    """Runs in a worker. Returns the side's version or None, and a function that times a pass or runs `check`."""
    side, device = arguments.worker, 'cuda' if arguments.platform == 'gpu' else 'cpu'
    batch_size, dtype, precision = arguments.batch_size, arguments.dtype, arguments.precision
    flags = [*flags, f'--config.model.precision={precision}']
    passes: dict[str, Callable[[], Any]] = {}
    product: Callable[[int, str], Callable[[], float]]
    if side == PROJECT:  # the interpreter of a peer may lack what the project imports
        from benchmarks.project import paper_config, project_passes, project_product

        if precision == 'float32':
            import jax

            jax.config.update('jax_default_matmul_precision', precision)  # of the product; the step has its own
        passes, product = project_passes(paper_config(batch_size, flags, dtype)), project_product
    elif not peers.is_available(side, arguments.platform):
        return None, lambda name: None
    elif side == 'tensorflow':
        passes, product = peers.tensorflow_passes(batch_size, dtype, precision), peers.tensorflow_product
    else:
        passes = peers.torch_passes(batch_size, dtype, device, precision)
        product = functools.partial(peers.torch_product, device=device)
    passes |= {f'product {size}': product(size, dtype) for size in PRODUCTS[arguments.platform]}

    def respond(name: str) -> Any:
        if name == 'check':
            return passes[name]()
        begin = time.perf_counter()
        value = passes[name]()
        seconds = time.perf_counter() - begin
        if not math.isfinite(value):
            raise FloatingPointError(f'{name} returned {value}')
        return seconds

    return sys.modules[side].__version__, respond


def check_against_plain(worker: runner.Worker) -> dict[str, float]:
    """Returns the largest difference from the plain implementation by its name. Exits if it exceeds the tolerance."""
    name, distance, tolerance = worker.ask('check')
    if not distance <= tolerance:  # also catches NaN
        runner.fail(
            f'{name} differs from the plain implementation by {distance:.1e} of its norm; rounding errors explain'
            f' {tolerance:g}. The step is wrong, or its settings differ from those of plain.py (then use --unchecked)'
        )
    return {name: distance}


def results(times: Times, batch_size: int, flops: dict[str, int]) -> dict[str, Any]:
    """Returns the results for --json: images/s, ratios, FLOP/s, and shares of the best matrix product's FLOP/s.

    Args:
      flops: FLOPs per image, by pass.
    """
    found: dict[str, Any] = {}
    rates = dict.fromkeys(times['train'], 0.0)
    for name in times.keys() - set(PASSES):
        of_product = 2 * int(name.split()[1]) ** 3
        rates = {side: max(rate, of_product / min(times[name][side])) for side, rate in rates.items()}
    for prefix, name in (('', 'train'), ('forward_', 'forward')):
        speeds = {side: batch_size / statistics.median(seconds) for side, seconds in times[name].items()}
        found[f'{prefix}images_per_second'] = own = speeds.get(PROJECT)
        for peer in PEERS:
            found[f'{peer}_{prefix}images_per_second'] = speeds.get(peer)
            found[f'{peer}_{prefix}ratio'] = own / speeds[peer] if own and peer in speeds else None
        found[f'{prefix}flops_per_image'] = flops[name]
        found[f'{prefix}share_of_product'] = {side: flops[name] * s / max(rates.values()) for side, s in speeds.items()}
        found[f'{prefix}best_images_per_second'] = {side: batch_size / min(s) for side, s in times[name].items()}
    return found | {'product_flops_per_second': rates}


def report(result: dict[str, Any]) -> str:
    """Formats the table as text."""
    rates = ', '.join(f'{rate / 1e9:.0f} with {side}' for side, rate in result['product_flops_per_second'].items())
    rows = [('side', 'version', 'pass', 'images/s', 'best', 'share of product', 'project/peer')]
    for side in [side for side in SIDES if side in result['versions']]:
        version = result['versions'][side]
        if version is None:
            rows.append((side, 'absent', '', '', '', '', ''))
            continue
        for prefix, name in (('', 'train'), ('forward_', 'forward')):
            best, share = (result[f'{prefix}{what}'][side] for what in ('best_images_per_second', 'share_of_product'))
            speed = result[f'{"" if side == PROJECT else f"{side}_"}{prefix}images_per_second']
            ratio = result.get(f'{side}_{prefix}ratio')
            figures = f'{speed:.1f}', f'{best:.1f}', f'{share:.2f}', '' if ratio is None else f'{ratio:.2f}'
            rows.append((side, version, name, *figures))
    lines = [
        f'{result["machine"]}; batch {result["batch_size"]}, {result["dtype"]}, {result["platform"]}',
        f'GFLOP per image: train {result["flops_per_image"] / 1e9:.2f}, forward'
        f' {result["forward_flops_per_image"] / 1e9:.2f}; best GFLOP/s of a matrix product: {rates}',
        *('', *runner.text_table(*rows)),
    ]
    for name, value in result['difference'].items():
        lines += ['', f'Equal to the plain implementation except for rounding; the largest: {value:.1e}, of {name}.']
    return '\n'.join(lines)


def main() -> None:
    """Runs the requested sides and prints the results."""
    parser = runner.make_parser(__doc__, 6, '--sides', SIDES)
    parser.add_argument('--batch_size', type=runner.positive, default=128)
    parser.add_argument('--warmup', type=runner.positive, default=2, help='rounds before those, compilation included')
    parser.add_argument('--platform', choices=PLATFORMS, default='cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of all sides')
    parser.add_argument('--precision', choices=('default', 'float32'), default='default', help='of float32, all sides')
    parser.add_argument('--torch_python', type=runner.program, default=sys.executable, help='Python with torch')
    parser.add_argument('--unchecked', action='store_true', help='do not compare with the plain implementation')
    arguments, flags = parser.parse_known_args()
    if arguments.worker:
        return runner.serve(lambda: start(arguments, flags))
    from alexnet_jax.audit import cost_model
    from benchmarks.project import paper_config

    config = paper_config(
        arguments.batch_size, [*flags, f'--config.model.precision={arguments.precision}'], arguments.dtype
    )
    forward = 2 * sum(layer.multiply_adds for layer in cost_model.layers(config))
    passes = (*PASSES, *(f'product {size}' for size in PRODUCTS[arguments.platform]))
    pythons = {'torch': arguments.torch_python}
    difference: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        commands = {side: runner.command_of(side, python=pythons.get(side, sys.executable)) for side in arguments.sides}
        workers = [runner.Worker(side, each, PLATFORMS[arguments.platform], stack) for side, each in commands.items()]
        present = [worker for worker in workers if worker.about is not None]
        if present and present[0].side == PROJECT and not arguments.unchecked:
            difference = check_against_plain(present[0])
        sides = [worker.side for worker in present]
        times = {
            name: dict(zip(sides, runner.take_turns(present, name, arguments.rounds, arguments.warmup), strict=True))
            for name in passes
        }
    result = results(times, config.train.batch_size, {'train': cost_model.flops_per_image(config), 'forward': forward})
    result |= {name: getattr(arguments, name) for name in ('batch_size', 'rounds', 'platform', 'dtype', 'precision')}
    versions = {'python': platform.python_version()} | {worker.side: worker.about for worker in workers}
    result |= {'difference': difference, 'config': flags, 'versions': versions}
    return runner.print_result(result, report, arguments.json)


if __name__ == '__main__':
    main()
