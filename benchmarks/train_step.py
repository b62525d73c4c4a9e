"""Times one `paper` train step and forward pass, in turn with the same passes in TensorFlow and PyTorch.

    python benchmarks/train_step.py [--batch_size=128] [--rounds=6] [--torch_python=PATH] [--json]
    python benchmarks/train_step.py --platform=gpu --dtype=bfloat16 --batch_size=1024

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

--config.a.b=value applies to the project's side. A TPU has no peers. Neither GPU nor TPU could be tested here. On these
platforms all sides hold device memory at the same time, so their allocators do not preallocate it. float32 means JAX's
default on the platform: on GPUs from Ampere on, matrix products of all sides round their inputs to TF32; on TPUs, to
bfloat16.
"""

import argparse
import ast
import contextlib
import datetime
import functools
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from alexnet_jax.config import Config
from benchmarks import peers
from benchmarks.peers import tensorflow_passes, torch_passes
from benchmarks.workers import NO_GPU, Worker, machine, serve

PROJECT, *PEERS = SIDES = ('jax', 'tensorflow', 'torch')  # the names of the packages
PASSES = ('train', 'forward')
PLATFORMS = {
    'cpu': NO_GPU | {'TF_ENABLE_ONEDNN_OPTS': '1'},
    # All sides share the device.
    'gpu': {'JAX_PLATFORMS': 'cuda', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'TF_FORCE_GPU_ALLOW_GROWTH': 'true'},
    'tpu': {'JAX_PLATFORMS': 'tpu'},
}
# Rows of the square matrices. On accelerators they are larger, to make launch and transfer times negligible.
PRODUCTS = {'cpu': (2048, 4096), 'gpu': (8192, 16384), 'tpu': (8192, 16384)}

Times = dict[str, dict[str, tuple[float, ...]]]  # seconds of each round, by pass and side


def configuration(arguments: argparse.Namespace, overrides: list[str]) -> Any:
    """Returns the project's resolved configuration. Exits with 2 if a setting is invalid."""
    from alexnet_jax.config import ConfigError, apply_overrides, default_config, resolve

    values: dict[str, Any] = {'train.batch_size': arguments.batch_size, 'model.dtype': arguments.dtype, 'mesh.data': 1}
    for override in overrides:
        field, text = override.removeprefix('--config.').split('=', 1)
        try:
            values[field] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            values[field] = text
    config = default_config()
    try:
        apply_overrides(config, values)
        return resolve(config)
    except ConfigError as error:
        print(f'train_step: {error}', file=sys.stderr)
        sys.exit(2)


def project_passes(config: Config) -> dict[str, Callable[[], Any]]:
    """Returns this project's passes, and `check`, which returns the result of check.worst()."""
    from alexnet_jax.runtime import backend

    if config.cpu_tuning:
        backend.configure_cpu_backend()
    import jax

    from benchmarks.project import Project

    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # AssertionError: the platform's package is not installed
        platforms = os.environ.get('JAX_PLATFORMS')
        sys.exit(f'train_step: jax finds no device for JAX_PLATFORMS={platforms}; is its package installed?')
    project = Project(config)

    def check() -> tuple[str, float, float]:
        from benchmarks.check import differences, worst

        exact = config.model.dtype == 'float32' and jax.default_backend() == 'cpu'
        return worst(differences(project), exact)

    return {'train': project.train, 'forward': project.forward, 'check': check}


def project_product(size: int, dtype: str) -> Callable[[], float]:
    """Returns a function that multiplies two `size` x `size` matrices."""
    import jax

    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda matrix: matrix @ matrix)
    return lambda: float(product(matrix)[0, 0])


def start(arguments: argparse.Namespace, overrides: list[str]) -> tuple[str | None, Callable[[str], Any]]:
    """Runs in a worker. Returns the side's version or None, and a function that times a pass or runs `check`."""
    side, device = arguments.worker, 'cuda' if arguments.platform == 'gpu' else 'cpu'
    batch_size, dtype = arguments.batch_size, arguments.dtype
    passes: dict[str, Callable[[], Any]] = {}
    product: Callable[[int, str], Callable[[], float]] = project_product
    if side == PROJECT:
        passes = project_passes(configuration(arguments, overrides))
    elif side == 'tensorflow' and peers.has_tensorflow(arguments.platform):
        passes, product = tensorflow_passes(batch_size, dtype), peers.tensorflow_product
    elif side == 'torch' and peers.has_torch(arguments.platform):
        passes = torch_passes(batch_size, dtype, device)
        product = functools.partial(peers.torch_product, device=device)
    if not passes:
        return None, lambda name: None
    passes |= {f'product {size}': product(size, dtype) for size in PRODUCTS[arguments.platform]}

    def respond(name: str) -> Any:
        if name == 'check':
            return passes[name]()
        begin = time.perf_counter()
        value = passes[name]()
        seconds = time.perf_counter() - begin
        if not math.isfinite(value):
            raise FloatingPointError(f'{name} gave {value}')
        return seconds

    return sys.modules[side].__version__, respond


def equal_to_plain(worker: Worker) -> dict[str, float]:
    """Returns the largest difference from the plain implementation by its name. Exits if it exceeds the tolerance."""
    name, distance, tolerance = worker.ask('check')
    if not distance <= tolerance:  # also catches NaN
        sys.exit(
            f'train_step: {name} differs by {distance:.1e} of its size from the plain implementation; rounding explains'
            f' {tolerance:g}. The step is wrong, or given other settings than plain.py has (then --unchecked)'
        )
    return {name: distance}


def measure(workers: list[Worker], passes: tuple[str, ...], rounds: int, warmup: int) -> Times:
    """Returns the seconds of each round. The sides take turns."""
    times = {}
    for name in passes:
        table = [[worker.ask(name) for worker in workers] for _ in range(warmup + rounds)]
        columns = zip(*table[warmup:], strict=True)
        times[name] = {worker.side: column for worker, column in zip(workers, columns, strict=True)}
    return times


def ratio(seconds: dict[str, tuple[float, ...]], peer: str) -> float | None:
    """Returns the peer's median time over the project's, or None if one of them was not timed."""
    if PROJECT not in seconds or peer not in seconds:
        return None
    return statistics.median(seconds[peer]) / statistics.median(seconds[PROJECT])


def results(times: Times, config: Config) -> dict[str, Any]:
    """Returns the results for --json: images/s, ratios, FLOP/s, and shares of the best matrix product's FLOP/s."""
    from alexnet_jax.audit import cost_model

    batch_size = config.train.batch_size
    found: dict[str, Any] = {}
    rates = dict.fromkeys(times['train'], 0.0)
    for name in times.keys() - set(PASSES):
        flops = 2 * int(name.split()[1]) ** 3
        rates = {side: max(rate, flops / min(times[name][side])) for side, rate in rates.items()}
    forward = 2 * sum(layer.multiply_adds for layer in cost_model.layers(config))
    for prefix, name, flops in (('', 'train', cost_model.flops_per_image(config)), ('forward_', 'forward', forward)):
        speeds = {side: batch_size / statistics.median(seconds) for side, seconds in times[name].items()}
        found[f'{prefix}images_per_second'] = speeds.get(PROJECT)
        found |= {f'{peer}_{prefix}images_per_second': speeds.get(peer) for peer in PEERS}
        found |= {f'{peer}_{prefix}ratio': ratio(times[name], peer) for peer in PEERS}
        found[f'{prefix}flops_per_image'] = flops
        found[f'{prefix}share_of_product'] = {side: flops * s / max(rates.values()) for side, s in speeds.items()}
        found[f'{prefix}best_images_per_second'] = {side: batch_size / min(s) for side, s in times[name].items()}
    return found | {'product_flops_per_second': rates}


def report(result: dict[str, Any]) -> str:
    """Formats the table as text."""
    shares, versions = result['share_of_product'], result['versions']
    rates = ', '.join(f'{rate / 1e9:.0f} with {side}' for side, rate in result['product_flops_per_second'].items())
    lines = [
        f'{result["machine"]}; batch {result["batch_size"]}, {result["dtype"]}, {result["platform"]}; images/s',
        f'GFLOP an image: train {result["flops_per_image"] / 1e9:.2f}, forward'
        f' {result["forward_flops_per_image"] / 1e9:.2f}; GFLOP/s of a matrix product at its best: {rates}',
        '',
        f'{"":<26}{"train":>9}{"":>9}{"share of":>10}{"forward":>10}{"":>9}{"project/peer":>17}',
        f'{"side":<12}{"version":<14}{"median":>9}{"best":>9}{"product":>10}{"median":>10}{"best":>9}{"train":>8}'
        f'{"forward":>9}',
    ]
    for side in [side for side in SIDES if side in versions]:
        if versions[side] is None:
            lines.append(f'{side:<12}absent')
            continue
        prefix = '' if side == PROJECT else f'{side}_'
        row = f'{side:<12}{versions[side]:<14}{result[f"{prefix}images_per_second"]:>9.1f}'
        row += f'{result["best_images_per_second"][side]:>9.1f}{shares[side]:>10.2f}'
        row += f'{result[f"{prefix}forward_images_per_second"]:>10.1f}'
        row += f'{result["forward_best_images_per_second"][side]:>9.1f}'
        ratios = [result.get(f'{side}_{prefix}ratio') for prefix in ('', 'forward_')]
        lines.append(row + ''.join('' if r is None else f'{r:>{w}.2f}' for r, w in zip(ratios, (8, 9), strict=True)))
    for name, value in result['difference'].items():
        lines += ['', f'Equal to the plain implementation but for rounding; at most by {value:.1e}, of {name}.']
    return '\n'.join(lines)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the project's setting overrides. Exits with 2 if one is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=6, help='timed, of each pass')
    parser.add_argument('--warmup', type=int, default=2, help='rounds before those, compilation included')
    parser.add_argument('--platform', choices=PLATFORMS, default='cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of all sides')
    parser.add_argument('--sides', default=','.join(SIDES), help='which of %(default)s to run')
    parser.add_argument('--torch_python', default=sys.executable, metavar='PATH', help='an interpreter that has torch')
    parser.add_argument('--unchecked', action='store_true', help='leave out the plain implementation')
    parser.add_argument('--json', action='store_true', help='one JSON object in place of the table')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if unknown := [argument for argument in overrides if not re.match(r'--config\.[\w.]+=', argument)]:
        parser.error(f'{unknown[0]!r} is no flag; settings of the project are written --config.a.b=value')
    if min(arguments.batch_size, arguments.rounds, arguments.warmup) < 1:
        parser.error('--batch_size, --rounds and --warmup are at least 1')
    if unknown := sorted(set(arguments.sides.split(',')) - set(SIDES)):
        parser.error(f'--sides: there is no {", ".join(unknown)}; there are {", ".join(SIDES)}')
    if not shutil.which(arguments.torch_python):
        parser.error(f'--torch_python: {arguments.torch_python!r} is no program')
    return arguments, overrides


def main() -> None:
    """Runs the requested sides and prints the results."""
    arguments, overrides = parse()
    if arguments.worker:
        return serve(lambda: start(arguments, overrides))
    config = configuration(arguments, overrides)
    passes = (*PASSES, *(f'product {size}' for size in PRODUCTS[arguments.platform]))
    pythons: dict[str, str] = {'torch': arguments.torch_python}
    difference: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for side in [side for side in SIDES if side in arguments.sides.split(',')]:
            command = [pythons.get(side, sys.executable), os.path.abspath(__file__), f'--worker={side}', *sys.argv[1:]]
            workers.append(Worker(side, command, PLATFORMS[arguments.platform], stack))
        present = [worker for worker in workers if worker.about is not None]
        if present and present[0].side == PROJECT and not arguments.unchecked:
            difference = equal_to_plain(present[0])
        times = measure(present, passes, arguments.rounds, arguments.warmup)
    versions = {'python': platform.python_version()} | {worker.side: worker.about for worker in workers}
    result = results(times, config) | {'difference': difference, 'config': overrides}
    result |= {name: getattr(arguments, name) for name in ('batch_size', 'rounds', 'platform', 'dtype')}
    result |= {'versions': versions, 'machine': machine(), 'date': datetime.date.today().isoformat()}
    print(json.dumps(result) if arguments.json else report(result))
    return None


if __name__ == '__main__':
    main()
