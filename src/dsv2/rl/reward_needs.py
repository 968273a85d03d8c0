"""What the rewards of a recipe stand on, looked at before a run starts: reward models by their hashes, what prompts must have."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import DataError
from dsv2.rl.reward import RewardSection, tests_of
from dsv2.train.start import start_hash


def reward_models(sections: Sequence[RewardSection]) -> dict[str, str]:
    """Return what identifies the weights of each reward model that a recipe names, by its folder.

    Raises:
        CheckpointError: there is none.
    """
    folders = dict.fromkeys(section.folder for section in sections if section.name == "model")
    return {folder: start_hash(latest_checkpoint(folder)) for folder in folders}


def require_wanted(sections: Sequence[RewardSection], examples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse prompts that lack what a paid reward judges by: their rollouts would never have a score.

    Args:
        sections: of the recipe.
        examples: the prompts.

    Raises:
        DataError: some lack it.
    """
    for section in sections:
        check = _WANTED.get(section.name)
        if check is None or not section.weight:
            continue
        lacking = [(example, problem) for example in examples if (problem := check(example))]
        if lacking:
            example, problem = lacking[0]
            raise DataError(
                f"the reward {section.shown_as!r} cannot judge {len(lacking):,} of {len(examples):,} prompts: {problem}; the first is "
                f"{str(example.get('messages'))[:80]}",
                hint="complete or leave out these rows, or set the weight of that reward to 0",
            )


def _lacks_answer(example: Mapping[str, Any]) -> str:
    return "" if example.get("answer") is not None else 'it has no "answer"'


def _lacks_tests(example: Mapping[str, Any]) -> str:
    try:
        tests_of(example)
    except DataError as error:
        return error.message
    return ""


_WANTED = {"answer": _lacks_answer, "steps": _lacks_answer, "code": _lacks_tests}  # what is wrong with a prompt; "" if nothing is
