"""Atomic file writes, JSON files and JSON Lines files."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from alexnet_jax.paths import nearest_existing

JsonObject = dict[str, Any]


@contextlib.contextmanager
def atomic_write(path: str, mode: str = 'w') -> Iterator[IO]:
    """Yields a temporary file, then syncs it to disk and renames it to `path`; on an error `path` is unchanged.

    Raises OSError: the file cannot be written.
    """
    # A name that does not contain that of the file, which may have the maximum length; jobs on several hosts may write
    # the same file.
    temporary = os.path.join(os.path.dirname(path), f'.{uuid.uuid4().hex}.tmp')
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_json(path: str, value: object) -> None:
    """Writes `value` as JSON to `path` atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1)
        file.write('\n')


def json_digest(content: JsonObject) -> str:
    """Returns the SHA-256 hex digest of `content` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: str) -> JsonObject | None:
    """Returns the JSON object in `path`, or None if the file is missing, unreadable, corrupt or not an object."""
    try:
        with open(path, encoding='utf-8') as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def quarantine(path: str) -> str:
    """Renames `path`, a corrupt file or folder, and returns the new name. Raises OSError: it cannot be renamed."""
    name = f'{os.path.basename(path)}.corrupt-{time.time_ns()}'
    os.rename(path, os.path.join(os.path.dirname(path), name))
    return name


def read_json_lines(path: str) -> list[JsonObject]:
    """Returns the JSON objects in `path`, one per line; skips corrupt lines, such as the last line of a killed run.

    Raises OSError: the file cannot be read.
    """
    lines = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def free_bytes(path: str) -> int:
    """Returns the free bytes of the disk on which `path`, which may be missing, is or would be."""
    return shutil.disk_usage(nearest_existing(path)).free
