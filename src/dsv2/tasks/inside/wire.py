"""Plain values as nested lists of text and numbers: what passes between a confined process and the judge. Nothing here runs code.

A value on the wire is null, true, false, a number (integers below 2^63), a string, or a list that begins with a letter: i integer, f float,
c complex, b bytes, each in hexadecimal; l list, t tuple, s set, z frozenset, g iterator with their items; d dict with key, value, key,
value ...; o an object that stays where it is, with its number and the name of its type.
"""

from __future__ import annotations

from _json import encode_basestring_ascii  # json itself takes half as long to import as the interpreter to start

TYPE_CHECKING = False  # typing is slow to import too
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Wire = Any  # nested lists, str, int, bool, None

MAX_DEPTH = 100
_COLLECTIONS = (list, "l"), (tuple, "t"), (dict, "d"), (frozenset, "z"), (set, "s")


class TooLarge(Exception):
    """A value takes more room than is allowed, or is nested too deeply."""


class Encoder:
    """Write values as JSON, within a number of characters.

    Args:
        room: how many characters a value may take.
        keep: called with an object that is no plain value; returns the number under which it is kept.
    """

    def __init__(self, room: int, keep: Callable[[object], int]) -> None:
        self._room = room
        self.keep = keep

    def json(self, value: object) -> str:
        """Return the value's wire form as JSON text.

        Raises:
            TooLarge: it does not fit.
        """
        self._parts: list[str] = []
        self._left = self._room
        self._write(value, 0)
        return "".join(self._parts)

    def _put(self, part: str) -> None:
        self._left -= len(part)
        if self._left < 0:
            raise TooLarge(f"the value takes more than {self._room} characters")
        self._parts.append(part)

    def _write(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TooLarge(f"the value is nested more than {MAX_DEPTH} deep")
        if value is None or value is True or value is False:
            self._put({None: "null", True: "true", False: "false"}[value])
        elif isinstance(value, str):
            self._put(encode_basestring_ascii(str.__str__(value)))
        elif isinstance(value, int):
            number = int.__index__(value)
            self._put(str(number) if -(2**63) <= number < 2**63 else f'["i","{number:x}"]')
        elif isinstance(value, float):
            self._put(f'["f","{float.hex(value)}"]')
        elif isinstance(value, complex):
            self._put(f'["c","{value.real.hex()}","{value.imag.hex()}"]')
        elif isinstance(value, bytes | bytearray):
            self._put(f'["b","{value.hex()}"]')
        elif isinstance(value, list | tuple | set | frozenset | dict) or _is_iterator(value):
            self._write_items(value, depth)
        else:
            self._put(f'["o",{int(self.keep(value))},{encode_basestring_ascii(type(value).__name__)}]')

    def _write_items(self, value: Any, depth: int) -> None:
        kind = next((kind for collection, kind in _COLLECTIONS if isinstance(value, collection)), "g")
        self._put(f'["{kind}"')
        for item in (part for pair in dict.items(value) for part in pair) if isinstance(value, dict) else value:
            self._put(",")
            self._write(item, depth + 1)
        self._put("]")


def _is_iterator(value: object) -> bool:
    """Tell whether it is a generator or another iterator of Python's own, which is nothing but its items."""
    return type(value).__module__ in ("builtins", "itertools") and hasattr(type(value), "__next__")


def decode(wire: Wire, thing: Callable[[int, str], object]) -> Any:
    """Return the value of a wire form; `thing` makes an object of a number and the name of a type.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(wire, list):
        return wire
    try:
        kind, *items = wire
        if kind == "i":
            return int(items[0], 16)
        if kind == "f":
            return float.fromhex(items[0])
        if kind == "c":
            return complex(float.fromhex(items[0]), float.fromhex(items[1]))
        if kind == "b":
            return bytes.fromhex(items[0])
        if kind == "o":
            if type(items[0]) is not int or not isinstance(items[1], str):
                raise TypeError("an object without a number")  # the number goes back onto the wire as it is
            return thing(items[0], items[1])
        values = [decode(item, thing) for item in items]
        if kind == "d":
            return dict(zip(values[::2], values[1::2], strict=True))
        if kind == "g":
            return iter(values)
        return {"l": list, "t": tuple, "s": set, "z": frozenset}[kind](values)
    except (TypeError, LookupError, RecursionError, OverflowError) as error:
        raise ValueError(f"no value: {error!r}") from None
