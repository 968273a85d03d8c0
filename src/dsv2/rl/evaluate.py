"""How well a policy answers held-out prompts: the mean reward, and how likely one of k answers is right."""

from collections.abc import Sequence
from math import comb

from dsv2.engine.llm import LLM
from dsv2.rl.reward import Rewards
from dsv2.rl.rollout import Example, draw
from dsv2.rl.tools import Tool


def evaluate(
    llm: LLM, examples: Sequence[Example], rewards: Rewards, *, samples: int, max_tokens: int, seed: str, tool: Tool | None = None
) -> dict[str, float]:
    """Answer every example ``samples`` times at temperature 1 and score the answers.

    Returns:
        reward: the mean. Where a part of the reward is 0 or 1 for every answer, ``NAME/pass@1`` and ``NAME/pass@k``, k = ``samples``:
        without bias, over the examples (Chen et al. 2021, eq 1).
    """
    rollouts = draw(llm, examples, group_size=samples, max_tokens=max_tokens, seed=seed, tool=tool)
    scores = rewards.score(rollouts)
    known = [reward for reward in scores.total if reward is not None]
    found = {"reward": sum(known) / max(1, len(known)), "mean_length": sum(len(r.tokens) for r in rollouts) / len(rollouts)}
    for name, values in scores.parts.items():
        if any(value not in (0.0, 1.0) for value in values):
            continue
        right = [sum(value == 1.0 for value in values[i : i + samples]) for i in range(0, len(values), samples)]
        for k in dict.fromkeys((1, samples)):
            found[f"{name}/pass@{k}"] = sum(pass_at(k, samples, count) for count in right) / len(right)
    return found


def pass_at(k: int, drawn: int, right: int) -> float:
    """Return the chance that at least one of ``k`` of the drawn answers is right."""
    return 1.0 - comb(drawn - right, k) / comb(drawn, k)
