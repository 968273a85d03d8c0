"""Fill-in-the-middle beside conversations, so that fine-tuning does not unlearn it (Coder-V2 report, 3.1.2 and 3.5).

The documents are files of code, or the fenced code of the answers themselves. Each is cut and told as in pre-training (``data/fim.py``);
here only the middle and the EOS after it are to be learnt, as ``tokenizer/chat.py: render_fim`` says.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsv2.data.conversation_rows import Samples
from dsv2.data.conversations import Conversation
from dsv2.data.fim import cut
from dsv2.data.order import permute
from dsv2.data.recipe import FimRules
from dsv2.data.rows import ReadingReport
from dsv2.errors import ConfigError
from dsv2.tokenizer.chat import render_fim
from dsv2.tokenizer.tokenizer import Tokenizer

_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FEWEST_LINES = 3  # of a fenced block that counts as a document


def fenced_code(conversations: Iterable[Conversation]) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of each block of code that an assistant wrote between fences."""
    for conversation in conversations:
        for message in conversation.messages:
            if message["role"] == "assistant":
                for block in _FENCED.findall(message.get("content") or ""):
                    if block.count("\n") >= _FEWEST_LINES:
                        yield conversation.place, block


@dataclass(frozen=True, slots=True)
class FimCounts:
    """What became of the documents that were looked at: ``used`` are samples now, ``too_long`` are longer than a row."""

    used: int
    too_long: int


def add_fim(
    samples: Samples, documents: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, share: float, seq_len: int, seed: int
) -> FimCounts:
    """Append as many documents, cut in three, as make ``share`` of all samples; each is used once.

    They are taken from all files, in an order that the seed decides. One that is longer than a row is passed over and counted.

    Args:
        samples: the conversations; the documents follow them.
        documents: (place, text) of each.
        tokenizer: has the FIM markers.
        share: of all samples, below 1.
        seq_len: places of a row.
        seed: of the order and of the cuts.

    Raises:
        ConfigError: there are too few documents, or the tokenizer has no FIM markers.
    """
    before = len(samples)
    wanted = round(before * share / (1 - share))
    rules, long = FimRules(rate=1.0, seed=seed), ReadingReport()
    numbers = np.arange(len(documents), dtype=np.uint64)
    for number in permute(numbers, np.zeros_like(numbers), size=len(documents), seed=seed).tolist():
        if len(samples) - before == wanted:
            break
        place, text = documents[number]
        parts = cut(text, rules)
        assert parts is not None  # the rate is 1
        prefix, middle, suffix = parts
        samples.add(render_fim(tokenizer, prefix, suffix, middle), place, seq_len, "refuse", long)
    counts = FimCounts(len(samples) - before, long.refused.total())
    if counts.used < wanted:
        raise ConfigError(
            f"data.fim_share = {share:g} of {before + wanted:,} samples takes {wanted:,} documents that fit into a row; "
            f"{counts.used:,} do, {counts.too_long:,} are longer than {seq_len} tokens",
            hint="give files of code with --fim-documents, or lower data.fim_share",
        )
    return counts
