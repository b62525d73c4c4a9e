"""Train AlexNet from a checkout of the repository: `python launch.py` is `alexnet train`."""

import runpy

if __name__ == '__main__':
    runpy.run_module('alexnet_jax.launch', run_name='__main__', alter_sys=True)
