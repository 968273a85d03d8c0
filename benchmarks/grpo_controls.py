"""What GRPO's gain on sums is made of: the same start and budget, and one thing changed at a time.

    python benchmarks/grpo_controls.py --out FOLDER [--start runs/start/sft] [--seeds 3] [--steps 20]

The start knows sums from demonstrations of which 45 % are wrong (arithmetic_start.py). Every arm takes ``steps`` x 32 prompts x 8 answers,
or as many demonstrations. Held-out sums of another split, 8 answers each at temperature 1. Stopped, the same command goes on behind the
last arm that was finished. With one update a batch every ratio is 1, so token and output differ in their weights alone; with four they
differ in what is clipped. Prints a table (mean and standard error over seeds) and ``ratio NAME VALUE`` lines: pass@1 of GRPO over that
of the arm.
"""

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from arithmetic_start import LONGEST, answered, make_start
from once import Result, once

PROMPTS, SIZE = 32, 8
GRPO = {
    "GRPO": [],
    "GRPO, rewards dealt out by lot in a group": ["reward=[{name='answer', shuffled=true}]"],
    "GRPO, no KL": ["objective.kl_weight=0"],
    "GRPO, ratio of outputs (V2 as printed)": ["preset=v2"],
    "GRPO, 4 updates a batch": ["update.updates=4"],
    "GRPO, 4 updates a batch, ratio of outputs": ["update.updates=4", "preset=v2"],
    "Dr. GRPO": ["preset=dr_grpo"],
}
ONE_CHECKPOINT = "run.checkpoint_every=100000"
SHORT = ["run.epochs=1", "run.seq_len=128", "run.precision=fp32", "data.validation_share=0"]
RATE = 3e-4  # GRPO's peak; DPO is shown at rates of its own too
DPO_RATES = (3e-4, 3e-5, 1e-5, 3e-6)


def grpo(start: Path, out: Path, seed: int, steps: int, overrides: list[str]) -> Path:
    """Run GRPO as the recipe says, with one thing changed."""
    from dsv2.config import load_recipe
    from dsv2.rl.grpo import train
    from dsv2.rl.grpo_recipe import GrpoRecipe
    from dsv2.rl.prompts import open_prompts
    from dsv2.train.start import open_start

    given = [f"model.start={json.dumps(str(start))}", f"run.seed={seed}", f"run.steps={steps}", "task.held_out=0", ONE_CHECKPOINT]
    recipe = load_recipe("arithmetic", GrpoRecipe, folder="grpo", overrides=given + overrides)
    recipe, opened = open_start(recipe)
    train(recipe, opened, open_prompts(recipe, opened.tokenizer, []), out)
    return out


def more_demonstrations(start: Path, out: Path, seed: int, steps: int) -> Path:
    """Go on with fine-tuning, on as many new demonstrations as GRPO draws answers."""
    from dsv2.tasks.arithmetic import demonstrations

    rows = [{"messages": messages} for messages in demonstrations(steps * PROMPTS * SIZE, seed + 100)]
    return sft(start, out, seed, rows)


def own_right_answers(start: Path, out: Path, seed: int, steps: int) -> Path:
    """Rejection sampling: draw as many answers as GRPO, keep the right ones, fine-tune on them."""
    rows = [
        {"messages": [*rollout.example["messages"], {"role": "assistant", "content": rollout.text}]}
        for rollout, right in own_answers(start, seed, steps)
        if right
    ]
    return sft(start, out, seed, rows)


def pairs_offline(start: Path, out: Path, seed: int, steps: int, rate: float) -> Path:
    """DPO on pairs of a right and a wrong answer to one prompt, out of as many answers as GRPO draws."""
    groups: dict[int, tuple[dict, list[str], list[str]]] = {}
    for rollout, right in own_answers(start, seed, steps):
        group = groups.setdefault(rollout.group, (dict(rollout.example), [], []))
        group[1 if right else 2].append(rollout.text)
    pairs = [
        {"messages": example["messages"], "chosen": good, "rejected": bad}
        for example, right, wrong in groups.values()
        for good, bad in zip(right, wrong, strict=False)
    ]
    out.mkdir(parents=True)
    (out / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tuned("dpo", start, out, seed, [out / "pairs.jsonl"], ["batch.sequences=32", "batch.micro_sequences=32"], rate=rate)
    return out / "run"


def own_answers(start: Path, seed: int, steps: int) -> list:
    """Return (rollout, whether it is right) of the start's answers to as many prompts as GRPO takes."""
    from dsv2.engine.llm import LLM
    from dsv2.rl.rollout import draw
    from dsv2.tasks.arithmetic import final_number, problems

    asked = list(problems(steps * PROMPTS, seed + 200))
    examples = [{"messages": [{"role": "user", "content": p.question}], "answer": p.answer} for p in asked]
    with LLM(start, dtype="fp32", max_batch=64, max_len=128) as llm:
        drawn = draw(llm, examples, group_size=SIZE, max_tokens=LONGEST, seed=str(seed))
    return [(rollout, final_number(rollout.text) == rollout.example["answer"]) for rollout in drawn]


def sft(start: Path, out: Path, seed: int, rows: list[dict]) -> Path:
    out.mkdir(parents=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tuned("sft", start, out, seed, [out / "rows.jsonl"], ["batch.sequences=8", "batch.micro_sequences=8", "samples.prompts=[]"])
    return out / "run"


def tuned(verb: str, start: Path, out: Path, seed: int, data: list[Path], more: list[str], *, rate: float = RATE) -> None:
    """Run ``dsv2 sft`` or ``dsv2 dpo`` with GRPO's warmup and decay."""
    from dsv2 import samples
    from dsv2.rl import dpo

    schedule = [f"learning_rate.peak={rate}", "learning_rate.warmup_steps=5", "learning_rate.decay=cosine"]
    given = [f"model.start={json.dumps(str(start))}", f"run.seed={seed}", ONE_CHECKPOINT, *SHORT, *schedule, *more]
    (samples.sft if verb == "sft" else dpo.run)("default", given, data=data, out=out / "run")


def arms(steps: int) -> dict[str, Callable[[Path, Path, int], Path]]:
    found: dict[str, Callable[[Path, Path, int], Path]] = {
        name: lambda start, out, seed, overrides=overrides: grpo(start, out, seed, steps, overrides) for name, overrides in GRPO.items()
    }
    found["more demonstrations"] = lambda start, out, seed: more_demonstrations(start, out, seed, steps)
    found["own right answers (rejection sampling)"] = lambda start, out, seed: own_right_answers(start, out, seed, steps)
    for rate in DPO_RATES:
        found[f"DPO on own pairs, rate {rate:g}"] = lambda start, out, seed, rate=rate: pairs_offline(start, out, seed, steps, rate)
    return found


def made(out: Path) -> Result:
    """Make the start anew."""
    shutil.rmtree(out, ignore_errors=True)  # of a start that was not finished
    make_start(out)
    return {}


def result(arm: Callable[[Path, Path, int], Path], start: Path, out: Path, seed: int) -> Result:
    """Run an arm; return how its model answers, and the seconds of training (and drawing) alone."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    run = arm(start, out, seed)
    return {"training": time.perf_counter() - began} | answered(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="run that every arm begins from; without it one is made, in a minute and a half")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    start = arguments.start or arguments.out / "start" / "sft"
    if not arguments.start:
        once(arguments.out / "start.json", lambda: made(start.parent))
    found: dict[str, list[Result]] = {"start": [once(arguments.out / "before.json", lambda: answered(start))]}
    for name, arm in arms(arguments.steps).items():
        folder = "-".join(re.findall("[a-z0-9.]+", name.lower()))
        runs = [arguments.out / f"{folder}-{seed}" for seed in range(arguments.seeds)]
        found[name] = [
            once(run.with_name(f"{run.name}.json"), lambda arm=arm, run=run, seed=seed: result(arm, start, run, seed))
            for seed, run in enumerate(runs)
        ]
    print(f"\n| {arguments.steps} steps, {arguments.seeds} seeds | pass@1 | pass@{SIZE} | greedy | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name, results in found.items():
        cells = [spread([result[key] for result in results]) for key in ("pass@1", f"pass@{SIZE}", "greedy")]
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(result.get('training', 0.0) for result in results):.0f} |")
    best = statistics.mean(result["pass@1"] for result in found["GRPO"])
    for name, results in found.items():
        told = name.replace(" ", "_").replace(",", "")
        print(f"ratio grpo_over_{told} {best / statistics.mean(result['pass@1'] for result in results):.3f}")


def spread(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


if __name__ == "__main__":
    main()
