"""CPU tuning before jax is imported: the XLA flag, and freed memory that stays with the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_jax import startup

ROOT = Path(__file__).parent.parent
COUNT_FAULTS = """
import ctypes, resource, sys, threading
from alexnet_jax import startup
if 'tuned' in sys.argv:
    startup.tune_cpu()
library, size = ctypes.CDLL(None), 100 << 20
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def use():
    block = library.malloc(size)
    library.memset(block, 1, size)
    library.free(block)
def in_thread():
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
in_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
in_thread()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*arguments: str) -> int:
    """Pages that a thread has mapped for 100 MB of memory the second time it uses them."""
    run = subprocess.run(
        [sys.executable, '-c', COUNT_FAULTS, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_memory_of_a_step_is_not_mapped_anew():
    pages = (100 << 20) // os.sysconf('SC_PAGE_SIZE')
    assert page_faults() >= pages
    assert page_faults('tuned') < pages / 100


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ('', startup.CPU_LIBRARY_FUSION),
        ('--xla_foo=1', '--xla_foo=1 ' + startup.CPU_LIBRARY_FUSION),
        ('--xla_cpu_experimental_ynn_fusion_type=', '--xla_cpu_experimental_ynn_fusion_type='),
    ],
)
def test_flags_of_the_user_are_kept(monkeypatch, before, after):
    monkeypatch.setenv('XLA_FLAGS', before)
    startup.tune_cpu()
    assert os.environ['XLA_FLAGS'] == after


def test_an_untried_jaxlib_gets_no_flag(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')
    monkeypatch.setattr(startup, 'TRIED_WITH_JAXLIB', ('0.0.1',))
    startup.tune_cpu()
    assert os.environ['XLA_FLAGS'] == ''


def test_the_flag_takes_convolutions_out_of_library_fusions():
    program = """
import sys
from alexnet_jax import startup
if 'tuned' in sys.argv:
    startup.tune_cpu()
import jax, jax.numpy as jnp
from alexnet_jax.layers import convolution
compiled = jax.jit(convolution).lower(jnp.ones((8, 13, 13, 32)), jnp.ones((3, 3, 32, 32))).compile()
print('ynn' in compiled.as_text())
"""
    for arguments, fused in (([], 'True'), (['tuned'], 'False')):
        environment = {**os.environ, 'XLA_FLAGS': ''}
        run = subprocess.run(
            [sys.executable, '-c', program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == fused, run.stderr
