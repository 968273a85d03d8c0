"""Fill-in-the-middle: a document cut in three and told in the order prefix, suffix, middle (PSM), before it is packed.

    BOS <fim_begin> prefix <fim_hole> suffix <fim_end> middle EOS                           (DeepSeek-Coder-V2, 3.1.2)

Whether a document is turned and where it is cut depends on the seed and its text alone: not on its place, its neighbours or the process.
"""

import hashlib

from dsv2.data.recipe import FimRules
from dsv2.tokenizer.chat import render_fim
from dsv2.tokenizer.tokenizer import Tokenizer


def cut(text: str, rules: FimRules) -> tuple[str, str, str] | None:
    """Return prefix, middle and suffix of a document that is to be turned, None for one that stays.

    The two cuts are drawn evenly from all places between characters, so that any of the three may be empty (Bavarian et al. 2022).
    """
    key = hashlib.blake2b(text.encode(), digest_size=24, key=rules.seed.to_bytes(8, "little")).digest()
    chance, first, second = (int.from_bytes(key[at : at + 8], "little") for at in (0, 8, 16))
    if chance >= rules.rate * 2**64:
        return None
    low, high = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    return text[:low], text[low:high], text[high:]


def turned(tokenizer: Tokenizer, text: str, rules: FimRules) -> list[int] | None:
    """Return the ids of a document that is to be turned, with BOS and EOS; None for one that stays.

    Raises:
        ConfigError: the tokenizer has no FIM markers.
    """
    parts = cut(text, rules)
    if parts is None:
        return None
    prefix, middle, suffix = parts
    return list(render_fim(tokenizer, prefix, suffix, middle).tokens)
