"""Fill-in-the-middle beside conversations, so that fine-tuning does not unlearn it (Coder-V2 report, 3.1.2 and 3.5).

The documents are files of code, or the fenced code of the answers themselves. Each is cut and told as in pre-training (``data/fim.py``);
here only the middle and the EOS after it are to be learnt, as ``tokenizer/chat.py: render_fim`` says.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from dsv2.data.conversation_rows import Samples
from dsv2.data.conversations import Conversation, ReadingReport
from dsv2.data.fim import cut
from dsv2.data.recipe import FimRules
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


def add_fim(
    samples: Samples,
    documents: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    share: float,
    seq_len: int,
    seed: int,
    report: ReadingReport,
) -> int:
    """Append as many documents, cut in three, as make ``share`` of all samples; each is used once. Return how many.

    Args:
        samples: the conversations; the documents follow them.
        documents: (place, text) of each.
        tokenizer: has the FIM markers.
        share: of all samples, below 1.
        seq_len: places of a row; longer documents are refused in ``report``.
        seed: of the cuts.
        report: counts the refused.

    Raises:
        ConfigError: there are too few documents, or the tokenizer has no FIM markers.
    """
    before = len(samples)
    wanted = round(before * share / (1 - share))
    rules = FimRules(rate=1.0, seed=seed)
    for place, text in documents:
        if len(samples) - before == wanted:
            break
        parts = cut(text, rules)
        assert parts is not None  # the rate is 1
        prefix, middle, suffix = parts
        samples.add(render_fim(tokenizer, prefix, suffix, middle), place, seq_len, "refuse", report)
    added = len(samples) - before
    if added < wanted:
        raise ConfigError(
            f"data.fim_share = {share:g} of {before + wanted:,} samples takes {wanted:,} documents that fit into a row; {added:,} do",
            hint="give files of code with --fim-documents, or lower data.fim_share",
        )
    return added
