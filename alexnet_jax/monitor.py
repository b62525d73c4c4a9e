"""What a run tells: progress on a terminal or in a log, metrics.jsonl, and files that are never half written."""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LOG_INTERVAL_SECS = 15.0

_process, _processes = 0, 1


def set_process_index(process: int, processes: int) -> None:
    """Say that this is process `process` of `processes`: all but process 0 keep silent where nothing is wrong."""
    global _process, _processes
    _process, _processes = process, processes


def is_silent() -> bool:
    """Whether progress and results are another process's to tell."""
    return _process != 0


def log_error(message: str) -> None:
    """One line about what is wrong, on standard error; of several processes each says which one it is."""
    which = f'process {_process} of {_processes}: ' if _processes > 1 else ''
    print(f'alexnet_jax: {which}{message}', file=sys.stderr, flush=True)


def log(message: str) -> None:
    """One line for the reader of a log or a terminal, on standard error."""
    if is_silent():
        return
    line = f'{time.strftime("%H:%M:%S")} {message}'
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)  # above the bar
    else:
        print(line, file=sys.stderr, flush=True)


def summarize_exception(error: Exception) -> str:
    """What an error of a library says, short."""
    return (str(error).splitlines() or [''])[0][:300] or type(error).__name__


class Preemption:
    """While it is open, the first SIGTERM or Ctrl-C only sets `requested`; a second one ends the process as usual."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested = False

    def __enter__(self) -> 'Preemption':
        self.before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        for other, handler in self.before.items():
            signal.signal(other, handler)
        os.write(
            2, f'{signal.Signals(number).name}: saving, then this ends (again: at once, without saving)\n'.encode()
        )

    def delegate_to_jax(self) -> None:
        """Leave SIGTERM to JAX, which has taken it over and tells all processes; Ctrl-C becomes a SIGTERM."""
        signal.signal(signal.SIGINT, self._pass_on)
        # JAX says why it ends a process whose group is broken; the stacks of all threads behind it would hide that.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    def _pass_on(self, number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


class Watchdog:
    """While it is open, ends the process with 1 when it is not fed for `timeout` seconds, after a dump of all stacks.

    It counts its own seconds, so those during which the whole process slept are not among them.
    """

    def __init__(self, timeout: int):
        self.timeout = timeout
        self.ended = threading.Event()
        self.feed('the start')

    def __enter__(self) -> 'Watchdog':
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()

    def feed(self, what: str) -> None:
        """Things go on; `what` is the point that was reached."""
        self.reached, self.seconds = what, 0

    def _watch(self) -> None:
        while not self.ended.wait(1.0):
            self.seconds += 1
            if self.seconds > self.timeout:
                log_error(
                    f'no progress since {self.reached}, for config.distributed.progress_timeout={self.timeout} s;'
                    ' what each thread does:'
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)


class Progress:
    """A bar on a terminal; in a log, a line with rate and remaining time every 15 seconds.

    Args:
      what: shown in front.
      total: units of work in all; `done` of them were done before.
      unit: its name.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.start = self.last_line = time.monotonic()
        self.first = done
        self.bar: Any = None
        if sys.stderr.isatty() and not is_silent():
            from tqdm import tqdm

            self.bar = tqdm(desc=what, total=total, unit=f' {unit}', initial=done, dynamic_ncols=True, smoothing=0.1)

    def update(self, count: int = 1, note: str = '') -> None:
        """Count `count` more units; `note` is shown behind."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            if note:
                self.bar.set_postfix_str(note)
        elif time.monotonic() - self.last_line >= LOG_INTERVAL_SECS:
            self.line(note)

    def line(self, note: str = '') -> None:
        """Print where things stand as a line of the log; nothing on a terminal, where the bar says it."""
        if self.bar is not None:
            return
        self.last_line = time.monotonic()
        rate = (self.done - self.first) / max(self.last_line - self.start, 1e-9)
        left = _minutes((self.total - self.done) / rate) if rate else 'unknown'
        behind = f'  {note}' if note else ''
        log(f'{self.what} {self.done}/{self.total} {self.unit}  {rate:.1f}/s  ETA {left}{behind}')

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{int(seconds) % 60:02d}s'


@contextlib.contextmanager
def atomic_write(path: str, mode: str = 'w') -> Iterator[Any]:
    """A file that becomes `path` at the end, on disk; where writing fails `path` stays as it was. Raises OSError."""
    aside = f'{path}.{uuid.uuid4().hex}.tmp'  # jobs on several hosts may write the same file
    try:
        with open(aside, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise


def write_json(path: str, value: Any) -> None:
    """Write `value` to `path` whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1)
        file.write('\n')


def read_json(path: str) -> dict[str, Any] | None:
    """The object in `path`; None where there is no such file or it is damaged."""
    try:
        with open(path) as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Metrics:
    """metrics.jsonl and layers.jsonl: one JSON object a line, written through at once.

    Lines later than what is resumed are dropped, so no step is in the file twice.

    Args:
      path: of the file; None: nothing is written.
      last: by `split` the step after which lines are dropped.
      watchers: are given each line too.
    """

    def __init__(
        self, path: str | None, last: dict[str, int], watchers: Sequence[Callable[[dict[str, Any]], None]] = ()
    ):
        self.file, self.watchers = None, watchers
        if path is None:
            return
        kept = []
        if os.path.exists(path):
            with open(path) as file:
                kept = [line.rstrip('\n') + '\n' for line in file if _is_kept(line, last)]
        with atomic_write(path) as file:
            file.writelines(kept)
        self.file = open(path, 'a', buffering=1)  # noqa: SIM115

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self.file:
            self.file.write(json.dumps(values) + '\n')
            for watcher in self.watchers:
                watcher(values)

    def close(self) -> None:
        """Close the file."""
        if self.file:
            self.file.close()


def _is_kept(line: str, last: dict[str, int]) -> bool:
    try:
        values = json.loads(line)
        return values['step'] <= last[values['split']]
    except (ValueError, KeyError, TypeError):  # the line a killed run was writing
        return False
