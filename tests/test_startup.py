"""The start of a process: CPU tuning before jax is imported, compiled programs kept on disk, answers without jax."""

import ctypes
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import jax
import pytest

from alexnet_jax.runtime import backend

ROOT = Path(__file__).parent.parent
COUNT_FAULTS = """
import resource, sys, time
from alexnet_jax.runtime import backend
if 'tuned' in sys.argv:
    backend.configure_cpu_backend()
import jax, jax.numpy as jnp
from alexnet_jax.layers import materialize
images = jnp.ones((25, 1 << 20))
step = jax.jit(lambda images: materialize(images + 1)[:, 0]).lower(images).compile()
def faults():
    time.sleep(0.1)  # a worker thread may free the memory of the step before a moment after that step is ready
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(images))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(step.memory_analysis().temp_size_in_bytes, *(faults() for _ in range(11)))
"""


def page_faults(*arguments: str) -> tuple[int, int]:
    """Returns the number of memory pages a computation needs, and the fewest that one of ten computations mapped."""
    environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}  # with several JAX computes in other threads, too
    command = [sys.executable, '-c', COUNT_FAULTS, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    size, _, *faults = map(int, run.stdout.split())
    return size // os.sysconf('SC_PAGE_SIZE'), min(faults)


@pytest.mark.slow
def test_step_memory_is_reused_without_page_faults():
    pages, mapped = page_faults()
    assert mapped >= pages > 25_000
    pages, mapped = page_faults('tuned')
    assert mapped < pages / 100


GIVE_BACK = """
import re
from alexnet_jax.runtime import backend
backend.configure_cpu_backend()
def resident():
    return int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10
blocks = [bytearray(1 << 20) for _ in range(200)]
end = bytearray(1 << 20)  # what is above free memory keeps it from the system
sizes = [resident()]
del blocks
sizes.append(resident())
backend.reserve_step_memory(0)
sizes.append(resident())
print(*sizes)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_free_memory_is_given_back_when_asked_for():
    run = subprocess.run([sys.executable, '-c', GIVE_BACK], cwd=ROOT, capture_output=True, text=True, check=True)
    used, freed, given_back = map(int, run.stdout.split())
    assert used - freed < 20 << 20
    assert freed - given_back > 180 << 20


PLACE = """
import ctypes
from alexnet_jax.runtime import backend
backend.configure_cpu_backend()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
below, between = library.malloc(200 << 20), library.malloc(1 << 20)
library.free(below)
backend.reserve_step_memory(300 << 20)
first_step = library.malloc(300 << 20)
library.free(first_step)
library.free(between)
print(library.malloc(300 << 20) - first_step)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_trim'), reason='another allocator than that of glibc')
def test_a_step_takes_its_memory_where_the_one_before_it_did():
    run = subprocess.run([sys.executable, '-c', PLACE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == '0\n'


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
    """What is kept of the flags that XLA was asked about."""
    return sorted(file.read_text() for file in caches.glob('alexnet_jax/xla_flags/*'))


def test_xla_flag_support_is_cached(caches, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_not_asked_about=1')
    asked = {backend.CPU_LIBRARY_FUSION: True, UNKNOWN_FLAG: False}
    assert {flag: backend.xla_accepts(flag) for flag in asked} == asked
    assert answers(caches) == ['accepted', 'refused']
    monkeypatch.setattr(sys, 'executable', '/nowhere/python')  # no child process can start
    assert {flag: backend.xla_accepts(flag) for flag in asked} == asked
    other = importlib.metadata.distribution('jax')  # another build
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
    _, told = train(tmp_path, photos_dir, tmp_path / 'run', program=['-c', REFUSING])
    assert answers(tmp_path) == ['refused']
    assert 'flag' not in told.lower()


def test_flag_keeps_convolutions_out_of_library_fusions():
    program = """
import sys
from alexnet_jax.runtime import backend
if 'tuned' in sys.argv:
    backend.configure_cpu_backend()
import jax, jax.numpy as jnp
from alexnet_jax.layers import convolution
convolved = jax.jit(convolution).lower(jnp.ones((8, 13, 13, 32)), jnp.ones((3, 3, 32, 32))).compile()
product = jax.jit(lambda x, kernel, bias: x @ kernel + bias[None])
product = product.lower(jnp.ones((128, 512)), jnp.ones((512, 512)), jnp.ones(512)).compile().as_text()
fusion = next((line for line in product.splitlines() if 'ynn_fusion' in line and ' fusion(' in line), '')
print('ynn' in convolved.as_text(), fusion.split(' fusion(')[-1].split(')')[0].count('%'))
"""
    for arguments, fused in (([], 'True 2'), (['tuned'], 'False 2')):
        environment = {**os.environ, 'XLA_FLAGS': ''}
        run = subprocess.run(
            [sys.executable, '-c', program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == fused, run.stderr


@pytest.mark.parametrize(
    ('flag', 'code', 'said'),
    [
        ('--help', 1, '--[no]distributed'),
        ('--config.optimizer.lr=3', 2, 'config.optimizer.lr: no such field'),
        ('--config.model.towers=3', 2, 'not divisible by model.towers=3'),
    ],
)
def test_help_and_usage_errors_skip_heavy_imports(flag, code, said):
    command = [sys.executable, '-X', 'importtime', 'launch.py', flag]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == code
    assert said in run.stdout + run.stderr
    imported = set(re.findall(r'^import time:.*\| +(\w+)', run.stderr, re.MULTILINE))
    assert 'ml_collections' in imported
    heavy = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'tensorflow', 'tensorflow_datasets', 'matplotlib'}
    assert not imported & heavy


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The folder of a user's caches, empty, and JAX as it is when a command begins."""
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


def test_cache_folder_is_in_xdg_cache_home(caches):
    assert folder_in_use() == str(caches / 'alexnet_jax' / 'compiled' / '3_cores')
    assert os.listdir(caches / 'alexnet_jax' / 'compiled') == ['3_cores']


@pytest.mark.parametrize(('users', 'seconds'), [(None, 0.1), ('30', 0.0)])
def test_min_compile_time_of_cached_programs(caches, monkeypatch, users, seconds):
    monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')
    if users:
        monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', users)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)  # JAX was imported before
    folder_in_use()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == seconds


def test_cache_folder_defaults_to_home(caches, monkeypatch):
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(caches))
    assert folder_in_use() == str(caches / '.cache' / 'alexnet_jax' / 'compiled' / '3_cores')


def test_user_cache_folder_is_left_to_jax(caches, monkeypatch):
    jax.config.update('jax_compilation_cache_dir', 'gs://bucket/compiled')  # JAX_COMPILATION_CACHE_DIR in a new process
    show = warnings.showwarning
    assert folder_in_use() == 'gs://bucket/compiled'
    assert not caches.exists()
    assert warnings.showwarning is show


def test_compilation_cache_can_be_disabled(caches):
    jax.config.update('jax_enable_compilation_cache', False)  # JAX_ENABLE_COMPILATION_CACHE=false in a new process
    assert folder_in_use() is None
    assert not caches.exists()


@pytest.mark.parametrize('place', ['relative', '{}/file'])
def test_unwritable_cache_folder_is_reported(caches, monkeypatch, capsys, tmp_path, place):
    (tmp_path / 'file').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', place.format(tmp_path))
    assert folder_in_use() is None
    assert 'alexnet_jax/compiled/3_cores cannot be written' in capsys.readouterr().err
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
    told = capsys.readouterr().err
    assert told.endswith('/3_cores: jit_f cannot be kept: OSError: [Errno 28] No space left on device\n')
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
    kept |= {'JAX_ENABLE_COMPILATION_CACHE': 'true', 'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '1'}

    def run(cores='2', **environment):
        command = [sys.executable, '-c', PROGRAM, cores]
        run = subprocess.run(command, cwd=ROOT, env=os.environ | kept | environment, capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, '')
        hits, *donated = run.stdout.split()
        assert donated == ['True', 'True']
        return int(hits)

    assert run() == 0
    assert run() == len(list(tmp_path.rglob('*-cache'))) > 0
    assert run(XLA_FLAGS='--xla_cpu_enable_fast_math=true') == 0
    assert run(cores='1') == 0  # split over two cores it would be as right, but slower than one made for them


def train(caches: Path, data_dir: str, workdir: Path, *flags: str, program=('launch.py',)) -> tuple[str, str]:
    """Digest and standard error of a run of two steps on eight devices, with a user's caches in `caches`."""
    settings = {'data.data_dir': data_dir, 'model.widths': '(16,0,0,0,32,0,64)', 'train.steps': 2, 'eval.views': 1}
    fields = [f'--config.{field}={value}' for field, value in settings.items()]
    kept = {'XDG_CACHE_HOME': str(caches), 'JAX_ENABLE_COMPILATION_CACHE': 'true', 'JAX_NUM_CPU_DEVICES': '8'}
    kept |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
    run = subprocess.run(
        [sys.executable, *program, f'--workdir={workdir}', *fields, *flags],
        cwd=ROOT,
        env=os.environ | kept,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads((workdir / 'result.json').read_text())['state_digest'], run.stderr


@pytest.mark.slow
def test_cached_and_corrupt_programs_give_the_same_run(photos_dir, tmp_path):
    def programs():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*-cache')}

    cold, _ = train(tmp_path, photos_dir, tmp_path / 'cold')
    compiled = programs()
    evaluation, step = sorted(path for path in compiled if re.match('jit_(train|eval)_step-', path.name))
    assert step.name.startswith('jit_train_step-')
    evaluation.write_bytes(evaluation.read_bytes()[:1000])

    warm, told = train(tmp_path, photos_dir, tmp_path / 'warm')
    assert warm == cold
    # What is not found is written, so all others were found.
    assert {path for path, time in programs().items() if compiled.get(path) != time} == {evaluation}
    zlib.decompress(evaluation.read_bytes())
    assert len(re.findall('jit_eval_step is damaged .* compiled again', told)) == 1
    assert not re.search('Warning|machine', told)


@pytest.mark.slow
def test_several_processes_use_no_private_cache(photos_dir, tmp_path):
    group = ['--coordinator_address=localhost:{}', '--num_processes=1', '--process_id=0', '--config.train.steps=0']
    with socket.socket() as listener:
        listener.bind(('', 0))
        group[0] = group[0].format(listener.getsockname()[1])
    train(tmp_path, photos_dir, tmp_path / 'run', *group)
    assert os.listdir(tmp_path / 'alexnet_jax') == ['xla_flags']
