"""Runs each side of a benchmark in its own process. The sides take turns; waiting ones are stopped by SIGSTOP."""

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

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


def open_answers() -> Any:
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
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)  # first
        self.about = self._answer()

    def ask(self, request: Any) -> Any:
        """Sends a request and returns the answer, both JSON values. Exits if the process died."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # _answer() says why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            name = os.path.basename(sys.argv[0]).removesuffix('.py')
            sys.exit(f'{self.errors.read()}\n{name}: the {self.side} side ended with exit code {code}; see above')
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)
