"""Parts of a long benchmark that are made once: stopped and started again, it goes on behind the last that was finished."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv2.files import atomic_write_json

Result = dict[str, Any]


def once(file: Path, make: Callable[[], Result]) -> Result:
    """Return what a file holds, and first make it, with the seconds that it took, if it is not there."""
    if not file.exists():
        began = time.perf_counter()
        made = make()
        atomic_write_json(file, {"seconds": time.perf_counter() - began} | made)
    found: Result = json.loads(file.read_text(encoding="utf-8"))
    return found
