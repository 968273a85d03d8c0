"""How well a policy answers held-out prompts: the mean reward, and how likely one of k answers is right."""

from collections.abc import Sequence
from math import comb

from dsv2.engine.llm import LLM
from dsv2.rl.reward import Rewards
from dsv2.rl.rollout import Example, draw
from dsv2.rl.tools import Tool


def evaluate(
    llm: LLM,
    examples: Sequence[Example],
    rewards: Rewards,
    *,
    samples: int,
    max_tokens: int,
    seed: str,
    tool: Tool | None = None,
) -> dict[str, float | None]:
    """Answer every example ``samples`` times at temperature 1 and score the answers.

    Args:
        llm: the policy's engine.
        examples: prompts.
        rewards: that score.
        samples: k, answers to each example.
        max_tokens: longest answer.
        seed: of all draws.
        tool: that the policy may call.

    Returns:
        the same keys whatever the values; None where no answer has a score. ``reward``: the mean of those that are known; ``answers``: how
        many there were; ``unscored``: of these, without a reward, and as ``NAME/unscored`` without that one, where it was
        asked. For each that says right or wrong, ``NAME/pass@1`` and ``NAME/pass@k``: without bias (Chen et al. 2021, eq 1), over the
        examples that have k answers with a score.
    """
    rollouts = draw(llm, examples, group_size=samples, max_tokens=max_tokens, seed=seed, tool=tool)
    scores = rewards.score(rollouts)
    known = [reward for reward in scores.total if reward is not None]
    found: dict[str, float | None] = {
        "reward": _mean(known), "mean_length": _mean([len(rollout.tokens) for rollout in rollouts]),
        "answers": len(rollouts), "unscored": len(rollouts) - len(known),
    }  # fmt: skip
    for part in rewards.parts:
        name, values = part.label, scores.parts[part.label]
        found[f"{name}/unscored"] = scores.unscored(name)
        if not part.right_or_wrong:
            continue
        judged = [[value for value in values[i : i + samples] if value is not None] for i in range(0, len(values), samples)]
        for k in dict.fromkeys((1, samples)):
            found[f"{name}/pass@{k}"] = _mean([pass_at(k, len(own), own.count(1.0)) for own in judged if len(own) >= k])
    return found


def pass_at(k: int, drawn: int, right: int) -> float:
    """Return the chance that at least one of ``k`` of the drawn answers is right."""
    return 1.0 - comb(drawn - right, k) / comb(drawn, k)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
