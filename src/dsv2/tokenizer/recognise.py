"""Which chat template a folder comes with. Its Jinja text is looked at and never run: ``chat.py`` renders what is recognised."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from dsv2.errors import DataError
from dsv2.tokenizer.chat import Template, chat_template
from dsv2.tokenizer.specials import ASSISTANT

MAX_TEMPLATE_BYTES = 1_000_000


def template_text(folder: Path, settings: dict[str, Any]) -> tuple[str | None, str]:
    """Return the chat template's text and the file that holds it; None without one.

    Args:
        folder: a model or tokenizer folder; its chat_template.jinja goes before tokenizer_config.json, as in transformers.
        settings: content of its tokenizer_config.json; of several named templates "default" counts, else the first.

    Raises:
        DataError: the file is larger than any template.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise DataError(f"{file} has {file.stat().st_size:,} bytes; a chat template has at most {MAX_TEMPLATE_BYTES:,}")
        return file.read_text(encoding="utf-8", errors="replace"), file.name
    text = settings.get("chat_template")
    if isinstance(text, list):
        named = {str(entry.get("name")): entry.get("template") for entry in text if isinstance(entry, dict)}
        text = named.get("default", next(iter(named.values()), None))
    return (text if isinstance(text, str) else None), "tokenizer_config.json"


def recognise(text: str | None, markers: Collection[str]) -> Template | None:
    """Tell what a text is: V2.5's roles are markers, V2's are words; without one the tokenizer's markers tell what it can use."""
    if text is None:
        return "v2.5" if ASSISTANT in markers else "v2"
    if ASSISTANT in text:
        return "v2.5"
    return "v2" if "Assistant:" in text else None


def is_ours(text: str) -> bool:
    """Tell whether a text is word for word one that we write."""
    return any(text.strip() == chat_template(known).strip() for known in get_args(Template))
