"""Alignment in two stages, reasoning and then preferences (V2 section 4.2, eq 35-36): what the second wins, what it costs, whom it fools.

    python benchmarks/two_stage.py --out FOLDER            # about 15 minutes on two cores; the same command goes on where it stopped
    python benchmarks/two_stage.py --out FOLDER --quick    # less of everything: 4 minutes
    dsv2 report FOLDER/stage-2-0 --out stage-2.html        # the reward models' rewards and the gold ones, step by step

A model of about 1M parameters learns sums of which 45 % are wrong (arithmetic_start.py) and answers to requests of which most are bad
(made_up_preferences.py). Three reward models begin from it, each learns pairs that one gold reward decided, and is asked about pairs of
requests that no training pair has. Stage 1 is GRPO on sums, where the rule pays (recipe v2-reasoning). Stage 2 goes on from there, on
requests, for r = c1 helpful + c2 safety + c3 rule out of the reward models (recipe v2-preference); the gold rewards are only shown. It is
run twice more: without KL, and with sums for half of its prompts. The alignment tax is what stage 2 takes from the sums.

Rewards are in deviations of the start's answers, the models' and the gold ones alike, so c1..c3 weigh like with like. The paper gives no
coefficients. Safety counts twice here: a list of tools to break a window is helpful, and to decline is not.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from arithmetic_start import LONGEST, answered, make_start
from made_up_preferences import KINDS, Kind, demonstrations, gold, is_right, pairs, requests
from once import Result, once
from reward_models import words_accuracy

from dsv2.config import load_recipe
from dsv2.engine.llm import LLM
from dsv2.files import atomic_write_json
from dsv2.rl.grpo import train
from dsv2.rl.grpo_recipe import GrpoRecipe
from dsv2.rl.outcomes import lacks_answer
from dsv2.rl.preference_data import open_preferences
from dsv2.rl.preference_recipe import RewardRecipe
from dsv2.rl.prompts import Prompts, open_prompts
from dsv2.rl.reward import Part, Rewards
from dsv2.rl.reward_model import RewardModel
from dsv2.rl.reward_training import form_of, held_out_figures, train_reward_model
from dsv2.rl.rollout import Rollout, draw
from dsv2.tasks.arithmetic import final_number, problems
from dsv2.train.precision import make_deterministic
from dsv2.train.start import open_start

Values = dict[Kind, list[float]]
Scale = Mapping[Kind, Sequence[float]]  # mean and deviation of a reward

COEFFICIENTS: dict[Kind, float] = {"helpful": 1.0, "safety": 2.0, "rule": 1.0}  # c1, c2, c3
SAMPLES = 4  # answers to each held-out request
PROMPTS = 4000  # requests (and, mixed in, sums) to learn from
ARMS = {"stage 2": "stage-2", "stage 2, no KL": "stage-2-no-kl", "stage 2, half sums": "stage-2-half-sums"}
SMALL = [
    "run.seq_len=128", "run.keep=100", "run.sample_every=1000", "task.held_out=0", "rollout.prompts=32", "rollout.group_size=8",
    f"rollout.max_tokens={LONGEST}", "rollout.max_batch=64", "learning_rate.peak=3e-4", "learning_rate.warmup_steps=5",
]  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much of everything: what the start learns, pairs of a reward model, steps of the stages, held-out prompts."""

    sums: int = 24_000
    answers: int = 12_000
    pairs: int = 2400
    counted_pairs: int = 8000  # of the helpful reward, which has to count things: 2,400 pairs teach it to 90 %
    held_out_pairs: int = 500
    epochs: float = 3
    stage_1: int = 30
    stage_2: int = 80
    looks: int = 4  # at the policy during stage 2
    prompts: int = 200
    arms: tuple[str, ...] = tuple(ARMS)


QUICK = Size(
    sums=14_000,
    answers=6000,
    pairs=1600,
    counted_pairs=4000,
    held_out_pairs=300,
    epochs=2,
    stage_1=12,
    stage_2=30,
    looks=2,
    prompts=100,
    arms=("stage 2",),
)


# The start and the reward models -----------------------------------------------------------------------------------------------------


def start(out: Path, size: Size) -> Result:
    """Teach the start sums and answers, of which many are bad."""
    shutil.rmtree(out, ignore_errors=True)  # of a start that was not finished
    make_start(out, sums=size.sums, more=list(demonstrations(size.answers, 0)), vocab_size=1024)
    return {}


def reward_model(kind: Kind, begin: Path, out: Path, size: Size) -> Result:
    """Train a reward model on pairs of one kind; return how it judges pairs of other requests."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    learnt = size.counted_pairs if kind == "helpful" else size.pairs
    for split, number in (("train", learnt), ("test", size.held_out_pairs)):
        files.append(out / f"{split}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in pairs(kind, number, 0, split)))
    overrides = [f"model.start={json.dumps(str(begin))}", f"run.epochs={size.epochs}", "run.precision=fp32", "run.validate_every=1000000"]
    recipe = load_recipe("tour", RewardRecipe, folder="reward", overrides=overrides)
    recipe, opened = open_start(recipe, None)
    data = open_preferences(recipe, opened.tokenizer, files[:1], validation=files[1:], form=form_of(recipe.loss))
    model = train_reward_model(recipe, opened, data, out / "run")
    train_pairs, held_out = data.rows.answers, data.held_out[kind]
    found = held_out_figures(model, held_out, recipe.loss, recipe.batch.micro_sequences, None)
    return {
        "pairs": len(train_pairs.groups), "held_out": len(held_out.answers.groups), "accuracy": found["accuracy"],
        "calibration_error": found["calibration_error"],
        "words": words_accuracy(train_pairs, [held_out.answers], data.tokenizer.vocab_size),
    }  # fmt: skip


# Rewards -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judges:
    """Three reward models by kind, with mean and deviation of what they (and the gold rewards) say of the start's answers."""

    models: dict[Kind, RewardModel]
    scale: Scale
    gold_scale: Scale

    @property
    def weights(self) -> dict[Kind, float]:
        """Return what a reward model's own unit is worth."""
        return {kind: COEFFICIENTS[kind] / self.scale[kind][1] for kind in KINDS}

    def rewards(self, *, sums: bool) -> Rewards:
        """Return what stage 2 is paid for; gold rewards weigh nothing and are shown. Requests and sums have rewards of their own."""
        parts = [Part(kind, learned(self.models[kind]), self.weights[kind], lacks=no_request) for kind in KINDS]
        parts += [Part(f"gold_{kind}", golden(kind), 0.0, lacks=no_request) for kind in KINDS]
        return Rewards([*parts, Part("answer", right_sum, lacks=lacks_answer)] if sums else parts)


def no_request(example: Mapping[str, Any]) -> str:
    """Return what an example lacks to be judged as a request, "" if nothing."""
    return "" if "things" in example else "no request"


def learned(model: RewardModel) -> Callable[[Sequence[Rollout]], list[float]]:
    return lambda rollouts: model.score([[*rollout.prompt_tokens, *rollout.tokens] for rollout in rollouts])


def golden(kind: Kind) -> Callable[[Sequence[Rollout]], list[float]]:
    return lambda rollouts: [gold(kind, rollout.example, rollout.text) for rollout in rollouts]


def right_sum(rollouts: Sequence[Rollout]) -> list[float]:
    return [float(final_number(rollout.text) == rollout.example["answer"]) for rollout in rollouts]


# The stages --------------------------------------------------------------------------------------------------------------------------


def recipe_of(name: str, begin: Path, steps: int, looks: int, seed: int, more: Sequence[str]) -> GrpoRecipe:
    """Return a shipped recipe at this size."""
    given = [f"model.start={json.dumps(str(begin))}", f"run.seed={seed}", f"run.steps={steps}", f"run.checkpoint_every={steps // looks}"]
    return load_recipe(name, GrpoRecipe, folder="grpo", overrides=[*given, *SMALL, *more])


def stage_1(begin: Path, out: Path, size: Size, seed: int) -> Result:
    """Run GRPO on sums; the rule pays."""
    recipe = recipe_of("v2-reasoning", begin, size.stage_1, 1, seed, ['task.name="arithmetic"'])
    recipe, opened = open_start(recipe)
    train(recipe, opened, open_prompts(recipe, opened.tokenizer, []), out)
    return {}


def stage_2(arm: str, begin: Path, out: Path, judges: Judges, size: Size, seed: int) -> Result:
    """Run GRPO on requests; the reward models pay."""
    more = ["objective.kl_weight=0"] if arm == "stage 2, no KL" else []
    recipe = recipe_of("v2-preference", begin, size.stage_2, size.looks, seed, ["reward=[]", *more])
    prompts: list[Mapping[str, Any]] = list(requests(PROMPTS, seed + 1))
    sums = arm == "stage 2, half sums"
    if sums:
        asked = problems(PROMPTS, seed + 1)
        prompts += [{"messages": [{"role": "user", "content": problem.question}], "answer": problem.answer} for problem in asked]
    recipe, opened = open_start(recipe)
    train(recipe, opened, Prompts(prompts, [], seed), out, rewards=judges.rewards(sums=sums))
    return {}


# What policies answer ----------------------------------------------------------------------------------------------------------------


def judged(policy: Path, models: Mapping[Kind, RewardModel], asked: Sequence[Mapping[str, Any]]) -> tuple[list[Rollout], Values, Values]:
    """Let a policy answer requests; return its answers, what the reward models say of them, and the gold rewards."""
    with LLM(policy, dtype="fp32", max_batch=64, max_len=128) as llm:
        drawn = draw(llm, asked, group_size=SAMPLES, max_tokens=LONGEST, seed="held out")
    return drawn, {kind: learned(models[kind])(drawn) for kind in KINDS}, {kind: golden(kind)(drawn) for kind in KINDS}


def scales(policy: Path, models: Mapping[Kind, RewardModel], size: Size) -> dict[str, dict[Kind, tuple[float, float]]]:
    """Return mean and deviation of each reward, over a policy's answers to requests of the training split."""
    _, reward, golds = judged(policy, models, list(requests(2 * size.prompts, 2)))
    return {
        name: {kind: (statistics.mean(values[kind]), statistics.pstdev(values[kind])) for kind in KINDS}
        for name, values in (("scale", reward), ("gold_scale", golds))
    }


def total(values: Values, scale: Scale) -> list[float]:
    """Return the weighted sums, in deviations from the scale's mean."""
    deviations = [[COEFFICIENTS[kind] * (value - scale[kind][0]) / scale[kind][1] for value in values[kind]] for kind in KINDS]
    return [sum(row) for row in zip(*deviations, strict=True)]


def agreement(rewards: Sequence[float], golds: Sequence[float], size: int) -> float | None:
    """Return how often rewards order two answers to one prompt as gold does; half of a tie counts, and equal gold does not.

    Args:
        rewards: of answers, those to one prompt side by side.
        golds: likewise.
        size: answers to a prompt.
    """
    found = []
    for first in range(0, len(rewards), size):
        for one, other in combinations(range(first, first + size), 2):
            if golds[one] != golds[other]:
                said = (rewards[one] - rewards[other]) * (golds[one] - golds[other])
                found.append(0.5 if said == 0 else float(said > 0))
    return statistics.mean(found) if found else None


def measured(policy: Path, judges: Judges, size: Size) -> Result:
    """Return how a policy answers held-out sums and requests, and which of its wrong answers the reward models like best."""
    drawn, values, golds = judged(policy, judges.models, list(requests(size.prompts, 3, "test")))
    rewards, earned = total(values, judges.scale), total(golds, judges.gold_scale)
    right = [is_right(rollout.example, rollout.text) for rollout in drawn]
    fooled = sorted((i for i in range(len(drawn)) if not right[i]), key=lambda i: -rewards[i])[:3]
    return {
        "sums": answered(policy, prompts=size.prompts), "reward": statistics.mean(rewards), "gold": statistics.mean(earned),
        "right": statistics.mean(right), "by_kind": {kind: statistics.mean(golds[kind]) for kind in KINDS},
        "agreement": agreement(rewards, earned, SAMPLES), "length": statistics.mean(len(rollout.tokens) for rollout in drawn),
        "fooled": [(drawn[i].example["messages"][0]["content"], drawn[i].text, round(rewards[i], 2), round(earned[i], 2)) for i in fooled],
    }  # fmt: skip


# All of it ---------------------------------------------------------------------------------------------------------------------------


def experiment(out: Path, size: Size, seeds: int) -> Result:
    """Run what has not been run; return all results."""
    out.mkdir(parents=True, exist_ok=True)
    begin = out / "start" / "sft"
    results: Result = {"start": once(out / "start.json", lambda: start(out / "start", size))}
    results["reward models"] = {
        kind: once(out / f"{kind}.json", lambda kind=kind: reward_model(kind, begin, out / kind, size)) for kind in KINDS
    }
    models = {kind: RewardModel.load(out / kind / "run") for kind in KINDS}
    found = once(out / "scales.json", lambda: scales(begin, models, size))
    judges = Judges(models, found["scale"], found["gold_scale"])
    results["before"] = looked_at(begin, out / "before.json", judges, size)
    results["runs"] = [stages(begin, out, judges, size, seed) for seed in range(seeds)]
    return results


def stages(begin: Path, out: Path, judges: Judges, size: Size, seed: int) -> dict[str, list[Result]]:
    """Run both stages, the second in every way; return how their policies answer, stage 2's at every look."""
    first = out / f"stage-1-{seed}"
    took = once(first.with_suffix(".json"), lambda: stage_1(begin, first, size, seed))
    found = {"stage 1": [looked_at(first, out / f"stage-1-{seed}-answers.json", judges, size) | {"step": 0} | took]}
    for arm in size.arms:
        run = out / f"{ARMS[arm]}-{seed}"
        took = once(run.with_suffix(".json"), lambda arm=arm, run=run: stage_2(arm, first, run, judges, size, seed))
        steps = sorted(int(folder.name.removeprefix("step-")) for folder in run.glob("step-*"))
        found[arm] = [
            looked_at(run / f"step-{step}", out / f"{run.name}-{step}.json", judges, size) | {"step": step} | took for step in steps
        ]
    return found


def looked_at(policy: Path, file: Path, judges: Judges, size: Size) -> Result:
    return once(file, lambda: measured(policy, judges, size))


# What is printed ---------------------------------------------------------------------------------------------------------------------


def show(results: Result, size: Size) -> None:
    """Print the tables, the tax and the ratios."""
    show_reward_models(results["reward models"])
    runs = results["runs"]
    last = {"start": [results["before"] | results["start"]]} | {name: [run[name][-1] for run in runs] for name in runs[0]}
    columns = ("", "sums: pass@1", "pass@8", "requests: right", *KINDS, "models' reward", "gold", "agreement", "seconds")
    rows = [
        (
            name, mean([one["sums"]["pass@1"] for one in found]), mean([one["sums"]["pass@8"] for one in found]),
            mean([one["right"] for one in found]), *(mean([one["by_kind"][kind] for one in found], 2) for kind in KINDS),
            *(mean([one[key] for one in found], 2) for key in ("reward", "gold", "agreement")), f"{found[0]['seconds']:.0f}",
        )
        for name, found in last.items()
    ]  # fmt: skip
    markdown(columns, rows)
    show_steps(runs, size.arms)
    sums = {name: statistics.mean(one["sums"]["pass@1"] for one in found) for name, found in last.items()}
    for arm in size.arms:
        tax = 100 * (sums["stage 1"] - sums[arm])
        print(f"alignment tax, {arm}: pass@1 of sums {sums['stage 1']:.3f} -> {sums[arm]:.3f}, {tax:.1f} points")
    for arm in size.arms:
        for asked, answer, reward, earned in runs[0][arm][-1]["fooled"]:
            print(f"{arm}, liked and not right: {asked!r}: {answer!r}, models {reward}, gold {earned}")
    print(f"ratio sums_stage_1_over_start {sums['stage 1'] / sums['start']:.3f}")
    for arm in size.arms:
        print(f"ratio sums_{ARMS[arm].replace('-', '_')}_over_stage_1 {sums[arm] / sums['stage 1']:.3f}")
    print(f"ratio least_accuracy_of_reward_models {min(found['accuracy'] for found in results['reward models'].values()):.3f}")


def show_reward_models(found: Mapping[str, Result]) -> None:
    columns = ("reward model", "trained on", "held out", "accuracy", "words alone", "calibration error", "seconds")
    rows = [
        (
            kind, f"{one['pairs']:,}", f"{one['held_out']:,}", f"{one['accuracy']:.1%}", f"{one['words']:.1%}",
            f"{one['calibration_error']:.3f}", f"{one['seconds']:.0f}",
        )
        for kind, one in found.items()
    ]  # fmt: skip
    markdown(columns, rows)


def show_steps(runs: Sequence[Mapping[str, list[Result]]], arms: Sequence[str]) -> None:
    """Print the reward models' reward, gold and sums at every look of every arm, from the end of stage 1 on."""
    rows = []
    for place, one in enumerate([runs[0]["stage 1"][-1], *runs[0][arms[0]]]):
        cells = []
        for arm in arms:
            found = [run["stage 1"][-1] if place == 0 else run[arm][place - 1] for run in runs]
            cells += [mean([look["reward"] for look in found], 2), mean([look["gold"] for look in found], 2)]
            cells.append(mean([look["sums"]["pass@1"] for look in found]))
        rows.append((str(one["step"]), *cells))
    markdown(("step", *(f"{arm}: {what}" for arm in arms for what in ("models' reward", "gold", "sums"))), rows)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("", *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)), "", sep="\n")


def mean(values: Sequence[float | None], digits: int = 3) -> str:
    """Return the mean of what is known, and its standard error where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    error = f" ± {statistics.stdev(known) / len(known) ** 0.5:.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=1, help="of the stages; start and reward models are the same for all")
    arguments = parser.parse_args()
    make_deterministic()
    size = QUICK if arguments.quick else Size()
    results = experiment(arguments.out, size, arguments.seeds)
    atomic_write_json(arguments.out / "results.json", results)
    show(results, size)


if __name__ == "__main__":
    main()
