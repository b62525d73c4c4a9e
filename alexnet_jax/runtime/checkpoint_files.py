"""The files of checkpoints that can be read without jax: their steps, the progress of the run, and its settings."""

import contextlib
import json
import os
import re

from alexnet_jax.runtime.files import JsonObject, json_digest

MAX_STEP = 2**31 - 1  # steps are int32
_STEP_NAME = re.compile(r'0|[1-9][0-9]{0,9}')


def parse_step(name: str) -> int | None:
    """Returns the step of the checkpoint folder `name`, or None if no checkpoint has this name."""
    step = int(name) if _STEP_NAME.fullmatch(name) else None
    return step if step is None or step <= MAX_STEP else None


def checkpoint_steps(directory: str) -> list[int]:
    """Returns the steps in the names of the folder `directory`, ascending; [] if there is no such folder."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return sorted(step for step in map(parse_step, names) if step is not None)


def progress_digest(progress: JsonObject) -> str:
    """Returns the sha256 hex digest of `progress` without its own digest, as JSON with sorted keys."""
    return json_digest({key: value for key, value in progress.items() if key != 'progress_digest'})


def read_progress(checkpoint: str) -> JsonObject:
    """Returns the progress in the folder of a checkpoint: a RunState as JSON, `state_digest` and, except in checkpoints
    of earlier versions, the settings as `config`.

    Raises OSError or ValueError: the file is missing, or is corrupt.
    """
    try:
        with open(os.path.join(checkpoint, 'progress', 'metadata'), encoding='utf-8') as file:
            progress = json.load(file)
        if not isinstance(progress, dict) or not isinstance(progress.get('state_digest'), str):
            raise ValueError('its progress is not a JSON object with a state_digest')
        has_digest = 'progress_digest' in progress or 'config' in progress  # earlier versions write neither
        if has_digest and progress.get('progress_digest') != progress_digest(progress):
            raise ValueError('its progress does not match its digest')
    except RecursionError:  # from deeply nested JSON
        raise ValueError('its progress is corrupt') from None
    return progress


def read_newest_progress(directory: str) -> tuple[int, JsonObject] | None:
    """Returns (step, read_progress()) of the newest checkpoint in `directory` that can be read, or None."""
    for step in reversed(checkpoint_steps(directory)):
        with contextlib.suppress(OSError, ValueError):
            return step, read_progress(os.path.join(directory, str(step)))
    return None
