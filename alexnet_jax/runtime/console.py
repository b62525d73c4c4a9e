"""Log lines, error lines and progress bars on standard error."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL_SECS = 15.0

_process, _processes = 0, 1


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
    print(f'alexnet_jax: {which}{message}', file=sys.stderr, flush=True)


def log(message: str) -> None:
    """Prints one line with the time of day to standard error, on the primary process only."""
    if not is_primary():
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
