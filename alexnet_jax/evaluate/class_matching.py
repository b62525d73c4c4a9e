"""Matches the classes of other data with those of a run, by WordNet id or name, never by order."""

import dataclasses
import functools
import os
import re
import unicodedata
from collections.abc import Callable, Sequence

from alexnet_jax.config import ConfigError
from alexnet_jax.paths import shown
from alexnet_jax.runtime.files import json_digest

_WORDNET_ID = re.compile(r'(n\d{8})(?![0-9A-Za-z])')
_NUMBER = re.compile(r'(?:class[ _-]?)?(\d{1,9})', re.IGNORECASE)
_MAX_FILE_BYTES = 1 << 24
_TWO_COLUMNS = 'per line a name in the data, a tab and a name in the run'


@dataclasses.dataclass(frozen=True)
class ClassFile:
    """The content of --classes=FILE: `names` of the classes 0, 1, ..., or `renamed`: name in the data -> in the run."""

    path: str
    names: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def digest(self) -> str:
        """Returns the digest of the content."""
        return json_digest({'names': self.names, 'renamed': self.renamed})


@dataclasses.dataclass(frozen=True)
class ClassMatching:
    """Which class of the run each class of the data is.

    Attributes:
      labels: for each class of the data its label in the run, or -1 if the run has no such class.
      how: number of matched classes by rule, such as {'name': 12}.
    """

    labels: tuple[int, ...]
    how: dict[str, int]


def are_numbers(names: Sequence[str]) -> bool:
    """Returns whether all `names` are numbers, such as '0' or 'class 7'."""
    return bool(names) and all(_NUMBER.fullmatch(name) for name in names)


def read_class_file(path: str) -> ClassFile:
    """Reads --classes=FILE.

    The file has one name per line, the names of the classes 0, 1, 2, ...; or two columns separated by a tab, the name
    of a class in the data and its name in the run.

    Raises ConfigError: the file cannot be read or mixes both forms.
    """
    flag = f'--classes={path}'
    try:
        with open(os.path.expanduser(path), encoding='utf-8-sig') as file:
            lines = [line.rstrip('\r\n') for line in file.read(_MAX_FILE_BYTES).split('\n')]
    except (OSError, ValueError) as error:
        reason = (error.strerror or 'unreadable') if isinstance(error, OSError) else 'not UTF-8 text'
        raise ConfigError(f'{flag}: {reason}; name a text file with one class name per line') from None
    lines = [line for line in lines if line.strip()]
    columns = {line.count('\t') for line in lines}
    if not lines or len(columns) > 1 or max(columns) > 1:
        raise ConfigError(
            f'{flag}: each line must have one class name, that of class 0, 1, 2, ...; or the name in the data, a tab'
            ' and the name in the run'
        )
    if columns == {0}:
        return ClassFile(path, tuple(line.strip() for line in lines))
    pairs = [(first.strip(), second.strip()) for first, second in (line.split('\t') for line in lines)]
    twice = next((name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])), None)
    if twice is not None:
        raise ConfigError(f'{flag}: {shown(twice)} is twice in the first column')
    return ClassFile(path, renamed=tuple(pairs))


class NameIndex:
    """Finds one of `names` by a name for the same class.

    The rules, in this order: the same name; the same WordNet id, alone or at the start of a name such as 'n01440764
    tench, Tinca tinca'; the same name without regard to case, separators and WordNet id; one of the synonyms between
    commas. Names with different WordNet ids are never the same.
    """

    def __init__(self, names: Sequence[str], where: str):
        self.names, self.where = list(names), where
        keys: tuple[Callable[[str], set[str]], ...] = (lambda name: {name}, _ids, _folded, _synonyms)
        self._rules = dict(zip(('name', 'WordNet id', 'name in another form', 'synonym'), keys, strict=True))
        self._found: dict[str, dict[str, list[int]]] = {rule: {} for rule in self._rules}
        for rule, keys_of in self._rules.items():
            for label, name in enumerate(self.names):
                for key in keys_of(name):
                    self._found[rule].setdefault(key, []).append(label)

    def find(self, name: str) -> tuple[int, str] | None:
        """Returns the position of the class `name` and the rule that found it, or None.

        Raises ConfigError: a rule finds several classes.
        """
        own_id = _ids(name)
        for rule, keys_of in self._rules.items():
            labels = {label for key in keys_of(name) for label in self._found[rule].get(key, ())}
            labels = {label for label in labels if not (own_id and _ids(self.names[label])) or rule in _EXACT}
            if len(labels) > 1:
                several = ' and '.join(shown(self.names[label]) for label in sorted(labels)[:3])
                raise ConfigError(
                    f'{shown(name)} may be several classes of {self.where}: {several}; say which with --classes=FILE,'
                    f' {_TWO_COLUMNS}'
                )
            if labels:
                return labels.pop(), rule
        return None


_EXACT = ('name', 'WordNet id')


def _ids(name: str) -> set[str]:
    match = _WORDNET_ID.match(name.strip())
    return {match[1]} if match else set()


@functools.lru_cache(maxsize=8192)
def _simplified(name: str) -> str:
    """Returns `name` without differences of case, separators and the encoding of accents, and without WordNet id."""
    name = _WORDNET_ID.sub('', name.strip(), count=1) if _WORDNET_ID.match(name.strip()) else name
    return ' '.join(re.split(r'[\s_-]+', unicodedata.normalize('NFC', name).casefold())).strip(' ,:')


def _folded(name: str) -> set[str]:
    return {_simplified(name)} - {''}


def _synonyms(name: str) -> set[str]:
    return {part.strip() for part in _simplified(name).split(',')} - {''}


def match_classes(
    data_names: Sequence[str],
    run_names: Sequence[str],
    data: str,
    run: str,
    file: ClassFile | None = None,
    class_numbers: bool = False,
) -> ClassMatching:
    """Matches the classes of the data with those of the run, see NameIndex.

    Numbers are matched with other names only if `class_numbers` says that they are the labels of the run, or if `file`
    names them. Names that neither match nor are numbers are looked up in `file`, which may have both forms of a name.

    Args:
      data_names, run_names: the class names.
      data, run: names of the data and of the run at the beginning of messages.
      file: the content of --classes.
      class_numbers: whether the number of a class in the data is its label in the run.

    Raises ConfigError: no class matches, a name is ambiguous, two classes of the data are the same class of the run, a
      number is no label, or names are needed.
    """
    index = NameIndex(run_names, run)
    renamed = dict(file.renamed) if file else {}
    unknown = next((name for name in renamed if name not in set(data_names)), None)
    if file and renamed and unknown is not None:
        raise ConfigError(f'--classes={file.path}: {shown(unknown)} is not a class of {data}, {_listed(data_names)}')
    if class_numbers:
        numbers, how = _by_number(data_names, run_names, data, run)
        if numbers:
            _check(numbers, data_names, run_names, data, run, None, set())
        return ClassMatching(numbers, how)
    through = _Dictionary(file, data_names, index) if file and file.names else None
    labels, how = [], dict[str, int]()
    for name in data_names:
        found = through.find(name) if through else None
        if found is None:
            found = index.find(renamed.get(name, name))
        if found is None and file and name in renamed:
            raise ConfigError(
                f'--classes={file.path}: {shown(renamed[name])} is not a class of {run}, {_listed(run_names)}'
            )
        labels.append(-1 if found is None else found[0])
        if found is not None:
            rule = f'--classes={file.path}' if file and name in renamed else found[1]
            how[rule] = how.get(rule, 0) + 1
    _check(labels, data_names, run_names, data, run, file, set(renamed))
    return ClassMatching(tuple(labels), how)


class _Dictionary:
    """Finds classes of the run through the names in --classes=FILE, of which line k + 1 names the number k."""

    def __init__(self, file: ClassFile, data_names: Sequence[str], index: NameIndex):
        self._file, self._index = file, index
        self._entries = NameIndex(file.names, f'--classes={file.path}')
        self._data_has_numbers, self._run_has_numbers = are_numbers(data_names), are_numbers(index.names)
        if self._run_has_numbers and len(file.names) != len(index.names):
            raise ConfigError(
                f'--classes={file.path}: {len(file.names)} names, but the {len(index.names)} classes of {index.where}'
                ' have only numbers; name all of them, in the order of their labels'
            )

    def find(self, name: str) -> tuple[int, str] | None:
        """Returns the label of the class `name` of the data and the rule, or None if the file does not have it."""
        rule = f'--classes={self._file.path}'
        if self._data_has_numbers:
            number = _number(name)
            entry = number if number < len(self._file.names) else None
            if entry is None:
                raise ConfigError(
                    f'{rule}: {len(self._file.names)} names, which is too few for the class {shown(name)}'
                )
        else:
            found = self._entries.find(name)
            entry = found[0] if found else None
        if entry is None:
            return None
        if self._run_has_numbers:
            numbers = [_number(each) for each in self._index.names]
            return (numbers.index(entry), rule) if entry in numbers else None
        found = self._index.find(self._file.names[entry])
        return (found[0], rule) if found else None


def _number(name: str) -> int:
    match = _NUMBER.fullmatch(name)
    assert match is not None
    return int(match[1])


def _by_number(
    data_names: Sequence[str], run_names: Sequence[str], data: str, run: str
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Returns the numbers in `data_names` as labels. Raises ConfigError: a name is no number, or no label."""
    other = next((name for name in data_names if not _NUMBER.fullmatch(name)), None)
    if other is not None:
        raise ConfigError(f'--class_numbers: the class {shown(other)} of {data} is not a number; omit the flag')
    labels = tuple(map(_number, data_names))
    if max(labels, default=0) >= len(run_names):
        raise ConfigError(
            f'--class_numbers: {data} has the class {max(labels)}, but the largest label of {run} is'
            f' {len(run_names) - 1}'
        )
    return labels, {'label number': len(labels)}


def _check(
    labels: Sequence[int],
    data_names: Sequence[str],
    run_names: Sequence[str],
    data: str,
    run: str,
    file: ClassFile | None,
    renamed: set[str],
) -> None:
    """Raises ConfigError: no class matches, or two classes of the data, not renamed, match the same class."""
    if not any(label >= 0 for label in labels):
        if are_numbers(data_names) and not (file and file.names):
            hint = '; --class_numbers takes the numbers of the data as labels of the run, and --classes=FILE names them'
        elif are_numbers(run_names) and not (file and file.names):
            hint = '; --classes=FILE names the classes of the run, one name per line in the order of their labels'
        elif all(map(_ids, data_names)) != all(map(_ids, run_names)):
            hint = '; --classes=FILE connects WordNet ids and names, with a line such as n01440764 tench per class'
        else:
            hint = f'; --classes=FILE gives the classes, {_TWO_COLUMNS}'
        raise ConfigError(
            f'no class of {data} is a class of {run}: {_listed(data_names)} in the data, {_listed(run_names)} in the'
            f' run{hint}'
        )
    first: dict[int, str] = {}
    for label, name in zip(labels, data_names, strict=True):
        if label >= 0 and name not in renamed and first.setdefault(label, name) != name:
            raise ConfigError(
                f'{data}: {shown(first[label])} and {shown(name)} are both the class {shown(run_names[label])} of'
                f' {run}; if that is right, say so with --classes=FILE, {_TWO_COLUMNS}'
            )


def _listed(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names as text, and the number of all."""
    more = f', ... ({len(names):,} classes)' if len(names) > most else ''
    return f'{", ".join(map(shown, names[:most]))}{more}' if names else 'no classes'
