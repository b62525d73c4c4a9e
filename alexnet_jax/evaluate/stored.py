"""The results in WORKDIR/evaluations, one JSON file per data set. This module does not import jax."""

import hashlib
import os
import re

from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.files import JsonObject, read_json, write_json

FOLDER = 'evaluations'
_KIND = 'alexnet evaluation'
_MAX_NAME_BYTES = 150


def result_name(source: str, split: str, views: int, *options: str) -> str:
    """Returns the name, without '.json', of the result for a split of a source.

    A digest of the source tells folders with the same name from each other.

    Args:
      source: an absolute source.
      split: name of the split; 'all' is left out.
      views: number of views.
      options: what else tells results apart, such as 'all_classes' or 'best'; '' is left out.
    """
    kind, _, location = source.partition(':')
    text = os.path.basename(location) if kind in ('folder', 'idx', 'wds') else location
    digest = hashlib.sha256(source.encode(errors='surrogatepass')).hexdigest()[:8]
    parts = [
        _word(text or kind),
        digest,
        '' if split == 'all' else _word(split),
        f'{views}_views' if views > 1 else '1_view',
    ]
    return '_'.join(filter(None, [*parts, *map(_word, options)]))


def _word(text: str) -> str:
    name = re.sub(r'[^\w.-]+', '_', text, flags=re.ASCII).strip('_.-')
    return name.encode()[: _MAX_NAME_BYTES // 2].decode(errors='ignore')


def store(workdir: str, name: str, result: JsonObject) -> bool:
    """Writes `result` to WORKDIR/evaluations/NAME.json atomically; returns whether that was possible.

    If the folder cannot be written, the log says so.
    """
    path = os.path.join(workdir, FOLDER, f'{name}.json')
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_json(path, {'kind': _KIND, **result})
    except OSError as error:
        log(f'the result is not kept, because {path} cannot be written ({error.strerror})')
        return False
    return True


def read(workdir: str, name: str) -> JsonObject | None:
    """Returns the content of WORKDIR/evaluations/NAME.json, or None if there is no such result."""
    result = read_json(os.path.join(workdir, FOLDER, f'{name}.json'))
    return result if result is not None and result.get('kind') == _KIND else None


def read_all(workdir: str) -> dict[str, JsonObject]:
    """Returns the results in WORKDIR/evaluations by name; corrupt files are omitted."""
    folder = os.path.join(workdir, FOLDER)
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    found = ((name, read(workdir, name.removesuffix('.json'))) for name in names if name.endswith('.json'))
    return {name.removesuffix('.json'): result for name, result in found if result is not None}
