"""Runs the examples in the docstrings of the Python API: python tests/doctests.py

tests/test_api.py runs this program in the checkout, and tests/wheel.sh in an environment that has only the wheel.
"""

import doctest
import sys
import time

import alexnet_jax

EXAMPLES = {'load', 'create', 'predict', 'images', 'logits', 'activations', 'preprocess', 'module'}


def main() -> int:
    """Returns the exit code: 1 if an example fails, or a name of EXAMPLES has none."""
    start, found = time.monotonic(), set()
    modules = {sys.modules[function.__module__] for function in (alexnet_jax.load, alexnet_jax.TrainedModel)}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for module in modules:
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            found |= {test.name.rsplit('.', 1)[-1]} if test.examples else set()
            runner.run(test)
    failed, tried = runner.summarize()
    if EXAMPLES - found:
        print(f'no examples: {", ".join(sorted(EXAMPLES - found))}')
    print(f'{tried} examples of {alexnet_jax.__name__} {alexnet_jax.__version__}, {failed} failed')
    print(f'{time.monotonic() - start:.0f} s', file=sys.stderr)
    return int(failed > 0 or bool(EXAMPLES - found))


if __name__ == '__main__':
    sys.exit(main())
