"""Rewards out of a file of the user's: a recipe names it and a function in it. The file is run like any program, with the user's rights."""

import hashlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv2.errors import ConfigError, did_you_mean


def function_of(file: str, name: str) -> Callable[..., Any]:
    """Run a file and return a function of it; once in a process, however many of its functions are rewards.

    Args:
        file: its path.
        name: of the function.

    Raises:
        ConfigError: the file cannot be read or run, or has no such function.
    """
    module = _module(Path(file).resolve())
    function = vars(module).get(name)
    if not callable(function):
        own = [other for other, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        seen = "nothing" if function is None else f"{function!r}, which cannot be called,"
        hint = did_you_mean(name, own) or "define it there"
        raise ConfigError(f"{file} has {seen} under the name {name!r}; its functions: {', '.join(own) or 'none'}", hint=hint)
    found: Callable[..., Any] = function
    return found


def file_hash(file: str) -> str:
    """Return the SHA-256 of a file as 64 hex digits.

    Raises:
        ConfigError: it cannot be read.
    """
    return hashlib.sha256(_text(Path(file))).hexdigest()


def _text(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the reward's file {file}: {error.strerror}", hint="give the path of a Python file") from error


def _module(file: Path) -> ModuleType:
    """Return a file as a module; compiled from its text, since a compiled copy that Python kept may be of an older one."""
    text = _text(file)
    name = f"dsv2_reward_{hashlib.sha256(bytes(file) + text).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(text, str(file), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        place = f":{lines[-1]}" if lines else ""
        raise ConfigError(
            f"the reward's file {file}{place} cannot be run: {type(error).__name__}: {error}", hint="it is run when a run starts; mend it"
        ) from error
    return module
