"""Recipes: TOML plus ``key=value`` overrides, checked strictly against the pydantic model of the room that reads them.

Base knows no recipe: a room derives its sections from ``Section`` and names its folder of shipped recipes. Nothing is guessed: an
unknown key is an error that names the nearest one, "12" is not 12, and every complaint names its file, line or override.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from dsv2.errors import ConfigError, did_you_mean

S = TypeVar("S", bound="Section")
KeyPath = tuple[str, ...]

_OVERRIDE = re.compile(r"\s*([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\s*=(.*)", re.DOTALL)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_KINDS = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}
_ALLOWED = {
    "int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "string_type": "a string",
    "model_type": "a table", "dict_type": "a table", "list_type": "an array", "tuple_type": "an array",
}  # fmt: skip


class Section(BaseModel):
    """A part of a recipe: frozen, and an undeclared key is an error, infinity and NaN are refused unless a field allows them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def recipe_names(folder: str) -> list[str]:
    """Return the names of the shipped recipes of one stage, sorted: ``recipes/<folder>/<name>.toml``."""
    shipped = _shipped(folder)
    return (
        sorted(entry.name.removesuffix(".toml") for entry in shipped.iterdir() if entry.name.endswith(".toml")) if shipped.is_dir() else []
    )


def load_recipe(source: str, schema: type[S], *, folder: str, overrides: Sequence[str] = ()) -> S:
    """Read a recipe, apply overrides in order and check the result strictly against ``schema``.

    Args:
        source: name of a shipped recipe, or path of a TOML file (anything with a slash or ending in ``.toml``).
        schema: the stage's recipe.
        folder: where the stage's shipped recipes are, below ``recipes/``.
        overrides: ``section.key=value`` with a TOML literal; a bare word is a string. In an array of tables a number says which, from 0:
            ``reward.0.weight=2.0``.

    Raises:
        ConfigError: no such recipe, broken TOML, an unknown key, a value of the wrong type or out of range.
    """
    text, file = _read(source, folder)
    data = _parse(text, file)
    applied: dict[KeyPath, str] = {}
    for override in overrides:
        path, value = parse_override(override)
        _set(data, path, value, override)
        applied[path] = override
    try:
        # JSON mode: strict Python mode would refuse an array for a tuple and a string for a path, and TOML has no other way to write them.
        return schema.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise _explain(error, schema, data, file, applied) from error
    except ConfigError as error:  # raised by a validator of the schema
        raise ConfigError(f"{file}: {error.message}", hint=error.hint) from error


def parse_override(override: str) -> tuple[KeyPath, Any]:
    """Split ``a.b=value`` into the key path and the value, a TOML literal or else a bare word.

    Example:
        >>> parse_override("schedule.peak_lr=4e-4")
        (('schedule', 'peak_lr'), 0.0004)

    Raises:
        ConfigError: there is no key, no ``=`` or no value, or a quote or bracket is left open.
    """
    match = _OVERRIDE.fullmatch(override)
    if match is None or not match[2].strip():
        raise ConfigError(
            f"override {override!r} is not of the form key=value",
            hint="write it like schedule.warmup_steps=100, and an empty text like key='\"\"'",
        )
    key, value = tuple(match[1].split(".")), match[2].strip()
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError as error:
        if value[0] in "\"'[{":
            raise ConfigError(
                f"override {override!r}: {value} is not a TOML value", hint="quote the words in it, close quotes and brackets"
            ) from error
        return key, value
    return key, parsed["value"] if len(parsed) == 1 else value


def dump_toml(recipe: Section) -> str:
    """Return a recipe as TOML text that is read back as an equal recipe; fields that are None are left out.

    Raises:
        ValueError: a value cannot be written in TOML, such as None in a field whose default is something else.
    """
    text = "\n".join(_lines(recipe.model_dump(mode="json"), ())).strip() + "\n"
    again = type(recipe).model_validate_json(json.dumps(tomllib.loads(text), default=str), strict=True)
    if again != recipe:
        raise ValueError(f"{recipe!r} does not survive TOML: it is read back as {again!r}")
    return text


def _shipped(folder: str) -> Traversable:
    return files("dsv2") / "recipes" / folder


def _read(source: str, folder: str) -> tuple[str, str]:
    """Return a recipe's text and the name by which messages call it."""
    names = recipe_names(folder)
    if source in names:
        return (_shipped(folder) / f"{source}.toml").read_text(encoding="utf-8"), f"recipes/{folder}/{source}.toml"
    if not (source.endswith(".toml") or "/" in source):
        shipped = f"shipped: {', '.join(names)}" if names else f"none is shipped for {folder}"
        raise ConfigError(f"unknown recipe {source!r}; {shipped}", hint=did_you_mean(source, names) or "give the path of a .toml file")
    try:
        return Path(source).read_text(encoding="utf-8-sig"), source
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}", hint="a recipe is a TOML file"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {source}: {error.strerror}", hint=did_you_mean(Path(source).stem, names)) from error


def _parse(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).partition(" (at ")
        number = re.search(r"line (\d+)", place)
        lines = text.splitlines()
        line = int(number[1]) if number else len(lines)
        raise ConfigError(
            f"{file}:{line}: not valid TOML: {reason}", hint=f"line {line} reads: {lines[line - 1].strip()}" if lines else None
        ) from error


def _set(data: dict[str, Any], path: KeyPath, value: Any, override: str) -> None:
    table: Any = data
    for depth, part in enumerate(path[:-1], start=1):
        table = table.setdefault(part, {}) if isinstance(table, dict) else table[int(part)]
        name, then = ".".join(path[:depth]), path[depth]
        if isinstance(table, list) and all(isinstance(item, dict) for item in table):
            if not then.isdigit() or int(then) >= len(table):
                raise ConfigError(
                    f"override {override!r}: {name} has {len(table)} tables, counted from 0, and {then!r} is none of them",
                    hint=f"write {name}.0 for the first, or {name}=[{{...}}, ...] for all of them",
                )
        elif not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {name} is {_literal(table)}, not a section")
    table[path[-1] if isinstance(table, dict) else int(path[-1])] = value


# TOML ------------------------------------------------------------------------------------------------------------------------------


def _lines(table: dict[str, Any], path: KeyPath) -> Iterator[str]:
    """Yield a table's own keys, then its sub-tables: in TOML a key below a header belongs to that header."""
    values = {key: value for key, value in table.items() if value is not None and not isinstance(value, dict)}
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    if path and (values or not tables):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in values.items():
        yield f"{_key(key)} = {_literal(value)}"
    for key, value in tables.items():
        yield from _lines(value, (*path, key))


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _literal(name)


def _literal(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON string is a TOML string but for DEL
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_literal(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return str(value)


# Saying what is wrong --------------------------------------------------------------------------------------------------------------


def _explain(
    error: ValidationError, schema: type[BaseModel], data: dict[str, Any], file: str, applied: Mapping[KeyPath, str]
) -> ConfigError:
    """Turn pydantic's errors into one ConfigError: a line for each value, the first hint."""
    problems: dict[str, list[str]] = {}  # what is wrong -> what would be allowed: every branch of a union complains about the same value
    hint = None
    for detail in error.errors(include_url=False):
        key, seen = _locate(detail, data)
        override = next((text for path, text in applied.items() if key[: len(path)] == path or (key and path[: len(key)] == key)), None)
        message, allowed = _describe(detail, ".".join(key), seen)
        problems.setdefault(f"{file if override is None else f'override {override!r}'}: {message}", []).extend(allowed)
        hint = hint or _hint(detail, key, seen, schema)
    lines = [f"{message}; allowed: {' or '.join(allowed)}" if allowed else message for message, allowed in problems.items()]
    return ConfigError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} things are wrong", *lines]), hint=hint)


def _locate(detail: ErrorDetails, data: Any) -> tuple[KeyPath, Any]:
    """Return the key path of an error, without pydantic's marks for union branches, and the value found there."""
    key: list[str] = []
    for part in detail["loc"]:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside:
            data = data[part]
            key.append(str(part))
    if detail["type"] == "missing":
        key.append(str(detail["loc"][-1]))
    return tuple(key), data


def _describe(detail: ErrorDetails, name: str, seen: Any) -> tuple[str, list[str]]:
    """Return what is wrong, and what would be allowed as a list of at most one."""
    kind, message = detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        return f"unknown key {name!r}", []
    if kind == "missing":
        return f"the key {name!r} is missing", []
    if kind == "value_error":  # raised by a validator: its text is whole
        reason = message.removeprefix("Value error, ")
        return (
            f"{name} = {_literal(seen)}: {reason}" if name and not isinstance(seen, dict) else f"{name}: {reason}" if name else reason
        ), []
    kind_seen = _KINDS.get(type(seen), "a date or time")
    return f"{name} = {_literal(seen)} ({kind_seen})", [_ALLOWED.get(kind, message.removeprefix("Input should be "))]


def _hint(detail: ErrorDetails, key: KeyPath, seen: Any, schema: type[BaseModel]) -> str | None:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _nearest_key(key, schema)
    if kind == "int_type" and isinstance(seen, float) and seen.is_integer():
        return f"write {int(seen)}"
    if kind == "bool_type" and str(seen).lower() in ("true", "false"):
        return f"write {str(seen).lower()}"
    if kind == "string_type" and not isinstance(seen, dict | list):
        return f"quote it: {key[-1]} = {_literal(str(seen))}"
    if kind == "literal_error" and isinstance(seen, str):
        return did_you_mean(seen, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
    return None


def _nearest_key(key: KeyPath, schema: type[BaseModel]) -> str | None:
    """Name the key that was probably meant: a similar one of the same section, the same one of another, or the nearest of all."""
    paths = list(_key_paths(schema))
    word = tuple(part for part in key if not part.isdigit())  # without the indices of arrays of tables
    siblings = [".".join(path) for path in paths if path[:-1] == word[:-1] and SequenceMatcher(None, path[-1], word[-1]).ratio() > 0.6]
    namesakes = [".".join(path) for path in paths if path[-1] == word[-1]]
    return did_you_mean(".".join(word), siblings or namesakes or [".".join(path) for path in paths])


def _key_paths(schema: type[BaseModel]) -> Iterator[KeyPath]:
    for name, field in schema.model_fields.items():
        yield (name,)
        for section in _sections(field.annotation):
            yield from ((name, *path) for path in _key_paths(section))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models inside an annotation such as ``Section | None`` or ``list[Section]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
