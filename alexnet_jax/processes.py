"""The processes of one run: how they find each other, agree and end together. With one process all of it is idle."""

import collections
import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax.config import ConfigError
from alexnet_jax.monitor import Preemption, set_process_index, summarize_exception

SHUTDOWN_TIMEOUT = 60  # seconds; at the end of a run all processes are a few writes apart
SHARED_FS_TIMEOUT_SECS = 10.0  # seconds until a file written on one host must be seen on the others
TEXT = 1024  # bytes of a text that all are told


class DistributedInitError(RuntimeError):
    """Processes that did not come together: one line with the cause and what to do."""


def start(group: dict[str, Any] | None, config: Any, preemption: Preemption) -> bool:
    """Join the other processes, which must come within `config.start_timeout` seconds; whether that was done.

    False where `preemption` was requested meanwhile; then hard_exit() is the only way out.

    Args:
      group: coordinator_address, num_processes and process_id; {} lets JAX look for SLURM, TPU or Kubernetes; None:
        there is only this process.
      config: `distributed` of a configuration.

    Raises:
      ConfigError: JAX found none of these, or the processes have different numbers of devices.
      DistributedInitError: the others did not come, or the coordinator's address cannot be used.
    """
    if group is None:
        return True
    where = group.get('coordinator_address', 'the coordinator')
    if group.get('process_id') == 0:
        _check_free(where)
    missed = f'not all processes met at {where} within config.distributed.start_timeout={config.start_timeout} s'
    # In a thread, for while it waits in C++ no signal is handled; and its own timeout aborts the process.
    joined = ThreadPoolExecutor(1).submit(
        jax.distributed.initialize,
        **group,
        initialization_timeout=config.start_timeout + 60,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
    )
    deadline = time.monotonic() + config.start_timeout
    while not joined.done():
        time.sleep(0.05)
        if preemption.requested:
            return False
        if time.monotonic() > deadline:
            raise DistributedInitError(missed)
    try:
        joined.result()
    except ValueError as error:
        raise ConfigError(
            f'--distributed: found neither SLURM, TPU nor Kubernetes ({error});'
            ' give --coordinator_address, --num_processes and --process_id'
        ) from None
    except RuntimeError as error:
        raise DistributedInitError(f'the processes could not meet at {where}: {summarize_exception(error)}') from None
    preemption.delegate_to_jax()
    set_process_index(jax.process_index(), jax.process_count())
    held = collections.Counter(device.process_index for device in jax.devices())
    if len(set(held.values())) > 1:
        devices = ', '.join(str(held[process]) for process in sorted(held))
        raise ConfigError(f'the processes have {devices} devices; all must have as many')
    return not preemption.requested


def _check_free(address: str) -> None:
    """Raise DistributedInitError where the coordinator's port is taken; JAX would end in a segmentation fault."""
    try:
        socket.create_server(('', int(address.rsplit(':', 1)[1]))).close()
    except (OSError, OverflowError) as error:
        raise DistributedInitError(
            f'--coordinator_address: {address} cannot be used: {error}; is a process left, or name another port'
        ) from None


def is_primary_process() -> bool:
    """Whether this process writes the files and talks."""
    return jax.process_index() == 0


def first_error_on_any_process(problem: str = '') -> str:
    """What is wrong with the first process that has a problem, '' without any: the same on all, once all have called.

    Text after the first 1024 bytes is lost.
    """
    row = np.frombuffer(problem.encode()[:TEXT].ljust(TEXT), np.uint8)
    rows = multihost_utils.process_allgather(row)
    texts = (bytes(row).decode(errors='ignore').strip() for row in rows)
    return next(filter(None, texts), '')


def needs_gather(x: jax.Array) -> bool:
    """Whether no process holds all numbers of `x`, so that they travel in gather_to_host()."""
    return not x.is_fully_replicated and not x.is_fully_addressable


def gather_to_host(x: jax.Array) -> np.ndarray:
    """All numbers of `x`, an array on the mesh; where it needs_gather() all processes must call it."""
    return multihost_utils.process_allgather(x, tiled=True) if needs_gather(x) else np.asarray(x)


def count_set_on_any_process(chosen: np.ndarray) -> int:
    """How many are chosen on any process; `chosen` (N,) bool, N the same on all, which must call it."""
    return int(multihost_utils.process_allgather(chosen).reshape(-1, len(chosen)).any(0).sum())


def broadcast_from_primary(tree: Any) -> Any:
    """Process 0's arrays (NumPy, of the same shapes and dtypes on all) on every process."""
    return multihost_utils.broadcast_one_to_all(tree)


def reached_preemption_sync_point(count: int) -> bool:
    """Whether to stop because a process got SIGTERM: the same answer on all for the same `count`, True once.

    count: 1 at the first call, and one more at each. With one process the answer is always False.
    """
    return multihost_utils.reached_preemption_sync_point(count)


def assert_equal_across_processes(settings: dict[str, Any]) -> None:
    """Raise ConfigError on all processes where one has other `settings` (by name; JSON) than process 0."""
    digests = {
        name: np.frombuffer(json.dumps(value).encode()[:TEXT].ljust(TEXT), np.uint8) for name, value in settings.items()
    }
    differ = [name for name, value in broadcast_from_primary(digests).items() if (value != digests[name]).any()]
    mine = f'{differ[0]}: {settings[differ[0]]} on process {jax.process_index()}, not so on process 0' if differ else ''
    problem = first_error_on_any_process(mine)
    if problem:
        raise ConfigError(problem)


@contextlib.contextmanager
def workdir_lock(workdir: str) -> Iterator[None]:
    """Hold the folder of a run for these processes alone, and make sure that all of them see the same one.

    Raises ConfigError (on all processes): another run has it, it cannot be written, or it is not shared.
    """
    path, token = (
        os.path.join(workdir, 'lock'),
        bytes(broadcast_from_primary(np.frombuffer(os.urandom(16), np.uint8))).hex(),
    )
    with contextlib.ExitStack() as stack:
        problem = ''
        if is_primary_process():
            try:
                file = stack.enter_context(open(path, 'a'))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                print(token, file=file, flush=True)
                os.fsync(file.fileno())  # on NFS the others would see it half a minute later
            except BlockingIOError:
                problem = f'--workdir: another process trains in {workdir}; name another one'
            except OSError as error:
                problem = f'--workdir: {workdir} cannot be used: {error}'
        problem = first_error_on_any_process(problem)
        if not problem:
            deadline = time.monotonic() + SHARED_FS_TIMEOUT_SECS
            while not (seen := _holds(path, token)) and time.monotonic() < deadline:
                time.sleep(0.1)
            problem = first_error_on_any_process(
                ''
                if seen
                else f'--workdir: {workdir} on process {jax.process_index()} is not that of process 0; share it'
            )
        if problem:
            raise ConfigError(problem)
        yield


def _holds(path: str, token: str) -> bool:
    try:
        with open(path) as file:
            return file.read().strip() == token
    except OSError:
        return False


def describe_peer_failure(error: Exception) -> str | None:
    """In one line that another process is gone, where that is what `error` of a collective says; otherwise None."""
    signs = ('gloo', 'connection', 'coordination', 'unavailable', 'deadline', 'barrier', 'nccl')
    if not isinstance(error, jax.errors.JaxRuntimeError) or not jax.distributed.is_initialized():
        return None
    known = any(sign in str(error).lower() for sign in signs)
    return f'another process was lost ({summarize_exception(error)})' if known else None


def hard_exit(code: int) -> NoReturn:
    """End this process at once: an orderly end would wait for the others, and they for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
