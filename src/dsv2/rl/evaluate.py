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
        reward: the mean of those that are known. Where a part of the reward is 0 or 1 for every answer, ``NAME/pass@1`` and
        ``NAME/pass@k``, k = ``samples``: without bias (Chen et al. 2021, eq 1), over the examples that have k answers with a score.
    """
    rollouts = draw(llm, examples, group_size=samples, max_tokens=max_tokens, seed=seed, tool=tool)
    scores = rewards.score(rollouts)
    known = [reward for reward in scores.total if reward is not None]
    found = {"mean_length": sum(len(r.tokens) for r in rollouts) / len(rollouts)}
    if known:
        found = {"reward": sum(known) / len(known), **found}
    for name, values in scores.parts.items():
        if any(value not in (0.0, 1.0, None) for value in values):
            continue
        judged = [[value for value in values[i : i + samples] if value is not None] for i in range(0, len(values), samples)]
        for k in dict.fromkeys((1, samples)):
            chances = [pass_at(k, len(own), own.count(1.0)) for own in judged if len(own) >= k]
            if chances:
                found[f"{name}/pass@{k}"] = sum(chances) / len(chances)
    return found


def pass_at(k: int, drawn: int, right: int) -> float:
    """Return the chance that at least one of ``k`` of the drawn answers is right."""
    return 1.0 - comb(drawn - right, k) / comb(drawn, k)
