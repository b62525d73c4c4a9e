"""What must happen before jax is imported, and before it compiles."""

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

from alexnet_jax.monitor import atomic_write, log

CPU_LIBRARY_FUSION = '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'

CHILD_TIMEOUT_SECS = 120  # for a flag to be tried; it takes a second

KEPT = 1 << 30  # bytes of compiled programs
CACHE_WARNING = r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)"  # as JAX 0.10 has it

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def configure_cpu_backend() -> None:
    """Make training on a CPU faster: a flag for XLA, a setting of JAX and two of the C library's allocator.

    The flag leaves only matrix products to XLA's library for fusions, and convolutions to the faster code they had
    before it; a whole step takes 0.4 to 0.85 of the time, by processor and version. Products are left to it without the
    bias that is added, with which fc6 takes 2.6 times as long. It is left out where XLA refuses it or where XLA_FLAGS
    already says what to do about it; all else there is kept.
    The allocator keeps the 831 MB that a step of the full network takes and gives back, instead of having 200,000 pages
    mapped anew in every step: 4 to 12 % of the time. It does so only for the main thread, so JAX computes there, not in
    one beside it; computations on several devices it still gives to others. Memory once used there stays with the
    process.
    Imports jax. Does nothing on a machine with a GPU or TPU plugin.
    """
    if any(importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu')):
        return
    flags = os.environ.get('XLA_FLAGS', '')
    if CPU_LIBRARY_FUSION.split('=')[0] not in flags and xla_accepts(CPU_LIBRARY_FUSION):
        os.environ['XLA_FLAGS'] = f'{flags} {CPU_LIBRARY_FUSION}'.strip()
    library = ctypes.CDLL(None)
    if hasattr(library, 'mallopt'):  # glibc
        # Not M_ARENA_MAX=1, with which other threads keep theirs too: it may take 3 GB more, and threads wait for it.
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)
    import jax

    jax.config.update('jax_cpu_enable_async_dispatch', False)


def xla_accepts(flag: str) -> bool:
    """Returns whether the XLA of the installed jaxlib accepts `flag` in XLA_FLAGS.

    XLA ends the process on a flag that it does not know, so a child process tries it: once for each build of jaxlib,
    in less than a second, for the answer is kept in alexnet_jax/xla_flags/ of the user's cache folder. Returns False,
    and keeps nothing, where the child process fails for another reason.
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
    """The folder `name` for what this package keeps of the user's: in $XDG_CACHE_HOME or ~/.cache."""
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(caches, 'alexnet_jax', name)


def reserve_step_memory(temporary: int) -> None:
    """Have the C library's allocator keep one place for the `temporary` bytes that a step takes anew each time.

    What it holds unused, such as the 200 MB that a compiler leaves behind, goes back to the system. Bytes that stay
    for ever part the place from free memory below it: where the two became one, the next step would lie elsewhere, on
    up to 600 MB that nothing had used. Call it in the thread that calls the step.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, 'malloc_trim'):  # glibc
        return
    library.malloc.restype = library.realloc.restype = ctypes.c_void_p
    library.malloc.argtypes, library.realloc.argtypes = [ctypes.c_size_t], [ctypes.c_void_p, ctypes.c_size_t]
    library.realloc(library.malloc(temporary + (1 << 16)), 1 << 16)
    library.malloc_trim(0)


def enable_compilation_cache() -> None:
    """Have JAX keep what it compiles in the user's cache folder, where the next start finds it. Imports jax.

    The folder is alexnet_jax/compiled/ in $XDG_CACHE_HOME or ~/.cache; above 1 GB the programs go that were not used
    for longest. Each number of cores has one of its own in it, for XLA splits work over the cores it sees, and JAX does
    not look at them when it takes a program from the disk; it does look at the processor's features, XLA's flags,
    devices and versions.
    JAX_COMPILATION_CACHE_DIR names another folder, which is left to JAX and the user. Does nothing with
    JAX_ENABLE_COMPILATION_CACHE=false; where the folder cannot be written only says so.
    """
    import jax

    settings: Any = jax.config
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        # JAX itself leaves out what takes less than a second: evaluation, and the program of the first weights.
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
        log(f'{folder} cannot be written, so each start compiles anew; JAX_COMPILATION_CACHE_DIR names another folder')
        return
    _evict_lru(root)
    _shorten_cache_warnings(folder)
    settings.update('jax_compilation_cache_dir', folder)


def _evict_lru(root: str) -> None:
    """Remove the files below `root` that were not used for longest while there are more than KEPT bytes.

    JAX's own limit locks the folder at every read, and fails for good where a process was killed while it wrote.
    """
    files = []
    for folder, _, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(OSError):  # another process may have removed it
                status = os.stat(path)
                files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(file[1] for file in files)
    for _, of_file, path in sorted(files):
        if size <= KEPT:
            break
        with contextlib.suppress(OSError):
            os.remove(path)
        size -= of_file


def _shorten_cache_warnings(folder: str) -> None:
    """Say in one line what JAX warns of about `folder`, and remove programs that are damaged: JAX leaves them there."""
    show = warnings.showwarning

    def show_shorter(message: Any, *where: Any, **more: Any) -> None:
        found = re.match(CACHE_WARNING, str(message))
        if not found:
            show(message, *where, **more)
        elif found[1] == 'writing':
            log(f'{folder}: {found[2]} cannot be kept: {found[3]}')
        else:
            log(f'{folder}: {found[2]} is damaged ({found[3]}); it is removed and compiled again')
            for path in glob.glob(glob.escape(os.path.join(folder, found[2])) + '-*'):
                with contextlib.suppress(OSError):
                    os.remove(path)

    warnings.showwarning = show_shorter
