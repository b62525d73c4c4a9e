"""Multi-process runs: initialization, collectives on host values, and termination."""

import collections
import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, UInt8

from alexnet_jax.config import ConfigError, DistributedConfig
from alexnet_jax.runtime.console import set_process_index, summarize_exception
from alexnet_jax.runtime.preemption import PreemptionHandler

SHUTDOWN_TIMEOUT = 60  # seconds; all processes finish a run within a few file writes of each other
SHARED_FS_TIMEOUT_SECS = 10.0  # within this time the other hosts must see a file that one host wrote
MAX_MESSAGE_BYTES = 1024  # bytes of a message between processes; longer messages are truncated

Tree = TypeVar('Tree')  # of NumPy arrays


class DistributedInitError(RuntimeError):
    """The processes did not connect; the message is one line with the cause and, where known, a remedy."""


def initialize(group: dict[str, Any] | None, config: DistributedConfig, preemption: PreemptionHandler) -> bool:
    """Runs jax.distributed.initialize; all processes must connect within `config.initialization_timeout` seconds.

    Args:
      group: coordinator_address, num_processes and process_id; {} lets JAX detect SLURM, TPU or Kubernetes; None means
        a single process.
      config: `distributed` of a configuration.
      preemption: checked while waiting; afterwards JAX handles SIGTERM, and the other signals become SIGTERM.

    Returns:
      True on success; False if preemption was requested meanwhile, in which case the caller must call hard_exit().

    Raises:
      ConfigError: JAX detected no cluster, or the processes have different numbers of devices.
      DistributedInitError: a process is missing, or the coordinator's address cannot be used.
    """
    if group is None:
        return True
    where = group.get('coordinator_address', 'the coordinator')
    if group.get('process_id') == 0:
        _check_free(where)
    missed = (
        f'not all processes connected to {where} within'
        f' config.distributed.initialization_timeout={config.initialization_timeout} s'
    )
    # Use a thread, because Python handles no signal while JAX waits in C++, and JAX's own timeout aborts the process.
    joined = ThreadPoolExecutor(1).submit(
        jax.distributed.initialize,
        **group,
        initialization_timeout=config.initialization_timeout + 60,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
    )
    deadline = time.monotonic() + config.initialization_timeout
    while not joined.done():
        time.sleep(0.05)
        if preemption.requested and not joined.done():
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
        raise DistributedInitError(
            f'the processes could not connect to {where}: {summarize_exception(error)}'
        ) from None
    preemption.delegate_to_jax()
    set_process_index(jax.process_index(), jax.process_count())
    held = collections.Counter(device.process_index for device in jax.devices())
    if len(set(held.values())) > 1:
        devices = ', '.join(str(held[process]) for process in sorted(held))
        # A barrier: if one process exited now, JAX would abort those that have not counted the devices yet.
        jax.distributed.shutdown()
        raise ConfigError(f'the processes have {devices} devices; all processes must have the same number')
    return True


def _check_free(address: str) -> None:
    """Raises DistributedInitError if the coordinator's port is in use; JAX would crash with a segmentation fault."""
    try:
        socket.create_server(('', int(address.rsplit(':', 1)[1]))).close()
    except (OSError, OverflowError) as error:
        raise DistributedInitError(
            f'--coordinator_address: {address} cannot be used: {error};'
            ' end the process that still uses the port, or choose another port'
        ) from None


def is_primary_process() -> bool:
    """Returns whether this is the primary process, which writes the files and logs progress."""
    return jax.process_index() == 0


def first_error_on_any_process(problem: str = '') -> str:
    """Collective. Returns the first nonempty `problem`, in the order of the processes, or '' if there is none.

    Messages are truncated to MAX_MESSAGE_BYTES.
    """
    rows = multihost_utils.process_allgather(_as_row(problem))
    texts = (bytes(row).decode(errors='ignore').strip() for row in rows)
    return next(filter(None, texts), '')


def _as_row(message: str) -> UInt8[np.ndarray, ' bytes']:
    """Returns `message` as UTF-8, truncated or padded with blanks to MAX_MESSAGE_BYTES."""
    return np.frombuffer(message.encode()[:MAX_MESSAGE_BYTES].ljust(MAX_MESSAGE_BYTES), np.uint8)


def needs_gather(x: jax.Array) -> bool:
    """Returns whether `x` is neither fully replicated nor fully addressable, so gather_to_host() must all-gather."""
    return not x.is_fully_replicated and not x.is_fully_addressable


def gather_to_host(x: jax.Array) -> np.ndarray:
    """Returns the global array `x` as a NumPy array; a collective if needs_gather(x)."""
    return multihost_utils.process_allgather(x, tiled=True) if needs_gather(x) else np.asarray(x)


def count_set_on_any_process(chosen: Bool[np.ndarray, ' n']) -> int:
    """Collective. Returns how many entries of `chosen` are True on at least one process; all lengths must be equal."""
    return int(multihost_utils.process_allgather(chosen).reshape(-1, len(chosen)).any(0).sum())


def broadcast_from_primary(tree: Tree) -> Tree:
    """Collective. Returns the NumPy arrays of the primary process; shapes and dtypes must be equal on all processes."""
    return multihost_utils.broadcast_one_to_all(tree)


def reached_preemption_sync_point(count: int) -> bool:
    """Returns whether all processes must stop at this call, because one of them received SIGTERM.

    `count` must be 1 at the first call and increase by 1 at each call. The result is the same on all processes. A
    single process always gets False.
    """
    return multihost_utils.reached_preemption_sync_point(count)


def assert_equal_across_processes(settings: Mapping[str, object]) -> None:
    """Collective. Raises ConfigError on all processes if one has other `settings` than process 0.

    `settings` maps names to JSON values, which are compared by the first MAX_MESSAGE_BYTES of their JSON text.
    """
    digests = {name: _as_row(json.dumps(value)) for name, value in settings.items()}
    differ = [name for name, value in broadcast_from_primary(digests).items() if (value != digests[name]).any()]
    mine = (
        f'{differ[0]}: {settings[differ[0]]} on process {jax.process_index()}, but not on process 0' if differ else ''
    )
    problem = first_error_on_any_process(mine)
    if problem:
        raise ConfigError(problem)


@contextlib.contextmanager
def workdir_lock(workdir: str) -> Iterator[None]:
    """Collective. Locks the workdir against other runs, and verifies that all processes see the same directory.

    Raises ConfigError (on all processes): another run holds the lock, or the workdir is not writable or not shared.
    """
    path = os.path.join(workdir, 'lock')
    token = bytes(broadcast_from_primary(np.frombuffer(os.urandom(16), np.uint8))).hex()
    with contextlib.ExitStack() as stack:
        problem = ''
        if is_primary_process():
            try:
                file = stack.enter_context(open(path, 'a'))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                print(token, file=file, flush=True)
                os.fsync(file.fileno())  # without fsync, other NFS clients see the token half a minute later
            except BlockingIOError:
                problem = f'--workdir: another process is training in {workdir}; name another folder'
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
                else f'--workdir: {workdir} on process {jax.process_index()} is not the folder of process 0;'
                ' use a shared file system'
            )
        if problem:
            raise ConfigError(problem)
        yield


def _holds(path: str, token: str) -> bool:
    """Returns whether the file `path` contains exactly `token`."""
    try:
        with open(path, errors='replace') as file:
            return file.read().strip() == token
    except OSError:
        return False


def describe_peer_failure(error: Exception) -> str | None:
    """Returns a one-line message if `error`, raised by a collective, means that a peer process died; else None."""
    signs = ('gloo', 'connection', 'coordination', 'unavailable', 'deadline', 'barrier', 'nccl')
    if not isinstance(error, jax.errors.JaxRuntimeError) or not jax.distributed.is_initialized():
        return None
    known = any(sign in str(error).lower() for sign in signs)
    return f'another process was lost ({summarize_exception(error)})' if known else None


def hard_exit(code: int) -> NoReturn:
    """Ends this process immediately. A regular exit would deadlock, because the processes wait for each other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
