"""The judge's end of the channel to a confined process: how messages are framed on their way down, what is believed of what comes up."""

import json
import marshal
from typing import Any

from dsv2.tasks.inside.wire import MAX_DEPTH

_MOST_LAYERS = MAX_DEPTH + 3  # of lists in a line: the message, the value, a number in it


def framed(message: Any) -> bytes:
    """Return a message of plain values as the process reads it: marshalled, behind its length."""
    content = marshal.dumps(message)
    return len(content).to_bytes(4, "little") + content


def parsed(line: bytes) -> list[Any] | None:
    """Return a line's message; None if no process of ours writes such: no list that begins with a word, an object, or nested too deeply."""
    try:
        message = _JSON.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    layer = [message]
    for _ in range(_MOST_LAYERS):
        layer = [item for part in layer if isinstance(part, list) for item in part]
    return message if not layer and isinstance(message, list) and message and isinstance(message[0], str) else None


def _refuse_object(_: object) -> None:
    raise ValueError("objects of JSON are never written")


_JSON = json.JSONDecoder(object_hook=_refuse_object)
