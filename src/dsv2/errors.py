"""What a user can cause, and what to do about it.

Every error says what is wrong, the value seen and the value allowed; a ``hint`` on its own line says what to do. The command line
prints it and exits with 2. A bug in dsv2 raises something else.
"""

import difflib
from collections.abc import Iterable

# The extras of pyproject.toml and what each brings; distribution and import name are the same for all of them.
EXTRAS: dict[str, tuple[str, ...]] = {
    "constrain": ("llguidance",),
    "serve": ("fastapi", "uvicorn"),
    "data": ("pyarrow", "zstandard", "datasketch", "ftfy", "py3langid"),
    "eval": ("sympy",),
    "gguf": ("gguf",),
    "tensorboard": ("tensorboard",),
}


class Dsv2Error(Exception):
    """Base of the errors below.

    Args:
        message: what is wrong, the value seen, the value allowed.
        hint: what to do about it, one imperative sentence.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message.encode(errors="backslashreplace").decode()  # a value of a damaged file may hold half a character
        self.hint = hint
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(Dsv2Error):
    """A recipe, preset, model config or command-line value is wrong."""


class DataError(Dsv2Error):
    """A document, shard or corpus is missing, empty, damaged or in the wrong encoding."""


class CheckpointError(Dsv2Error):
    """A checkpoint is missing, incomplete, damaged or does not fit the model."""


class RequestError(Dsv2Error):
    """A generation request asks for something that cannot be served."""


class MissingExtra(Dsv2Error):
    """An optional dependency is needed and not installed.

    Args:
        package: the distribution that is missing.
        extra: the extra of dsv2 that brings it.
        purpose: what it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        # Not `pip install "dsv2[...]"`: dsv2 is installed from a checkout, and an index could give that name to somebody else.
        super().__init__(
            f"{purpose} needs {package}, which is not installed", hint=f"run: pip install {package} (part of the extra dsv2[{extra}])"
        )


def extra_of(module: str) -> str | None:
    """Return the extra that brings an importable module (dotted name), or None when no extra does."""
    return next((extra for extra, packages in EXTRAS.items() if module.partition(".")[0] in packages), None)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return the hint ``did you mean 'X'?`` with the nearest of ``known``, however far; None when nothing is known."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"did you mean {near[0]!r}?" if near else None
