"""What happens to text before the merges: DeepSeek's pre-tokeniser and the byte alphabet (section 4.4 of the specification).

The pre-tokeniser is a chain of isolating splits, each applied to the pieces that the one before it left. Merges never cross a piece,
so newlines and digits stay alone, a leading blank belongs to the word or the punctuation after it, and never to Han or digits.
"""

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from dsv2.errors import DataError

# Cased letters: Lu, Ll and Lt of Unicode 14 less Armenian, modern Georgian, mathematical alphabets and others that the released file
# leaves out (2,729 code points). Written out because unicodedata changes with the version of Python, and a vocabulary must not.
CASED_LETTERS = (
    "0041-005A 0061-007A 00B5 00C0-00D6 00D8-00F6 00F8-01BA 01BC-01BF 01C4-0293 0295-02AF 0370-0373 0376-0377 037B-037D 037F "
    "0386 0388-038A 038C 038E-03A1 03A3-03F5 03F7-0481 048A-052F 0531-0556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF "
    "1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D "
    "2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
# The second range holds the ASCII letters too; the step before has already taken them.
PUNCTUATION = "0021-002F 003A-007E 2018-201F 3000-3002 FF01-FF0F FF1A-FF5E"
# Han, kana, Hangul and every other script from U+0800 up.
UNCASED_SCRIPTS = "0800-9FA5 AC00-D7FF"


def code_points(ranges: str) -> frozenset[int]:
    """Return the code points of space-separated hexadecimal ranges such as ``"0041-005A 00B5"``."""
    found: set[int] = set()
    for item in ranges.split():
        first, _, last = item.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


def _character_class(ranges: str) -> str:
    # Literal characters, as in the released files: readers of tokenizer.json in other languages have other escapes. "[" and "]" occur
    # only inside ranges, never as their ends.
    return "".join("-".join(chr(int(end, 16)) for end in item.split("-")) for item in ranges.split())


def deepseek_pre_tokenizer() -> PreTokenizer:
    r"""Build the pre-tokeniser of the DeepSeek-V2 family as the ``tokenizers`` library runs it.

    ``\s`` and ``$`` are those of the library's regular expressions (Unicode blanks; newlines are alone by then), which no Python
    module reproduces exactly.
    """
    patterns = (
        "[\r\n]",
        rf"\s?[{_character_class(CASED_LETTERS)}]+",
        rf"\s?[{_character_class(PUNCTUATION)}]+",
        r"\s+$",
        f"[{_character_class(UNCASED_SCRIPTS)}]+",
    )
    splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*splits, Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_characters() -> dict[int, str]:
    """Return the character that stands for each of the 256 bytes in the vocabulary (GPT-2's table).

    Printable Latin-1 bytes stand for themselves, the others take the characters from U+0100 up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}


def base_alphabet() -> list[str]:
    """Return the 243 base symbols: one for each byte that occurs in UTF-8 (C0, C1 and F5 to FF never do)."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    return sorted(character for byte, character in byte_characters().items() if byte not in never)


def require_unicode(text: object, what: str) -> None:
    """Refuse text that has no UTF-8 form.

    Args:
        text: what should be a Python string.
        what: names the text in the message, such as "document 7".

    Raises:
        DataError: ``text`` is not a string, or it holds a lone surrogate (U+D800 to U+DFFF), which a broken decoder or ``json`` leaves
            behind; the message gives its offset in characters.
    """
    if not isinstance(text, str):
        raise DataError(f"{what} is of type {type(text).__name__}, expected text (str)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: it has no UTF-8 form",
            hint="decode the source as UTF-8 (or UTF-16 with its pairs), or replace the character",
        ) from None
