"""Configures XLA, the C library's memory allocator and JAX's compilation cache."""

import contextlib
import ctypes
import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from typing import Any

from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.files import atomic_write

CPU_LIBRARY_FUSION = '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'

CHILD_TIMEOUT_SECS = 120  # for the child process that tries a flag, which takes a second

MAX_CACHE_BYTES = 1 << 30  # bytes of compiled programs to keep in the cache
CACHE_WARNING = r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)"  # wording of JAX 0.10

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def configure_cpu_backend() -> None:
    """Speeds up training on a CPU with an XLA flag, a JAX setting and two settings of the C library's allocator.

    The flag restricts XLA's library fusions to single matrix products. Convolutions then use XLA's older code,
    which is faster, and a whole step takes 0.4 to 0.85 of the time, depending on processor and version. Products
    are not fused with the bias addition, because fc6 takes 2.6 times as long in such a fusion. The flag is omitted if
    XLA rejects it or XLA_FLAGS already sets it; other flags in XLA_FLAGS are kept.

    The allocator keeps the 831 MB that a step of the full network allocates and frees, which saves mapping 200,000
    pages per step: 4 to 12 % of the time. Memory that the main thread has used once stays with the process. The
    allocator settings affect only the main thread, so asynchronous dispatch is disabled and JAX computes in the calling
    thread; computations on several devices still use other threads.

    The function imports jax. It does nothing on a machine with a GPU or TPU plugin.
    """
    if any(importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu')):
        return
    flags = os.environ.get('XLA_FLAGS', '')
    if CPU_LIBRARY_FUSION.split('=')[0] not in flags and xla_accepts(CPU_LIBRARY_FUSION):
        os.environ['XLA_FLAGS'] = f'{flags} {CPU_LIBRARY_FUSION}'.strip()
    library = ctypes.CDLL(None)
    if hasattr(library, 'mallopt'):  # glibc
        # M_ARENA_MAX=1 would keep the memory of all threads, but may take 3 GB more and makes threads wait for locks.
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)
    import jax

    jax.config.update('jax_cpu_enable_async_dispatch', False)


def xla_accepts(flag: str) -> bool:
    """Returns whether the XLA of the installed jaxlib accepts `flag` in XLA_FLAGS.

    XLA aborts the process on an unknown flag, so a child process tries the flag, in less than a second. The result is
    cached for each build of jaxlib in alexnet_jax/xla_flags/ of the user's cache folder. If the child process fails
    for another reason, the result is False and is not cached.
    """
    jaxlib = importlib.metadata.distribution('jaxlib')
    build = f'{flag} {jaxlib.version} {jaxlib.read_text("RECORD")}'  # RECORD has a hash of each file
    folder = _cache_folder('xla_flags')
    path = os.path.join(folder, hashlib.sha256(build.encode()).hexdigest()[:32])
    with contextlib.suppress(OSError, KeyError, UnicodeDecodeError), open(path) as file:
        return {'accepted': True, 'refused': False}[file.read()]
    if not sys.executable:  # Python is embedded in another program
        return False
    try:
        child = subprocess.run(
            [sys.executable, '-P', '-c', 'import jax; jax.devices()'],  # -P: no modules of the current folder
            env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flag},
            capture_output=True,
            timeout=CHILD_TIMEOUT_SECS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    accepted = child.returncode == 0
    if os.path.isabs(path) and (accepted or flag.split('=')[0].encode() in child.stderr):
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            with atomic_write(path) as file:
                file.write('accepted' if accepted else 'refused')
    return accepted


def _cache_folder(name: str) -> str:
    """Returns the path of this package's cache folder `name` in $XDG_CACHE_HOME or ~/.cache."""
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(caches, 'alexnet_jax', name)


def reserve_step_memory(temporary: int) -> None:
    """Makes the C library's allocator reuse one region for the `temporary` bytes that every step allocates and frees.

    A block of 64 KB that is never freed separates the region from free memory below it. Otherwise the two would merge,
    and the next step would start at another address and touch up to 600 MB of new pages. Unused memory, such as the
    200 MB that compilation leaves behind, returns to the system. Call this function in the thread that calls the step.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, 'malloc_trim'):  # glibc
        return
    library.malloc.restype = library.realloc.restype = ctypes.c_void_p
    library.malloc.argtypes, library.realloc.argtypes = [ctypes.c_size_t], [ctypes.c_void_p, ctypes.c_size_t]
    library.realloc(library.malloc(temporary + (1 << 16)), 1 << 16)
    library.malloc_trim(0)


def enable_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache in alexnet_jax/compiled/ of $XDG_CACHE_HOME or ~/.cache.

    The function imports jax. It removes the least recently used programs above MAX_CACHE_BYTES. Each number of cores
    has its own subfolder, because XLA divides work among the cores that it sees, but JAX's cache key does not include
    their number; the key does include processor features, XLA flags, devices and versions.

    If JAX_COMPILATION_CACHE_DIR names a folder, JAX uses that folder without this limit. With
    JAX_ENABLE_COMPILATION_CACHE=false there is no cache. If the folder is not writable, the function logs this and
    enables no cache. The minimum compile time of cached programs is 0.1 s, unless
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS is set.
    """
    import jax

    settings: Any = jax.config  # jax 0.10 does not declare the types of these settings
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        # JAX's default skips programs that compile in under a second: evaluation and weight initialization.
        settings.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    root = _cache_folder('compiled')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    folder = os.path.join(root, f'{cores}_cores')
    with contextlib.suppress(OSError):
        if os.path.isabs(folder):
            os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        log(f'{folder} is not writable, so each start compiles again; set JAX_COMPILATION_CACHE_DIR to another folder')
        return
    _evict_lru(root)
    _shorten_cache_warnings(folder)
    settings.update('jax_compilation_cache_dir', folder)


def _evict_lru(root: str) -> None:
    """Removes the least recently used files below `root` until at most MAX_CACHE_BYTES remain.

    JAX's own limit locks the folder at every read, and fails permanently after a process was killed during a write.
    """
    files = []
    for folder, _, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(OSError):  # another process may have removed it
                status = os.stat(path)
                files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(file[1] for file in files)
    for _, of_file, path in sorted(files):
        if size <= MAX_CACHE_BYTES:
            break
        with contextlib.suppress(OSError):
            os.remove(path)
        size -= of_file


def _shorten_cache_warnings(folder: str) -> None:
    """Logs each cache warning of JAX about `folder` as one line, and removes corrupt programs, which JAX keeps."""
    show = warnings.showwarning

    def show_shorter(message: Warning | str, *where: Any, **more: Any) -> None:
        found = re.match(CACHE_WARNING, str(message))
        if not found:
            show(message, *where, **more)
        elif found[1] == 'writing':
            log(f'{folder}: {found[2]} cannot be cached: {found[3]}')
        else:
            log(f'{folder}: {found[2]} is corrupt ({found[3]}); it is removed and compiled again')
            for path in glob.glob(glob.escape(os.path.join(folder, found[2])) + '-*'):
                with contextlib.suppress(OSError):
                    os.remove(path)

    warnings.showwarning = show_shorter
