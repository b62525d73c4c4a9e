"""The interpreter that `make` chooses for its virtual environment, among stand-ins on the PATH."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

# Answers the questions of the Makefile as an interpreter of this version, and makes no real environment.
WORKING = """#!/bin/sh
case "$1" in
  -c) case "$2" in *platform*) echo {version} ;; esac ;;
  -m) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""
BROKEN = '#!/bin/sh\necho "{version}: command not found" >&2\nexit 127\n'


@pytest.fixture
def interpreters(tmp_path):
    """Returns a function that makes working or broken interpreters, and runs make with no others on the PATH."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for tool in ('sh', 'mkdir', 'cp', 'touch', 'make'):
        path = next(Path(place) / tool for place in os.environ['PATH'].split(':') if (Path(place) / tool).exists())
        (folder / tool).symlink_to(path)

    def make(venv: Path, *variables: str, **scripts: str) -> subprocess.CompletedProcess:
        for name, script in scripts.items():
            file = folder / name.replace('_', '.')
            file.write_text(script.format(version=name.removeprefix('python').replace('_', '.')))
            file.chmod(0o755)
        command = ['make', f'--file={ROOT}/Makefile', f'VENV={venv}', *variables, f'{venv}/created']
        environment = {'PATH': str(folder)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return make


def test_newest_interpreter_that_starts_is_chosen(interpreters, tmp_path):
    run = interpreters(tmp_path / 'venv', python3_13=BROKEN, python3_12=WORKING, python3_11=WORKING)
    assert (run.returncode, run.stderr) == (0, '')
    assert run.stdout == f'{tmp_path}/venv: Python 3.12\n'
    assert (tmp_path / 'venv' / 'created').exists()


def test_interpreter_can_be_named(interpreters, tmp_path):
    other = tmp_path / 'my python'
    other.write_text(WORKING.format(version='3.11.9'))
    other.chmod(0o755)
    run = interpreters(tmp_path / 'venv', f'PYTHON={other}', python3_13=WORKING)
    assert run.stdout == f'{tmp_path}/venv: Python 3.11.9\n'


def test_no_interpreter_that_starts_is_an_error(interpreters, tmp_path):
    run = interpreters(tmp_path / 'venv', python3_13=BROKEN, python3_11=BROKEN)
    assert run.returncode != 0
    message, _ = run.stderr.splitlines()  # the second line is make's own
    assert message.startswith('No Python to use: none of python3.13 python3.12 python3.11 python3.14 python3 starts, ')
    assert not (tmp_path / 'venv').exists()


def test_environment_of_the_user_is_not_changed(interpreters, tmp_path):
    (tmp_path / 'venv').mkdir()
    (tmp_path / 'venv' / 'mine').touch()
    run = interpreters(tmp_path / 'venv', python3_13=WORKING)
    assert run.returncode != 0
    assert f'{tmp_path}/venv was not made by this Makefile: remove it, or name another' in run.stderr
    assert os.listdir(tmp_path / 'venv') == ['mine']


@pytest.mark.parametrize(
    ('asked', 'named'), [(WORKING, '3.11'), (BROKEN, 'no Python that starts')], ids=['working', 'broken']
)
def test_interpreter_of_another_version_is_refused(interpreters, tmp_path, asked, named):
    assert interpreters(tmp_path / 'venv', python3_13=WORKING).returncode == 0
    run = interpreters(tmp_path / 'venv', 'PYTHON=python3.11', python3_11=asked)
    assert run.returncode != 0
    assert f'{tmp_path}/venv has Python 3.13, and python3.11 is {named}: remove {tmp_path}/venv, or name' in run.stderr
