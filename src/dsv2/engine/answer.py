"""One answer of a request while it is written: its sampler, its text, and what was recorded on the way."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class PromptRecord:
    """What is recorded of a request's prompt, once for all its answers.

    Args:
        logprobs: of the tokens behind the first scored row.
        experts: [layer, chosen] of each token.
    """

    logprobs: list[TokenLogprob] = field(default_factory=list)
    experts: list[NDArray[np.integer[Any]]] = field(default_factory=list)


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
        prompt: what is recorded of the prompt, shared by the request's answers.
    """

    __slots__ = (
        "drafts",
        "experts",
        "first_scored",
        "index",
        "lookup",
        "num_new",
        "prompt",
        "request",
        "sampler",
        "seq",
        "speculate",
        "text",
    )

    def __init__(
        self, request: Request, index: int, seq: Sequence, tokenizer: Tokenizer, *, seed: int, grammar: Grammar | None, speculate: bool,
        prompt: PromptRecord,
    ) -> None:  # fmt: skip
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
        self.text = TextStream(
            tokenizer.stream(), params.stop, include_stop=params.include_stop, min_tokens=params.min_tokens, regex=params.stop_regex
        )
        self.num_new = 0
        self.speculate = speculate
        self.lookup: PromptLookup | None = None  # made for the first draft: most waiting answers, and all of large batches, have none
        self.drafts = DraftLength()
        self.first_scored = max(params.prompt_logprobs_from, 1) - 1  # the row of position p tells of token p + 1
        self.prompt = prompt
        self.experts: list[NDArray[np.integer[Any]]] = []  # [layer, chosen] of each token behind the prompt

    def take(self, drawn: Drawn, drafted: int) -> Output:
        """Add what was drawn; return what the answer gained, and whether and why it ends.

        Args:
            drawn: tokens, perhaps with an error instead.
            drafted: draft tokens that were verified.
        """
        if drafted:
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

    def record_experts(self, start: int, chosen: list[NDArray[np.integer[Any]]]) -> None:
        """Keep the chosen experts, [layer, chosen] each, of the tokens from position ``start`` on."""
        length = len(self.request.tokens)
        of_prompt = max(0, min(len(chosen), length - start))
        self.prompt.experts[start : start + of_prompt] = chosen[:of_prompt]
        if of_prompt < len(chosen):
            self.experts[start + of_prompt - length :] = chosen[of_prompt:]  # what stood there was of a draft, or before a preemption

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
        if not self.speculate:
            return ()
        if self.lookup is None:
            self.lookup = PromptLookup(self.seq.tokens)
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
            prompt_logprobs=tuple(self.prompt.logprobs) if reason is not None and params.prompt_logprobs is not None else None,
            cached_tokens=self.seq.num_hit,
            experts=self._read_experts() if reason is not None and self.request.record_experts else None,
            error=error,
        )

    def _read_experts(self) -> NDArray[np.integer[Any]] | None:
        """Return the experts of all tokens but the last, which nobody read; behind them may stand those of drafts that were not taken."""
        experts = [*self.prompt.experts, *self.experts][: len(self.request.tokens) + max(self.num_new, 1) - 1]
        return np.stack(experts) if experts else None


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
