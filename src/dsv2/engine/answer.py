"""One answer of a request while it is written: its sampler, its text, and what was recorded on the way."""

from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv2.engine.constrain import Grammar
from dsv2.engine.request import FinishReason, Output, Request, TokenLogprob
from dsv2.engine.sampler import Drawn, NotFinite, SamplerState
from dsv2.engine.sequence import Sequence
from dsv2.engine.speculate import DraftLength, PromptLookup
from dsv2.engine.text import TextStream
from dsv2.errors import CheckpointError
from dsv2.tokenizer.tokenizer import Tokenizer

MOST_DRAFTED = 6  # tokens


class Dropped(CheckpointError):
    """Some requests met logits that are no numbers and are no longer in the engine.

    Args:
        request_ids: theirs.
        failure: what the sampler met.
    """

    def __init__(self, request_ids: Ordered[str], failure: NotFinite) -> None:
        super().__init__(f"request {', '.join(map(repr, request_ids))}: {failure.message}", hint=failure.hint)
        self.request_ids = tuple(request_ids)


class Answer:
    """Number ``index`` of a request's answers.

    Args:
        request: that it answers.
        index: from 0 to n - 1.
        seq: what the scheduler moves.
        tokenizer: the model's.
        seed: of the request.
        grammar: the compiled constraint.
        speculate: whether drafts may be tried.
    """

    __slots__ = ("drafts", "experts", "first_scored", "index", "lookup", "num_new", "prompt_logprobs", "request", "sampler", "seq", "text")

    def __init__(
        self, request: Request, index: int, seq: Sequence, tokenizer: Tokenizer, *, seed: int, grammar: Grammar | None, speculate: bool
    ) -> None:
        params = request.params
        self.request, self.index, self.seq = request, index, seq
        self.sampler = SamplerState(
            params,
            request.tokens,
            seed=seed,
            index=index,
            end_ids=params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, tokenizer.eos_id),
            matcher=None if grammar is None else grammar.matcher(),
        )
        self.text = TextStream(tokenizer.stream(), params.stop, include_stop=params.include_stop, min_tokens=params.min_tokens)
        self.num_new = 0
        self.lookup = PromptLookup(request.tokens) if speculate else None
        self.drafts = DraftLength()
        self.first_scored = max(params.prompt_logprobs_from, 1) - 1  # the row of position p tells of token p + 1
        self.prompt_logprobs: list[TokenLogprob] = []  # from that row on
        self.experts: list[NDArray[np.integer[Any]]] = []  # [layer, chosen] of token p

    def take(self, drawn: Drawn, drafted: int) -> Output:
        """Add what was drawn; return what the answer gained, and whether and why it ends.

        Args:
            drawn: tokens, perhaps with an error instead.
            drafted: draft tokens that were verified.
        """
        if drafted and self.lookup is not None:
            self.drafts.record(drafted, max(0, len(drawn.tokens) - 1))
        if drawn.error is not None:
            return self.output((), self.text.finish(), "error", (), error=drawn.error.message)
        texts: list[str] = []
        reason: FinishReason | None = None
        count = 0
        for token in drawn.tokens:
            count += 1
            self.num_new += 1
            reason = self._add(token, texts)
            if reason is not None:
                break
        if self.lookup is not None:
            self.lookup.extend(drawn.tokens[:count])
        return self.output(drawn.tokens[:count], "".join(texts), reason, (drawn.logprobs or ())[:count])

    def _add(self, token: int, texts: list[str]) -> FinishReason | None:
        if self.sampler.ends(token):
            texts.append(self.text.finish())
            return "stop"
        texts.append(self.text.push(token))
        reason: FinishReason | None = None
        if not self.text.stopped and self.num_new == self.request.params.max_tokens:
            texts.append(self.text.finish())
            reason = "length"
        return "stop" if self.text.stopped else reason

    def draft(self, costs: Ordered[float]) -> tuple[int, ...]:
        """Return the tokens to verify in the next step; none where none are at hand or they would not pay."""
        if self.lookup is None:
            return ()
        proposed = self.lookup.propose(len(costs) - 1)
        return tuple(proposed[: self.drafts.choose(costs)]) if proposed else ()

    def output(
        self, tokens: tuple[int, ...], text: str, reason: FinishReason | None, logprobs: Ordered[TokenLogprob], error: str | None = None
    ) -> Output:
        """Make an output of this answer; what was recorded of the prompt comes with the last one."""
        params = self.request.params
        return Output(
            self.request.request_id,
            tokens,
            text,
            reason,
            None if params.logprobs is None else tuple(logprobs),
            len(self.request.tokens),
            index=self.index,
            prompt_logprobs=tuple(self.prompt_logprobs) if reason is not None and params.prompt_logprobs is not None else None,
            cached_tokens=self.seq.num_hit,
            experts=self._read_experts() if reason is not None and self.request.record_experts and self.experts else None,
            error=error,
        )

    def _read_experts(self) -> NDArray[np.integer[Any]]:
        """Return the experts of all tokens but the last, which nobody read; behind them may stand those of drafts that were not taken."""
        return np.stack(self.experts[: len(self.request.tokens) + max(self.num_new, 1) - 1])


def joined(parts: Ordered[Output]) -> Output:
    """Join the outputs of one answer, in order, into one."""
    last = parts[-1]
    return Output(
        last.request_id,
        tuple(token for part in parts for token in part.tokens),
        "".join(part.text for part in parts),
        last.finish_reason,
        None if last.logprobs is None else tuple(entry for part in parts for entry in part.logprobs or ()),
        last.prompt_tokens,
        index=last.index,
        prompt_logprobs=last.prompt_logprobs,
        cached_tokens=last.cached_tokens,
        experts=last.experts,
        error=last.error,
    )
