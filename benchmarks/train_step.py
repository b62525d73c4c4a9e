"""Speed of one `paper` train step and forward pass on a CPU, in turn with the same in TensorFlow and in PyTorch.

    python benchmarks/train_step.py [--batch_size=128] [--rounds=6] [--torch_python=PATH] [--json]

Timed, in float32 with the batch in memory and until the result is there:
  train    forward with LRN and dropout, gradient, momentum update with weight decay. The project runs the step of its
           training loop on uint8 images of 256 pixels: augmentation and error rates are within its time, where the
           peers are fed ready float images of 224 pixels. The project does more work.
  forward  logits without dropout. The project runs its evaluation of the centre view: cutting it out, the mean,
           softmax, loss and errors are within its time; the peers sum their logits.

Every side has a process of its own, and these take turns step by step, so that a change in the machine's speed meets
all; the ones not asked sleep. Ratios are the peer's median time over the project's: above 1 the project is faster.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROJECT, *PEERS = SIDES = ('jax', 'tensorflow', 'torch')  # each named as the package it needs
PASSES = ('train', 'forward')
CPU_ONLY = {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '-1', 'TF_ENABLE_ONEDNN_OPTS': '1'}
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4

Passes = dict[str, Callable[[], float]]  # each runs once, to its end, and returns a number that must be finite
Times = dict[str, dict[str, tuple[float, ...]]]  # seconds of each round by pass and side


def project_passes(batch_size: int) -> Passes:
    """This project's own compiled steps on a mesh of one device."""
    from alexnet_jax import config as settings
    from alexnet_jax import startup

    config = settings.default_config()
    config.train.batch_size = batch_size
    config.mesh.data = 1
    config = settings.resolve(config)
    startup.tune_cpu()

    import jax
    import numpy as np

    from alexnet_jax import augment, parallel, step
    from alexnet_jax.shapes import LAYERS

    mesh = parallel.make_mesh(config)
    random, size = np.random.default_rng(0), config.data.image_size
    batch = {
        'image': random.integers(0, 256, (batch_size, size, size, 3), np.uint8),
        'label': random.integers(0, config.model.num_classes, batch_size, np.int32),
        'number': np.arange(batch_size, dtype=np.uint32),
    }
    batch = jax.block_until_ready(parallel.put_batch(parallel.batch_sharding(mesh, config.mesh.layout), batch))
    moments = {'mean_rgb': np.full(3, 127.5), 'eigenvalues': np.full(3, 5e3), 'eigenvectors': np.eye(3)}
    moments['mean_image'] = np.full((size, size, 3), 127.5)
    preprocessing = augment.preprocessing(moments, config.data)
    train_step, eval_step = step.make_train_step(config, mesh), step.make_eval_step(config, mesh, views=1)
    state = step.init_state(config, mesh)
    rates = {name: {'kernel': np.float32(RATE), 'bias': np.float32(RATE)} for name in LAYERS}

    def train() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(train_step(state, batch, rates, preprocessing))
        return float(metrics['loss'])

    return {'train': train, 'forward': lambda: float(np.asarray(eval_step(state, batch, preprocessing))[0])}


def tensorflow_passes(batch_size: int) -> Passes:
    """The network in TensorFlow: oneDNN, NHWC, compiled by tf.function, its own LRN, groups as split convolutions."""
    import tensorflow as tf

    shapes: list[tuple[int, ...]]
    shapes = [(11, 11, 3, 96), (5, 5, 48, 256), (3, 3, 256, 384), (3, 3, 192, 384), (3, 3, 192, 256)]
    shapes += [(9216, 4096), (4096, 4096), (4096, 1000)]
    kernels = [tf.Variable(tf.random.normal(shape, stddev=0.01)) for shape in shapes]
    biases = [tf.Variable(tf.fill([shape[-1]], 0.1)) for shape in shapes]
    variables = kernels + biases
    velocities = [tf.Variable(tf.zeros_like(variable)) for variable in variables]
    images = tf.random.normal((batch_size, 224, 224, 3))
    labels = tf.random.uniform((batch_size,), 0, 1000, tf.int32)

    def convolution(x, layer, stride, padding):
        kernel, bias = kernels[layer], biases[layer]
        x = tf.pad(x, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
        groups = x.shape[-1] // kernel.shape[2]
        pairs = zip(tf.split(x, groups, -1), tf.split(kernel, groups, -1), strict=True)
        parts = [tf.nn.conv2d(part, part_kernel, stride, 'VALID') for part, part_kernel in pairs]
        return tf.nn.relu(tf.concat(parts, -1) + bias)

    def pool(x):
        return tf.nn.max_pool2d(x, 3, 2, 'VALID')

    def logits(dropout):
        x = pool(tf.nn.local_response_normalization(convolution(images, 0, 4, 2), 2, 2.0, 1e-4, 0.75))
        x = pool(tf.nn.local_response_normalization(convolution(x, 1, 1, 2), 2, 2.0, 1e-4, 0.75))
        for layer in (2, 3, 4):
            x = convolution(x, layer, 1, 1)
        x = tf.reshape(pool(x), [batch_size, -1])
        for layer in (5, 6):
            x = tf.nn.relu(x @ kernels[layer] + biases[layer])
            x = tf.nn.dropout(x, 0.5) if dropout else x
        return x @ kernels[7] + biases[7]

    @tf.function
    def train_step():
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits(dropout=True))
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, variables)
        for variable, gradient, velocity in zip(variables, gradients, velocities, strict=True):
            velocity.assign(MOMENTUM * velocity - RATE * (gradient + DECAY * variable))
            variable.assign_add(velocity)
        return loss

    forward = tf.function(lambda: tf.reduce_sum(logits(dropout=False)))
    return {'train': lambda: float(train_step()), 'forward': lambda: float(forward())}


def torch_passes(batch_size: int) -> Passes:
    """The network in PyTorch: torch.compile, channels_last, LRN as shifted adds, SGD over all tensors at once."""
    import torch
    from torch import nn
    from torch.nn import functional

    class LocalResponseNorm(nn.Module):
        def forward(self, x):
            channels = x.shape[1]
            squares = functional.pad(x * x, (0, 0, 0, 0, 2, 2))
            root = torch.rsqrt(2.0 + 1e-4 * sum(squares[:, i : i + channels] for i in range(5)))
            return x * (root * torch.sqrt(root))  # to the power of -0.75

    network: Any = nn.Sequential(
        *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(), LocalResponseNorm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, 1, 2, groups=2), nn.ReLU(), LocalResponseNorm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 384, 3, 1, 1, groups=2), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(4096, 1000),
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY, foreach=True)
    images = torch.randn(batch_size, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch_size,))
    compiled = torch.compile(network)

    def train() -> float:
        network.train()
        optimizer.zero_grad()
        loss = functional.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def forward() -> float:
        network.eval()
        with torch.no_grad():
            return compiled(images).sum().item()

    return {'train': train, 'forward': forward}


def serve(side: str, batch_size: int) -> None:
    """A worker: says its version or null in one line of JSON, then for every line 'train' or 'forward' its seconds."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print, from C too, goes to stderr
    if importlib.util.find_spec(side) is None:
        print(json.dumps(None), file=answers, flush=True)
        return
    sys.path.insert(0, ROOT)
    passes = {'jax': project_passes, 'tensorflow': tensorflow_passes, 'torch': torch_passes}[side](batch_size)
    print(json.dumps(sys.modules[side].__version__), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        value = passes[line.strip()]()
        seconds = time.perf_counter() - start
        if not math.isfinite(value):
            raise FloatingPointError(f'{line.strip()} gave {value}')
        print(json.dumps(seconds), file=answers, flush=True)


class Worker:
    """The process of one side."""

    def __init__(self, side: str, python: str, batch_size: int):
        self.side, self.errors = side, tempfile.TemporaryFile('w+')  # noqa: SIM115
        command = [python, os.path.abspath(__file__), f'--worker={side}', f'--batch_size={batch_size}']
        pipes: dict[str, Any] = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': self.errors}
        self.process: Any = subprocess.Popen(command, **pipes, text=True, env=os.environ | CPU_ONLY)
        self.version = self.answer()

    def answer(self) -> Any:
        """The next line the worker says; exits with the worker's stderr where it died instead."""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            sys.exit(f'{self.errors.read()}\ntrain_step: the {self.side} side ended with exit code {code}; see above')
        return json.loads(line)

    def seconds(self, name: str) -> float:
        """Time of one pass, 'train' or 'forward', run now."""
        with contextlib.suppress(BrokenPipeError):  # answer() says why
            print(name, file=self.process.stdin, flush=True)
        return self.answer()


def measure(workers: list[Worker], rounds: int, warmup: int) -> Times:
    """Seconds of each round; the sides take turns."""
    times = {}
    for name in PASSES:
        table = [[worker.seconds(name) for worker in workers] for _ in range(warmup + rounds)]
        columns = zip(*table[warmup:], strict=True)
        times[name] = {worker.side: column for worker, column in zip(workers, columns, strict=True)}
    return times


def ratio(seconds: dict[str, tuple[float, ...]], peer: str) -> float | None:
    """How many times as fast as `peer` the project is, by the medians; None where one of them was not timed."""
    if PROJECT not in seconds or peer not in seconds:
        return None
    return statistics.median(seconds[peer]) / statistics.median(seconds[PROJECT])


def report(times: Times, versions: dict[str, str | None], batch_size: int) -> str:
    """The table for people."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            cpu = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), cpu)
    lines = [f'{os.cpu_count()} cores, {cpu}; Python {versions["python"]}; batch {batch_size}, float32; images/s', '']
    lines += [f'{"":<26}{"train":>9}{"":>9}{"forward":>10}{"":>9}{"project/peer":>17}']
    lines += [f'{"side":<12}{"version":<14}{"median":>9}{"best":>9}{"median":>10}{"best":>9}{"train":>8}{"forward":>9}']
    for side in [side for side in SIDES if side in versions]:
        if versions[side] is None:
            lines.append(f'{side:<12}absent')
            continue
        speeds = [batch_size / f(times[name][side]) for name in PASSES for f in (statistics.median, min)]
        row = f'{side:<12}{versions[side]:<14}{speeds[0]:>9.1f}{speeds[1]:>9.1f}{speeds[2]:>10.1f}{speeds[3]:>9.1f}'
        ratios = [ratio(times[name], side) for name in PASSES]
        lines.append(row + ''.join('' if r is None else f'{r:>{w}.2f}' for r, w in zip(ratios, (8, 9), strict=True)))
    return '\n'.join(lines)


def main() -> None:
    """Run the sides asked for and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=6, help='timed, of each pass')
    parser.add_argument('--warmup', type=int, default=2, help='rounds before those, compilation included')
    parser.add_argument('--sides', default=','.join(SIDES), help='which of %(default)s to run')
    parser.add_argument('--torch_python', default=sys.executable, metavar='PATH', help='an interpreter that has torch')
    parser.add_argument('--json', action='store_true', help='one JSON object in place of the table')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.batch_size, arguments.rounds, arguments.warmup) < 1:
        parser.error('--batch_size, --rounds and --warmup are at least 1')
    if arguments.worker:
        return serve(arguments.worker, arguments.batch_size)
    sides = arguments.sides.split(',')
    if unknown := set(sides) - set(SIDES):
        parser.error(f'--sides: there is no {", ".join(sorted(unknown))}; there are {", ".join(SIDES)}')
    if not shutil.which(arguments.torch_python):
        parser.error(f'--torch_python: {arguments.torch_python!r} is no program')

    pythons = {'torch': arguments.torch_python}
    workers: list[Worker] = []
    try:
        for side in [side for side in SIDES if side in sides]:
            workers.append(Worker(side, pythons.get(side, sys.executable), arguments.batch_size))
        present = [worker for worker in workers if worker.version is not None]
        times = measure(present, arguments.rounds, arguments.warmup)
    finally:
        for worker in workers:
            worker.process.kill()
    versions = {'python': platform.python_version()} | {worker.side: worker.version for worker in workers}
    if not arguments.json:
        print(report(times, versions, arguments.batch_size))
        return None
    result: dict[str, Any] = {}
    for prefix, name in (('', 'train'), ('forward_', 'forward')):
        own = times[name].get(PROJECT)
        result[f'{prefix}images_per_second'] = own and arguments.batch_size / statistics.median(own)
        result |= {f'{peer}_{prefix}ratio': ratio(times[name], peer) for peer in PEERS}
    result |= {'batch_size': arguments.batch_size, 'rounds': arguments.rounds, 'versions': versions}
    print(json.dumps(result))
    return None


if __name__ == '__main__':
    main()
