"""Logging, progress bars, preemption signals, the watchdog, atomic file writes, and metrics.jsonl."""

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
    """Declares this process as `process` of `processes`. Afterwards all but process 0 log only errors."""
    global _process, _processes
    _process, _processes = process, processes


def is_silent() -> bool:
    """Returns whether this process logs only errors, because another process logs progress and results."""
    return _process != 0


def log_error(message: str) -> None:
    """Prints one line about an error to standard error, with the process index if there are several processes."""
    which = f'process {_process} of {_processes}: ' if _processes > 1 else ''
    print(f'alexnet_jax: {which}{message}', file=sys.stderr, flush=True)


def log(message: str) -> None:
    """Prints one line with the time of day to standard error, on process 0 only."""
    if is_silent():
        return
    line = f'{time.strftime("%H:%M:%S")} {message}'
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)  # above the progress bar
    else:
        print(line, file=sys.stderr, flush=True)


def summarize_exception(error: Exception) -> str:
    """Returns the first line of the message of `error`, at most 300 characters, or its type if that line is empty."""
    return (str(error).splitlines() or [''])[0][:300] or type(error).__name__


class Preemption:
    """Context in which the first SIGTERM or Ctrl-C only sets `requested`; a second one has its usual effect."""

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
        """Leaves SIGTERM to JAX, whose own handler notifies all processes, and turns the first Ctrl-C into SIGTERM."""
        signal.signal(signal.SIGINT, self._pass_on)
        # JAX logs why it aborts when the connection to another process breaks; a dump of all stacks would hide that.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    def _pass_on(self, number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


class Watchdog:
    """Context that dumps all stacks and exits the process with 1 after `timeout` seconds without a call of feed().

    The watchdog counts its own one-second waits, so time during which the whole process is suspended does not count.
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
        """Resets the countdown; `what` names the point that the process has reached."""
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
    """Progress bar on a terminal; in a log, a line with rate and remaining time at most every 15 seconds.

    Args:
      what: label in front of the bar or line.
      total: units of work in total.
      unit: name of the unit.
      done: units that were completed before, for example before a resume.
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
        """Adds `count` completed units; `note` appears at the end of the bar or line."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            if note:
                self.bar.set_postfix_str(note)
        elif time.monotonic() - self.last_line >= LOG_INTERVAL_SECS:
            self.line(note)

    def line(self, note: str = '') -> None:
        """Logs the progress as one line; does nothing on a terminal, where the bar shows it."""
        if self.bar is not None:
            return
        self.last_line = time.monotonic()
        rate = (self.done - self.first) / max(self.last_line - self.start, 1e-9)
        left = _minutes((self.total - self.done) / rate) if rate else 'unknown'
        behind = f'  {note}' if note else ''
        log(f'{self.what} {self.done}/{self.total} {self.unit}  {rate:.1f}/s  ETA {left}{behind}')

    def close(self) -> None:
        """Ends the bar and leaves its last state on the terminal."""
        if self.bar is not None:
            self.bar.close()


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{int(seconds) % 60:02d}s'


@contextlib.contextmanager
def atomic_write(path: str, mode: str = 'w') -> Iterator[Any]:
    """Yields a temporary file that is synced to disk and renamed to `path`; on an error `path` is unchanged.

    Raises OSError: the file cannot be written.
    """
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
    """Writes `value` as JSON to `path` atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1)
        file.write('\n')


def read_json(path: str) -> dict[str, Any] | None:
    """Returns the JSON object in `path`, or None if the file is missing, unreadable, corrupt or not an object."""
    try:
        with open(path) as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Metrics:
    """Writer of metrics.jsonl and layers.jsonl: one JSON object per line, flushed line by line.

    Opening a file drops corrupt lines and lines after the resumed step, so that no step appears twice.

    Args:
      path: path of the file, or None to write nothing and call no watchers.
      last: the last step to keep, by `split`; lines of other splits are dropped.
      watchers: functions that also receive each written line, as a dict.
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
        """Appends one line and passes it to the watchers."""
        if self.file:
            self.file.write(json.dumps(values) + '\n')
            for watcher in self.watchers:
                watcher(values)

    def close(self) -> None:
        """Closes the file."""
        if self.file:
            self.file.close()


def _is_kept(line: str, last: dict[str, int]) -> bool:
    try:
        values = json.loads(line)
        return values['step'] <= last[values['split']]
    except (ValueError, KeyError, TypeError):  # for example an incomplete line of a killed run
        return False
