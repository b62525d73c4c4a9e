"""Checkpoints written in the background: their content, and the folders of killed and failing writers."""

import asyncio
import json
import os
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_json, run_command

from alexnet_jax.training import checkpointing
from alexnet_jax.training.checkpointing import Checkpointer, CheckpointError
from alexnet_jax.training.metric_sum import MetricSum
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import TrainState


def small_state(value: float) -> TrainState:
    params = {'conv1': {'kernel': jnp.full((4, 3), value), 'bias': jnp.full(3, -value)}}
    return TrainState(jnp.int32(value), params, jax.tree.map(lambda leaf: leaf / 2, params), {})


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpointer(str(tmp_path / 'checkpoints'), keep=2)


def test_training_continues_while_a_checkpoint_is_written(checkpoints, tmp_path):
    train_step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    held = threading.Event()
    checkpoints.writer.submit(held.wait)  # as a slow writer does
    state = small_state(1.0)
    checkpoints.save(state, RunState(step=1), error=None)
    for _ in range(2):
        before, state = state, train_step(state)
        assert before.params['conv1']['kernel'].is_deleted()  # The new state reuses its memory.
    assert list((tmp_path / 'checkpoints').iterdir()) == []
    held.set()
    checkpoints.save(state, RunState(step=3), error=None)  # waits for the previous checkpoint
    assert (tmp_path / 'checkpoints' / '1').is_dir()
    checkpoints.wait()
    for step in (3, 1):
        checkpoint = checkpoints.restore(jax.eval_shape(lambda: small_state(1.0)))
        restored = checkpoint.state
        assert checkpoint.run_state.step == int(restored.step) == step
        np.testing.assert_array_equal(restored.opt_state['conv1']['bias'], np.full(3, step - 1.5))
        np.testing.assert_array_equal(restored.params['conv1']['kernel'], np.full((4, 3), step))
        np.testing.assert_array_equal(restored.params['conv1']['bias'], np.full(3, step - 2))
        checkpoints.manager.delete(step)
    checkpoints.close()


def test_checkpoint_of_another_version_is_refused(checkpoints, tmp_path):
    for step in (1, 2):
        checkpoints.save(small_state(1.0), RunState(step=step), error=None)
    checkpoints.wait()
    progress = tmp_path / 'checkpoints' / '2' / 'progress' / 'metadata'
    values = {key: value for key, value in read_json(progress).items() if key != 'progress_digest'}
    progress.write_text(json.dumps(values | {'stepp': 2}))
    message = r"checkpoints/2: RunState has no field 'stepp'; the checkpoint was written by another version$"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(jax.eval_shape(lambda: small_state(1.0)))
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['1', '2']
    checkpoints.close()


KILLED = """
    import glob, os, signal, sys
    import jax.numpy as jnp
    from alexnet_jax.training.checkpointing import Checkpointer
    from alexnet_jax.training.run_state import RunState
    from alexnet_jax.training.state import TrainState

    checkpoints = Checkpointer(sys.argv[1], keep=2)
    for step in range(1, 100):
        state = TrainState(jnp.int32(step), {'weights': jnp.full(2 * 10**7, step)}, {}, {})
        checkpoints.save(state, RunState(step=step), None)
        # On a busy machine a checkpoint may be complete before the first look; then the next one is killed.
        while step > 1 and not os.path.exists(f'{sys.argv[1]}/{step}'):
            if glob.glob(f'{sys.argv[1]}/{step}.*/state/*'):
                os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_killed_writer_leaves_the_previous_checkpoint(tmp_path):
    run = run_command('-c', textwrap.dedent(KILLED), tmp_path)
    assert run.returncode == -9, run.stderr
    (unfinished,) = (path.name for path in tmp_path.iterdir() if '.' in path.name)
    killed_at = int(unfinished.partition('.')[0])
    checkpoints = Checkpointer(str(tmp_path), keep=2)
    abstract = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), {'weights': jax.ShapeDtypeStruct((2 * 10**7,), jnp.int32)}, {}, {}
    )
    checkpoint = checkpoints.restore(abstract)
    assert checkpoint.run_state.step == killed_at - 1
    np.testing.assert_array_equal(checkpoint.state.params['weights'], killed_at - 1)
    checkpoints.close()


LOST = """
    import os, sys
    import jax.numpy as jnp
    from alexnet_jax.training.checkpointing import CheckpointError, Checkpointer
    from alexnet_jax.training.run_state import RunState
    from alexnet_jax.training.state import TrainState

    for call in ('save', 'wait', 'close'):
        folder = os.path.join(sys.argv[1], call)
        checkpoints = Checkpointer(folder, keep=2)
        os.rmdir(folder)
        open(folder, 'w').close()
        checkpoints.save(TrainState(jnp.int32(1), {'weights': jnp.ones(9)}, {}, {}), RunState(step=1), None)
        try:
            if call == 'save':
                checkpoints.save(TrainState(jnp.int32(2), {'weights': jnp.ones(9)}, {}, {}), RunState(step=2), None)
            else:
                getattr(checkpoints, call)()
        except CheckpointError as error:
            print(error, flush=True)
    os._exit(0)  # as launch.py ends: threads of Orbax wait for minutes for the folder
"""


def test_next_call_raises_the_error_of_the_writer(tmp_path):
    run = run_command('-c', textwrap.dedent(LOST), tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    for call, line in zip(('save', 'wait', 'close'), lines, strict=True):
        assert line.startswith(f'{tmp_path}/{call}: a checkpoint was not written: [Errno ')


def test_sums_on_the_device_are_as_exact_as_float64_sums():
    random = np.random.default_rng(0)
    values = (random.standard_normal((3000, 4)) * 10.0 ** random.integers(-4, 5, (3000, 4))).astype(np.float32)
    totals = MetricSum()
    for row in values:
        totals.add({'row': jnp.asarray(row), 'first': jnp.asarray(row[0])})
    found, wanted = totals.read(), values.astype(np.float64).sum(0)
    assert totals.count == 3000
    assert found['row'].dtype == np.float64
    np.testing.assert_allclose(found['row'], wanted, rtol=1e-9)
    np.testing.assert_allclose(found['first'], wanted[0], rtol=1e-9)
    with np.testing.assert_raises(AssertionError):  # float32 sums are not exact enough
        np.testing.assert_allclose(np.add.accumulate(values, dtype=np.float32)[-1], wanted, rtol=1e-6)


def test_sum_with_a_nonfinite_value_is_nonfinite():
    totals = MetricSum()
    for value in (1.0, np.nan, 2.0):
        totals.add({'loss': jnp.float32(value)})
    assert not np.isfinite(totals.read()['loss'])
    with pytest.raises(ValueError, match='nothing was added'):
        MetricSum().read()


ORBAX = os.path.join('site-packages', 'orbax', 'checkpoint', 'serialization.py')


@pytest.mark.parametrize(
    ('file', 'message', 'shown'),
    [(ORBAX, 'Encountered error', False), ('other.py', 'Another cause', True)],
)
def test_only_unfinished_coroutines_of_orbax_are_silenced(monkeypatch, file, message, shown):
    seen = []
    monkeypatch.setattr(sys, 'unraisablehook', seen.append)
    checkpointing._silence_orbax_teardown.__wrapped__()
    source = f"""
async def read():
    try:
        await asyncio.sleep(0)
    finally:
        raise RuntimeError({message!r})
"""
    names = {'asyncio': asyncio}
    exec(compile(source, file, 'exec'), names)
    reading = names['read']()
    reading.send(None)
    del reading
    assert [str(unraisable.exc_value) for unraisable in seen] == [message] * shown


@pytest.mark.parametrize(('message', 'shown'), [('Event loop is closed', False), ('Another cause', True)])
def test_only_errors_of_a_closed_event_loop_are_silenced(monkeypatch, message, shown):
    seen = []
    monkeypatch.setattr(sys, 'unraisablehook', seen.append)
    checkpointing._silence_orbax_teardown.__wrapped__()

    class Answer:
        def __del__(self):
            raise RuntimeError(message)

    del (answer := [Answer()])[0]
    assert answer == []
    assert [str(unraisable.exc_value) for unraisable in seen] == [message] * shown
