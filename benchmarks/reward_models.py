"""Reward models on made-up preferences with a known gold reward, and on real pairs of people: held-out accuracy and calibration.

    python benchmarks/reward_models.py --out OUT [--start CHECKPOINT] [--real FILE.jsonl.gz ...] [--only helpful]

Without --start each model begins from random weights and a tokenizer trained on the texts of its own data. So small a model, which has read
next to nothing, cannot tell people's choices; the real pairs are there to show how little of that it learns.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dsv2.checkpoint.layout import save_checkpoint
from dsv2.data.conversations import ReadingReport
from dsv2.data.preferences import read_preferences
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.progress import read_metrics, table
from dsv2.rl.preference_data import open_preferences
from dsv2.rl.preference_recipe import RewardRecipe
from dsv2.rl.preference_run import open_start
from dsv2.rl.reward_training import form_of, train_reward_model
from dsv2.tasks.preferences import KINDS, pairs
from dsv2.tokenizer.train import train_tokenizer

CONTEXT, VOCABULARY = 512, 2048  # tokens of an answered conversation, entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and result.json")
    parser.add_argument("--start", help="checkpoint to begin from")
    parser.add_argument("--real", type=Path, action="append", default=[], help="file of real pairs; may be repeated")
    parser.add_argument("--only", action="append", help="name of a data set; may be repeated")
    parser.add_argument("--pairs", type=int, default=4000, help="made-up pairs to train on, of each kind")
    args = parser.parse_args()
    files = [made_up(kind, args.pairs, args.out / "data") for kind in KINDS] + [(path.name.split(".")[0], path, None) for path in args.real]
    results = [
        train_one(name, path, validation, args.out / name, args.start)
        for name, path, validation in files
        if not args.only or name in args.only
    ]
    (args.out / "result.json").write_text(json.dumps(results, indent=1))
    columns = ("data", "pairs", "held out", "accuracy", "longer one", "margin", "calibration error", "seconds")
    rows = [
        (r["name"], r["pairs"], r["held_out"], *(f"{r[c]:.3f}" for c in ("accuracy", "longer", "margin", "error")), f"{r['s']:.0f}")
        for r in results
    ]
    table("reward models", columns, rows, stdout=True)


def made_up(kind: str, number: int, folder: Path) -> tuple[str, Path, Path]:
    """Write pairs to train on and others, of another seed, to test on."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for split, count, seed in (("train", number, 0), ("test", 500, 1)):
        written.append(folder / f"{kind}-{split}.jsonl")
        written[-1].write_text("".join(json.dumps(row) + "\n" for row in pairs(kind, count, seed)))
    return kind, written[0], written[1]


def train_one(name: str, data: Path, validation: Path | None, out: Path, start: str | None) -> dict[str, object]:
    """Train a reward model in ``out``, a folder that does not exist yet; return its held-out figures."""
    real = validation is None
    begin = start or str(random_start(data, out / "start"))
    recipe = RewardRecipe.model_validate(
        {
            "model": {"start": begin},
            "data": {"too_long": "cut", "max_refused": 0.5, "validation_share": 0.2},
            "run": {"epochs": 3, "seq_len": 2 * CONTEXT if real else 256, "validate_every": 25, "checkpoint_every": 1000},
            "batch": {"sequences": 8, "micro_sequences": 4},
            "learning_rate": {"peak": 5e-4 if real else 2e-3, "decay": "cosine", "final_share": 0.1, "warmup_steps": 10},
            "loss": {"kind": "pairwise", "centring": 0.01},
        }
    )
    opened = open_start(recipe, None)
    read = open_preferences(recipe, opened.tokenizer, [data], validation=[validation] if validation else [], form=form_of(recipe.loss))
    began = time.perf_counter()
    train_reward_model(recipe, opened, read, out / "run")
    last = [line for line in read_metrics(out / "run" / "metrics.jsonl") if line["kind"] == "evaluation"][-1]
    domains = {domain: len(rows.answers.groups) for domain, rows in read.held_out.items()}
    total = sum(domains.values())

    def mean(figure: str) -> float:
        return sum(last[figure][domain] * count for domain, count in domains.items()) / total

    return {
        "name": name, "pairs": sum(read.num_preferences.values()), "held_out": total, "accuracy": mean("accuracy"),
        "longer": longer_wins(validation or data), "margin": mean("margin"), "error": mean("calibration_error"),
        "s": time.perf_counter() - began,
    }  # fmt: skip


def longer_wins(file: Path) -> float:
    """Return how often the chosen answer is the longer one: what length alone would get."""
    found = [
        [sum(len(message.get("content") or "") for message in answer.messages) for answer in preference.answers]
        for preference in read_preferences([file], ReadingReport())
    ]
    return sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in found) / len(found)


def random_start(data: Path, folder: Path) -> Path:
    """Write a model of the preset tour with random weights, and a tokenizer of the data's texts."""
    texts = [
        message.get("content") or ""
        for preference in read_preferences([data], ReadingReport())
        for answer in preference.answers
        for message in (*answer.prompt, *answer.messages)
    ]
    tokenizer = train_tokenizer(texts, vocab_size=VOCABULARY if sum(map(len, texts)) > 1_000_000 else 384)
    model = Transformer(preset("tour", vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, **SMALL))
    initialise(model, 0)
    save_checkpoint(folder, model, tokenizer)
    return folder


SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "kv_lora_rank": 64,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
