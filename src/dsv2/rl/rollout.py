"""Rollouts: what the policy wrote to a prompt, token for token, with the log-probabilities that it wrote them at.

Sampling is at temperature 1 from the whole vocabulary, so that the behaviour policy is the policy. What a rollout holds is what the engine
drew: nothing is ever encoded again. Seeds are functions of run, step and place, so a resumed run draws the same rollouts.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import numpy as np
from jaxtyping import Integer

from dsv2.engine.llm import LLM
from dsv2.engine.request import MAX_SAMPLES, Output, SamplingParams
from dsv2.errors import DataError
from dsv2.rl.tools import Tool
from dsv2.tokenizer.chat import content_of, render, stop_ids
from dsv2.tokenizer.tokenizer import Tokenizer

Example = Mapping[str, Any]  # "messages" (to answer), perhaps "tools", and what a reward wants: "answer", "tests", ...


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One answer to one prompt.

    Args:
        prompt_tokens: the prompt as it was given.
        tokens: what followed, the end token included.
        logprobs: of each of them when it was drawn, natural logarithm; 0 where a tool wrote it.
        mask: whether the policy wrote it (True) or a tool did.
        text: of ``tokens``, without the end token: the answer's content, as a conversation holds it.
        text_ends: for each of ``tokens``, how many characters of ``text`` are whole behind it.
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
    text_ends: tuple[int, ...]
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
        """Return what rollouts.jsonl holds of it; the prompt, and what rewards know of it, stand with a group's first answer."""
        example = dict(self.example)
        known = {} if self.index else {"prompt": example.pop("messages"), "example": example}
        return {
            "group": self.group, "index": self.index, **known, "text": self.text, "num_tokens": len(self.tokens),
            "finish_reason": self.finish_reason,
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
    asked: list[list[_Draft]] = []
    for group, example in enumerate(examples, first_group):
        tokens = tuple(render(llm.tokenizer, example["messages"], tools=example.get("tools"), add_generation_prompt=True).tokens)
        if len(tokens) + max_tokens > llm.engine.max_len:
            raise DataError(
                f"the prompt {str(example['messages'])[:60]!r} takes {len(tokens)} tokens; with rollout.max_tokens = {max_tokens} that is "
                f"beyond run.seq_len = {llm.engine.max_len}",
                hint="raise run.seq_len, lower rollout.max_tokens, or leave long prompts out",
            )
        drafts = [_Draft(tokens, example, group, index) for index in range(group_size)]
        # answers of one request: what they have in common is read, and its experts recorded, once
        asked += [drafts[first : first + MAX_SAMPLES] for first in range(0, group_size, MAX_SAMPLES)]
    drawn = list(chain.from_iterable(asked))
    turn = 0
    while asked:
        params = [
            SamplingParams(
                n=len(drafts), max_tokens=max_tokens - len(drafts[0].tokens), seed=_seed(seed, drafts[0].group, drafts[0].index, turn),
                logprobs=0, stop_token_ids=ends, stop_regex="" if tool is None else tool.call,
            )
            for drafts in asked
        ]  # fmt: skip
        outputs = llm.generate([(*drafts[0].prompt, *drafts[0].tokens) for drafts in asked], params, record_experts=record_experts)
        for draft, output in zip(chain.from_iterable(asked), outputs, strict=True):
            draft.add(output, ends, max_tokens, tool, llm)
        asked = [[draft] for draft in chain.from_iterable(asked) if draft.finish_reason is None]  # after a tool, each has its own prompt
        turn += 1
    return [draft.finished(llm) for draft in drawn]


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
        if self.experts is None or output.experts is None:
            self.experts = output.experts
        else:  # what was read before a tool's turn is read again behind it; its tokens were drawn through the experts of the first time
            self.experts = np.concatenate([self.experts, output.experts[len(self.experts) :]])
        if output.finish_reason != "stop" or tool is None or self.tokens[-1] in ends:
            self.finish_reason = output.finish_reason or "length"
            return
        # the text ends in a call: what the tool says is forced, and no token of it was the policy's choice
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
        text, ends = text_with_ends(llm.tokenizer, written)
        content = content_of(llm.tokenizer.template, text)
        ends = tuple(max(0, end - len(text) + len(content)) for end in ends)
        return Rollout(
            self.prompt, tuple(self.tokens), tuple(self.logprobs), tuple(self.mask), content,
            ends if len(written) == len(self.tokens) else (*ends, len(content)),
            self.finish_reason or "length", self.group, self.index, self.example, self.experts,
        )  # fmt: skip


def text_with_ends(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Decode tokens; return the text, and for each token how many characters of it are whole behind that token.

    A character whose bytes are spread over tokens is whole behind the last of them; one that is cut off at the end is whole behind none.
    """
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    return "".join([*pieces, stream.finish()]), tuple(accumulate(map(len, pieces)))


def _seed(seed: str, group: int, index: int, turn: int) -> int:
    """Return 63 bits that belong to a draw alone."""
    digest = hashlib.blake2b(f"{seed} {group} {index} {turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
