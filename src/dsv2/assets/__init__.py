"""Text that ships with dsv2: a small real corpus in four domains (en, zh, code, math), so that the tour needs no download.

``corpus/train`` and ``corpus/validation`` hold one ``DOMAIN.jsonl.gz`` each, rows ``{"text", "domain", "source"}``, most with
``title`` or ``path``. No document is in both. ``LICENSES.md`` names origin and licence of every source; the repository's
``scripts/build_assets.py`` made the files. ``instructions.toml``, written for dsv2: what ``tasks/instructions.py`` makes questions of.
"""

from importlib.resources import as_file, files
from pathlib import Path

from dsv2.errors import ConfigError

SPLITS = ("train", "validation")
DOMAINS = ("en", "zh", "code", "math")


def corpus_path(split: str) -> Path:
    """Return the folder of one split of the corpus, to be read with ``dsv2.data.documents.read_documents``.

    Args:
        split: "train" or "validation".

    Raises:
        ConfigError: there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"the corpus has no split {split!r}; it has {' and '.join(SPLITS)}")
    with as_file(files(__name__) / "corpus" / split) as folder:  # dsv2 is never run from a zip: the folder stays after the block
        return folder


def instructions_path() -> Path:
    """Return the file of facts that the tour's instruction set is made of."""
    with as_file(files(__name__) / "instructions.toml") as file:
        return file
