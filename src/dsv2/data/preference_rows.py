"""Judged answers as packed rows: the answers of one comparison side by side in one row, none of which sees another.

    row    <bos> U a A b <eos> | <bos> U a A c <eos> | . .      labels  - - - b <eos> - | - - - c <eos> - | - -
           document_ids  4 4 4 4 4 4 5 5 5 5 5 5 -1 -1          positions  0 1 2 3 4 5 0 1 2 3 4 5 0 1

A document is a whole answered conversation, its end token included: a reward is read off the last place. Its number is its answer's in the
whole data, so that a loss can look up what is known of it (its score, the reference's log-probability); of a comparison the better
answer comes first. Labels are the answer's own tokens, as ``tokenizer/chat.py`` masks them: what a policy is trained on.
"""

import hashlib
import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float64, Int32

from dsv2.data.conversation_rows import TooLong, best_fit, render_row
from dsv2.data.packing import IGNORE, PackedRow
from dsv2.data.preferences import Answer, Preference
from dsv2.data.rows import ReadingReport, Refused
from dsv2.tokenizer.chat import Template
from dsv2.tokenizer.tokenizer import Tokenizer

PADDING = -1  # document id of the places that stay empty


@dataclass(slots=True)
class JudgedAnswers:
    """Rendered answers, those of one preference next to each other; grows by ``add``.

    Attributes:
        tokens: ids of each answered conversation, end token included.
        learn: whether each token is the answer's own.
        scores: of single answers; of a pair 1 and 0.
        groups: first and number of the answers of each preference.
        cut: answers whose conversation lost its beginning because it, or that of the answer beside it, was too long.
    """

    tokens: list[Int32[np.ndarray, "tokens"]] = field(default_factory=list)
    learn: list[Bool[np.ndarray, "tokens"]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)
    cut: int = 0

    def add(self, preference: Preference, tokenizer: Tokenizer, *, template: Template | None, longest: int, too_long: TooLong) -> None:
        """Append a preference.

        Args:
            preference: of one or two answers.
            tokenizer: of the model.
            template: None: the tokenizer's own.
            longest: tokens of the longest conversation that is taken.
            too_long: what becomes of a longer one: refused, or it loses the beginning of its prompt.

        Raises:
            Refused: it cannot be rendered, or is too long.
            ConfigError: the template does not fit the tokenizer.
        """
        rendered = [render_answer(answer, tokenizer, template) for answer in preference.answers]
        beyond = max(len(tokens) for tokens, _ in rendered) - longest
        if beyond > 0:
            if too_long == "refuse":
                raise Refused(f"a conversation is longer than {longest} tokens")
            if any(len(learn) > longest and 2 * (len(learn) - int(learn.argmax())) > longest for _, learn in rendered):
                raise Refused(f"an answer is longer than {longest // 2} tokens")
            # All answers lose the same part of their prompt: two that are compared answer one question.
            kept = [np.delete(np.arange(len(tokens)), slice(1, 1 + beyond)) for tokens, _ in rendered]  # BOS stays
            rendered = [(tokens[places], learn[places]) for (tokens, learn), places in zip(rendered, kept, strict=True)]
            self.cut += len(rendered)
        self.groups.append((len(self.tokens), len(rendered)))
        for tokens, learn in rendered:
            self.tokens.append(tokens)
            self.learn.append(learn)
        self.scores += [1.0, 0.0] if preference.score is None else [preference.score]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """Hash of all answers and scores: equal fingerprints are equal data."""
        digest = hashlib.sha256(repr((self.scores, self.groups)).encode())
        for tokens, learn in zip(self.tokens, self.learn, strict=True):
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + learn.tobytes())
        return digest.hexdigest()

    @property
    def targets(self) -> Float64[np.ndarray, "answers"]:
        """The scores by answer number."""
        return np.array(self.scores)


def render_answer(
    answer: Answer, tokenizer: Tokenizer, template: Template | None
) -> tuple[Int32[np.ndarray, "tokens"], Bool[np.ndarray, "tokens"]]:
    """Return the ids of an answered conversation, and which of them are the answer's own.

    Raises:
        Refused: a message cannot be rendered, or there are tools and the template has no words for them.
        ConfigError: the template does not fit the tokenizer.
    """
    whole = render_row(tokenizer, [*answer.prompt, *answer.messages], template=template, tools=answer.tools)
    before = render_row(tokenizer, answer.prompt, template=template, tools=answer.tools, add_generation_prompt=True).tokens
    learn = np.array(whole.loss_mask, dtype=bool)
    learn[: len(os.path.commonprefix([before, whole.tokens]))] = False  # what the assistant said earlier in the conversation
    return np.array(whole.tokens, dtype=np.int32), learn


def render_preferences(
    preferences: Sequence[Preference],
    tokenizer: Tokenizer,
    *,
    template: Template | None,
    seq_len: int,
    too_long: TooLong,
    report: ReadingReport,
) -> JudgedAnswers:
    """Render preferences in order; what cannot be rendered or does not fit is refused in ``report``.

    A pair has the two halves of a row, a single answer all of it. There may be none left.

    Raises:
        ConfigError: the template does not fit the tokenizer.
    """
    judged = JudgedAnswers()
    for preference in preferences:
        longest = seq_len // len(preference.answers)
        try:
            judged.add(preference, tokenizer, template=template, longest=longest, too_long=too_long)
        except Refused as reason:
            report.refuse(str(reason), preference.place)
    return judged


class PreferenceRows:
    """Preferences packed into rows of ``seq_len`` places; any row is made when it is asked for.

    Args:
        answers: at least one; no preference longer than a row.
        seq_len: T, places in a row.
        pad_id: token of the places that stay empty, each row's last.

    Raises:
        ConfigError: a preference does not fit.
    """

    def __init__(self, answers: JudgedAnswers, seq_len: int, *, pad_id: int) -> None:
        self.answers, self.seq_len, self._pad_id = answers, seq_len, pad_id
        lengths = [sum(len(answers.tokens[first + n]) for n in range(number)) for first, number in answers.groups]
        self._rows = best_fit(lengths, seq_len)
        self.filled = sum(lengths) / (len(self._rows) * seq_len)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> PackedRow:
        """Return row ``index``.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        tokens = np.full(self.seq_len, self._pad_id, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE, dtype=np.int64)
        positions = np.zeros(self.seq_len, dtype=np.int64)
        document_ids = np.full(self.seq_len, PADDING, dtype=np.int64)
        start = 0
        for first, number in (self.answers.groups[group] for group in self._rows[index]):
            for answer in range(first, first + number):
                ids, learn = self.answers.tokens[answer], self.answers.learn[answer]
                end = start + len(ids)
                tokens[start:end] = ids
                labels[start : end - 1] = np.where(learn[1:], ids[1:], IGNORE)
                positions[start:end] = np.arange(len(ids))
                document_ids[start:end] = answer
                start = end
        positions[start:] = np.arange(self.seq_len - start)
        return PackedRow(tokens=tokens, labels=labels, positions=positions, document_ids=document_ids)
