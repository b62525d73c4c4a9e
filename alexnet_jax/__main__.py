"""The command `alexnet`; each of its subcommands is a module of this package."""

import difflib
import runpy
import sys

from alexnet_jax import __version__
from alexnet_jax.runtime.console import begin_command, log_error

COMMANDS = {
    'train': ('alexnet_jax.launch', 'train a network, or resume a run'),
    'prepare': ('alexnet_jax.prepare', 'prepare a data set for training'),
    'evaluate': ('alexnet_jax.evaluate', 'compute the validation errors of checkpoints or of an ensemble of them'),
    'predict': ('alexnet_jax.predict', 'classify images'),
    'figures': ('alexnet_jax.figures', 'draw the figures of the paper from runs'),
    'report': ('alexnet_jax.report', 'summarize a run or a sweep, as text or as an HTML page'),
    'convert': ('alexnet_jax.convert', 'import weights of torchvision or Caffe, or export to ONNX and other formats'),
    'audit': ('alexnet_jax.audit', 'compute the collectives, bytes and FLOPs of a training step on any mesh'),
}


def main() -> None:
    """Runs the subcommand that the command line names; exits with code 2 if there is no such subcommand."""
    begin_command()
    name, *arguments = sys.argv[1:] or ['--help']
    if name in ('--help', '-h', 'help'):
        print('usage: alexnet COMMAND [ARGUMENT ...]\n')
        for command, (_, purpose) in COMMANDS.items():
            print(f'  {command:<10}{purpose}')
        print('\n`alexnet COMMAND --help` lists the arguments of a command, `alexnet --version` prints the version.')
    elif name == '--version':
        print(f'alexnet_jax {__version__}')
    elif name in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(COMMANDS[name][0], run_name='__main__', alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f'; did you mean {near[0]}?' if near else '.'
        log_error(f'{name!r} is not a command{hint} The commands are {", ".join(COMMANDS)}')
        sys.exit(2)


if __name__ == '__main__':
    main()
