"""Prompts that no right answer could earn at: found once, before a run begins, and kept with it."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from dsv2.data.order import canonical
from dsv2.errors import DataError
from dsv2.files import atomic_write_json
from dsv2.progress import say
from dsv2.rl.prompts import Prompts
from dsv2.rl.reward import Rewards
from dsv2.rl.rollout import Example

LEFT_OUT = "left-out.json"  # in the run's folder: hash of a prompt's row -> why its own solution is not paid


def without_untestable(prompts: Prompts, rewards: Rewards, out: Path, *, begun: bool, check: bool, max_refused: float) -> Prompts:
    """Return the prompts without those whose own solution a paid reward would not pay.

    A run that goes on leaves out what it left out when it began, whatever solutions do now.

    Args:
        prompts: all of them.
        rewards: of the run.
        out: its folder.
        begun: the run goes on.
        check: run solutions.
        max_refused: share of the prompts that may be left out.

    Raises:
        DataError: more of them would be, or none is left to learn from.
    """
    file = out / LEFT_OUT
    if begun:
        left_out = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return prompts.without(left_out, _key) if left_out else prompts
    file.unlink(missing_ok=True)  # of a start that was killed
    examples = [*prompts.take(0, len(prompts)), *prompts.held_out]
    problems = _problems(rewards, examples) if check else {}
    if not problems:
        return prompts
    reason = next(iter(problems.values()))
    failed = sum(_key(example) in problems for example in examples)
    if failed > max_refused * len(examples):
        raise DataError(
            f"the own solutions of {failed:,} of {len(examples):,} prompts fail, more than task.max_refused = {max_refused:g}: {reason}",
            hint="mend their tests (docs/sandbox.md says which right programs fail), raise task.max_refused, or set "
            "task.check_solutions=false",
        )
    kept = prompts.without(problems, _key)
    atomic_write_json(file, problems)
    return kept


def _problems(rewards: Rewards, examples: Sequence[Example]) -> dict[str, str]:
    """Return why the own solution of a prompt is not paid, by the prompt's key; says what was run, and how fast."""
    found: dict[str, str] = {}
    paid = {label for part in rewards.parts if part.weight for label in (part.label, part.only_with)}
    for part in rewards.parts:
        asked = [example for example in examples if not (part.lacks and part.lacks(example))]
        if part.own_solutions is None or part.label not in paid or not asked:
            continue
        began = time.perf_counter()
        problems = part.own_solutions(asked)
        seconds = time.perf_counter() - began
        known = sum(problem is not None for problem in problems)
        failed = [problem for problem in problems if problem]
        found |= {_key(example): problem for example, problem in zip(asked, problems, strict=True) if problem}
        if known:
            end = f"{len(failed):,} fail and their prompts are left out: {failed[0]}" if failed else "all pass"
            say(f"reward {part.label!r}: own solutions of {known:,} prompts run, {known / seconds:.0f} a second; {end}")
    return found


def _key(example: Example) -> str:
    return hashlib.sha256(canonical(example).encode()).hexdigest()
