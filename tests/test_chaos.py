"""The chaos suite (chaos.py) in a short form, and runs with planted faults, which the suite must report as lost."""

import dataclasses
from pathlib import Path

import chaos
import pytest

# The tests take two minutes on two cores, and longer on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1800)]

SHORT = (
    *('kill/0/1', 'checkpoint/0/0', 'checkpoint/0/1', 'files/0/0', 'data/0/0', 'data/0/3', 'disk/0/0'),
    *('twice/0/0', 'suspend/0/1', 'pipe/0/0', 'pipe/0/2', 'stop/0/0'),
)
CONFIGURE = """
import os, threading, time
from alexnet_jax.runtime import backend
backend.configure_cpu_backend()
from alexnet_jax.training import checkpointing, metrics_logger
"""
LAUNCH = """
import runpy, sys
sys.argv[0] = 'launch.py'
runpy.run_path('launch.py', run_name='__main__')
"""
# For each fault: code that is run before launch.py, the case that must find it, and a part of what the case reports.
PLANTED = {
    'a checkpoint restored without its digest check': (
        """
def restore_unchecked(path, abstract_state):
    progress = checkpointing.read_progress(path)
    state, run_state = checkpointing._read_state(path, abstract_state), checkpointing._run_state(progress)
    return checkpointing.Checkpoint(state, run_state, progress['state_digest'], progress['config']), ''
checkpointing.restore_checkpoint = restore_unchecked
""",
        'checkpoint/0/18',
        'result.json: ',
    ),
    'a checkpoint restored with other values': (
        """
import dataclasses, jax
restore = checkpointing.Checkpointer.restore
def restore_wrongly(checkpoints, state):
    found = restore(checkpoints, state)
    double = lambda leaf: leaf * 2 if getattr(leaf.dtype, 'kind', '') == 'f' else leaf
    return found and dataclasses.replace(found, state=jax.tree.map(double, found.state))
checkpointing.Checkpointer.restore = restore_wrongly
""",
        'checkpoint/0/1',
        'result.json: ',
    ),
    'the last line of metrics.jsonl is not written': (
        """
close = metrics_logger.JsonlWriter.close
def lose(writer):
    writer.file.truncate(os.path.getsize(writer.file.name) - 20)
    close(writer)
metrics_logger.JsonlWriter.close = lose
""",
        'stop/0/0',
        'metrics.jsonl',
    ),
    'a run resumes from scratch': (
        """
checkpointing.Checkpointer.restore = lambda self, state: None
""",
        'checkpoint/0/1',
        'resumed at step 0',
    ),
    'a traceback of a thread': (
        """
threading.Thread(target=lambda: 1 / 0).start()
""",
        'stop/0/0',
        'Traceback',
    ),
    'a run that hangs': ('time.sleep(1000)', 'stop/0/0', 'no end in time'),
}


@pytest.fixture(scope='module')
def suite(photos_dir, tmp_path_factory):
    suite = chaos.Suite(tmp_path_factory.mktemp('chaos'), Path(photos_dir), kills=2)
    suite.prepare()
    return suite


def run(suite, *names):
    """Returns the ended cases by name."""
    cases = [
        chaos.Case(kind, int(seed), int(index), suite) for kind, seed, index in (name.split('/') for name in names)
    ]
    return {case.name: case for case in chaos.run_cases(cases, jobs=2)}


def test_nothing_is_lost(suite):
    ended = run(suite, *SHORT)
    assert {name: case.detail for name, case in ended.items() if 'LOST' in case.outcomes} == {}
    assert sorted(ended) == sorted(SHORT)
    assert all(case.outcomes for case in ended.values())
    assert ended['checkpoint/0/0'].outcomes == ['recovered']
    assert chaos.table(list(ended.values())).count('\n') == 1 + len(chaos.KINDS)


@pytest.mark.parametrize('fault', PLANTED)
def test_planted_fault_is_reported_as_lost(suite, fault):
    code, name, report = PLANTED[fault]
    limit = 3 if 'hangs' in fault else suite.limit
    (case,) = run(dataclasses.replace(suite, program=('-c', CONFIGURE + code + LAUNCH), limit=limit), name).values()
    assert 'LOST' in case.outcomes, case.detail
    assert report in case.detail
