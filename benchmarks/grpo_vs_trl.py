"""GRPO: dsv2's stage and TRL's GRPOTrainer on the same nano model and prompts, one run: seconds a step, rollouts a second.

    python benchmarks/grpo_vs_trl.py                    # one prompt x 8 answers of 64 tokens a step, fp32
    python benchmarks/grpo_vs_trl.py --prompts 8        # eight prompts
    python benchmarks/grpo_vs_trl.py --quick            # one mode of TRL, one round

Both sides: initial weights from dsv2, the same chat prompts through the same template, temperature 1 over the whole vocabulary, one
update a batch, every token of the batch with the same weight, clip 0.2, no KL (TRL's default), AdamW, 2 threads. The reward is the number
of distinct characters, which differs in every group, so both sides have something to learn from each. TRL generates with
transformers, which is what it does without vLLM, and may not end an answer early; dsv2 draws what it draws, and with untrained weights
few answers end early: tokens are counted. dsv2 does more in a step: it records experts and replays them, and compares every token's
log-probability in engine and trainer. Modes of TRL (experts as grouped_mm and eager) run once each; then the fastest and dsv2 alternate,
and medians are compared. A step counts from the beginning of one to that of the next. Prints ``ratio NAME VALUE``: above 1, dsv2 is
better.

The floor is dsv2's own training step: a forward and backward pass with its update on as many tokens, as pre-training takes it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

GROUP, NEW = 8, 64
WARM_UP, STEPS = 3, 12
RATE = 1e-5


def make_inputs(folder: Path) -> None:
    """Write a model with initial weights and its tokenizer, and prompts."""
    from dsv2.assets import corpus_path
    from dsv2.checkpoint.layout import save_checkpoint
    from dsv2.data.documents import read_documents
    from dsv2.model.init import initialise
    from dsv2.model.transformer import Transformer
    from dsv2.presets import preset
    from dsv2.tokenizer.train import train_tokenizer

    config = preset("nano", max_position_embeddings=512)
    tokenizer = train_tokenizer((document.text for document in read_documents([corpus_path("train")])), vocab_size=config.vocab_size)
    model = Transformer(config)
    initialise(model, seed=0)
    save_checkpoint(folder / "model", model, tokenizer)
    rows = [{"prompt": f"def add_{i}(a, b):\n    return a + b  # test number {i}"} for i in range(256)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(folder: Path, prompts: int) -> Any:
    from dsv2.rl.grpo_recipe import GrpoRecipe

    return GrpoRecipe.model_validate(
        {
            "model": {"start": str(folder / "model")},
            "task": {"held_out": 0},
            "run": {"steps": 10_000, "seq_len": 160, "checkpoint_every": 10_000},
            "rollout": {"prompts": prompts, "group_size": GROUP, "max_tokens": NEW, "max_batch": GROUP * prompts},
            "objective": {"normalise": "tokens", "kl_weight": 0.0},
            "learning_rate": {"peak": RATE, "warmup_steps": 0, "decay_points": []},
            "optimizer": {"adam_beta2": 0.999, "weight_decay": 0.0},
        }
    )


def distinct_characters(text: str) -> float:
    """Return what both sides pay."""
    return float(len(set(text)))


def run_dsv2(folder: Path, prompts: int, steps: int) -> dict[str, Any]:
    """Run the stage as its command does, and stop it after the steps that are timed."""
    from dsv2.metrics import read_metrics
    from dsv2.rl import grpo
    from dsv2.rl.prompts import open_prompts
    from dsv2.rl.reward import Part, Rewards
    from dsv2.train.start import open_start

    rewards = Rewards([Part("distinct", lambda rollouts: [distinct_characters(rollout.text) for rollout in rollouts])])
    recipe, opened = open_start(recipe_of(folder, prompts))
    real, begins = grpo.draw, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        begins.append(time.perf_counter())
        if len(begins) > WARM_UP + steps + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    grpo.draw = counted
    with tempfile.TemporaryDirectory() as out:
        with suppress(KeyboardInterrupt):
            grpo.train(recipe, opened, open_prompts(recipe, opened.tokenizer, [folder / "prompts.jsonl"]), Path(out), rewards=rewards)
        lines = [line for line in read_metrics(Path(out) / "metrics.jsonl") if line["kind"] == "grpo"][WARM_UP:]
    if any(line["frac_reward_zero_std"] for line in lines):
        raise RuntimeError("a group earned equal rewards: dsv2 takes it forward only, TRL backward too, so their times say nothing")
    step_s = statistics.median(b - a for a, b in zip(begins[WARM_UP:], begins[WARM_UP + 1 :], strict=False))
    rollout_s = statistics.median(line["rollout_s"] for line in lines)
    tokens = [after["num_tokens"] - before["num_tokens"] for before, after in pairwise(lines)]
    return {
        "rollouts_per_s": GROUP * prompts / step_s, "step_s": step_s, "rollout_s": rollout_s, "rest_s": step_s - rollout_s,
        "new_tokens": statistics.mean(line["completions/mean_length"] for line in lines),
        "logp_difference": max(line["sampling/sampling_logp_difference/max"] for line in lines),
        "floor_s": bare_step(folder, int(statistics.median(tokens)), GROUP * prompts),
    }  # fmt: skip


def bare_step(folder: Path, tokens: int, rows: int) -> float:
    """Return the seconds of a pre-training step on as many tokens in as many rows."""
    import torch

    from dsv2.checkpoint.huggingface import load_model
    from dsv2.data.batch import Batch
    from dsv2.train.losses import BalanceSection
    from dsv2.train.optimizer import OptimizerSection, make_optimizer
    from dsv2.train.step import train_step

    model = load_model(folder / "model", dtype=torch.float32).train()
    optimizer = make_optimizer(model, OptimizerSection())
    ids = torch.randint(10, 8000, (rows, tokens // rows), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    batch = Batch(ids, ids.roll(-1, 1), positions, torch.zeros_like(ids))
    times = []
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        train_step(model, optimizer, [batch], lr=RATE, clip_norm=1.0, balance=BalanceSection(expert=0.0), autocast=None)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:])


def run_trl(folder: Path, prompts: int, steps: int, experts: str) -> dict[str, Any]:
    """Run GRPOTrainer with the same settings."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TRANSFORMERS_VERBOSITY="error")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, experts_implementation=experts)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    begins: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begins.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=GROUP * prompts, num_generations=GROUP, max_completion_length=NEW,
            max_steps=WARM_UP + steps + 1, learning_rate=RATE, lr_scheduler_type="constant", optim="adamw_torch_fused", beta=0.0,
            temperature=1.0, top_p=1.0, top_k=0, gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1,
            generation_kwargs={"min_new_tokens": NEW}, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Watch()],
            reward_funcs=lambda completions, **_: [distinct_characters(completion[0]["content"]) for completion in completions],
        )  # fmt: skip
        trainer.train()
    step_s = statistics.median(b - a for a, b in zip(begins[WARM_UP:], begins[WARM_UP + 1 :], strict=False))
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry]
    return {"rollouts_per_s": GROUP * prompts / step_s, "step_s": step_s, "new_tokens": statistics.mean(lengths)}


def in_process(folder: Path, arguments: argparse.Namespace, task: dict[str, str], steps: int) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--prompts", str(arguments.prompts), "--threads", str(arguments.threads), "--steps", str(steps)]
    # dsv2 as its command line sets it; the peer, which frees memory every step, gets huge pages
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "0" if task["side"] == "dsv2" else "1"}
    done = subprocess.run(
        [*command, "--task", json.dumps(task), "--folder", str(folder)], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(" ".join(task.values()) + ": " + ", ".join(f"{name} {value:,.3g}" for name, value in row.items()), flush=True)
    return row


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Find TRL's faster mode, then let both sides take turns."""
    modes = [{"side": "trl", "experts": experts} for experts in ("grouped_mm", "eager")][: 1 if arguments.quick else 2]
    tried = [in_process(folder, arguments, mode, max(2, arguments.steps // 3))["step_s"] for mode in modes] if len(modes) > 1 else [0.0]
    best = modes[tried.index(min(tried))]
    ours, theirs = [], []
    for _ in range(1 if arguments.quick else arguments.rounds):
        ours.append(in_process(folder, arguments, {"side": "dsv2"}, arguments.steps))
        theirs.append(in_process(folder, arguments, best, arguments.steps))
    middle = {name: statistics.median(row[name] for row in ours) for name in ours[0]}
    peer = statistics.median(row["step_s"] for row in theirs)
    count = GROUP * arguments.prompts
    print(
        f"\nnano, fp32, {arguments.threads} threads, {count} rollouts of {NEW} tokens a step: dsv2 {middle['step_s']:.3f} s, "
        f"{middle['rollouts_per_s']:.1f} rollouts/s; TRL {best['experts']} {peer:.3f} s, {count / peer:.1f} rollouts/s\n"
        f"dsv2's step: {middle['rollout_s']:.3f} s of rollouts, {middle['rest_s']:.3f} s of all else; "
        f"a pre-training step on as many tokens takes {middle['floor_s']:.3f} s\n"
        f"ratio grpo_nano_rollouts_per_s_{count} {peer / middle['step_s']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1, help="prompts a step, each with 8 answers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        import torch

        torch.set_num_threads(arguments.threads)
        task = json.loads(arguments.task)
        if task["side"] == "dsv2":
            row = run_dsv2(arguments.folder, arguments.prompts, arguments.steps)
        else:
            row = run_trl(arguments.folder, arguments.prompts, arguments.steps, task["experts"])
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        measure(arguments, Path(folder))


if __name__ == "__main__":
    main()
