"""The writer of metrics.jsonl and layers.jsonl."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from alexnet_jax.runtime.files import atomic_write


class JsonlWriter:
    """Writer of metrics.jsonl and layers.jsonl: one JSON object per line, flushed line by line.

    Opening a file drops corrupt lines and lines after the resumed step, so that no step appears twice.

    Args:
      path: path of the file, or None to write nothing and to call no trackers.
      last: the last step to keep, by `split`; lines of other splits are dropped.
      trackers: functions that also receive each written line, as a dict.
    """

    def __init__(
        self, path: str | None, last: dict[str, int], trackers: Sequence[Callable[[dict[str, Any]], None]] = ()
    ):
        self.file, self.trackers = None, trackers
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
        """Appends one line and passes it to the trackers."""
        if self.file:
            self.file.write(json.dumps(values) + '\n')
            for tracker in self.trackers:
                tracker(values)

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
