"""Runs each side of a benchmark in its own process. The sides take turns; waiting ones are stopped by SIGSTOP."""

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NO_GPU = {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '-1', 'TF_CPP_MIN_LOG_LEVEL': '3'}


def machine() -> str:
    """Describes the number of cores, the processor and the Python version."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            cpu = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'{cores} cores, {cpu}; Python {platform.python_version()}'


def peak_memory() -> int:
    """Returns the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def open_answers() -> TextIO:
    """Runs in a worker. Returns the file for answers, and redirects stdout, also that of C libraries, to stderr."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a stopped process would outlive its parent
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    return answers


def serve(start: Callable[[], tuple[Any, Callable[[Any], Any]]]) -> None:
    """Runs in a worker. Describes the side, then answers requests until stdin ends, as one line of JSON each.

    Args:
      start: returns the description of the side, and a function from a request to its answer.
    """
    with open_answers() as answers:
        about, respond = start()
        print(json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(respond(json.loads(line))), file=answers, flush=True)


class Worker:
    """The process of one side, killed when `stack` closes.

    Args:
      side: the name of the side in messages.
      command: a command that ends in serve().
      environment: variables to add to this process's environment.

    Attributes:
      about: the description that the side sent.
    """

    def __init__(self, side: str, command: list[str], environment: dict[str, str], stack: contextlib.ExitStack):
        self.side, self.errors = side, tempfile.TemporaryFile('w+')  # noqa: SIM115
        pipes: dict[str, Any] = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': self.errors}
        self.process: Any = subprocess.Popen(command, **pipes, text=True, env=os.environ | environment)
        stack.callback(self._close)
        self.about = self._answer()

    def ask(self, request: Any) -> Any:
        """Sends a request and returns the answer, both JSON values. Exits if the process died."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # _answer() says why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def terminate(self) -> None:
        """Ends the process by SIGTERM, and waits until it has ended."""
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)
        self.process.wait()

    def _close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):  # a request that a dead process did not read
                file.close()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            print(self.errors.read(), file=sys.stderr)
            fail(f'the process of {self.side} ended with exit code {code}; see above')
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def command_of(side: str, *flags: str, python: str = sys.executable) -> list[str]:
    """Returns the command of a worker: this script with its own flags, `flags` and --worker=`side`."""
    return [python, os.path.abspath(sys.argv[0]), *sys.argv[1:], *flags, f'--worker={side}']


def take_turns(workers: Sequence[Worker], request: Any, rounds: int, warmup: int = 0) -> list[list[Any]]:
    """Asks every worker in turn, `warmup` + `rounds` times. Returns the answers of each worker after the warmup."""
    table = [[worker.ask(request) for worker in workers] for _ in range(warmup + rounds)]
    return [list(column) for column in zip(*table[warmup:], strict=True)]


def fail(message: str) -> NoReturn:
    """Prints the name of the benchmark and `message`, and exits with code 1."""
    sys.exit(f'{os.path.basename(sys.argv[0]).removesuffix(".py")}: {message}')


def make_parser(
    documentation: str | None, rounds: int | None, flag: str = '', names: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Returns a parser with the flags --rounds, --json and --worker, and a flag that selects some of `names`.

    Args:
      documentation: the docstring of the benchmark.
      rounds: the default of --rounds.
      flag: the flag that selects, such as '--sides', or '' for none.
      names: the values that can be selected.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=positive, default=rounds, help='how often to time each case')
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of tables')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    if flag:
        parser.add_argument(flag, type=some_of(names), default=','.join(names), help='the default is %(default)s')
    return parser


def positive(text: str) -> int:
    """The type of a flag: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def program(text: str) -> str:
    """The type of a flag: the path of a program."""
    if not shutil.which(text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a program')
    return text


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns the type of a flag: some of `names`, separated by commas. The result is in the order of `names`."""

    def chosen(text: str) -> list[str]:
        if unknown := sorted(set(text.split(',')) - set(names)):
            raise argparse.ArgumentTypeError(f'{", ".join(unknown)} is unknown; the names are {", ".join(names)}')
        return [name for name in names if name in text.split(',')]

    return chosen


def print_result(result: dict[str, Any], report: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """Adds machine and date to a result, and prints it as JSON or as text."""
    result |= {'machine': machine(), 'date': datetime.date.today().isoformat()}
    print(json.dumps(result) if as_json else report(result))


def text_table(*rows: Sequence[str]) -> list[str]:
    """Returns the lines of a table: the first column aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ['  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
