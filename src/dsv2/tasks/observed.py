"""Compare what a program returned, as it came out of confinement, with what was expected, as Python's == would.

The comparison follows the expected value, so its cost is bounded by that and not by what a program sends. Only plain types take part:
an object with an __eq__ of its own is a number on the wire by now, and equals nothing.
"""

from typing import Any

from dsv2.tasks.inside.wire import decode


def equals(seen: Any, expected: Any) -> bool:
    """Tell whether a wire form (inside/wire.py, as JSON read it) is a value equal to an expected one of plain types."""
    try:
        return _equals(seen, expected)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False  # what was sent is no value


def _equals(seen: Any, expected: Any) -> bool:
    if not isinstance(expected, list | tuple | set | frozenset | dict):
        scalar = not isinstance(seen, list) or seen[0] in ("i", "f", "c", "b")
        return scalar and bool(decode(seen, _no_object) == expected)
    if not isinstance(seen, list):
        return False
    kind, items = seen[0], seen[1:]
    if isinstance(expected, dict):
        return kind == "d" and len(items) == 2 * len(expected) and _equal_dicts(items[::2], items[1::2], expected)
    if len(items) != len(expected):
        return False
    if isinstance(expected, list | tuple):
        return bool(kind == ("l" if isinstance(expected, list) else "t")) and all(map(_equals, items, expected))
    return kind in ("s", "z") and {_hashable(item, len(expected)) for item in items} == expected


def _equal_dicts(keys: list[Any], values: list[Any], expected: dict[Any, Any]) -> bool:
    found = {_hashable(key, len(expected)): value for key, value in zip(keys, values, strict=True)}
    return found.keys() == expected.keys() and all(_equals(found[key], expected[key]) for key in expected)


def _hashable(wire: Any, room: int) -> Any:
    """Return a key or an item of a set. Sets inside it stay small: a program can choose items whose hashes collide, at quadratic cost."""
    if isinstance(wire, list) and wire[0] not in ("i", "f", "c", "b", "t", "z"):
        raise ValueError("no key, and not worth building")
    if isinstance(wire, list) and wire[0] == "z" and len(wire) > 64 + room:
        raise ValueError("a frozenset too large to be compared")
    if isinstance(wire, list) and wire[0] in ("t", "z"):
        items = [_hashable(item, room) for item in wire[1:]]
        return tuple(items) if wire[0] == "t" else frozenset(items)
    return decode(wire, _no_object)


def _no_object(number: int, type_name: str) -> Any:
    raise ValueError(f"an object of type {type_name}")
