"""Runs the first checks and measurements on a GPU or TPU, in ten minutes and without network: `make gpu`, `make tpu`.

    python benchmarks/accelerator.py --platform=gpu [--minutes=10] [--output=DIR] [--parts=NAME,...]

The parts run one after the other in the order of the list, each in its own process with a time limit, so that the
failure of one leaves the others. A part that would not fit into the rest of the time is listed as not run:
  tests      the tests marked `accelerator`, with model.precision=float32
  steps      speed and memory of the train step: float32, full float32 precision and bfloat16, batches of 128 and 1024
  audit      `alexnet audit --target`: the modeled speed and the compiled memory, beside the measured ones
  peers-...  train_step.py: the step in turn with PyTorch's, and compared with a plain implementation
  precision  what each precision does to a convolution and a product, against float64
  training   two epochs of the quickstart: speed, and the share of the time that waits for input
  resume     a run that is killed and resumed ends with the same bits

The results are in the folder accelerator-CARD-DATE and in a file of the same name with .tar.gz: summary.md,
results.json, and logs/ with the output of each part. Nothing is installed or downloaded. Packages that are missing are
named, and the parts that need them are left out. --platform=cpu rehearses all of it with a small network.

The exit code is 0 if no part failed, 1 if one did, 2 if JAX finds no such device.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import accelerator_summary
from benchmarks.accelerator_parts import SMALL
from benchmarks.runner import ROOT

ENVIRONMENTS = {
    'cpu': {'JAX_PLATFORMS': 'cpu'},
    'gpu': {'JAX_PLATFORMS': 'cuda', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
    'tpu': {'JAX_PLATFORMS': 'tpu'},
}
INSTALL = {'cpu': 'jax', 'gpu': 'jax[cuda12] or jax[cuda13]', 'tpu': 'jax[tpu]'}
# By XLA, convolutions and products otherwise use the fastest algorithm, which may add in another order each time.
DETERMINISTIC = {'gpu': {'XLA_FLAGS': '--xla_gpu_deterministic_ops=true'}}
# What the parts import, by the name of the package.
PACKAGE = ('absl', 'etils', 'flax', 'jaxtyping', 'ml_collections', 'numpy', 'optax', 'orbax')
DATA = ('array_record', 'grain', 'PIL', 'simplejpeg', 'skimage')
TESTS = ('pytest', 'scipy')
# JAX's names of the devices whose data sheets the audit has, as regular expressions, and the smallest target that a
# single device is compared with.
TARGETS = {
    'NVIDIA A100-SXM.*80GB': 'a100:1',
    'NVIDIA H100 80GB HBM3': 'h100:1',
    'NVIDIA H200': 'h200:1',
    'NVIDIA B200': 'b200:1',
    'TPU v4': 'v4:2x2x1',
    'TPU v5p?': 'v5p:2x2x1',
    'TPU v5( lite|e)': 'v5e:2x2',
    'TPU v6( lite|e)': 'v6e:2x2',
    'TPU7x': 'tpu7x:2x2x1',
}
DEVICE_LIMIT = 120  # seconds for JAX to find the devices
PACKING = 5  # seconds at the end


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of the list.

    Attributes:
      seconds: how long it takes; it does not start if less time is left.
      limit: seconds after which it is killed.
      needs: modules that it imports.
      environment: variables besides those of the platform.
      skipped: why it is left out, or ''.
    """

    name: str
    command: Sequence[str]
    seconds: int
    limit: int
    needs: Sequence[str] = PACKAGE
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: str = ''


def parts(platform: str, kind: str, folder: str) -> list[Part]:
    """Returns the parts for a device of the name `kind`, by their worth; the results of runs are in `folder`."""
    rehearsal = platform == 'cpu'
    flags = ['--rehearsal'] if rehearsal else []
    # The settings of the tests would need further plug-ins of pytest.
    pytest = [
        sys.executable,
        '-m',
        'pytest',
        '-c',
        os.devnull,
        '--rootdir',
        ROOT,
        '-p',
        'no:cacheprovider',
        '-q',
        '-ra',
    ]
    pytest += [
        '-W',
        'ignore::pytest.PytestUnknownMarkWarning',
        '-m',
        'accelerator and not slow' if rehearsal else 'accelerator',
    ]
    own = [sys.executable, 'benchmarks/accelerator_parts.py']
    tests = ['tests/test_accelerator.py', 'tests/test_krizhevsky2012.py']
    found = [
        Part('tests', [*pytest, *tests], 120, 300, (*PACKAGE, *TESTS)),
        Part('steps', [*own, 'steps', *flags], 100, 240),
        _audit(kind),
        *(_peers(platform, *case) for case in (('float32', 'default', 128), ('bfloat16', 'default', 1024))),
        Part('precision', [*own, 'precision', *flags], 30, 90),
        _training(rehearsal, os.path.join(folder, 'quickstart')),
        Part(
            'resume',
            [*pytest[:-1], 'accelerator', 'tests/test_train.py'],
            100,
            240,
            (*PACKAGE, *DATA, *TESTS),
            DETERMINISTIC.get(platform, {}),
        ),
    ]
    more = (
        ('float32', 'float32', 128),
        ('float32', 'default', 1024),
        ('bfloat16', 'default', 128),
        ('float32', 'float32', 1024),
    )
    return found + [_peers(platform, *case) for case in more if not rehearsal]


def _peers(platform: str, dtype: str, precision: str, batch_size: int) -> Part:
    command = [sys.executable, 'benchmarks/train_step.py', '--json', f'--platform={platform}', f'--dtype={dtype}']
    command += [f'--precision={precision}']
    if platform == 'cpu':
        command += ['--sides=jax', '--batch_size=4', '--rounds=1', '--warmup=1', '--unchecked', *SMALL]
    else:
        command += ['--sides=jax,torch', f'--batch_size={batch_size}', '--rounds=30']
    name = f'peers-{dtype if precision == "default" else "exact"}-{batch_size}'
    return Part(name, command, 5 if platform == 'cpu' else 90, 200)


def _training(rehearsal: bool, workdir: str) -> Part:
    small = ['--config.model.widths=(8,16,16,16,16,32,32)', '--config.train.steps=20', '--config.train.log_every=10']
    settings = small if rehearsal else ['--config.train.epochs=2', '--config.train.log_every=20']
    data = f'--config.data.data_dir={workdir}-data'
    command = [sys.executable, 'launch.py', '--config=configs/quickstart.py', f'--workdir={workdir}', data, *settings]
    return Part('training', command, 60, 150, (*PACKAGE, *DATA))


def _audit(kind: str) -> Part:
    target = next((target for name, target in TARGETS.items() if re.fullmatch(name, kind)), None)
    command = [sys.executable, '-m', 'alexnet_jax', 'audit', '--config=imagenet', f'--target={target}']
    command += ['--images_per_device=128', '--json']
    skipped = '' if target else f'there is no data sheet of {kind!r}'
    return Part('audit', command, 60, 200, PACKAGE, {'JAX_PLATFORMS': 'cpu'}, skipped)


def run(part: Part, environment: dict[str, str], left: float, logs: str) -> dict[str, Any]:
    """Runs a part that has `left` seconds; writes its output to `logs`, and returns its result.

    status: passed, failed, timeout, 'not run' (too little time is left), or skipped (`needs` or `skipped` of the part).
    rows: the lines of the output that are JSON objects.  note: why it did not pass, or the counts of pytest.
    """
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    result: dict[str, Any] = {'name': part.name, 'seconds': 0.0, 'rows': [], 'command': list(part.command)}
    if part.skipped or missing:
        return result | {'status': 'skipped', 'note': part.skipped or f'needs {", ".join(missing)}'}
    if left < part.seconds:
        return result | {'status': 'not run', 'note': f'takes {part.seconds} s, and {max(0, left):.0f} s were left'}
    limit, begin = min(part.limit, left), time.monotonic()
    out, err = (os.path.join(logs, f'{part.name}.{kind}') for kind in ('out', 'err'))
    with open(out, 'w') as stdout, open(err, 'w') as stderr:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=os.environ | environment | part.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the processes that it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result |= {'seconds': round(time.monotonic() - begin, 1), 'rows': json_lines(out)}
    if code is None:
        return result | {'status': 'timeout', 'note': f'killed after {limit:.0f} s'}
    if code:
        return result | {'status': 'failed', 'note': f'exit code {code}: {last_line(err) or last_line(out)}'}
    return result | {'status': 'passed', 'note': last_line(out) if 'pytest' in part.command else ''}


def json_lines(path: str) -> list[dict[str, Any]]:
    """Returns the JSON objects in a file, which may be one in several lines or one per line."""
    with open(path, errors='replace') as file:
        text = file.read()
    rows = []
    for each in [text, *text.splitlines()]:
        with contextlib.suppress(json.JSONDecodeError):
            rows += [json.loads(each)] if each.startswith('{') else []
        if rows and each is text:
            break
    return rows


def last_line(path: str) -> str:
    """Returns the last line of text in a file, at most 200 characters of it, or ''."""
    with open(path, errors='replace') as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1][:200] if lines else ''


def find_device(platform: str) -> dict[str, Any]:
    """Returns what accelerator_parts.device() says. Exits with code 2 if JAX finds no device of the platform."""
    problem = f'jax is not installed for {sys.executable}'
    if importlib.util.find_spec('jax') is not None:
        command = [sys.executable, 'benchmarks/accelerator_parts.py', 'device']
        environment = os.environ | ENVIRONMENTS[platform]
        try:
            child = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEVICE_LIMIT
            )
        except subprocess.TimeoutExpired:
            problem = f'jax needs more than {DEVICE_LIMIT} s to find the devices'
        else:
            found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith('{')]
            if child.returncode == 0 and found and found[0]['platform'] == platform:
                return found[0]
            reason = (child.stderr.strip().splitlines() or [f'exit code {child.returncode}'])[-1]
            problem = f'jax finds no {platform.upper()} ({reason[:200]})'
    print(f'accelerator: {problem}; install {INSTALL[platform]}, or name another Python with PYTHON=', file=sys.stderr)
    sys.exit(2)


def write(folder: str, name: str, text: str) -> None:
    """Writes a file of the folder, as a whole or not at all."""
    path = os.path.join(folder, name)
    with open(f'{path}.new', 'w') as file:
        file.write(text)
    os.replace(f'{path}.new', path)


def keep(scratch: str, folder: str) -> None:
    """Copies what the run of the quickstart measured, without its checkpoints and images."""
    for name in ('metrics.jsonl', 'environment.json', 'config.json', 'result.json'):
        with contextlib.suppress(OSError):
            shutil.copy(os.path.join(scratch, 'quickstart', name), os.path.join(folder, 'logs', f'quickstart-{name}'))


def run_all(arguments: argparse.Namespace, device: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Runs the parts and writes their results after each; returns the results. Ctrl-C or SIGTERM end the rest."""
    begin, results, stopped = time.monotonic(), [], False
    about = {'device': device, 'date': datetime.date.today().isoformat(), 'minutes': arguments.minutes}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix='accelerator-') as scratch:
        for part in parts(arguments.platform, device['kind'], scratch):
            if arguments.parts and part.name not in arguments.parts:
                continue
            left = 0.0 if stopped else begin + arguments.minutes * 60 - PACKING - time.monotonic()
            print(f'[{time.monotonic() - begin:4.0f} s] {part.name} ...', flush=True)
            try:
                result = run(part, ENVIRONMENTS[arguments.platform], left, os.path.join(folder, 'logs'))
            except KeyboardInterrupt:
                stopped = True
                result = {'name': part.name, 'status': 'stopped', 'seconds': 0.0, 'rows': [], 'note': 'by a signal'}
            results.append(result)
            print(f'         {result["status"]} {result["seconds"]:.0f} s  {result["note"]}', flush=True)
            keep(scratch, folder)
            write(folder, 'results.json', json.dumps(about | {'parts': results}, indent=1))
            write(folder, 'summary.md', accelerator_summary.summary(about, results, read_metrics(folder)))
    return results


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl of the quickstart, or [] if it did not run."""
    path = os.path.join(folder, 'logs', 'quickstart-metrics.jsonl')
    return json_lines(path) if os.path.exists(path) else []


def main() -> int:
    """Runs the parts, packs the folder and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--platform', choices=ENVIRONMENTS, default='gpu')
    parser.add_argument('--minutes', type=float, default=10, help='for everything')
    parser.add_argument('--output', default='.', help='where the folder is made')
    parser.add_argument('--parts', type=lambda text: text.split(','), default=[], help='some of the parts, by name')
    arguments = parser.parse_args()
    names = [part.name for part in parts(arguments.platform, '', '')]
    if unknown := sorted(set(arguments.parts) - set(names)):
        parser.error(f'--parts: {", ".join(unknown)} is unknown; the parts are {", ".join(names)}')
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [ROOT, os.environ.get('PYTHONPATH')]))
    device = find_device(arguments.platform)
    card = re.sub(r'[^a-z0-9]+', '-', device['kind'].lower()).strip('-')
    name = f'accelerator-{card}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}'
    folder = os.path.join(os.path.abspath(arguments.output), name)
    try:
        os.makedirs(os.path.join(folder, 'logs'))
    except OSError as error:
        print(f'accelerator: --output: {folder} cannot be made ({error.strerror})', file=sys.stderr)
        return 2
    print(
        f'{device["count"]} x {device["kind"]}, jax {device["jax"]}; {arguments.minutes:g} minutes; {folder}',
        flush=True,
    )
    if not (0, 10, 2) <= tuple(map(int, re.findall(r'\d+', device['jax'])[:3])) < (0, 13):
        print(f'accelerator: jax {device["jax"]} is not one of 0.10.2 to 0.12, with which the project is tested')
    results = run_all(arguments, device, folder)
    with tarfile.open(f'{folder}.tar.gz.new', 'w:gz') as archive:
        archive.add(folder, name)
    os.replace(f'{folder}.tar.gz.new', f'{folder}.tar.gz')
    print(f'{folder}.tar.gz')
    return int(any(result['status'] in ('failed', 'timeout', 'stopped') for result in results))


if __name__ == '__main__':
    sys.exit(main())
