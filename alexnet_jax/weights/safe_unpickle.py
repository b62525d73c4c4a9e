"""Safe reader for the pickle opcodes of state dicts. The reader never imports, calls or instantiates what a file names.

A pickle is a program for a stack machine, and Python's unpickler executes any function that the pickle names. This
reader turns names and calls into inert values and rejects every name that the caller does not allow.
"""

import dataclasses
import pickletools
import warnings
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

T = TypeVar('T')

ORDERED_DICT = 'collections.OrderedDict'
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_PLAIN = (  # opcodes of numbers, strings and bytes
    'BININT',
    'BININT1',
    'BININT2',
    'LONG1',
    'LONG4',
    'BINFLOAT',
    'BINUNICODE',
    'SHORT_BINUNICODE',
    'BINUNICODE8',
    'BINSTRING',
    'SHORT_BINSTRING',
    'BINBYTES',
    'SHORT_BINBYTES',
)


class UnknownName(ValueError):
    """The pickle references a name that is not allowed. str() of the error is that name, such as 'posix.system'."""


class UnreadablePickle(ValueError):
    """The pickle is truncated, corrupt, or has an unsupported opcode."""


@dataclasses.dataclass(frozen=True)
class Name:
    """Name of a class or function that the pickle references."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """Unexecuted call of a function, with its arguments."""

    name: str
    arguments: tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """Persistent id, a reference to data outside the pickle."""

    where: object


def safe_unpickle(file: Any, known: Collection[str]) -> tuple[object, list[Stored]]:
    """Reads one pickle from the current position of `file` and leaves the position at the end of the pickle.

    Args:
      file: Binary file with read() and readline().
      known: Allowed names. A collections.OrderedDict becomes a dict without attributes. Every other name becomes a
        Name in the value, or a Call if the pickle calls it.

    Returns:
      The value, and all its persistent ids.

    Raises:
      UnknownName: The pickle references a name outside `known`.
      UnreadablePickle: The pickle is truncated, corrupt, or has an unsupported opcode.
    """
    stored: list[Stored] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # pickletools decodes strings before this reader rejects their opcode
            return _interpret(file, known, stored), stored
    except (UnknownName, UnreadablePickle):
        raise
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError) as error:
        raise UnreadablePickle(f'its pickle is truncated or corrupt ({" ".join(str(error).split())[:80]})') from None


def _interpret(file: Any, known: Collection[str], stored: list[Stored]) -> object:
    stack: list[object] = []
    below: list[list[object]] = []  # saved stacks, one per mark
    memo: dict[object, object] = {}
    for opcode, argument, _ in pickletools.genops(file):
        word = opcode.name
        if word in _PLAIN:
            stack.append(argument)
        elif word in _CONSTANTS:
            stack.append(_CONSTANTS[word])
        elif word in ('EMPTY_DICT', 'EMPTY_LIST', 'EMPTY_TUPLE'):
            stack.append({'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}[word]())
        elif word in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            count = int(word[-1])
            stack[-count:] = [_last(stack, count)]
        elif word == 'MARK':
            below.append(stack)
            stack = []
        elif word in ('TUPLE', 'APPENDS', 'SETITEMS'):
            items, stack = stack, below.pop()
            if word == 'TUPLE':
                stack.append(tuple(items))
            elif word == 'APPENDS':
                _checked(stack[-1], list).extend(items)
            else:
                _set_items(stack[-1], items)
        elif word == 'APPEND':
            item = stack.pop()
            _checked(stack[-1], list).append(item)
        elif word == 'SETITEM':
            pair = _last(stack, 2)
            del stack[-2:]
            _set_items(stack[-1], pair)
        elif word in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif word == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif word in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif word in ('GLOBAL', 'INST'):
            stack.append(_named(_checked(argument, str).replace(' ', '.', 1), known if word == 'GLOBAL' else ()))
        elif word == 'STACK_GLOBAL':
            module, name = _last(stack, 2)
            stack[-2:] = [_named(f'{_checked(module, str)}.{_checked(name, str)}', known)]
        elif word in ('REDUCE', 'NEWOBJ'):
            function, arguments = _last(stack, 2)
            stack[-2:] = [_call(_checked(function, Name).name, _checked(arguments, tuple))]
        elif word == 'BUILD':
            stack.pop()  # discards attributes such as module versions
            _checked(stack[-1], (dict, Call))
        elif word == 'BINPERSID':
            stored.append(Stored(stack.pop()))
            stack.append(stored[-1])
        elif word == 'STOP':
            return stack.pop()
        elif word not in ('PROTO', 'FRAME'):
            raise UnreadablePickle(f'its pickle uses {word}, which a state dict never needs; nothing was executed')
    raise UnreadablePickle('its pickle is truncated')


def _named(name: str, known: Collection[str]) -> Name:
    if name not in known:
        raise UnknownName(name[:200] if name.isprintable() else repr(name[:200]))
    return Name(name)


def _call(name: str, arguments: tuple[Any, ...]) -> object:
    """Returns a dict for a call of collections.OrderedDict (Python 2 passes its items), otherwise a Call."""
    if name != ORDERED_DICT:
        return Call(name, arguments)
    result: dict[object, object] = {}
    for key, value in arguments[0] if arguments else ():
        _set_items(result, [key, value])
    return result


def _last(stack: list[object], count: int) -> tuple[object, ...]:
    if len(stack) < count:
        raise ValueError('the stack is empty')
    return tuple(stack[-count:])


def _checked(value: object, kind: type[T] | tuple[type[T], ...]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f'{type(value).__name__} in place of another type')
    return value


def _set_items(target: object, items: Sequence[object]) -> None:
    """Adds alternating keys and values to a dict. Keys must be str or int, whose comparison runs no foreign code."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        _checked(target, dict)[_checked(key, (str, int))] = value
