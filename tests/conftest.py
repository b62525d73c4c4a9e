"""Configures JAX for all tests: eight simulated devices, the CPU flags of a real run, and strict promotion.

With JAX_PLATFORMS=cuda or tpu, the tests run on accelerators; those marked `accelerator` must pass there.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # child processes use the same GPU
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # Tests leave the cache of the user alone.

from alexnet_jax.runtime import backend

backend.configure_cpu_backend()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# A background job of a script, or nohup, starts pytest with ignored signals, which all child processes would inherit.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope='session')
def photos_dir(tmp_path_factory) -> str:
    """A data_dir with `photos` prepared at 72 pixels. All processes of pytest-xdist share it."""
    from alexnet_jax.prepare.writer import PrepareConfig, prepare

    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    # A second process waits for the first, and then finds the data set complete.
    prepare(PrepareConfig('photos', image_size=72), str(folder / 'photos'))
    return str(folder / 'photos')


@pytest.fixture(scope='module')
def compiled_programs(tmp_path_factory):
    """A compilation cache that all child processes of a test module share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'true')
        patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('compiled')))
        patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
        yield


@pytest.fixture
def without_tensorflow(tmp_path_factory, monkeypatch):
    """Child processes cannot import or find TensorFlow."""
    folder = tmp_path_factory.mktemp('site')
    (folder / 'sitecustomize.py').write_text(
        """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'tensorflow':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Finder())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == 'tensorflow' else find_spec(name, package)
"""
    )
    monkeypatch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{Path(__file__).parent.parent}')
