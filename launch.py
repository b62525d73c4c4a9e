"""Train AlexNet from a checkout of the repository: `python launch.py` is `alexnet train`."""

import runpy

from alexnet_jax.runtime.console import begin_command

if __name__ == '__main__':
    begin_command()
    runpy.run_module('alexnet_jax.launch', run_name='__main__', alter_sys=True)
