"""Standard streams that survive a lost terminal or pipe; log lines, error lines and progress bars on standard error."""

import contextlib
import io
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL_SECS = 15.0
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

_process, _processes = 0, 1
_stdout_required = True


def begin_command() -> None:
    """Prepares this process for a command, before its imports, which take seconds.

    Calls protect_output(), and lets Ctrl-C end the process without a traceback until the command handles Ctrl-C.
    """
    protect_output()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def protect_output() -> None:
    """Replaces Python's standard output and standard error by streams for which print() raises no exception.

    Characters that the encoding lacks are written as backslash escapes. What cannot be written, for example to a closed
    pipe, a full disk or a lost terminal, is dropped. For standard output, the command ends instead: silently with code
    141 if the pipe is closed, otherwise with an error line and code 1; see make_stdout_optional().

    Closed standard descriptors are opened on os.devnull, so that no other file gets their numbers.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
        stream = getattr(sys, name)
        if stream is getattr(sys, f'__{name}__'):  # otherwise the caller of this process captures the stream
            setattr(sys, name, _protected(stream, descriptor))


def make_stdout_optional() -> None:
    """Makes standard output drop what cannot be written, in a command whose results are files."""
    global _stdout_required
    _stdout_required = False


def _protected(stream: Any, descriptor: int) -> io.TextIOWrapper:
    """Returns a text stream to `descriptor` in place of `stream`, which is None if the descriptor was closed."""
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    raw = _StandardStream(descriptor, 'w', closefd=False)
    unbuffered = getattr(stream, 'write_through', False)  # python -u
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=getattr(stream, 'encoding', 'utf-8'),
        errors='backslashreplace',
        line_buffering=True,  # an error then occurs in print(), not after the end of the command
        write_through=unbuffered,
    )


class _StandardStream(io.FileIO):
    """Standard output or standard error without buffer and encoding."""

    def write(self, data: Any) -> int:
        """Writes all bytes of `data` and returns their number; see protect_output() for errors."""
        content = memoryview(data).cast('B')
        done = 0
        try:
            while done < len(content):
                written = super().write(content[done:])
                if written is None:  # the descriptor is in non-blocking mode, and the pipe or terminal is full
                    select.select([], [self], [])
                done += written or 0
        except OSError as error:
            if self.fileno() == 1 and _stdout_required:
                make_stdout_optional()
                if isinstance(error, BrokenPipeError):
                    sys.exit(EXIT_BROKEN_PIPE)
                log_error(f'standard output cannot be written: {error.strerror}')
                sys.exit(1)
        return len(content)


def set_process_index(process: int, processes: int) -> None:
    """Sets the index of this process and the number of processes. All processes except 0 then log only errors."""
    global _process, _processes
    _process, _processes = process, processes


def is_primary() -> bool:
    """Returns whether this is the primary process, which logs progress and results; the others log only errors."""
    return _process == 0


def log_error(message: str) -> None:
    """Prints one line about an error to standard error, with the process index if there are several processes."""
    which = f'process {_process} of {_processes}: ' if _processes > 1 else ''
    print(f'alexnet_jax: {which}{_in_one_line(message)}', file=sys.stderr, flush=True)


def log(message: str) -> None:
    """Prints one line with the time of day to standard error, on the primary process only."""
    if not is_primary():
        return
    line = f'{time.strftime("%H:%M:%S")} {_in_one_line(message)}'
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)  # above the progress bar
    else:
        print(line, file=sys.stderr, flush=True)


def _in_one_line(message: str) -> str:
    """Returns `message` with escaped line breaks, which paths and messages of libraries may contain."""
    return message.replace('\r', '\\r').replace('\n', '\\n')


def summarize_exception(error: Exception) -> str:
    """Returns the first line of the message of `error`, at most 300 characters, or its type if that line is empty."""
    return (str(error).splitlines() or [''])[0][:300] or type(error).__name__


class ProgressBar:
    """A progress bar on a terminal; in a log, a line with rate and remaining time every LOG_INTERVAL_SECS or more.

    Args:
      desc: label in front of the bar or line.
      total: units of work in total.
      unit: name of the unit.
      done: units that were complete at the start, for example in a resumed run.
    """

    bar: 'tqdm | None' = None

    def __init__(self, desc: str, total: int, unit: str, done: int = 0):
        self.desc, self.total, self.unit, self.done = desc, total, unit, done
        self.start = self.last_line = time.monotonic()
        self.first = done
        if sys.stderr.isatty() and is_primary():
            from tqdm import tqdm

            self.bar = tqdm(desc=desc, total=total, unit=f' {unit}', initial=done, dynamic_ncols=True, smoothing=0.1)

    def update(self, count: int = 1, note: str = '') -> None:
        """Adds `count` completed units; `note` appears at the end of the bar or line."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            if note:
                self.bar.set_postfix_str(note)
        elif time.monotonic() - self.last_line >= LOG_INTERVAL_SECS:
            self.log_line(note)

    def log_line(self, note: str = '') -> None:
        """Logs the progress as one line; does nothing on a terminal, where the bar shows it."""
        if self.bar is not None:
            return
        self.last_line = time.monotonic()
        rate = (self.done - self.first) / max(self.last_line - self.start, 1e-9)
        left = _minutes((self.total - self.done) / rate) if rate else 'unknown'
        behind = f'  {note}' if note else ''
        log(f'{self.desc} {self.done}/{self.total} {self.unit}  {rate:.1f}/s  ETA {left}{behind}')

    def close(self) -> None:
        """Ends the bar and leaves its last state on the terminal."""
        if self.bar is not None:
            self.bar.close()


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{int(seconds) % 60:02d}s'
