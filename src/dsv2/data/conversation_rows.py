"""Conversations as packed rows of training data: whole samples side by side, none of which sees another.

    samples  <bos> U a A b <eos>   and   <bos> U c A d e <eos>        seq_len 12
    row      <bos> U a A b | <bos> U c A d e | .      labels  - - - b <eos> | - - - d e <eos> | -      positions 0 1 2 3 4 0 1 2 3 4 5 0

A sample is a conversation from its first token to the last that the model itself writes: what follows teaches nothing. Its labels are the
assistant's tokens and the tokens that end its turns, as ``tokenizer/chat.py`` says; its last token is a label only, so a sample of n
tokens takes n - 1 places. Each sample is a document of its row: attention stays within it and positions restart.

Rows are filled by best fit: the longest sample first, each into the fullest row that still has room for it.
"""

import bisect
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32

from dsv2.data.conversations import Conversation, Tool
from dsv2.data.packing import IGNORE, PackedRow
from dsv2.data.rows import ReadingReport, Refused
from dsv2.errors import ConfigError, DataError
from dsv2.tokenizer.chat import Rendered, Template, render
from dsv2.tokenizer.tokenizer import Tokenizer

TooLong = Literal["refuse", "cut"]


@dataclass(slots=True)
class Samples:
    """Rendered samples, one after the other in flat arrays; grows by ``add``.

    Attributes:
        tokens: ids of all samples.
        learn: whether each token is the model's own to predict.
        places: where each sample came from.
        cut: samples that lost their end because they were longer than a row.
    """

    tokens: list[Int32[np.ndarray, "tokens"]] = field(default_factory=list)
    learn: list[Bool[np.ndarray, "tokens"]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    cut: int = 0

    def add(self, rendered: Rendered, place: str, seq_len: int, too_long: TooLong, report: ReadingReport) -> None:
        """Append a sample, or refuse it in ``report`` where it is longer than a row.

        Raises:
            DataError: no token of it is the model's own: it would train on nothing and look healthy.
        """
        learn = np.array(rendered.loss_mask, dtype=bool)
        learn[:1] = False  # nothing comes before the first token to predict it from
        if not learn.any():
            raise DataError(
                f"{place}: there is nothing to learn in it, its loss mask is empty",
                hint="a conversation needs a turn of the assistant; leave this row out",
            )
        end = int(np.flatnonzero(learn)[-1]) + 1
        if end - 1 > seq_len:
            if too_long == "refuse":
                report.refuse(f"longer than a row of {seq_len} tokens", place)
                return
            end = seq_len + 1
            if not learn[:end].any():
                report.refuse(f"its first answer begins after a row of {seq_len} tokens", place)
                return
            self.cut += 1
        self.tokens.append(np.array(rendered.tokens[:end], dtype=np.int32))
        self.learn.append(learn[:end])
        self.places.append(place)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_labels(self) -> int:
        """Tokens to learn."""
        return sum(int(learn.sum()) for learn in self.learn)

    @property
    def num_places(self) -> int:
        """Places that the samples take in rows."""
        return sum(len(tokens) - 1 for tokens in self.tokens)

    def label_bytes(self, tokenizer: Tokenizer) -> int:
        """Return the UTF-8 bytes of what is to be learnt; a token that ends a turn counts none."""
        markers = set(tokenizer.special_ids.values())
        learnt = (token for tokens, learn in zip(self.tokens, self.learn, strict=True) for token in tokens[learn].tolist())
        return sum(len(tokenizer.token_bytes(token)) for token in learnt if token not in markers)

    @property
    def fingerprint(self) -> str:
        """Hash of all samples: equal fingerprints are equal data."""
        digest = hashlib.sha256()
        for tokens, learn in zip(self.tokens, self.learn, strict=True):
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + learn.tobytes())
        return digest.hexdigest()


def render_row(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: Template | None = None,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = False,
) -> Rendered:
    """Render what a row of a file holds; arguments as of ``tokenizer.chat.render``.

    Raises:
        Refused: a message cannot be rendered, or there are tools and the template has no words for them.
        ConfigError: the template does not fit the tokenizer.
    """
    if tools and (template or tokenizer.template) == "v2":
        raise Refused("it has tools, which the template v2 cannot write")
    try:
        return render(tokenizer, messages, template=template, tools=tools, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise Refused(error.message) from error


def render_samples(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    *,
    template: Template | None,
    seq_len: int,
    too_long: TooLong,
    report: ReadingReport,
) -> dict[str, Samples]:
    """Render conversations by domain, in order; what cannot be rendered or does not fit is refused in ``report``, and may leave none.

    Args:
        conversations: what to render.
        tokenizer: of the model.
        template: None: the tokenizer's own.
        seq_len: places of a row.
        too_long: what becomes of a conversation that is longer: it is refused, or loses its end.
        report: counts the refused.

    Raises:
        ConfigError: the template does not fit the tokenizer.
        DataError: a conversation has nothing to learn (names its row).
    """
    domains: dict[str, Samples] = {}
    for conversation in conversations:
        try:
            rendered = render_row(tokenizer, conversation.messages, template=template, tools=conversation.tools)
        except Refused as reason:
            report.refuse(str(reason), conversation.place)
            continue
        domains.setdefault(conversation.domain, Samples()).add(rendered, conversation.place, seq_len, too_long, report)
    return {domain: samples for domain, samples in domains.items() if len(samples)}


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which items go into each bin: the longest first, each into the fullest bin with room for it, else into a new one.

    Items of equal length keep their order, so the result depends on nothing else.

    Raises:
        ConfigError: an item is longer than a bin.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the different rooms of bins that are not full, sorted
    by_room: dict[int, list[int]] = {}
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[item] > capacity:
            raise ConfigError(f"an item of length {lengths[item]} does not fit into {capacity}")
        found = bisect.bisect_left(rooms, lengths[item])
        if found == len(rooms):
            bins.append([])
            chosen, room = len(bins) - 1, capacity
        else:
            room = rooms[found]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[found]
        bins[chosen].append(item)
        left = room - lengths[item]
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(chosen)
    return bins


class ConversationRows:
    """Samples packed into rows of ``seq_len`` places; any row is made when it is asked for.

    Args:
        samples: at least one; none longer than a row.
        seq_len: T, places in a row.
        pad_id: token of the places that stay empty, each row's last; they have no label and are a document of their own.

    Raises:
        ConfigError: ``seq_len`` is below 1, or a sample does not fit.
    """

    def __init__(self, samples: Samples, seq_len: int, *, pad_id: int) -> None:
        if seq_len < 1:
            raise ConfigError(f"seq_len = {seq_len}; a row holds at least 1 token")
        self.seq_len = seq_len
        self.samples = samples
        self._pad_id = pad_id
        self._rows = best_fit([len(tokens) - 1 for tokens in samples.tokens], seq_len)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def filled(self) -> float:
        """Share of the places that hold a sample."""
        return self.samples.num_places / (len(self) * self.seq_len)

    def members(self, index: int) -> Sequence[int]:
        """Return which samples lie in row ``index``, in order."""
        return self._rows[index]

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
        document_ids = np.full(self.seq_len, len(self._rows[index]), dtype=np.int64)
        start = 0
        for number, sample in enumerate(self._rows[index]):
            ids, learn = self.samples.tokens[sample], self.samples.learn[sample]
            end = start + len(ids) - 1
            tokens[start:end] = ids[:-1]
            labels[start:end] = np.where(learn[1:], ids[1:], IGNORE)
            positions[start:end] = np.arange(end - start)
            document_ids[start:end] = number
            start = end
        positions[start:] = np.arange(self.seq_len - start)
        return PackedRow(tokens=tokens, labels=labels, positions=positions, document_ids=document_ids)
