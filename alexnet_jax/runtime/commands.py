"""Command lines that run this package in a shell or in a child process."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

_RUN = ('-P', '-m')  # options that run a module; -P keeps Python from importing modules of the current folder
_PARENT = str(Path(__file__).resolve().parents[2])  # the folder that contains this package


def shell_command(*arguments: str) -> str:
    """Returns a shell command that runs `alexnet ARGUMENTS` with this package.

    The command works from any folder if `arguments` contain only absolute paths. The command begins with `alexnet` if
    the shell finds the script that was installed with this package, and otherwise with the path of the script. If the
    package is not installed, the command calls the interpreter with PYTHONPATH.
    """
    script = _installed_script()
    if script is not None:
        found = shutil.which('alexnet')
        on_path = found is not None and os.path.samefile(found, script)
        return shlex.join(['alexnet' if on_path else os.path.abspath(script), *arguments])
    python = 'python' if shutil.which('python') == sys.executable else sys.executable or 'python'
    paths = f'PYTHONPATH={shlex.quote(_PARENT)}${{PYTHONPATH:+:$PYTHONPATH}} '
    return paths + shlex.join([python, *_RUN, 'alexnet_jax', *arguments])


def _installed_script() -> str | None:
    """Returns the path of the script `alexnet` installed with this package, or None if there is none."""
    try:
        distribution = importlib.metadata.distribution('alexnet_jax')
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text('direct_url.json') or '{}')
    if origin.get('dir_info', {}).get('editable'):
        is_this = origin['url'] == Path(_PARENT).as_uri()
    else:
        is_this = os.path.realpath(str(distribution.locate_file(''))) == os.path.realpath(_PARENT)
    files = [str(distribution.locate_file(file)) for file in distribution.files or () if file.stem == 'alexnet']
    return next((os.path.normpath(file) for file in files if is_this and os.access(file, os.X_OK)), None)


def child_command(module: str, *arguments: str) -> list[str]:
    """Returns the command line of a child process that runs `module` of this package in child_environment()."""
    return [sys.executable, *_RUN, f'alexnet_jax.{module}', *arguments]


def child_environment() -> dict[str, str]:
    """Returns this process's environment with this package's folder first in PYTHONPATH."""
    paths = [_PARENT, *filter(None, [os.environ.get('PYTHONPATH')])]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(paths)}


def recorded_command() -> list[str]:
    """Returns the command line of this process, with paths relative to the folder of this package's repository."""
    root = re.escape(f'{_PARENT}{os.sep}')
    return [
        os.path.basename(sys.argv[0]),
        *(re.sub(f'(^|=){root}', r'\1', argument) for argument in sys.argv[1:]),
    ]
