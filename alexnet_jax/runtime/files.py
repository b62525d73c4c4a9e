"""Atomic file writes, and JSON files."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

JsonObject = dict[str, Any]


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
