"""Which documents are worth training on: pure functions, each of which returns why it drops a text, or None.

The general rules are Gopher's (Rae et al. 2021, A.1.1), the code rules those of DeepSeek-Coder-V2 (2.1). Thresholds stand in
:mod:`dsv2.data.recipe`. A rule's name is ``section.rule``, under which it is counted and reported.
"""

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import PurePosixPath

import numpy as np

from dsv2.data.reading import BLANK, LETTER, MARK, Reading, gram_hashes
from dsv2.data.recipe import CodeRules, ContentiousRules, GeneralRules

BULLETS = ("-", "*", "•", "●", "◦", "‣", "▪", "·")
ELLIPSES = ("...", "…", "。。。")
HTML_START = re.compile(r"\s*(<!--.*?-->\s*)?<(!doctype html|html)\b", re.IGNORECASE | re.DOTALL)
UNSEEN = {"script", "style", "template", "noscript", "head"}
HEAD_TAGS = {"title", "meta", "link", "base"}
LONG_LINE = 12  # characters from which a repeated line counts
OFTEN = 6  # times that a run of words must stand in a text before its share counts: short texts repeat their subject
SNIFFED = 400  # characters that tell HTML


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a document is left out.

    Attributes:
        rule: ``section.rule``.
        why: what was seen and what is allowed.
    """

    rule: str
    why: str


def is_of(domain: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a domain is one of those that the patterns name."""
    return any(fnmatchcase(domain, pattern) for pattern in patterns)


def judge_general(reading: Reading, rules: GeneralRules) -> Drop | None:
    """Judge natural language by its length, its words, its symbols, its lines and its repetitions."""
    num_words = len(reading.word_starts)
    if not rules.min_words <= num_words <= rules.max_words:
        return Drop("general.length", f"{num_words} words; {rules.min_words} to {rules.max_words} are allowed")
    if drop := _words(reading, rules):
        return drop
    if drop := _lines(reading, rules):
        return drop
    return _repetition(reading, rules)


def _words(reading: Reading, rules: GeneralRules) -> Drop | None:
    ideographs = reading.ideograph_words()
    others = reading.word_lens[~ideographs]
    if 2 * len(others) > len(ideographs) and not rules.min_mean_word_len <= (mean := float(others.mean())) <= rules.max_mean_word_len:
        allowed = f"{rules.min_mean_word_len} to {rules.max_mean_word_len} are allowed"
        return Drop("general.mean_word_len", f"{mean:.1f} characters; {allowed}")
    share = reading.count(LETTER | MARK) / max(len(reading.codes) - reading.count(BLANK), 1)
    if share < rules.min_letter_share:
        return Drop("general.letters", f"{share:.2f} of the characters are letters; at least {rules.min_letter_share}")
    symbols = reading.text.count("#") + reading.text.count("...") + reading.text.count("…")
    if symbols > rules.max_symbols_per_word * len(ideographs):
        seen = f"{symbols} # and ellipses in {len(ideographs)} words"
        return Drop("general.symbols", f"{seen}; at most {rules.max_symbols_per_word} a word are allowed")
    return None


def _lines(reading: Reading, rules: GeneralRules) -> Drop | None:
    lines = [line for line in (line.strip() for line in reading.lines()) if line]
    if not lines:
        return None
    bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
    if bullets > rules.max_bullet_lines:
        return Drop("general.bullets", f"{bullets:.2f} of the lines begin with a bullet; at most {rules.max_bullet_lines}")
    ellipses = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
    if ellipses > rules.max_ellipsis_lines:
        return Drop("general.ellipses", f"{ellipses:.2f} of the lines end in an ellipsis; at most {rules.max_ellipsis_lines}")
    long = [line for line in lines if len(line) >= LONG_LINE]  # braces and \\noindent recur in sound texts
    distinct = set(long)
    repeated = (len(long) - len(distinct)) / len(lines)
    if repeated > rules.max_repeated_lines:
        return Drop("general.repeated_lines", f"{repeated:.2f} of the lines repeat an earlier one; at most {rules.max_repeated_lines}")
    repeated = (sum(map(len, long)) - sum(map(len, distinct))) / sum(map(len, lines))
    if repeated > rules.max_repeated_line_chars:
        allowed = f"at most {rules.max_repeated_line_chars}"
        return Drop("general.repeated_lines", f"{repeated:.2f} of the characters are in lines that repeat an earlier one; {allowed}")
    return None


def _repetition(reading: Reading, rules: GeneralRules) -> Drop | None:
    ends = np.concatenate([[0], np.cumsum(reading.word_lens)])
    for length, most in zip((2, 3, 4), rules.max_top_grams, strict=True):
        grams = gram_hashes(reading.word_hashes, length)
        if len(grams) == 0:
            continue
        _, first, counts = np.unique(grams, return_index=True, return_counts=True)
        characters = (ends[first + length] - ends[first]) * np.where(counts >= OFTEN, counts, 0)
        share = float(characters.max()) / float(ends[-1])
        if share > most:
            return Drop("general.top_gram", f"{share:.2f} of the characters are in one run of {length} words; at most {most}")
    length = 20 if 2 * np.count_nonzero(reading.ideograph_words()) > len(reading.word_starts) else 10
    share = repeated_share(reading, length)
    if share > rules.max_repeated_grams:
        why = f"{share:.2f} of the characters are in runs of {length} words that recur; at most {rules.max_repeated_grams}"
        return Drop("general.repeated_grams", why)
    return None


def repeated_share(reading: Reading, length: int) -> float:
    """Return the share of the words' characters that lie in a run of ``length`` words which stood there before."""
    grams = gram_hashes(reading.word_hashes, length)
    if len(grams) == 0:
        return 0.0
    order = np.argsort(grams, kind="stable")
    again = order[1:][grams[order[1:]] == grams[order[:-1]]]
    edges = np.zeros(len(reading.word_starts) + 1, dtype=np.int64)
    np.add.at(edges, again, 1)
    np.add.at(edges, again + length, -1)
    covered = np.cumsum(edges)[:-1] > 0
    return float(reading.word_lens[covered].sum() / reading.word_lens.sum())


def judge_code(reading: Reading, rules: CodeRules, path: str = "") -> Drop | None:
    """Judge code by its lines and letters; XML, HTML, JSON and YAML by rules of their own.

    Args:
        reading: of the file.
        rules: thresholds.
        path: name of the file, which tells its kind; without one the text does.
    """
    text, kind = reading.text, code_kind(reading.text, path)
    lengths = reading.line_ends - reading.line_starts
    if lengths.size and lengths.mean() > rules.max_mean_line:
        return Drop("code.mean_line", f"a mean of {lengths.mean():.0f} characters a line; at most {rules.max_mean_line:g}")
    if lengths.size and lengths.max() > rules.max_line:
        return Drop("code.max_line", f"a line of {lengths.max()} characters; at most {rules.max_line}")
    share = reading.count(LETTER) / max(len(text), 1)
    if share < rules.min_letter_share:
        return Drop("code.letters", f"{share:.2f} of the characters are letters; at least {rules.min_letter_share}")
    if "<?xml version=" in text[:100] and kind != "xslt":
        return Drop("code.xml", "<?xml version= in the first 100 characters")
    if kind == "html":
        visible = len(visible_text(text))
        if visible < max(rules.min_html_chars, rules.min_html_share * len(text)):
            allowed = f"at least {rules.min_html_chars}, and {rules.min_html_share} of the file"
            return Drop("code.html", f"{visible} of {len(text)} characters are visible; {allowed}")
    if kind in ("json", "yaml") and not rules.min_data_chars <= len(text) <= rules.max_data_chars:
        return Drop(f"code.{kind}", f"{len(text)} characters; {rules.min_data_chars} to {rules.max_data_chars} are allowed")
    return None


def code_kind(text: str, path: str = "") -> str:
    """Return "html", "json", "yaml" or "xslt" for such a file, "" for any other: by its name, else by how it begins."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix:
        kinds = {".html": "html", ".htm": "html", ".xhtml": "html", ".json": "json", ".yaml": "yaml", ".yml": "yaml"}
        return {**kinds, ".xsl": "xslt", ".xslt": "xslt"}.get(suffix, "")
    if HTML_START.match(text[:SNIFFED]):
        return "html"
    if "<xsl:stylesheet" in text[:2000] or "<xsl:transform" in text[:2000]:
        return "xslt"
    if text.lstrip()[:1] in ("{", "[") and text.rstrip()[-1:] in ("}", "]"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return ""
        return "json"
    return "yaml" if text.startswith(("%YAML", "---\n")) else ""


class _Visible(HTMLParser):
    """Collects the text that a browser would show."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen: list[str] = []
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in UNSEEN:
            self.unseen.append(tag)
        elif tag not in HEAD_TAGS and "head" in self.unseen:  # a head need not be closed: what cannot stand in it ends it
            self.unseen.remove("head")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unseen:
            del self.unseen[self.unseen.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.parts.append(data)


def visible_text(html: str) -> str:
    """Return the text that a browser would show, runs of blanks as one."""
    parser = _Visible()
    parser.feed(html)
    parser.close()
    return " ".join("".join(parser.parts).split())


def judge_contentious(reading: Reading, rules: ContentiousRules) -> Drop | None:
    """Drop a text that dwells on disputed terms: on several of them, and often."""
    found = [match.lower() for match in _terms(rules.terms).findall(reading.text)]
    rate = 1000 * len(found) / max(len(reading.word_starts), 1)
    if len(set(found)) >= rules.min_distinct and rate >= rules.min_per_thousand:
        return Drop("contentious.terms", f"{len(set(found))} terms, {rate:.1f} in 1000 words: {', '.join(sorted(set(found))[:5])}")
    return None


@lru_cache(maxsize=8)
def _terms(terms: tuple[str, ...]) -> re.Pattern[str]:
    # Chinese is written without blanks: only words of an alphabet have borders.
    words = [rf"\b{re.escape(term)}\b" if term.isascii() else re.escape(term) for term in terms]
    return re.compile("|".join(words) or r"(?!)", re.IGNORECASE)
