"""What the rewards of a run stand on, looked at before it starts: reward models by their hashes, what prompts and the machine must have."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import DataError
from dsv2.progress import say
from dsv2.rl.reward import Part, Rewards
from dsv2.rl.reward_kinds import RewardSection
from dsv2.train.start import start_hash


def reward_models(sections: Sequence[RewardSection]) -> dict[str, str]:
    """Return what identifies the weights of each reward model that a recipe names, by its folder.

    Raises:
        CheckpointError: there is none.
    """
    folders = dict.fromkeys(section.folder for section in sections if section.name == "model")
    return {folder: start_hash(latest_checkpoint(folder)) for folder in folders}


def require_judges(rewards: Rewards, examples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse prompts whose rollouts nothing would judge, and a machine that cannot judge the others.

    Where rewards are paid that judge by something of a prompt, such as its answer or its tests, each prompt must have what one of them
    judges by: a format or a length alone says nothing about it. Says of how many prompts such a reward is not asked.

    Args:
        rewards: of the run.
        examples: its prompts.

    Raises:
        DataError: some prompts lack all of it.
        ConfigError: this machine cannot give a reward that some prompt asks for.
    """
    parts = {part.label: part for part in rewards.parts}
    missing = {part.label: [_lacks(part, parts, example) for example in examples] for part in rewards.parts}
    judges = [part.label for part in rewards.parts if part.weight and (part.lacks or (part.only_with and parts[part.only_with].lacks))]
    unjudged = [i for i in range(len(examples)) if judges and all(missing[label][i] for label in judges)]
    if unjudged:
        first = unjudged[0]
        problems = "; ".join(dict.fromkeys(missing[label][first] for label in judges))
        raise DataError(
            f"{len(unjudged):,} of {len(examples):,} prompts can be judged by none of the rewards that look at them "
            f"({', '.join(judges)}): {problems}; the first is {str(examples[first].get('messages'))[:80]}",
            hint="complete or leave out these rows, or set the weight of those rewards to 0",
        )
    for label in judges:
        if some := [problem for problem in missing[label] if problem]:
            say(f"reward {label!r}: not asked about {len(some):,} of {len(examples):,} prompts: {some[0]}")
    for part in rewards.parts:
        if part.require and not all(missing[part.label]):
            part.require()


def _lacks(part: Part, parts: Mapping[str, Part], example: Mapping[str, Any]) -> str:
    """Return what a prompt lacks to be judged by a reward, or by the one that this is paid with."""
    both = [part, *([parts[part.only_with]] if part.only_with else [])]
    return next((problem for one in both if one.lacks and (problem := one.lacks(example))), "")
