"""Do the balance losses, device-limited routing and token dropping do their work? Small runs that differ in one factor at a time.

    python benchmarks/balance_study.py --out runs/balance --docs docs      # 33 runs of some 70 s, two at once: 20 minutes on two cores
    python benchmarks/balance_study.py --out runs/quick --quick            # a few steps of minute models: does every part work?

Each run is `dsv2 pretrain benchmarks/balance_study.toml` with the values of its arm, in a process and with one thread of its own. All arms
have the same steps, initial weights and data for one seed, so a busy machine changes the times and nothing else. Started again, the study
goes on: finished runs stay, others continue from their last checkpoint. When all are done it writes results.json and figures to the
folder --out; with --docs also the tables of DIR/balance.md, with results and figures in DIR/balance/.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import balance_measures as measures
import balance_page as page

from dsv2.config import load_recipe
from dsv2.errors import Dsv2Error
from dsv2.files import atomic_write
from dsv2.metrics import read_metrics
from dsv2.model.config import ModelConfig
from dsv2.progress import bar, console, table
from dsv2.train.corpus import Corpus
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.schedule import steps_of

RECIPE = Path(__file__).with_suffix(".toml")
SEEDS, VOCABULARY, RANDOM_STEPS = (0, 1, 2), 2048, 100
FACTORS = {
    "alpha_1": "balance.expert",
    "alpha_2": "balance.device",
    "alpha_3": "balance.communication",
    "M": "model.overrides.topk_group",
    "dropping": "dropping.capacity_factor",
}
NO_LOSSES = {"alpha_1": 0.0, "alpha_2": 0.0, "alpha_3": 0.0}
QUICK = (
    "model.overrides.hidden_size=32", "model.overrides.intermediate_size=64", "model.overrides.num_hidden_layers=2",
    "model.overrides.num_attention_heads=2", "model.overrides.moe_intermediate_size=16", "run.tokens=8192", "run.seq_len=128",
    "run.checkpoint_every=4",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arm:
    """One variant: its name in tables, and the factors whose values differ from the baseline's."""

    label: str
    changes: Mapping[str, float] = field(default_factory=dict)

    def overrides(self) -> list[str]:
        return [f"{FACTORS[factor]}={value}" for factor, value in self.changes.items()]


# The last two change more than one factor: what dropping does when nothing evens the load, and what it is compared with.
ARMS = {
    "baseline": Arm("baseline: 0.003, 0.05, 0.02, M = 3"),
    "alpha1-0": Arm("alpha_1 = 0", {"alpha_1": 0.0}),
    "alpha1-0.01": Arm("alpha_1 = 0.01", {"alpha_1": 0.01}),
    "alpha1-0.1": Arm("alpha_1 = 0.1", {"alpha_1": 0.1}),
    "alpha2-0": Arm("alpha_2 = 0", {"alpha_2": 0.0}),
    "alpha3-0": Arm("alpha_3 = 0", {"alpha_3": 0.0}),
    "m1": Arm("M = 1", {"M": 1}),
    "m8": Arm("M = 8: no limit", {"M": 8}),
    "dropping": Arm("dropping, capacity 1.0", {"dropping": 1.0}),
    "no-losses": Arm("no losses", NO_LOSSES),
    "no-losses-dropping": Arm("no losses, dropping", NO_LOSSES | {"dropping": 1.0}),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed, in a folder of its own."""

    arm: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def recipe(self) -> PretrainRecipe:
        return load_recipe(str(RECIPE), PretrainRecipe, folder="pretrain", overrides=self.overrides)

    @property
    def num_steps(self) -> int:
        recipe = self.recipe
        return len(list(steps_of(recipe.batch, recipe.run.seq_len, recipe.run.tokens)))

    def steps_done(self) -> int:
        """Count the lines of training that are written; cheap enough to be asked every second."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0

    def finished(self) -> bool:
        """Tell whether the run came to its end: the validation after the last step is written."""
        metrics = self.folder / "metrics.jsonl"
        lines = read_metrics(metrics) if metrics.exists() else []
        return any(line["kind"] == "validation" and line["step"] == self.num_steps for line in lines)

    def check(self, corpus: Corpus) -> None:
        """Refuse a folder that holds a run of another recipe or of other data."""
        if not (self.folder / "recipe.toml").exists():
            return
        began = load_recipe(str(self.folder / "recipe.toml"), PretrainRecipe, folder="pretrain")
        data = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))["data"]
        if began != self.recipe or data != corpus.fingerprint:
            what = "recipe" if began != self.recipe else "data"
            raise SystemExit(f"error: {self.folder} holds a run of another {what}\nhint: choose another --out, or remove that folder")

    def start(self, data: Path) -> subprocess.Popen[bytes]:
        """Start or continue the run; what it prints goes to a file beside its folder."""
        command = [
            sys.executable, "-m", "dsv2", "pretrain", str(RECIPE), *self.overrides, "--data", str(data), "--out", str(self.folder),
            *(["--resume"] if (self.folder / "recipe.toml").exists() else []),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")


def plan(out: Path, *, quick: bool) -> list[Run]:
    """Return all runs, seed by seed, so that a study that was stopped early has all arms."""
    seeds, extra = ((0,), QUICK) if quick else (SEEDS, ())
    return [
        Run(name, seed, out / f"{name}-seed{seed}", (*extra, *arm.overrides(), f"run.validate_every={10**6}", f"run.seed={seed}"))
        for seed in seeds
        for name, arm in ARMS.items()
    ]


def prepare_corpus(folder: Path, vocabulary: int) -> None:
    """Make tokenizer and shards of the shipped text; what is there already stays."""
    from dsv2.assets import corpus_path
    from dsv2.data.documents import read_documents
    from dsv2.data.prepare import prepare
    from dsv2.tokenizer.tokenizer import Tokenizer
    from dsv2.tokenizer.train import train_tokenizer

    if not (folder / "tokenizer").is_dir():
        texts = (document.text for document in read_documents([corpus_path("train")]))
        train_tokenizer(texts, vocab_size=vocabulary).save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for split in ("train", "validation"):
        if not (folder / split).is_dir():
            prepare(read_documents([corpus_path(split)]), tokenizer, folder / split)


def run_all(runs: Sequence[Run], data: Path, jobs: int) -> None:
    """Run what is not finished, ``jobs`` processes at once; checkpoints of finished runs are removed, their metrics stay."""
    waiting = [run for run in runs if not run.finished()]
    total = sum(run.num_steps for run in runs)
    done = {run.folder: run.steps_done() for run in runs}
    shown = sum(done.values())
    working: dict[subprocess.Popen[bytes], Run] = {}
    with bar(total, "study", unit="steps", done=shown) as progress:
        try:
            while waiting or working:
                while waiting and len(working) < jobs:
                    run = waiting.pop(0)
                    working[run.start(data)] = run
                time.sleep(1.0)
                ended = {process: code for process in working if (code := process.poll()) is not None}
                done |= {run.folder: run.steps_done() for run in working.values()}
                for process, code in ended.items():
                    settle(working.pop(process), code)
                now = sum(done.values())  # fewer than shown where a run went back to its checkpoint
                progress.advance(max(0, now - shown), finished=len(runs) - len(waiting) - len(working))
                shown = max(shown, now)
        finally:
            for process in working:
                process.terminate()
            for process in working:
                process.wait()
    for run in runs:
        for checkpoint in run.folder.glob("step-*"):
            shutil.rmtree(checkpoint)


def settle(run: Run, code: int) -> None:
    """Stop the study if a run failed."""
    if code or not run.finished():
        last = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise SystemExit("\n".join([f"error: {run.folder.name} ended with code {code}:", *last, f"all of it: {run.log}"]))


def results_of(runs: Sequence[Run], corpus: Corpus) -> dict[str, Any]:
    """Measure all runs: what is written to results.json."""
    import torch

    from dsv2.model.accounting import count_parameters

    assert corpus.validation is not None
    held_out = corpus.validation
    domain_bytes = {domain: held_out.num_bytes(domain) for domain in held_out.domains}
    arms: dict[str, Any] = {
        name: {"label": arm.label, "changes": dict(arm.changes), "seeds": [], "course": []} for name, arm in ARMS.items()
    }
    for run in runs:
        lines, recipe = read_metrics(run.folder / "metrics.jsonl"), run.recipe
        config = recipe.model_config_for(corpus.tokenizer)
        assert config.num_experts_per_tok is not None
        assigned = recipe.batch.sequences * recipe.run.seq_len * config.num_experts_per_tok
        figures = measures.figures_of(lines, limit=config.topk_group, assigned=assigned, domain_bytes=domain_bytes)
        arms[run.arm]["seeds"].append({"seed": run.seed} | figures)
        arms[run.arm]["course"].append(measures.course_of(lines, assigned=assigned))
    for arm in arms.values():
        arm["course"] = measures.merge_courses(arm["course"])
    recipe = runs[0].recipe
    config = recipe.model_config_for(corpus.tokenizer)
    counts = count_parameters(config)
    setup = {
        "parameters": counts.total, "activated": counts.activated_without_embedding, "moe_layers": config.num_moe_layers,
        "experts": config.n_routed_experts, "chosen": config.num_experts_per_tok, "devices": config.n_group,
        "steps": runs[0].num_steps, "tokens": recipe.run.tokens, "step_tokens": recipe.batch.sequences * recipe.run.seq_len,
        "seq_len": recipe.run.seq_len, "window": measures.WINDOW, "held_out_bytes": sum(domain_bytes.values()),
        "data": corpus.fingerprint[:16], "torch": torch.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }  # fmt: skip
    return {"setup": setup, "chance": even_router(config, setup["step_tokens"]), "arms": arms}


def even_router(config: ModelConfig, num_tokens: int) -> dict[str, float]:
    """Return figures of a router without any preference, random logits: what chance alone leaves uneven in a step."""
    import torch

    from dsv2.model.router import RouterStats, route
    from dsv2.train.router_load import router_load

    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(RANDOM_STEPS):
        routing = route(torch.randn(num_tokens, config.n_routed_experts or 0, generator=generator), config)
        load = router_load([RouterStats(0, routing.affinity.unsqueeze(0), routing.experts.unsqueeze(0))], config.n_group)
        assert load is not None
        lines.append({"router": load.metrics(config.n_group)})
    return measures.chance_of(lines)


def show_plan(runs: Sequence[Run], jobs: int) -> None:
    """Print what will be done."""
    rows = []
    for name, arm in ARMS.items():
        own = [run for run in runs if run.arm == name]
        done = sum(run.finished() for run in own)
        rows.append((name, " ".join(arm.overrides()) or "the recipe", len(own), done, sum(run.steps_done() > 0 for run in own) - done))
    table("plan", ("arm", "changes", "runs", "finished", "begun"), rows)
    first = runs[0]
    console().print(
        f"{len(runs)} runs of {first.num_steps} steps ({first.recipe.run.tokens:,} tokens), {jobs} at once, one thread each", markup=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; the same folder again continues")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; each takes one core")
    parser.add_argument("--data", type=Path, help="tokenizer/, train/ and validation/ as of dsv2 prepare; absent: the shipped corpus")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="also write DIR/balance/ and the tables of DIR/balance.md")
    parser.add_argument("--quick", action="store_true", help="a few steps of minute models, one seed")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    if options.docs is not None and not (options.docs / "balance.md").is_file():
        parser.error(f"--docs {options.docs}: it has no balance.md to write tables into")
    if options.docs is not None and options.quick:
        parser.error("--quick shows that the parts work, not what they do: its figures do not belong into --docs")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end with the study
    runs = plan(options.out, quick=options.quick)
    data = options.data or options.out / "data"
    try:
        if options.data is None:
            prepare_corpus(data, VOCABULARY)
        corpus = Corpus.open(data)
        if corpus.validation is None:
            parser.error(f"--data {data}: it has no folder validation/")
        for run in runs:
            run.check(corpus)
        show_plan(runs, options.jobs)
        run_all(runs, data, options.jobs)
    except Dsv2Error as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted\nhint: the same command goes on") from None
    text = measures.to_json(results_of(runs, corpus))
    results = json.loads(text)  # tables and pictures show what the file says, to its digits
    for folder in (options.out, *([options.docs / "balance"] if options.docs else [])):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "results.json", text)
        for name, picture in page.pictures(results).items():
            atomic_write(folder / name, picture)
    if options.docs:
        guide = options.docs / "balance.md"
        atomic_write(guide, page.fill(guide.read_text(encoding="utf-8"), results))
    print("\n\n".join(page.blocks(results).values()))


if __name__ == "__main__":
    main()
