"""The start of a process: CPU settings before jax is imported, the compilation cache, and answers without jax."""

import ctypes
import importlib.metadata
import os
import re
import sys
import warnings
import zlib
from pathlib import Path

import jax
import pytest
from helpers import config_flags, free_port, read_result, run_command

from alexnet_jax.runtime import backend

COUNT_FAULTS = """
import resource, sys, time
from alexnet_jax.runtime import backend
if 'configured' in sys.argv:
    backend.configure_cpu_backend()
import jax, jax.numpy as jnp
from alexnet_jax.layers import materialize
images = jnp.ones((25, 1 << 20))
step = jax.jit(lambda images: materialize(images + 1)[:, 0]).lower(images).compile()
def faults():
    time.sleep(0.1)  # A worker thread may free the memory of the previous step late.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(images))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(step.memory_analysis().temp_size_in_bytes, *(faults() for _ in range(11)))
"""


def page_faults(*arguments: str) -> tuple[int, int]:
    """Returns how many memory pages a computation needs, and the fewest page faults of one of ten computations."""
    # With several devices, JAX computes in other threads too.
    run = run_command('-c', COUNT_FAULTS, *arguments)
    assert run.returncode == 0, run.stderr
    size, _, *faults = map(int, run.stdout.split())
    return size // os.sysconf('SC_PAGE_SIZE'), min(faults)


@pytest.mark.slow
def test_step_memory_is_reused_without_page_faults():
    pages, faults = page_faults()
    assert faults >= pages > 25_000
    pages, faults = page_faults('configured')
    assert faults < pages / 100


RESERVE = """
import ctypes, re, resource
from alexnet_jax.runtime import backend
backend.configure_cpu_backend()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident():
    return int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10
def page_faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = library.malloc(300 << 20)
    library.memset(memory, 1, 300 << 20)
    library.free(memory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
below, between = library.malloc(200 << 20), library.malloc(1 << 20)
library.memset(below, 1, 200 << 20)
library.free(below)
before = resident()
backend.reserve_step_memory(300 << 20)
returned = before - resident()
first = page_faults_of_a_step()
library.free(between)
print(returned, first, page_faults_of_a_step())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_trim'), reason='the allocator is not that of glibc')
def test_reserved_step_memory_is_separate_from_free_memory():
    """Free memory returns to the system, and a step after the first one maps no new pages."""
    run = run_command('-c', RESERVE)
    assert run.returncode == 0, run.stderr
    returned, first, second = map(int, run.stdout.split())
    assert returned > 180 << 20
    assert first > 25_000 or os.sysconf('SC_PAGE_SIZE') > 4096
    assert second < 1000


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ('', backend.CPU_LIBRARY_FUSION),
        ('--xla_foo=1', '--xla_foo=1 ' + backend.CPU_LIBRARY_FUSION),
        ('--xla_cpu_experimental_ynn_fusion_type=', '--xla_cpu_experimental_ynn_fusion_type='),
    ],
)
def test_user_xla_flags_are_kept(monkeypatch, before, after):
    monkeypatch.setenv('XLA_FLAGS', before)
    backend.configure_cpu_backend()
    assert os.environ['XLA_FLAGS'] == after


UNKNOWN_FLAG = '--xla_cpu_no_such_flag=1'


def answers(caches: Path) -> list[str]:
    """Returns the cached answers to whether XLA accepts a flag."""
    return sorted(file.read_text() for file in caches.glob('alexnet_jax/xla_flags/*'))


def test_xla_flag_support_is_cached(caches, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_not_asked_about=1')
    asked = {backend.CPU_LIBRARY_FUSION: True, UNKNOWN_FLAG: False}
    assert {flag: backend.xla_accepts(flag) for flag in asked} == asked
    assert answers(caches) == ['accepted', 'refused']
    monkeypatch.setattr(sys, 'executable', '/nowhere/python')  # No child process can start.
    assert {flag: backend.xla_accepts(flag) for flag in asked} == asked
    other = importlib.metadata.distribution('jax')  # Another build has its own answers.
    monkeypatch.setattr(importlib.metadata, 'distribution', lambda name: other)
    assert not backend.xla_accepts(backend.CPU_LIBRARY_FUSION)
    assert answers(caches) == ['accepted', 'refused']


def test_flag_check_ignores_modules_in_current_folder(caches, tmp_path, monkeypatch):
    (tmp_path / 'random.py').write_text('raise ImportError')
    monkeypatch.chdir(tmp_path)
    assert backend.xla_accepts(backend.CPU_LIBRARY_FUSION)


@pytest.mark.parametrize('interpreter', ['/nowhere/python', '/bin/false', None])
def test_failed_flag_check_is_not_cached(caches, monkeypatch, interpreter):
    monkeypatch.setattr(sys, 'executable', interpreter)
    assert not backend.xla_accepts(backend.CPU_LIBRARY_FUSION)
    assert answers(caches) == []


def test_corrupt_cached_answer_is_checked_again(caches):
    backend.xla_accepts(UNKNOWN_FLAG)
    [file] = caches.glob('alexnet_jax/xla_flags/*')
    for damaged in (b'', b'maybe', b'\xff'):
        file.write_bytes(damaged)
        assert not backend.xla_accepts(UNKNOWN_FLAG)
        assert file.read_text() == 'refused'


@pytest.mark.parametrize('place', ['relative', '{}/file'])
def test_flag_check_without_cache_folder(caches, monkeypatch, capfd, tmp_path, place):
    (tmp_path / 'file').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', place.format(tmp_path))
    assert backend.xla_accepts(backend.CPU_LIBRARY_FUSION)
    assert not backend.xla_accepts(UNKNOWN_FLAG)
    assert os.listdir(tmp_path) == ['file']
    assert capfd.readouterr() == ('', '')


REFUSING = """
import runpy, sys
from alexnet_jax.runtime import backend
backend.CPU_LIBRARY_FUSION = '--xla_cpu_no_such_flag=1'
sys.argv[0] = 'launch.py'
runpy.run_module('alexnet_jax.launch', run_name='__main__', alter_sys=True)
"""


@pytest.mark.slow
def test_training_runs_without_a_rejected_flag(photos_dir, tmp_path):
    _, log = train(tmp_path, photos_dir, tmp_path / 'run', program=['-c', REFUSING])
    assert answers(tmp_path) == ['refused']
    assert 'flag' not in log.lower()


def test_flag_keeps_convolutions_out_of_library_fusions():
    program = """
import sys
from alexnet_jax.runtime import backend
if 'configured' in sys.argv:
    backend.configure_cpu_backend()
import jax, jax.numpy as jnp
from alexnet_jax.layers import convolution
convolved = jax.jit(convolution).lower(jnp.ones((8, 13, 13, 32)), jnp.ones((3, 3, 32, 32))).compile()
product = jax.jit(lambda x, kernel, bias: x @ kernel + bias[None])
product = product.lower(jnp.ones((128, 512)), jnp.ones((512, 512)), jnp.ones(512)).compile().as_text()
fusion = next((line for line in product.splitlines() if 'ynn_fusion' in line and ' fusion(' in line), '')
print('ynn' in convolved.as_text(), fusion.split(' fusion(')[-1].split(')')[0].count('%'))
"""
    for arguments, fused in (([], 'True 2'), (['configured'], 'False 2')):
        run = run_command('-c', program, *arguments, XLA_FLAGS='')
        assert run.stdout.strip() == fused, run.stderr


@pytest.mark.parametrize(
    ('flag', 'code', 'text'),
    [
        ('--help', 1, '--[no]distributed'),
        ('--config.optimizer.lr=3', 2, 'config.optimizer.lr'),
        ('--config.model.towers=3', 2, 'not divisible by model.towers=3'),
    ],
)
def test_help_and_usage_errors_skip_heavy_imports(flag, code, text):
    run = run_command('-X', 'importtime', 'launch.py', flag)
    assert run.returncode == code
    assert text in run.stdout + run.stderr
    imported = set(re.findall(r'^import time:.*\| +(\w+)', run.stderr, re.MULTILINE))
    assert 'ml_collections' in imported
    heavy = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'tensorflow', 'tensorflow_datasets', 'matplotlib'}
    assert not imported & heavy


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Returns an empty cache folder of a user, with JAX as at the start of a command."""
    folder = tmp_path / 'caches'
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 1, 2})
    jax.config.update('jax_enable_compilation_cache', True)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    yield folder
    jax.config.update('jax_persistent_cache_min_compile_time_secs', least)
    jax.config.update('jax_enable_compilation_cache', False)
    jax.config.update('jax_compilation_cache_dir', None)


def folder_in_use() -> str | None:
    backend.enable_compilation_cache()
    return jax.config.jax_compilation_cache_dir


def test_cache_folder_is_in_xdg_cache_home_or_home(caches, monkeypatch):
    assert folder_in_use() == str(caches / 'alexnet_jax' / 'compiled' / '3_cores')
    assert os.listdir(caches / 'alexnet_jax' / 'compiled') == ['3_cores']
    jax.config.update('jax_compilation_cache_dir', None)
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(caches))
    assert folder_in_use() == str(caches / '.cache' / 'alexnet_jax' / 'compiled' / '3_cores')


@pytest.mark.parametrize(('users', 'seconds'), [(None, 0.1), ('30', 0.0)])
def test_min_compile_time_of_cached_programs(caches, monkeypatch, users, seconds):
    monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')
    if users:
        monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', users)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)  # JAX is already imported.
    folder_in_use()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == seconds


def test_user_cache_folder_is_left_to_jax(caches, monkeypatch):
    jax.config.update('jax_compilation_cache_dir', 'gs://bucket/compiled')
    show = warnings.showwarning
    assert folder_in_use() == 'gs://bucket/compiled'
    assert not caches.exists()
    assert warnings.showwarning is show


def test_compilation_cache_can_be_disabled(caches):
    jax.config.update('jax_enable_compilation_cache', False)
    assert folder_in_use() is None
    assert not caches.exists()


@pytest.mark.parametrize('place', ['relative', '{}/file'])
def test_unwritable_cache_folder_is_reported(caches, monkeypatch, capsys, tmp_path, place):
    (tmp_path / 'file').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', place.format(tmp_path))
    assert folder_in_use() is None
    assert 'alexnet_jax/compiled/3_cores' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['file']


def test_least_recently_used_programs_are_evicted(caches, monkeypatch):
    monkeypatch.setattr(backend, 'MAX_CACHE_BYTES', 250)
    used = {'2_cores/old': (1, 1), '3_cores/older_but_read': (9, 0), '3_cores/oldest': (0, 0), '4_cores/new': (8, 8)}
    for name, times in used.items():
        file = caches / 'alexnet_jax' / 'compiled' / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(100))
        os.utime(file, times)
    backend.enable_compilation_cache()
    left = {path.name for path in (caches / 'alexnet_jax').rglob('*') if path.is_file()}
    assert left == {'older_but_read', 'new'}


def test_cache_write_errors_are_one_line(caches, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(warnings, 'showwarning', lambda *warning: shown.append(warning))
    backend.enable_compilation_cache()
    text = "Error writing persistent compilation cache entry for 'jit_f': OSError: [Errno 28] No space left on device"
    for message in (text, 'another thing'):
        warnings.showwarning(UserWarning(message), UserWarning, 'somewhere.py', 1)
    log = capsys.readouterr().err
    assert log.count('\n') == 1
    assert re.search(r'/3_cores: jit_f .*No space left on device\n', log)
    assert [str(warning[0]) for warning in shown] == ['another thing']


PROGRAM = """
import os, sys
from alexnet_jax.runtime import backend
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
backend.enable_compilation_cache()
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda event, **kind: hits.append(event.endswith('/cache_hits')))
x = jax.device_put(jnp.ones((512, 512)))
before = x.unsafe_buffer_pointer()
y = jax.jit(lambda x: jnp.tanh(x) * 2, donate_argnums=0)(x)
print(sum(hits), x.is_deleted(), y.unsafe_buffer_pointer() == before)
"""


@pytest.mark.slow
def test_cache_hits_need_same_flags_and_cores(tmp_path):
    kept = {'XDG_CACHE_HOME': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    kept |= {'JAX_ENABLE_COMPILATION_CACHE': 'true', 'XLA_FLAGS': ''}

    def run(cores='2', **environment):
        run = run_command('-c', PROGRAM, cores, **(kept | environment))
        assert (run.returncode, run.stderr) == (0, '')
        hits, *donated = run.stdout.split()
        assert donated == ['True', 'True']
        return int(hits)

    assert run() == 0
    assert run() == len(list(tmp_path.rglob('*-cache'))) > 0
    assert run(XLA_FLAGS='--xla_cpu_enable_fast_math=true') == 0
    assert run(cores='1') == 0  # A program for two cores would be correct, but slower.


def train(caches: Path, data_dir: str, workdir: Path, *flags: str, program=('launch.py',)) -> tuple[str, str]:
    """Trains two steps on eight devices; returns the digest and the standard error."""
    fields = {'data.data_dir': data_dir, 'model.widths': '(16,0,0,0,32,0,64)', 'train.steps': 2, 'eval.views': 1}
    variables = {'XDG_CACHE_HOME': str(caches), 'JAX_ENABLE_COMPILATION_CACHE': 'true', 'JAX_NUM_CPU_DEVICES': '8'}
    variables['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    variables['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
    run = run_command(*program, f'--workdir={workdir}', *config_flags(fields), *flags, **variables)
    assert run.returncode == 0, run.stderr
    return read_result(workdir)['state_digest'], run.stderr


@pytest.mark.slow
def test_cached_and_corrupt_programs_give_the_same_run(photos_dir, tmp_path):
    def programs():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*-cache')}

    cold, _ = train(tmp_path, photos_dir, tmp_path / 'cold')
    compiled = programs()
    evaluation, step = sorted(path for path in compiled if re.match('jit_(train|eval)_step-', path.name))
    assert step.name.startswith('jit_train_step-')
    evaluation.write_bytes(evaluation.read_bytes()[:1000])

    warm, log = train(tmp_path, photos_dir, tmp_path / 'warm')
    assert warm == cold
    # A program that is not found is compiled and written, so all others were found.
    assert {path for path, time in programs().items() if compiled.get(path) != time} == {evaluation}
    zlib.decompress(evaluation.read_bytes())
    assert len(re.findall('jit_eval_step', log)) == 1
    assert not re.search('Warning|machine', log)


@pytest.mark.slow
def test_several_processes_use_no_private_cache(photos_dir, tmp_path):
    group = [f'--coordinator_address=localhost:{free_port()}', '--num_processes=1', '--process_id=0']
    train(tmp_path, photos_dir, tmp_path / 'run', *group, '--config.train.steps=0')
    assert os.listdir(tmp_path / 'alexnet_jax') == ['xla_flags']
