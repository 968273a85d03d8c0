"""What is changed in a text: wrong decodings mended, personal data masked. Both are idempotent, and count what they did."""

import ipaddress
import re
from collections import Counter

from dsv2.data.clean import Drop
from dsv2.data.decompress import import_extra
from dsv2.data.recipe import EncodingRules, PersonalRules

# What UTF-8 looks like when it was read as Latin-1 or Windows-1252: a cheap sign, upon which ftfy decides.
MOJIBAKE = re.compile("[\u00c2-\u00f4\u0152\u0153][\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")
CONTROLS = re.compile("[\x00-\x07\x0b\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ufeff]")
LOST = re.compile("[\ufffd\ue000-\uf8ff]|\u951f\u65a4\u62f7")  # the last is U+FFFD twice, read as GBK
MASK = {"email": "[email]", "ip": "[ip]", "phone": "[phone]"}
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?"
_FIND = {
    "email": re.compile(rf"(?<![\w.+%-])[A-Za-z0-9][\w.+%-]{{0,63}}@(?:{_LABEL}\.)+[A-Za-z]{{2,24}}(?![\w-])", re.ASCII),
    "ip": re.compile(
        r"(?<![\w.:-])(?:(?:\d{1,3}\.){3}\d{1,3}"
        r"|(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,6})(?![\w:-]|\.\d)",
        re.ASCII,
    ),
    "phone": re.compile(
        r"(?<![\w.,+=/#-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"  # international
        r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4}"  # North America
        r"|1[3-9]\d(?:[ -]?\d{4}){2}|0\d{2,3}-\d{7,8})(?![\w-]|[.,]\d)",  # China
        re.ASCII,
    ),
}
MIN_PHONE_DIGITS = 10


def mend(text: str, rules: EncodingRules) -> tuple[str, Counter[str], Drop | None]:
    """Mend a wrongly decoded text, or refuse it.

    Returns:
        The text; how many of what was mended; why the text is refused, if it is.

    Raises:
        MissingExtra: there is something to mend and ftfy is not installed.
    """
    done: Counter[str] = Counter()
    if "\r" in text:
        done["line ends"] = 1
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii() and MOJIBAKE.search(text):
        # Line by line: a text that quotes mojibake, or holds some in one place, is sound elsewhere.
        fix = import_extra("ftfy", "mending broken encodings").fix_encoding
        mended = "\n".join(fix(line) if MOJIBAKE.search(line) else line for line in text.split("\n"))
        if mended != text:
            done["mojibake"] = 1
            text = mended
    # Afterwards: half of a letter that was read as Latin-1 is a control character.
    text, removed = CONTROLS.subn("", text)
    if removed:
        done["control characters"] = removed
    lost = sum(map(len, LOST.findall(text)))
    if lost > rules.max_lost_share * len(text):
        return text, done, Drop("encoding.lost", f"{lost} of {len(text)} characters are lost; at most a share of {rules.max_lost_share}")
    return text, done, None


def mask(text: str, rules: PersonalRules) -> tuple[str, Counter[str]]:
    """Replace personal data by its kind in brackets, and count by kind.

    Addresses of machines that are reserved, private or local (127.0.0.1) are nobody's and stay.
    """
    done: Counter[str] = Counter()

    def replace(match: re.Match[str]) -> str:
        if not really[kind](match[0]):
            return match[0]
        done[kind] += 1
        return MASK[kind]

    really = {"email": lambda found: True, "ip": _is_public, "phone": _is_phone}
    before = -1
    while done.total() > before:  # what stood close by was part of no word, number or address only once its neighbour was masked
        before = done.total()
        for kind in rules.kinds:
            if kind != "email" or "@" in text:
                text = _FIND[kind].sub(replace, text)
    return text, done


def _is_public(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _is_phone(found: str) -> bool:
    return sum(character.isdigit() for character in found) >= MIN_PHONE_DIGITS
