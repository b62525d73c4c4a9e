"""Saves and restores checkpoints with Orbax; a digest of the state detects corrupt files."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import logging
import os
import sys
import time
import types
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.options import MultiprocessingOptions

from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.console import log, summarize_exception
from alexnet_jax.runtime.workdir import CheckpointError
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import TrainState


def state_digest(state: TrainState) -> str:
    """Returns the sha256 hex digest of the parameters, the optimizer state and the batch-normalization statistics.

    The digest covers the leaves as little-endian float32, sorted by name. It does not depend on the mesh or the number
    of processes. Collective: every process must call it.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state, state.batch_stats))
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(distributed.gather_to_host(leaf), dtype='<f4').data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A restored checkpoint.

    Attributes:
      state: the train state with the requested shardings, or None if only the rest was requested.
      run_state: the progress of the run at that step.
      state_digest: see state_digest().
    """

    state: TrainState | None
    run_state: RunState
    state_digest: str


def restore_checkpoint(path: str, abstract_state: TrainState | None) -> tuple[Checkpoint | None, str]:
    """Restores the checkpoint in the folder `path` without changing the folder. Collective.

    Args:
      path: the folder of one checkpoint.
      abstract_state: shapes, dtypes and shardings of the state; None restores everything except the state.

    Returns:
      (checkpoint, ''), or (None, error message) if the checkpoint is corrupt. All processes return the same outcome.

    Raises:
      CheckpointError: the checkpoint is intact, but was written by another version of the program.
    """
    # A CheckpointManager would end with a barrier that a process with a read error never reaches.
    index = jax.process_index()
    alone = MultiprocessingOptions(primary_host=index, active_processes={index}, barrier_sync_key_prefix=f'read{index}')
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    arguments: dict[str, ocp.args.CheckpointArgs] = {'progress': ocp.args.JsonRestore()}
    if abstract_state is not None:
        arguments['state'] = ocp.args.StandardRestore(abstract_state)
    restored: Any = None
    problem = ''
    _silence_orbax_teardown()
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            restored = reader.restore(path, args=ocp.args.Composite(**arguments))
        written = restored.progress.pop('state_digest')
    except Exception as error:  # Orbax raises many types; the caller handles all of them alike
        cause = error.__cause__  # names the file and the parameter; Orbax lists TensorStore settings
        problem = summarize_exception(cause if isinstance(cause, Exception) else error)
    if problem:
        gc.collect()  # free the partly restored arrays before the next restore
    problem = distributed.first_error_on_any_process(problem)
    if problem:
        return None, problem
    if abstract_state is not None and state_digest(restored.state) != written:
        return None, 'its values do not match its digest'
    try:
        run_state = RunState.from_json(restored.progress)
    except ValueError as error:
        raise CheckpointError(f'{path}: {error}; the checkpoint was written by another version') from None
    return Checkpoint(None if abstract_state is None else restored.state, run_state, written), ''


@functools.cache
def _silence_orbax_teardown() -> None:
    """Suppresses the tracebacks that Orbax prints to standard error at some time after a failed save or restore.

    When one array fails, Orbax closes its event loop without waiting for the others. Its unfinished coroutines then
    raise the error that was already reported, and TensorStore's threads call the closed loop. Orbax's warning that a
    folder is opened for reading is suppressed too.
    """
    logging.getLogger('absl').addFilter(lambda record: not str(record.msg).startswith('Given directory is read only'))
    previous_hook = sys.unraisablehook

    def hook(unraisable: 'sys.UnraisableHookArgs') -> None:
        source = unraisable.object
        from_orbax = isinstance(source, types.CoroutineType) and f'{os.sep}orbax{os.sep}' in source.cr_code.co_filename
        if not from_orbax and str(unraisable.exc_value) != 'Event loop is closed':
            previous_hook(unraisable)

    sys.unraisablehook = hook


def checkpoint_metrics(directory: str) -> dict[int, float | None]:
    """Returns the top-1 error (0 to 1, None if unmeasured) of each checkpoint in `directory`, by ascending step.

    The function does not change the folder. Raises CheckpointError: the folder cannot be read.
    """
    _silence_orbax_teardown()
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    try:
        with ocp.CheckpointManager(directory, options=options) as manager:
            metrics = {step: manager.metrics(step) for step in sorted(manager.all_steps())}
            return {step: found['top1_error'] if found else None for step, found in metrics.items()}
    except Exception as error:  # from the file system, or from a corrupt metrics file
        raise CheckpointError(f'{directory}: the checkpoints cannot be listed: {summarize_exception(error)}') from None


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False, so that Orbax never calls JAX's preemption sync point.

        Orbax would pass the step, whereas the training loop passes its own counter; mixing the two loses a SIGTERM.
        """
        return False


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _snapshot(state: TrainState, previous: TrainState | None) -> TrainState:
    """Copies `state` into the donated buffers of `previous`; on a CPU, new buffers take three times as long."""
    return jax.tree.map(jnp.copy, state)


class Checkpointer:
    """Saves the checkpoints of a run in a background thread; keeps the newest `keep` and the one with the lowest error.

    The thread writes a copy of the state; the buffers of the copy stay allocated on the devices after the first save.
    All processes must call the same methods in the same order; each process writes its own shards.

    Args:
      directory: the folder of the checkpoints, with one subfolder per step.
      keep: number of newest checkpoints to keep.
    """

    def __init__(self, directory: str, keep: int):
        def top1_error(metrics):
            return metrics['top1_error']

        # With only best_fn and max_to_keep, Orbax would delete the newest checkpoint when it is not the best.
        newest = checkpoint_managers.LatestN(n=keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=top1_error, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self.directory = os.path.abspath(directory)
        os.makedirs(self.directory, exist_ok=True)
        _silence_orbax_teardown()
        # With active_processes, Orbax uses barriers that have a timeout instead of collectives that have none.
        all_processes = MultiprocessingOptions(active_processes=set(range(jax.process_count())))
        self.manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                best_fn=top1_error,
                best_mode='min',
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=all_processes,
            ),
        )
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.snapshot: TrainState | None = None  # the last saved state, on the devices

    def save(self, state: TrainState, run_state: RunState, error: float | None) -> None:
        """Starts to write a checkpoint in the background; does nothing if the step already has a checkpoint.

        The method waits for the previous checkpoint and for the copy of `state`; the caller may donate `state`
        afterwards. If this write fails, the next call of save(), wait() or close() raises the error.

        Args:
          state: the train state after `run_state.step` steps.
          run_state: the progress of the run.
          error: the validation top-1 error at this step, or None if it was not measured.

        Raises:
          CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        if run_state.step in self._steps():
            return
        # The next train step would wait for the copy anyway.
        self.snapshot = snapshot = jax.block_until_ready(_snapshot(state, self.snapshot))
        # All processes must run collectives in the same order, so the writer thread must not start one.
        needs_gather = any(distributed.needs_gather(leaf) for leaf in jax.tree.leaves(snapshot))
        digest = state_digest(snapshot) if needs_gather else None
        self.writing = self.writer.submit(self._write, snapshot, run_state, digest, error)

    def _write(self, snapshot: TrainState, run_state: RunState, digest: str | None, error: float | None) -> None:
        progress = run_state.to_json() | {'state_digest': digest or state_digest(snapshot)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(snapshot), progress=ocp.args.JsonSave(progress))
        metrics = None if error is None else {'top1_error': error}
        self.manager.save(run_state.step, args=arguments, metrics=metrics)
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def restore(self, abstract_state: TrainState) -> Checkpoint | None:
        """Returns the newest intact checkpoint, or None if there is no checkpoint. Collective.

        `abstract_state` has the shapes, dtypes and shardings of the state. Corrupt checkpoints newer than the returned
        one are logged and renamed to corrupt-STEP-NANOSECONDS. A checkpoint that one process cannot read counts as
        corrupt on all. Raises CheckpointError: no checkpoint can be read, or another version wrote the checkpoint.
        """
        corrupt: list[tuple[int, str]] = []
        for step in sorted(self._steps(), reverse=True):
            checkpoint, problem = restore_checkpoint(os.path.join(self.directory, str(step)), abstract_state)
            if checkpoint is None:
                corrupt.append((step, problem))
                continue
            if corrupt:
                self._quarantine(corrupt)
            return checkpoint
        if corrupt:
            raise CheckpointError(
                f'{self.directory}: no checkpoint can be read, the newest because {corrupt[0][1]};'
                ' remove the folder or use another --workdir to start over'
            )
        return None

    def latest_step(self) -> int:
        """Waits for the background write, which may fail, and returns the step of the newest checkpoint, or 0."""
        with contextlib.suppress(CheckpointError):
            self.wait()
        return self.manager.latest_step() or 0

    def _steps(self) -> list[int]:
        """Returns the checkpoint steps that process 0 sees; on a network disk, other processes may see others."""
        steps = np.array(self.manager.all_steps(), np.int32)
        count = int(distributed.broadcast_from_primary(np.int32(len(steps))))
        return distributed.broadcast_from_primary(np.resize(steps, count)).tolist()

    def _quarantine(self, corrupt: list[tuple[int, str]]) -> None:
        for step, problem in corrupt:
            name = f'corrupt-{step}-{time.time_ns()}'
            if distributed.is_primary_process():
                os.rename(os.path.join(self.directory, str(step)), os.path.join(self.directory, name))
            log(f'checkpoint {self.directory}/{step} is corrupt ({problem}); moved to {name}')
        distributed.first_error_on_any_process()
        self.manager.reload()

    def wait(self) -> None:
        """Waits for the background write. Raises CheckpointError: the checkpoint could not be written."""
        writing, self.writing = self.writing, None
        try:
            if writing:
                writing.result()
        except Exception as error:  # Orbax raises many types for a full disk or a lost mount
            raise CheckpointError(
                f'{self.directory}: a checkpoint was not written: {summarize_exception(error)}'
            ) from None

    def close(self) -> None:
        """Waits for the background write, then releases the thread and the manager. Raises as wait() does."""
        self.wait()
        self.writer.shutdown()
        self.manager.close()
