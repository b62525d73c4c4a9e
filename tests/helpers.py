"""Helpers for several test files: commands in child processes, the files of a workdir, and expected errors."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alexnet_jax.config import ConfigError

ROOT = Path(__file__).parent.parent
SMALL_NETWORK = {'model.widths': '(8,0,0,0,16,0,32)', 'model.lrn': False, 'model.towers': 1}  # compiles quickly


def environment(**variables: str) -> dict[str, str]:
    """Returns the variables of a child process: one simulated device, unless `variables` say otherwise."""
    return {**os.environ, 'JAX_NUM_CPU_DEVICES': '1', **variables}


def run_command(
    *arguments: Any, cwd: Path = ROOT, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess:
    """Runs Python with `arguments`, captures its output as text, and returns regardless of the exit code.

    For example, run_command('-m', 'alexnet_jax.predict', workdir) runs a command of the package.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start_command(
    *arguments: Any, stdout: Any = subprocess.DEVNULL, start_new_session: bool = False, **variables: str
) -> subprocess.Popen:
    """Starts Python with `arguments`; its standard error is a pipe of text."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**variables),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )


def config_flags(fields: dict[str, Any]) -> list[str]:
    """Returns the flags that set `fields`, by dotted name, such as `--config.train.steps=3`."""
    return [f'--config.{field}={value}' for field, value in fields.items()]


def training_command(data_dir: str, workdir: Path, fields: dict[str, Any], *overrides: str) -> list[str]:
    """Returns the command of a run of a small network, which compiles quickly, with the settings `fields`."""
    settings = {
        'data.data_dir': data_dir,
        'train.batch_size': 32,
        'train.log_every': 1,
        'eval.views': 1,
        'eval.batch_size': 400,
    }
    return ['launch.py', f'--workdir={workdir}', *config_flags(SMALL_NETWORK | settings | fields), *overrides]


def usage_error(run: subprocess.CompletedProcess) -> str:
    """Returns the single line that a command prints when it ends with exit code 2, without the name of the package."""
    assert (run.returncode, run.stdout) == (2, ''), run.stderr
    assert run.stderr.startswith('alexnet_jax: ')
    assert run.stderr.count('\n') == 1, run.stderr
    return run.stderr.removeprefix('alexnet_jax: ').rstrip('\n')


def refusal(function: Callable, *arguments: Any, **options: Any) -> str:
    """Returns the text of the ConfigError that `function` raises, which must be a single line."""
    with pytest.raises(ConfigError) as error:
        function(*arguments, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text())


def edit_progress(checkpoint: Path, **values: Any) -> None:
    """Replaces values of the progress in the folder of a checkpoint, with the digest that belongs to them."""
    file = checkpoint / 'progress' / 'metadata'
    progress = read_json(file) | values
    progress.pop('progress_digest', None)
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(progress | {'progress_digest': digest}))


def edit_manifest(folder: Path, **values: Any) -> None:
    """Replaces values in the manifest of a prepared data set, with the digest that belongs to them."""
    file = Path(folder) / 'prepared.json'
    manifest = read_json(file) | values
    manifest.pop('digest', None)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(manifest | {'digest': digest}))


def as_earlier_version(folder: Path, root: Path, source: str, name: str, **values: Any) -> Path:
    """Renames a prepared data set to `name`, with the manifest of an earlier version, and returns its folder.

    The data set was prepared from the folder `root`, with the splits train and val; `source` is what the user typed.
    `values` are other fields of the manifest.
    """
    classes = sorted(path.name for path in (root / 'train').iterdir())
    lines = [*classes]
    for split, where in {'train': 'train', 'validation': 'val'}.items():
        files = [path for label in classes for path in sorted((root / where / label).iterdir())]
        rows = [(str(path.relative_to(root)), path.stat().st_size, classes.index(path.parent.name)) for path in files]
        digest = _sha256('\n'.join(map(str, rows)).encode())
        lines.append(f'{split} {digest}')
    manifest = read_json(folder / 'prepared.json')
    for added in ('version', 'validation_split', 'order', 'inventory', 'origins', 'source_digest', 'notes'):
        del manifest[added]
    if 'class_names' in values:
        content = ''.join(f'{each}\n' for each in values['class_names']).encode()
        (folder / 'label.labels.txt').write_bytes(content)
        half, middle = (len(content) + 1) // 2, len(content) // 2
        digests = [_sha256(content[:half]), _sha256(content[middle : middle + half])]
        manifest['digests']['label.labels.txt'], manifest['files']['label.labels.txt'] = digests, len(content)
    fingerprint = _sha256('\n'.join(lines).encode())
    (folder / 'prepared.json').write_text(json.dumps(manifest | {'source': source, 'fingerprint': fingerprint}))
    edit_manifest(folder, **values)
    return folder.rename(folder.with_name(name))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_lines(path: Path) -> list[dict]:
    """Returns the objects of a JSON Lines file, such as metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_result(workdir: Path) -> dict:
    return read_json(Path(workdir) / 'result.json')


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(file: Path, size: int = 1000) -> None:
    """Keeps the first `size` bytes of a file."""
    file.write_bytes(file.read_bytes()[:size])


def wait_for(condition: Callable[[], Any], seconds: float = 120.0, every: float = 0.002) -> Any:
    """Calls `condition` until its result is true, and returns the result; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(every)
    return value


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('', 0))
        return listener.getsockname()[1]
