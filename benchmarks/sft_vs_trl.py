"""Fine-tuning with packing: dsv2's stage and TRL's SFTTrainer on the same nano model, conversations and rows, one run, tokens/s.

    python benchmarks/sft_vs_trl.py --data alpaca_en.jsonl.gz                      # fp32
    python benchmarks/sft_vs_trl.py --data alpaca_en.jsonl.gz --precision bf16
    python benchmarks/sft_vs_trl.py --data alpaca_en.jsonl.gz --quick              # one mode of TRL, one round

Both sides: 8 rows of 512 a step, loss on the assistant's tokens, fused AdamW, 2 threads, initial weights from dsv2, the same samples: TRL
gets dsv2's ids and masks, so that its own template costs it nothing. Modes of TRL run once each: packing "bfd" (best fit, padding free)
and "wrapped" (cut like a stream), experts as grouped_mm and eager; then the fastest and dsv2 alternate, and medians are compared. A step
counts from the beginning of one to that of the next, so the time for its batch is in it; tokens are those of samples, not of padding.
The first losses of both sides are printed. Prints ``ratio NAME VALUE``: above 1, dsv2 is better.
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
from itertools import islice
from pathlib import Path
from typing import Any

SEQ_LEN, ROWS = 512, 8
CONVERSATIONS = 3000
WARM_UP, STEPS = 3, 12
RATE = 1e-4


def make_inputs(folder: Path, data: str) -> None:
    """Write a model with initial weights and its tokenizer, and as many conversations as a run could use."""
    import gzip

    from dsv2.assets import corpus_path
    from dsv2.checkpoint.layout import save_checkpoint
    from dsv2.data.documents import read_documents
    from dsv2.model.init import initialise
    from dsv2.model.transformer import Transformer
    from dsv2.presets import preset
    from dsv2.tokenizer.train import train_tokenizer

    config = preset("nano", max_position_embeddings=SEQ_LEN)
    tokenizer = train_tokenizer((document.text for document in read_documents([corpus_path("train")])), vocab_size=config.vocab_size)
    model = Transformer(config)
    initialise(model, seed=0)
    save_checkpoint(folder / "model", model, tokenizer)
    with (
        (gzip.open if data.endswith(".gz") else open)(data, "rt", encoding="utf-8") as lines,
        (folder / "chats.jsonl").open("w", encoding="utf-8") as file,
    ):
        file.writelines(islice(lines, CONVERSATIONS))


def recipe_of(folder: Path, precision: str) -> Any:
    from dsv2.train.sft_recipe import SftRecipe

    return SftRecipe.model_validate(
        {
            "model": {"start": str(folder / "model")},
            "data": {"too_long": "cut", "validation_share": 0, "max_refused": 1},
            "run": {"epochs": 1, "seq_len": SEQ_LEN, "precision": precision, "checkpoint_every": 10_000, "loader_workers": 1},
            "batch": {"sequences": ROWS, "micro_sequences": ROWS},
            "learning_rate": {"peak": RATE, "warmup_steps": 0, "decay_points": []},
            "optimizer": {"adam_beta2": 0.999, "weight_decay": 0.0},
        }
    )


def run_dsv2(folder: Path, precision: str, steps: int) -> dict[str, Any]:
    """Run the stage as its command does, and stop it after the steps that are timed."""
    from dsv2.metrics import read_metrics
    from dsv2.train import loop
    from dsv2.train.sft import fine_tune
    from dsv2.train.sft_data import open_conversations
    from dsv2.train.start import open_start

    recipe, start = open_start(recipe_of(folder, precision))
    data = open_conversations(recipe, start.tokenizer, [folder / "chats.jsonl"])
    real, begins = loop.train_step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        begins.append(time.perf_counter())
        if len(begins) > WARM_UP + steps + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    loop.train_step = counted
    with tempfile.TemporaryDirectory() as out:
        with suppress(KeyboardInterrupt):
            fine_tune(recipe, start, data, Path(out))
        losses = [line["loss"] for line in read_metrics(Path(out) / "metrics.jsonl") if line["kind"] == "train"]
    step_s = statistics.median(b - a for a, b in zip(begins[WARM_UP:], begins[WARM_UP + 1 :], strict=False))
    return {"tokens_per_s": ROWS * SEQ_LEN * data.rows.filled / step_s, "step_s": step_s, "loss": losses[0], "filled": data.rows.filled}


def run_trl(folder: Path, precision: str, steps: int, packing: str, experts: str) -> dict[str, Any]:
    """Run SFTTrainer on the samples that dsv2 renders."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TRANSFORMERS_VERBOSITY="error")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from dsv2.train.sft_data import open_conversations
    from dsv2.train.start import open_start

    recipe, start = open_start(recipe_of(folder, precision))
    data = open_conversations(recipe, start.tokenizer, [folder / "chats.jsonl"])
    samples = data.rows.samples
    dataset = Dataset.from_list(
        [
            {"input_ids": ids.tolist(), "completion_mask": learn.astype(int).tolist()}
            for ids, learn in zip(samples.tokens, samples.learn, strict=True)
        ]
    )
    begins: list[float] = []
    tokens: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begins.append(time.perf_counter())

    class Watched(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None and mask.dim() == 2 else inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, experts_implementation=experts)
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out, per_device_train_batch_size=ROWS, max_length=SEQ_LEN, packing=True, packing_strategy=packing,
            max_steps=WARM_UP + steps + 1, learning_rate=RATE, lr_scheduler_type="constant", optim="adamw_torch_fused",
            max_grad_norm=1.0, completion_only_loss=True, gradient_checkpointing=False, bf16=precision == "bf16", use_cpu=True,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Watched(
            model=model, args=config, train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    times = [b - a for a, b in zip(begins[WARM_UP:], begins[WARM_UP + 1 :], strict=False)]
    speeds = [count / seconds for count, seconds in zip(tokens[WARM_UP:], times, strict=False)]
    return {"tokens_per_s": statistics.median(speeds), "step_s": statistics.median(times), "loss": losses[0], "filled": 1.0}


def in_process(folder: Path, precision: str, steps: int, threads: int, task: dict[str, str]) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--precision", precision, "--steps", str(steps), "--threads", str(threads)]
    command += ["--data", str(folder), "--task", json.dumps(task)]
    # dsv2 as its command line sets it; the peer, which frees memory every step, gets huge pages
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "0" if task["side"] == "dsv2" else "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(" ".join(task.values()) + ": " + ", ".join(f"{name} {value:,.3f}" for name, value in row.items()), flush=True)
    return row


def do_task(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    task, folder = json.loads(arguments.task), Path(arguments.data)
    if task["side"] == "dsv2":
        row = run_dsv2(folder, arguments.precision, arguments.steps)
    else:
        row = run_trl(folder, arguments.precision, arguments.steps, task["packing"], task["experts"])
    print(json.dumps(row))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    def once(task: dict[str, str], steps: int) -> dict[str, Any]:
        return in_process(folder, arguments.precision, steps, arguments.threads, task)

    modes = [
        {"side": "trl", "packing": packing, "experts": experts} for packing in ("wrapped", "bfd") for experts in ("grouped_mm", "eager")
    ]
    modes = modes[:1] if arguments.quick else modes
    tried = [once(mode, max(2, arguments.steps // 3))["tokens_per_s"] for mode in modes] if len(modes) > 1 else [0.0]
    best = modes[tried.index(max(tried))]
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(1 if arguments.quick else arguments.rounds):
        ours.append(once({"side": "dsv2"}, arguments.steps)["tokens_per_s"])
        theirs.append(once(best, arguments.steps)["tokens_per_s"])
    middle = statistics.median(ours), statistics.median(theirs)
    print(f"\nnano, {arguments.precision}, {arguments.threads} threads: dsv2 {middle[0]:,.0f} tokens/s; TRL {best['packing']}, "
          f"{best['experts']} {middle[1]:,.0f}")  # fmt: skip
    print(f"ratio sft_nano_{arguments.precision}_tokens_per_s {middle[0] / middle[1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="conversations, .jsonl or .jsonl.gz")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: products only, both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="times that dsv2 and the best mode of TRL alternate")
    parser.add_argument("--quick", action="store_true", help="one mode of TRL, one round")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        do_task(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), arguments.data)
        measure(arguments, Path(folder))


if __name__ == "__main__":
    main()
