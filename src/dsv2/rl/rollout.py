"""Rollouts: what the policy wrote to a prompt, token for token, with the log-probabilities that it wrote them at.

Sampling is at temperature 1 from the whole vocabulary, so that the behaviour policy is the policy. What a rollout holds is what the engine
drew: nothing is ever encoded again. Seeds are functions of run, step and place, so a resumed run draws the same rollouts.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Integer

from dsv2.engine.llm import LLM
from dsv2.engine.request import Output, SamplingParams
from dsv2.errors import DataError
from dsv2.rl.tools import Tool
from dsv2.tokenizer.chat import content_of, render, stop_ids

Example = Mapping[str, Any]  # "messages" (the conversation to answer), and what a reward wants: "answer", "tests", ...


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One answer to one prompt.

    Args:
        prompt_tokens: the prompt as it was given.
        tokens: what followed, the end token included.
        logprobs: of each of them when it was drawn, natural logarithm; 0 where a tool wrote it.
        mask: whether the policy wrote it (True) or a tool did.
        text: of ``tokens``, without the end token: the answer's content, as a conversation holds it.
        finish_reason: "stop" or "length".
        group: number of the prompt within its step.
        index: number of the answer within its group.
        example: that the prompt is of.
        experts: [prompt + tokens - 1, MoE layers, chosen] routed experts of every token that was read; None: not recorded.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    mask: tuple[bool, ...]
    text: str
    finish_reason: str
    group: int
    index: int
    example: Example
    experts: Integer[np.ndarray, "read layers chosen"] | None = field(default=None, repr=False)

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut before it ended."""
        return self.finish_reason != "stop"

    def as_dict(self) -> dict[str, Any]:
        """Return what rollouts.jsonl holds of it."""
        return {
            "group": self.group, "index": self.index, "prompt": self.example["messages"], "text": self.text, "num_tokens": len(self.tokens),
            "finish_reason": self.finish_reason, "example": {name: value for name, value in self.example.items() if name != "messages"},
        }  # fmt: skip


def draw(
    llm: LLM,
    examples: Sequence[Example],
    *,
    group_size: int,
    max_tokens: int,
    seed: str,
    record_experts: bool = False,
    tool: Tool | None = None,
    first_group: int = 0,
) -> list[Rollout]:
    """Let the policy answer each example ``group_size`` times; groups one after the other.

    Args:
        llm: the policy's engine.
        examples: prompts.
        group_size: G.
        max_tokens: longest answer.
        seed: of all draws, together with the place of each.
        record_experts: keep the routed experts, for replay.
        tool: that the policy may call; None: none.
        first_group: number of the first example's group.

    Raises:
        DataError: a prompt is malformed, or leaves no room for an answer.
    """
    ends = stop_ids(llm.tokenizer)
    unfinished = []
    for group, example in enumerate(examples, first_group):
        tokens = tuple(render(llm.tokenizer, example["messages"], add_generation_prompt=True).tokens)
        if len(tokens) + max_tokens > llm.engine.max_len:
            raise DataError(
                f"the prompt {str(example['messages'])[:60]!r} takes {len(tokens)} tokens; with rollout.max_tokens = {max_tokens} that is "
                f"beyond run.seq_len = {llm.engine.max_len}",
                hint="raise run.seq_len, lower rollout.max_tokens, or leave long prompts out",
            )
        unfinished += [_Draft(tokens, example, group, index) for index in range(group_size)]
    drafts = list(unfinished)
    turn = 0
    while unfinished:
        params = [
            SamplingParams(
                max_tokens=max_tokens - len(draft.tokens), seed=_seed(seed, draft.group, draft.index, turn), logprobs=0,
                stop_token_ids=ends, stop=() if tool is None else tool.stops, include_stop=tool is not None,
            )
            for draft in unfinished
        ]  # fmt: skip
        prompts = [(*draft.prompt, *draft.tokens) for draft in unfinished]
        for draft, output in zip(unfinished, llm.generate(prompts, params, record_experts=record_experts), strict=True):
            draft.add(output, ends, max_tokens, tool, llm)
        unfinished = [draft for draft in unfinished if draft.finish_reason is None]
        turn += 1
    return [draft.finished(llm) for draft in drafts]


class _Draft:
    """A rollout while it is written: turns of the policy and of its tool."""

    def __init__(self, prompt: tuple[int, ...], example: Example, group: int, index: int) -> None:
        self.prompt, self.example, self.group, self.index = prompt, example, group, index
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.mask: list[bool] = []
        self.finish_reason: str | None = None
        self.experts: Integer[np.ndarray, "read layers chosen"] | None = None

    def add(self, output: Output, ends: Sequence[int], max_tokens: int, tool: Tool | None, llm: LLM) -> None:
        """Take a turn of the policy; let the tool answer if it was called."""
        assert output.logprobs is not None
        self.tokens += output.tokens
        self.logprobs += [entry.logprob for entry in output.logprobs]
        self.mask += [True] * len(output.tokens)
        self.experts = output.experts
        if output.finish_reason != "stop" or tool is None or self.tokens[-1] in ends:
            self.finish_reason = output.finish_reason or "length"
            return
        # the text ended in one of the tool's marks: what the tool says is forced, and no token of it was the policy's choice
        forced = llm.tokenizer.encode(tool.answer(llm.tokenizer.decode(self.tokens)), add_bos=False)
        if len(self.tokens) + len(forced) >= max_tokens:
            self.finish_reason = "length"
            return
        self.tokens += forced
        self.logprobs += [0.0] * len(forced)
        self.mask += [False] * len(forced)

    def finished(self, llm: LLM) -> Rollout:
        """Return it."""
        written = self.tokens[:-1] if self.finish_reason == "stop" else self.tokens
        return Rollout(
            self.prompt, tuple(self.tokens), tuple(self.logprobs), tuple(self.mask),
            content_of(llm.tokenizer.template, llm.tokenizer.decode(written)),
            self.finish_reason or "length", self.group, self.index, self.example, self.experts,
        )  # fmt: skip


def _seed(seed: str, group: int, index: int, turn: int) -> int:
    """Return 63 bits that belong to a draw alone."""
    digest = hashlib.blake2b(f"{seed} {group} {index} {turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
