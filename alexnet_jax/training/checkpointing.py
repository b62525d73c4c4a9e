"""Saves and restores checkpoints with Orbax; a digest of the state detects corrupt files."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import types
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.options import MultiprocessingOptions

from alexnet_jax.config import Config
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.checkpoint_files import checkpoint_steps, parse_step, progress_digest, read_progress
from alexnet_jax.runtime.console import log, summarize_exception
from alexnet_jax.runtime.files import JsonObject, read_json, write_json
from alexnet_jax.runtime.workdir import CheckpointError
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import TrainState


def state_digest(state: TrainState) -> str:
    """Returns the sha256 hex digest of the parameters, their average, the optimizer and batch-normalization statistics.

    The digest covers the leaves as little-endian float32, sorted by name. It does not depend on the mesh or the number
    of processes. Collective: every process must call it.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state, state.batch_stats, state.average))
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(distributed.gather_to_host(leaf), dtype='<f4').data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A restored checkpoint.

    Attributes:
      state: the train state with the requested shardings, or None if only the rest was requested. The state has an
        average of the parameters if the checkpoint has one; see state.with_average() and TrainState.for_inference().
      run_state: the progress of the run at that step.
      state_digest: see state_digest().
      config: the settings as JSON, see Config.to_dict(); None if an earlier version wrote the checkpoint.
    """

    state: TrainState | None
    run_state: RunState
    state_digest: str
    config: JsonObject | None


def restore_checkpoint(path: str, abstract_state: TrainState | None) -> tuple[Checkpoint | None, str]:
    """Restores the checkpoint in the folder `path` without changing the folder. Collective.

    Args:
      path: the folder of one checkpoint.
      abstract_state: shapes, dtypes and shardings of the state, with or without an average; None restores everything
        except the state.

    Returns:
      (checkpoint, ''), or (None, error message) if the checkpoint is corrupt. All processes return the same outcome.

    Raises:
      CheckpointError: the checkpoint is intact, but was written by another version of the program.
    """
    restored: TrainState | None = None
    progress, problem = JsonObject(), ''
    _silence_orbax_teardown()
    try:
        progress = read_progress(path)
        if abstract_state is not None:
            restored = _read_state(path, abstract_state)
    except Exception as error:  # Orbax raises many types; the caller handles all of them alike
        cause = error.__cause__  # names the file and the parameter; Orbax lists TensorStore settings
        problem = summarize_exception(cause if isinstance(cause, Exception) else error)
    if problem:
        gc.collect()  # free the partly restored arrays before the next restore
    problem = distributed.first_error_on_any_process(problem)
    if problem:
        return None, problem
    if restored is not None and state_digest(restored) != progress['state_digest']:
        return None, 'its values do not match its digest'
    try:
        run_state = _run_state(progress)
    except TypeError as error:
        return None, f'its progress is corrupt: {error}'
    except ValueError as error:
        raise CheckpointError(f'{path}: {error}; the checkpoint was written by another version') from None
    if restored is not None and int(restored.step) != run_state.step:
        return None, f'its state is of step {int(restored.step)}, and its progress of step {run_state.step}'
    return Checkpoint(restored, run_state, progress['state_digest'], progress.get('config')), ''


def _run_state(progress: JsonObject) -> RunState:
    """Returns the RunState in `progress`, see read_progress(). Raises the errors of RunState.from_json()."""
    others = ('state_digest', 'progress_digest', 'config')
    return RunState.from_json({key: value for key, value in progress.items() if key not in others})


def _read_state(path: str, abstract_state: TrainState) -> TrainState:
    """Returns the state in the checkpoint folder `path`. Raises the errors of Orbax."""
    # A CheckpointManager would end with a barrier that a process with a read error never reaches.
    index = jax.process_index()
    alone = MultiprocessingOptions(primary_host=index, active_processes={index}, barrier_sync_key_prefix=f'read{index}')
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        average = abstract_state.params if _has_average(path) else {}
        abstract_state = dataclasses.replace(abstract_state, average=average)
        return reader.restore(path, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))).state


def _has_average(path: str) -> bool:
    """Returns whether the state in the checkpoint folder `path` has an average of the parameters.

    Raises OSError, ValueError or KeyError: the description that Orbax wrote is missing or corrupt.
    """
    with open(os.path.join(path, 'state', '_METADATA'), encoding='utf-8') as file:
        keys = json.load(file)['tree_metadata']
    return any(key.startswith("('average',") for key in keys)


@functools.cache
def _silence_orbax_teardown() -> None:
    """Suppresses the tracebacks that Orbax prints to standard error at some time after a failed save or restore.

    When one array fails, Orbax closes its event loop without waiting for the others. Its unfinished coroutines then
    raise the error that was already reported, and TensorStore's threads call the closed loop.
    """
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    previous_hook = sys.unraisablehook

    def hook(unraisable: 'sys.UnraisableHookArgs') -> None:
        source = unraisable.object
        from_orbax = isinstance(source, types.CoroutineType) and f'{os.sep}orbax{os.sep}' in source.cr_code.co_filename
        if not from_orbax and str(unraisable.exc_value) != 'Event loop is closed':
            previous_hook(unraisable)

    sys.unraisablehook = hook


def checkpoint_metrics(directory: str) -> dict[int, float | None]:
    """Returns the top-1 error (0 to 1, None if unmeasured) of each checkpoint in `directory`, by ascending step.

    The function does not change the folder. Raises CheckpointError: a metrics file is corrupt.
    """
    metrics: dict[int, float | None] = {}
    for step in checkpoint_steps(directory):
        path = os.path.join(directory, str(step))
        try:
            if os.path.isdir(path):
                metrics[step] = _read_metrics(path)
        except ValueError as error:
            raise CheckpointError(
                f'{directory}: the checkpoints cannot be listed: {error}; resuming the run repairs the file'
            ) from None
    return metrics


def _read_metrics(path: str) -> float | None:
    """Returns the top-1 error in the metrics of the checkpoint folder `path`, or None if there are no metrics.

    Raises ValueError: the file is corrupt, or is not what the progress in the same checkpoint says.
    """
    file = os.path.join(path, 'metrics', 'metrics')
    if not os.path.lexists(os.path.dirname(file)):
        return None
    error, measured = (read_json(file) or {}).get('top1_error'), _measured_error(path)
    if isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error <= 1:
        raise ValueError(f'{file} has no top-1 error from 0 to 1')
    if measured not in (error, None):
        raise ValueError(f'{file} has the top-1 error {error}, and the progress of the run {measured}')
    return error


def _measured_error(path: str) -> float | None:
    """Returns the top-1 error at the step of the checkpoint folder `path`, from the progress; None if unmeasured."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        run = _run_state(read_progress(path))
        return (
            run.last_evaluation['top1_error'] if run.last_evaluation and run.last_evaluated_step == run.step else None
        )
    return None


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False, so that Orbax never calls JAX's preemption sync point.

        Orbax would pass the step, whereas the training loop passes its own counter; mixing the two loses a SIGTERM.
        """
        return False


def _open_manager(directory: str, keep: int) -> _Manager:
    """Returns a manager that keeps the newest `keep` checkpoints and the one with the lowest error."""

    def top1_error(metrics):
        return metrics['top1_error']

    # With only best_fn and max_to_keep, Orbax would delete the newest checkpoint when it is not the best.
    newest = checkpoint_managers.LatestN(n=keep)
    best = checkpoint_managers.BestN(
        get_metric_fn=top1_error, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    # With active_processes, Orbax uses barriers that have a timeout instead of collectives that have none.
    all_processes = MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    return _Manager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            best_fn=top1_error,
            best_mode='min',
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=all_processes,
        ),
    )


def _repair(directory: str) -> None:
    """Quarantines checkpoints whose progress or name Orbax cannot use, and restores metrics from the progress.

    The files of the state are not read. A restore has found them intact, or will.
    """
    if not os.path.isdir(directory):
        return  # the first write reports that the folder is gone
    for name in os.listdir(directory):
        step, path = parse_step(name), os.path.join(directory, name)
        try:
            if step is None:
                if name.rstrip('\n').isdecimal() and name[0] != '0':  # a step to Orbax
                    raise ValueError(f'{name!r} is no step')
                continue
            read_progress(path)
        except (OSError, ValueError) as error:
            _quarantine_checkpoint(directory, name, summarize_exception(error))
            continue
        measured = _measured_error(path)
        try:
            is_intact = _read_metrics(path) is not None or measured is None
        except ValueError:
            is_intact = False
        if not is_intact:
            _write_metrics(path, measured)
    for metadata in ocp.path.step.standard_name_format().find_all(directory):
        try:
            _ = metadata.commit_timestamp
        except Exception:  # depends on what is wrong in the file
            os.remove(os.path.join(metadata.path, '_CHECKPOINT_METADATA'))  # Orbax works without this file


def _write_metrics(path: str, error: float | None) -> None:
    """Writes the metrics of the checkpoint folder `path` again; removes them if `error` is None."""
    folder = os.path.join(path, 'metrics')
    if os.path.isdir(folder):
        shutil.rmtree(folder)
    elif os.path.lexists(folder):
        os.remove(folder)
    if error is not None:
        os.makedirs(folder)
        write_json(os.path.join(folder, 'metrics'), {'top1_error': error})
    log(f'checkpoint {path}: its metrics are written again from the progress of the run')


def _quarantine_checkpoint(directory: str, name: str, problem: str) -> None:
    moved = f'corrupt-{name}-{time.time_ns()}'
    try:
        os.rename(os.path.join(directory, name), os.path.join(directory, moved))
    except OSError as error:
        raise CheckpointError(f'checkpoint {directory}/{name} cannot be renamed: {error.strerror}') from None
    log(f'checkpoint {directory}/{name} is corrupt ({problem}); moved to {moved}')


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
      config: the settings of the run, which each checkpoint contains; None leaves them out.

    Raises CheckpointError: the folder cannot be created.
    """

    def __init__(self, directory: str, keep: int, config: Config | None = None):
        self.directory, self.keep, self.config = os.path.abspath(directory), keep, config
        try:
            os.makedirs(self.directory, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f'{self.directory} cannot be used: {error.strerror}') from None
        _silence_orbax_teardown()
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.snapshot: TrainState | None = None  # the last saved state, on the devices

    @functools.cached_property
    def manager(self) -> _Manager:
        """Orbax's manager of the checkpoints, after the repair of what it cannot read. Collective."""
        problem = ''
        if distributed.is_primary_process():
            try:
                _repair(self.directory)
            except OSError as error:
                problem = summarize_exception(error)
        problem = distributed.first_error_on_any_process(problem)
        if problem:
            raise CheckpointError(f'{self.directory} cannot be used: {problem}')
        return _open_manager(self.directory, self.keep)

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
        manager = self.manager  # opens the manager in this thread, which is collective
        self.writing = self.writer.submit(self._write, manager, snapshot, run_state, digest, error)

    def _write(
        self,
        manager: _Manager,
        snapshot: TrainState,
        run_state: RunState,
        digest: str | None,
        error: float | None,
    ) -> None:
        progress = run_state.to_json() | {'state_digest': digest or state_digest(snapshot)}
        if self.config is not None:
            progress['config'] = self.config.to_dict()
        progress['progress_digest'] = progress_digest(progress)
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(snapshot), progress=ocp.args.JsonSave(progress))
        metrics = None if error is None else {'top1_error': error}
        manager.save(run_state.step, args=arguments, metrics=metrics)
        manager.wait_until_finished()
        manager.check_for_errors()

    def restore(self, abstract_state: TrainState) -> Checkpoint | None:
        """Returns the newest intact checkpoint, or None if there is no checkpoint. Collective.

        `abstract_state` has the shapes, dtypes and shardings of the state. Corrupt checkpoints newer than the returned
        one are logged and renamed to corrupt-STEP-NANOSECONDS. A checkpoint that one process cannot read counts as
        corrupt on all. Raises CheckpointError: no checkpoint can be read, or another version wrote the checkpoint.
        """
        corrupt: list[tuple[int, str]] = []
        for step in sorted(self._steps(), reverse=True):
            checkpoint, problem = restore_checkpoint(os.path.join(self.directory, str(step)), abstract_state)
            if checkpoint is not None and checkpoint.run_state.step != step:
                problem = f'it is a checkpoint of step {checkpoint.run_state.step}'
            if problem:
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

    def latest_step(self) -> int | None:
        """Waits for the background write, which may fail, and returns the step of the newest checkpoint, if any."""
        with contextlib.suppress(CheckpointError):
            self.wait()
        return max(checkpoint_steps(self.directory), default=None)

    def _steps(self) -> list[int]:
        """Returns the checkpoint steps that process 0 sees; on a network disk, other processes may see others."""
        steps = np.array(checkpoint_steps(self.directory), np.int32)
        count = int(distributed.broadcast_from_primary(np.int32(len(steps))))
        return distributed.broadcast_from_primary(np.resize(steps, count)).tolist()

    def _quarantine(self, corrupt: list[tuple[int, str]]) -> None:
        for step, problem in corrupt:
            if distributed.is_primary_process():
                _quarantine_checkpoint(self.directory, str(step), problem)
        distributed.first_error_on_any_process()
        if 'manager' in self.__dict__:
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
        if 'manager' in self.__dict__:
            self.manager.close()
