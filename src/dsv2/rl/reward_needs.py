"""What the rewards of a run stand on, looked at before it starts: who names them, by what hashes they are known, what they judge by."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.config import Section
from dsv2.errors import ConfigError, DataError
from dsv2.progress import say
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.reward import Part, Rewards
from dsv2.rl.reward_file import file_hash
from dsv2.rl.reward_kinds import RewardSection, open_rewards
from dsv2.rl.reward_scale import Scale
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.start import start_hash


class GivenReward(Section):
    """What a run keeps of a reward that no recipe names: all but its function."""

    weight: float
    only_with: str
    shuffled: bool
    of_steps: bool
    scale: Scale


def rewards_of(recipe: GrpoRecipe, tokenizer: Tokenizer, given: Rewards | None) -> Rewards:
    """Return the rewards of a run: those that its recipe names, or those that it is given.

    Raises:
        ConfigError: both, or neither; else as ``open_rewards``.
    """
    if given is None:
        return open_rewards(recipe.reward, tokenizer, recipe.run.seq_len)
    if recipe.reward:
        named = ", ".join(section.shown_as for section in recipe.reward)
        raise ConfigError(
            f"the recipe names rewards ({named}), and others are given: {', '.join(given.labels)}",
            hint="leave them out of the recipe, as the override reward=[] does",
        )
    return given


def given_sections(given: Rewards | None) -> dict[str, Section]:
    """Return what a run goes on with of rewards that it is given, by name: a recipe that states its rewards needs none of it."""
    return {
        f"rewards.{part.label}": GivenReward(
            weight=part.weight, only_with=part.only_with, shuffled=part.shuffled, of_steps=part.of_steps, scale=part.scale
        )
        for part in (given.parts if given else ())
    }


def judges_of(sections: Sequence[RewardSection]) -> dict[str, str]:
    """Return what identifies what judges the answers of a run: hashes of its reward models and of your own files, by their paths.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: there is no such file.
    """
    folders = dict.fromkeys(section.folder for section in sections if section.folder)
    files = dict.fromkeys(section.file for section in sections if section.file)
    return {folder: start_hash(latest_checkpoint(folder)) for folder in folders} | {file: file_hash(file) for file in files}


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
