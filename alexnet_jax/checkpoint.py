"""Checkpoints: Orbax behind one small class, with a fingerprint that tells a damaged file from a good one."""

import functools
import gc
import hashlib
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

from alexnet_jax import processes
from alexnet_jax.monitor import log, summarize_exception


def state_digest(state: Any) -> str:
    """sha256 over parameters, optimiser state and the statistics of batch normalisation.

    float32 little-endian, leaves in the order of their names. The same on any mesh and number of processes, which all
    must call it.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state, state.statistics))
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(processes.gather_to_host(leaf), dtype='<f4').data)
    return digest.hexdigest()


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written: one line with the folder, the cause and what to do."""


def restore_checkpoint(path: str, abstract_state: Any) -> tuple[Any, str]:
    """`state` and `progress` of the checkpoint in `path`, or None and what is wrong with it: the same on all processes.

    Changes nothing there. `abstract_state` says how the state is laid out; None: only `progress` is read.
    """
    # The manager would wait for all processes at its end, which one that finds damage does not reach.
    index = jax.process_index()
    alone = MultiprocessingOptions(primary_host=index, active_processes={index}, barrier_sync_key_prefix=f'read{index}')
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    arguments: dict[str, Any] = {'progress': ocp.args.JsonRestore()}
    if abstract_state is not None:
        arguments['state'] = ocp.args.StandardRestore(abstract_state)
    restored: Any = None
    problem = ''
    _silence_orbax_teardown()
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            restored = reader.restore(path, args=ocp.args.Composite(**arguments))
        written = restored.progress['state_digest']
    except Exception as error:  # Orbax raises many kinds; the next older checkpoint is the answer to all
        cause = error.__cause__  # names the file and the parameter, where Orbax lists settings of TensorStore
        problem = summarize_exception(cause if isinstance(cause, Exception) else error)
    if problem:
        gc.collect()  # of what was read in part, so that there is room for another
    problem = processes.first_error_on_any_process(problem)
    if problem:
        return None, problem
    if abstract_state is not None and state_digest(restored.state) != written:
        return None, 'its numbers differ from those written'
    return restored, ''


@functools.cache
def _silence_orbax_teardown() -> None:
    """Show nothing of what Orbax leaves unfinished of a damaged checkpoint: pages on standard error, at any time later.

    Its coroutines end with the error that was told already, and TensorStore's threads answer to a loop that is closed.
    """
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        coroutine = isinstance(unraisable.object, types.CoroutineType)
        of_orbax = coroutine and f'{os.sep}orbax{os.sep}' in unraisable.object.cr_code.co_filename
        if not of_orbax and str(unraisable.exc_value) != 'Event loop is closed':
            show(unraisable)

    sys.unraisablehook = show_others


def checkpoint_metrics(directory: str) -> dict[int, float | None]:
    """By step, ascending, the checkpoints in `directory`, each with its top-1 error (0 to 1) where it was measured.

    Changes nothing there. Raises CheckpointError: the folder cannot be read.
    """
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    try:
        with ocp.CheckpointManager(directory, options=options) as manager:
            metrics = {step: manager.metrics(step) for step in sorted(manager.all_steps())}
            return {step: found['top1_error'] if found else None for step, found in metrics.items()}
    except Exception as error:  # of the file system, or of a damaged file of metrics
        raise CheckpointError(f'{directory}: the checkpoints cannot be listed: {summarize_exception(error)}') from None


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """No: Orbax would ask JAX with the step, the loop asks with a count of its own; mixed, a SIGTERM gets lost."""
        return False


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copied(state: Any, before: Any) -> Any:
    """`state`, in the memory of the copy `before` it: where memory is new a CPU takes three times as long."""
    return jax.tree.map(jnp.copy, state)


class Checkpointer:
    """The checkpoints of a run, written in the background: the newest `keep` and the one with the lowest error.

    A thread writes a copy of the state on the devices, which keep that much memory for it from the first one on.
    All processes of the run call the same methods in the same order; each writes what its devices hold.

    Args:
      directory: where they lie, one folder a step.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: str, keep: int):
        def error(metrics):
            return metrics['top1_error']

        # Orbax' own pair of best_fn and max_to_keep would delete the newest checkpoint when it is not the best.
        newest = checkpoint_managers.LatestN(n=keep)
        best = checkpoint_managers.BestN(get_metric_fn=error, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self.directory = os.path.abspath(directory)
        os.makedirs(self.directory, exist_ok=True)
        # Naming the processes makes Orbax wait for them with a timeout, and not in a collective without one.
        everyone = MultiprocessingOptions(active_processes=set(range(jax.process_count())))
        self.manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                best_fn=error,
                best_mode='min',
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=everyone,
            ),
        )
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.copy: Any = None  # of the state, on the devices, that was saved last

    def save(self, state: Any, progress: dict[str, Any], error: float | None) -> None:
        """Begin to write `state` and `progress` (JSON); `error` is the validation error at this step, if measured.

        `state` may be donated afterwards. Waits for its copy, and for the checkpoint before it where that is still
        being written. What goes wrong with this one is told by the next call.

        Args:
          progress: with `step`, that of `state`.

        Raises:
          CheckpointError: the one before could not be written.
        """
        self.wait()
        if progress['step'] in self._steps():
            return
        self.copy = copy = jax.block_until_ready(_copied(state, self.copy))  # the next step would wait for it
        # Collectives must come in the same order on all processes: not from a thread beside the training.
        digest = state_digest(copy) if any(processes.needs_gather(leaf) for leaf in jax.tree.leaves(copy)) else None
        self.writing = self.writer.submit(self._write, copy, {**progress}, digest, error)

    def _write(self, copy: Any, progress: dict[str, Any], digest: str | None, error: float | None) -> None:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(copy),
            progress=ocp.args.JsonSave(progress | {'state_digest': digest or state_digest(copy)}),
        )
        metrics = None if error is None else {'top1_error': error}
        self.manager.save(progress['step'], args=arguments, metrics=metrics)
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, laid out as `abstract_state` says, and its progress; None without any.

        Damaged ones before it are named and moved to damaged-STEP; what one process cannot read is damaged for all.
        Raises CheckpointError: none of them can be read.
        """
        damaged: list[tuple[int, str]] = []
        for step in sorted(self._steps(), reverse=True):
            restored, problem = restore_checkpoint(os.path.join(self.directory, str(step)), abstract_state)
            if restored is None:
                damaged.append((step, problem))
                continue
            if damaged:
                self._quarantine(damaged)
            return restored.state, restored.progress
        if damaged:
            raise CheckpointError(
                f'{self.directory}: no checkpoint can be read, the newest because {damaged[0][1]};'
                ' remove the folder or name another --workdir to begin anew'
            )
        return None

    def _steps(self) -> list[int]:
        """Those with a checkpoint as process 0 sees them: on a network's disk another may see one more or fewer."""
        steps = np.array(self.manager.all_steps(), np.int32)
        count = int(processes.broadcast_from_primary(np.int32(len(steps))))
        return processes.broadcast_from_primary(np.resize(steps, count)).tolist()

    def _quarantine(self, damaged: list[tuple[int, str]]) -> None:
        for step, problem in damaged:
            aside = f'damaged-{step}-{time.time_ns()}'
            if processes.is_primary_process():
                os.rename(os.path.join(self.directory, str(step)), os.path.join(self.directory, aside))
            log(f'checkpoint {self.directory}/{step} is damaged ({problem}); moved to {aside}')
        processes.first_error_on_any_process()
        self.manager.reload()

    def wait(self) -> None:
        """Return when everything is on disk. Raises CheckpointError: something could not be written."""
        writing, self.writing = self.writing, None
        try:
            if writing:
                writing.result()
        except Exception as error:  # a full disk, a lost mount: told by Orbax in many ways
            raise CheckpointError(
                f'{self.directory}: a checkpoint was not written: {summarize_exception(error)}'
            ) from None

    def close(self) -> None:
        """Wait and release."""
        self.wait()
        self.writer.shutdown()
        self.manager.close()
