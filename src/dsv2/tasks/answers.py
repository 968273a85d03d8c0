"""Answers in text: find the final one, and tell whether two are the same. One checker for evaluation and for reward.

Two answers are the same if they are the same text after clean-up, or the same in what they say: numbers exactly (0.5 and 1/2), expressions
at three points (docs/sandbox.md says what that can miss), tuples and intervals item by item, lists and sets in any order.
"""

import cmath
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

from dsv2.tasks.expressions import MAX_POINTS, NotRead, Number, Tree, has_two_signs, names, read, value

MAX_CHARACTERS = 1000  # longer answers are the same only if they are the same text

_PHRASES = re.compile(
    r"(?:final\s+answer|answer|result)\s*(?:is|are|:|=|：)+\s*:?\s*"
    r"|(?:答案|结果|答)\s*(?:是|为|应为|[:：=])+\s*|(?:故选|因此选|所以选|应选)\s*[:：]?\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[。；;!！\n]|\.(?=\s|$)|，(?=[^\d])")
_REASON = re.compile(r"(?:,\s*|\s)(?:because|since|where)\b|,\s*as\b(?! well)")  # opens what never holds the answer
_REMARK = re.compile(r"(?:,\s*|\s)which\b|,\s*so\b")  # opens what holds it behind a description alone
_DESCRIBED = re.compile(r"(?:that|the|an?|his|her|its|their|our|your)\s+[A-Za-z]")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")


def final_answer(text: str) -> str | None:
    r"""Return the final answer of a worked solution, in English or Chinese; None if nothing looks like one.

    The last ``\boxed{...}`` wins, then what follows the last ``####``, then what follows the last "the answer is" (答案是, 故选), then the
    last number.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip() or None
    for match in reversed(list(_PHRASES.finditer(text))):
        said = _SENTENCE_END.split(text[match.end() :].strip().strip("*").strip(), maxsplit=1)[0].strip().strip("*$ ").strip()
        if said:
            return _value(said)
    numbers = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    return numbers[-1].rstrip(",") if numbers else None


def _value(said: str) -> str:
    """Return the value in what follows "the answer is", without a clause that explains it; of "that the sum is 7" it is the last said."""
    said = _REASON.split(said, maxsplit=1)[0]
    plain = _REMARK.split(said, maxsplit=1)[0]
    described = _DESCRIBED.match(plain) is not None
    whole = said if described and " is " not in plain else plain  # "the sum of 2 and 3, which is 5"
    before, _, last = whole.rpartition(" is ")
    return (last if described or not _NUMBER.search(before) else whole).strip("*$, ")


def _last_boxed(text: str) -> str | None:
    """Return what the last closed box holds; one pass, however many are left open."""
    found: tuple[int, int] | None = None
    opened: list[int] = []  # where a box's content begins; -1 for another brace
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else -1)
        elif opened and (start := opened.pop()) >= 0:
            found = max(found or (0, 0), (start, match.start()))
    return text[slice(*found)].strip() or None if found else None


def same_answer(given: str, truth: str) -> bool:
    """Tell whether two answers say the same. Symmetric; an answer is always the same as itself."""
    if given.strip() == truth.strip():
        return True
    if max(len(given), len(truth)) > MAX_CHARACTERS:
        return False
    one, other = _clean(given), _clean(truth)
    if _as_words(one) == _as_words(other) and _as_words(one):
        return True
    try:
        return _same(one, other)
    except RecursionError:
        return False


_REPLACED = [
    (re.compile(pattern), put)
    for pattern, put in (
        (r"\\(?:left|right|displaystyle|textstyle|bigl|bigr|Bigl|Bigr|big|Big|limits|mathstrut)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\tbinom|\\dbinom", r"\\binom"),
        (r"\\[!]|\\\$|[$￥¥€£]", ""),
        (r"\\(?:[,;:> ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~|\u00a0", " "),
        (r"\\[()\[\]]", " "),
        (r"\\(?:cdot|times)(?![A-Za-z])|[×·∙⋅]", "*"),
        (r"\*\*", "^"),
        (r"\\div(?![A-Za-z])|÷", "/"),
        (r"[−–—]", "-"),
        (r"\\%|％|\s*(?:percent|per cent)\b", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree(?![A-Za-z])", " degrees "),
        (r"\\(?:leqslant|leq|le)(?![A-Za-z])|<=", "≤"),
        (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>=", "≥"),
        (r"\\(?:neq|ne)(?![A-Za-z])|!=", "≠"),
        (r"\\(?:lt)(?![A-Za-z])", "<"),
        (r"\\(?:gt)(?![A-Za-z])", ">"),
        (r"\\infty(?![A-Za-z])|∞|\binfinity\b", " ∞ "),
        (r"\\pm(?![A-Za-z])", "±"),
        (r"\\(?:cup)(?![A-Za-z])|∪", "∪"),
        (r"\\(?:in)(?![A-Za-z])|∈", "∈"),
        (r"π", r"\\pi "),
        (r"√", r"\\sqrt "),
        (r"\\[{]", "⟨"),
        (r"\\[}]", "⟩"),
        (r"\\(?:l|r)?vert(?![A-Za-z])", "|"),
    )
]
_RAISED = re.compile("[²³]")
_TEXT = re.compile(r"\\(?:text|textnormal|mbox|textbf|textit|mathrm|mathbf|textrm|operatorname|rm|bf)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])")
_MATRIX = re.compile(r"\\begin\{([pbvB]?matrix|array)\}(?:\{[^{}]*\})?(.*?)\\end\{\1\}", re.DOTALL)


def _clean(text: str) -> str:
    """Return an answer without what only concerns its looks."""
    text = unicodedata.normalize("NFKC", _RAISED.sub(lambda match: f"^{match[0]}", text.strip()))
    boxed = _last_boxed(text)
    text = boxed if boxed is not None and text.startswith(("\\boxed", "\\fbox", "$\\boxed")) else text
    text = _MATRIX.sub(_plain_matrix, text)
    for pattern, put in _REPLACED:
        text = pattern.sub(put, text)
    text = _TEXT.sub(r" \1 ", text)
    text = re.sub(r"\s+", " ", text).lstrip().rstrip(" .。")
    return text if re.match(r"[(\[⟨]", text) else _THOUSANDS.sub(lambda match: re.sub(r"[,{}]", "", match[0]), text)


def _plain_matrix(match: re.Match[str]) -> str:
    """Write a matrix as a tuple of rows, each a tuple, which is how it is compared."""
    rows = [",".join(row.split("&")) for row in match[2].split("\\\\") if row.strip()]
    return "[" + ",".join(f"[{row}]" for row in rows) + "]"


def _as_words(text: str) -> str:
    return re.sub(r"[\s{}\"'`]+", "", text).casefold()


@dataclass(frozen=True)
class _Quantity:
    """An expression with what stands behind it: a unit, the base of its digits or a percent sign."""

    tree: Tree
    unit: str


_RELATIONS = "=≤≥<>≠∈"
_FLIPPED = {"≤": "≥", "≥": "≤", "<": ">", ">": "<"}
_OPENING, _CLOSING = "([⟨{", ")]⟩}"
_LIST_WORDS = re.compile(r"\s*(?:,|，|、|\band\b|\bor\b|和|或)\s*")


def _same(one: str, other: str) -> bool:
    """Compare two cleaned answers by what they say."""
    relation, other_relation = _relation(one), _relation(other)
    if relation and other_relation:
        return _same_relation(relation, other_relation)
    for found, bare in ((relation, other), (other_relation, one)):
        if found and found[0] in "=∈" and re.fullmatch(r"\\?[A-Za-z]\w*(?:_\{?\w+\}?)?(?: ?\([A-Za-z, ]+\))?", found[1]):
            return _same(found[2], bare)  # "x = 5" for "5"
        if found:
            return False
    for separator in ("∪", ","):
        parts = [_split(one, separator), _split(other, separator)]
        if separator == "," and len(parts[0]) != len(parts[1]):
            parts = [_both_signs(part) for part in parts]
        if max(map(len, parts)) > 1:
            return _same_in_any_order(*parts)
    group, other_group = _group(one), _group(other)
    if group and other_group:
        (brackets, items), (other_brackets, other_items) = group, other_group
        if brackets == other_brackets == "⟨⟩":
            return _same_in_any_order(items, other_items)
        if len(items) > 1 or len(other_items) > 1:
            return brackets == other_brackets and len(items) == len(other_items) and all(map(_same, items, other_items))
    return _same_quantity(one, other)


def _relation(text: str) -> tuple[str, str, str] | None:
    """Part a relation at its only sign outside of brackets."""
    places = [place for place, letter in _outside(text) if letter in _RELATIONS]
    if len(places) != 1:
        return None
    return text[places[0]], text[: places[0]].strip(), text[places[0] + 1 :].strip()


def _outside(text: str) -> Iterator[tuple[int, str]]:
    """Yield places and letters that stand in no bracket."""
    depth = 0
    for place, letter in enumerate(text):
        depth -= letter in _CLOSING
        if depth <= 0 and letter not in _OPENING:
            yield place, letter
        depth += letter in _OPENING


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator outside of brackets; words such as "and" separate a list as commas do."""
    if separator == ",":
        text = _commas(text)
    cuts = [place for place, letter in _outside(text) if letter == separator and place < len(text)]
    parts = [text[start:end].strip() for start, end in zip([-1, *cuts], [*cuts, len(text)], strict=True) for start in [start + 1]]
    return [part for part in parts if part]


def _both_signs(parts: list[str]) -> list[str]:
    """Write each a ± b of a list as two."""
    return [part.replace("±", sign) for part in parts for sign in ("+-" if "±" in part else "+")]


def _commas(text: str) -> str:
    return _LIST_WORDS.sub(",", text)


def _group(text: str) -> tuple[str, list[str]] | None:
    """Take a text that is one bracket apart; intervals may open and close with different ones."""
    if len(text) < 2 or text[0] not in "([⟨" or text[-1] not in ")]⟩" or any(place < len(text) - 1 for place, _ in _outside(text)):
        return None
    return text[0] + text[-1], _split(text[1:-1], ",")


def _same_in_any_order(ones: list[str], others: list[str]) -> bool:
    if len(ones) != len(others) or len(ones) > 50:
        return False
    left = list(others)
    for one in ones:
        match = next((other for other in left if _as_words(one) == _as_words(other) or _same(one, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_relation(one: tuple[str, str, str], other: tuple[str, str, str]) -> bool:
    sign, left, right = one
    if sign == other[0] and _same(left, other[1]) and _same(right, other[2]):
        return True
    if _FLIPPED.get(sign, sign) == other[0] and sign != "∈" and _same(left, other[2]) and _same(right, other[1]):
        return True
    if sign != "=" or other[0] != "=":
        return False
    try:  # two equations are the same if their differences are proportional: 2x - y = 1 and y = 2x - 1
        differences = [("-", read(sides[1]), read(sides[2])) for sides in (one, other)]
        ratios = [complex(value(differences[0], point)) / complex(value(differences[1], point)) for point in range(MAX_POINTS)]
    except (ValueError, ArithmeticError):
        return False
    unknown = names(differences[0])
    return bool(unknown) and unknown == names(differences[1]) and all(_near(ratio, ratios[0]) for ratio in ratios)


def _same_quantity(one: str, other: str) -> bool:
    try:
        pairs = [(left, right) for left in _readings(one) for right in _readings(other)]
        return any(_same_reading(left, right) for left, right in pairs)
    except (ValueError, ArithmeticError):
        return False


def _same_reading(one: _Quantity, other: _Quantity) -> bool:
    if one.unit and other.unit and one.unit != other.unit:
        return False
    if _same_value(one.tree, other.tree):
        return True
    # "50%" for "0.5": whoever leaves the sign out may mean either
    hundredths = [("%", quantity.tree) if quantity.unit == "%" else quantity.tree for quantity in (one, other)]
    return "%" in (one.unit, other.unit) and _same_value(hundredths[0], hundredths[1])


_UNIT = re.compile(r"(?:(?<=[\d)}!])|\s)\s*([^\W\d_][^\\(){}\[\]=+*]*)$")
_SHORT_UNITS = re.compile(r"[mgshljnwv]|[cmk]m|[mk]g|ml|ft|in|mi|oz|lb|hr|[ap]m|sq|cc|ha|[km]w|[kmg]b|hz|ms", re.IGNORECASE)
_LONG_UNIT = re.compile(r"[^\W\d_]{3}|[^\x00-\x7f]")
_BASE = re.compile(r"^([0-9A-F]+)_\{?(\d+)\}?$")
_MIXED = re.compile(r"^(-?)(\d+) (\d+)/(\d+)$")
_KNOWN = re.compile(r"\\?(?:pi|sqrt|sin|cos|tan|cot|sec|csc|ln|log|exp|frac|infty)\b")


def _readings(text: str) -> Iterator[_Quantity]:
    """Yield what an expression may mean: "5 cm" is five centimetres, or 5 * c * m.

    Raises:
        NotRead: nothing.
    """
    based, mixed = _BASE.match(text), _MIXED.match(text)
    if based and based[1].isdigit():
        yield _Quantity(read(based[1]), f"base {based[2]}")
        return
    if mixed and int(mixed[3]) < int(mixed[4]):
        text = f"{mixed[1]}({mixed[2]}+{mixed[3]}/{mixed[4]})"
    if text.endswith("%"):
        yield _Quantity(read(text[:-1]), "%")
        return
    with suppress(NotRead):
        yield _Quantity(_readable(text), "")
    unit = _UNIT.search(text)
    if unit and not _KNOWN.search(unit[1]) and (_LONG_UNIT.search(unit[1]) or _SHORT_UNITS.fullmatch(unit[1].split("^")[0])):
        with suppress(NotRead):
            yield _Quantity(_readable(text[: unit.start()].strip()), _singular(unit[1]))


def _readable(text: str) -> Tree:
    tail = text.replace(" ", "")
    if tail in ("∞", "+∞", "-∞"):
        return ("name", tail.lstrip("+"))
    return read(text)


def _singular(unit: str) -> str:
    unit = unit.strip().casefold()
    return unit[:-1] if len(unit) > 3 and unit.endswith("s") else unit


def _same_value(one: Tree, other: Tree) -> bool:
    if names(one) != names(other) and not (names(one) and names(other)):
        return False
    signs = (1, -1) if has_two_signs(one) or has_two_signs(other) else (1,)
    try:
        pairs = [
            ([value(one, point, sign) for sign in signs], [value(other, point, sign) for sign in signs])
            for point in range(MAX_POINTS if names(one) or names(other) else 1)
        ]
    except (ArithmeticError, ValueError):
        return one == other
    return all(all(map(_near, ours, theirs)) or all(map(_near, ours, reversed(theirs))) for ours, theirs in pairs)


def _near(one: Number, other: Number) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    return cmath.isclose(complex(one), complex(other), rel_tol=1e-9, abs_tol=1e-12)
