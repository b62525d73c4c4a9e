"""Eight simulated devices, the CPU flags of a real run, and strict promotion in every test."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # that of the user is left alone

from alexnet_jax.runtime import backend

backend.configure_cpu_backend()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def photos_dir(tmp_path_factory) -> str:
    """A data_dir in which `photos` is prepared at 72 pixels: once, where several processes run the tests."""
    from alexnet_jax.prepare.writer import PrepareConfig, prepare

    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    prepare(
        PrepareConfig('photos', image_size=72), str(folder / 'photos')
    )  # the second process waits, and finds it there
    return str(folder / 'photos')


@pytest.fixture(scope='module')
def compiled_programs(tmp_path_factory):
    """Processes that a test starts find what those before them have compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'true')
        patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('compiled')))
        patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
        yield
