"""The few words of pickle's language that state dicts are written in. Nothing is imported, called or made by name.

A pickle is a program for a machine with a stack, and Python's own reader runs it: it may call any function there is.
Here names and calls become inert values, and a name that is not `known` ends the reading.
"""

import dataclasses
import pickletools
import warnings
from collections.abc import Collection
from typing import Any

ORDERED_DICT = 'collections.OrderedDict'
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_PLAIN = (  # words for numbers and texts
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
    """A pickle asks for something that is not to be had; str() of it is its name, such as 'posix.system'."""


class UnreadablePickle(ValueError):
    """A pickle that is cut off, damaged, or uses a word that is not known here."""


@dataclasses.dataclass(frozen=True)
class Name:
    """What a pickle names."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """What a pickle would have called, and with what."""

    name: str
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a pickle says lies outside of it."""

    where: Any


def read(file: Any, known: Collection[str]) -> tuple[Any, list[Stored]]:
    """The value of the pickle that begins where `file` stands, and all that it says lies outside; `file` is behind it.

    Args:
      file: binary, with read() and readline().
      known: names that it may have. collections.OrderedDict becomes a dict, with no attributes; of all others the
        value has a Name, or a Call where the pickle would have called them.

    Raises UnknownName, UnreadablePickle.
    """
    stored: list[Stored] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about texts that are decoded before their word is refused
            return _interpret(file, known, stored), stored
    except (UnknownName, UnreadablePickle):
        raise
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError) as error:
        raise UnreadablePickle(f'its pickle is cut off or damaged ({" ".join(str(error).split())[:80]})') from None


def _interpret(file: Any, known: Collection[str], stored: list[Stored]) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    argument: Any
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
            stack.append(_named(argument.replace(' ', '.', 1), known if word == 'GLOBAL' else ()))
        elif word == 'STACK_GLOBAL':
            module, name = _last(stack, 2)
            stack[-2:] = [_named(f'{_checked(module, str)}.{_checked(name, str)}', known)]
        elif word in ('REDUCE', 'NEWOBJ'):
            function, arguments = _last(stack, 2)
            stack[-2:] = [_call(_checked(function, Name).name, _checked(arguments, tuple))]
        elif word == 'BUILD':
            stack.pop()  # attributes, such as the versions of modules
            _checked(stack[-1], (dict, Call))
        elif word == 'BINPERSID':
            stored.append(Stored(stack.pop()))
            stack.append(stored[-1])
        elif word == 'STOP':
            return stack.pop()
        elif word not in ('PROTO', 'FRAME'):
            raise UnreadablePickle(f'its pickle uses {word}, which no state dict needs; nothing in it was run')
    raise UnreadablePickle('its pickle is cut off')


def _named(name: str, known: Collection[str]) -> Name:
    if name not in known:
        raise UnknownName(name[:200] if name.isprintable() else repr(name[:200]))
    return Name(name)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """An ordered dict from nothing or from pairs, as Python 2 wrote it; otherwise an inert value."""
    if name != ORDERED_DICT:
        return Call(name, arguments)
    result: dict[Any, Any] = {}
    for key, value in arguments[0] if arguments else ():
        _set_items(result, [key, value])
    return result


def _last(stack: list[Any], count: int) -> tuple[Any, ...]:
    if len(stack) < count:
        raise ValueError('the stack is empty')
    return tuple(stack[-count:])


def _checked(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f'{type(value).__name__} where another type belongs')
    return value


def _set_items(target: Any, items: Any) -> None:
    """Put keys and values by turns into a dict; keys are texts or numbers, whose comparing runs nothing."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        _checked(target, dict)[_checked(key, (str, int))] = value
