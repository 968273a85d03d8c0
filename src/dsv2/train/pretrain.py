"""Stage: token shards to a base model (section 3.1).

RUN/recipe.toml    the recipe, resolved      RUN/plan.json      threads, device, fingerprint of the data
RUN/metrics.jsonl  one line per event        RUN/step-N/        checkpoints
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from dsv2.checkpoint.steps import checkpoints
from dsv2.config import Section, dump_toml, load_recipe
from dsv2.data.loader import Loader
from dsv2.data.mixture import Mixture, MixtureRules
from dsv2.data.packing import Rows
from dsv2.data.shards import TokenShards
from dsv2.errors import ConfigError, DataError
from dsv2.files import atomic_write, atomic_write_json, clear_leftovers
from dsv2.model.accounting import cache_elements_per_token, count_parameters
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.presets import preset
from dsv2.progress import MetricsLog, console, table
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.dropping import DroppingSection
from dsv2.train.guard import GuardSection
from dsv2.train.loop import MAY_CHANGE, LoopPlan, RunSection, Sample, resume_from, train
from dsv2.train.losses import BalanceSection
from dsv2.train.memory import keep_freed_memory
from dsv2.train.optimizer import OptimizerSection, make_optimizer
from dsv2.train.precision import autocast_dtype, make_deterministic, require_determinism, resolve_precision
from dsv2.train.samples import SamplesSection
from dsv2.train.schedule import BatchSize, LearningRate, check_batch
from dsv2.train.start import begin_weights, check_start
from dsv2.train.validation import DomainLoss, validate

RECIPE, PLAN = "recipe.toml", "plan.json"
_WRITTEN = r"recipe\.toml|plan\.json|metrics\.jsonl|step-\d+|diverged-step-\d+\.npz"  # what a killed run may have been writing
PAPER_DEVIATION, PAPER_WIDTH = 0.006, 5120  # of V2's initial values, and its hidden size (section 3.1.2)


class ModelSection(Section):
    """Which model: a preset, and fields of its config.json to replace."""

    preset: str = Field(description="name of a preset")
    overrides: dict[str, Any] = Field(default_factory=dict, description="config.json fields to replace")
    init: Literal["config", "width"] = Field(
        default="config", description="initial deviation: the config's initializer_range, or 0.006 sqrt(5120 / hidden_size)"
    )
    start: str | None = Field(
        default=None, description="checkpoint to continue from, weights only; absent: initial values; empty: must be given"
    )


class PretrainRecipe(Section):
    """A pre-training run: one dial, the preset and the token budget, and the values that go with it."""

    model: ModelSection
    run: RunSection
    batch: BatchSize
    learning_rate: LearningRate
    optimizer: OptimizerSection = OptimizerSection()
    balance: BalanceSection = BalanceSection()
    dropping: DroppingSection = DroppingSection()
    guard: GuardSection = GuardSection()
    mixture: MixtureRules | None = Field(default=None, description="Weights of the domains; without it every row once an epoch.")
    samples: SamplesSection = SamplesSection()

    def model_config_for(self, tokenizer: Tokenizer | None) -> ModelConfig:
        """Return the model's config, its vocabulary that of the tokenizer.

        Raises:
            ConfigError: unknown preset or field, sizes that do not fit, or a vocabulary other than the tokenizer's.
        """
        overrides = dict(self.model.overrides)
        if tokenizer is not None:
            given = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            for name, value in given.items():
                if overrides.get(name, value) != value:
                    raise ConfigError(
                        f"model.overrides.{name} = {overrides[name]!r}; the data's tokenizer says {value}", hint="leave it out"
                    )
            overrides |= given
        if self.model.init == "width":
            if "initializer_range" in overrides:
                raise ConfigError(
                    f"model.init = 'width' and model.overrides.initializer_range = {overrides['initializer_range']} both set the deviation",
                    hint="state one of them",
                )
            hidden = preset(self.model.preset, **overrides).hidden_size
            overrides["initializer_range"] = PAPER_DEVIATION * math.sqrt(PAPER_WIDTH / hidden)
        return preset(self.model.preset, **overrides)


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a run reads: training shards, held-out shards where there are any, and the tokenizer that made both."""

    train: TokenShards
    validation: TokenShards | None
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of all the data: equal fingerprints are equal data."""
        parts = [self.train.fingerprint, self.validation.fingerprint if self.validation else "", self.tokenizer.fingerprint]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Open ``folder``, which holds tokenizer/, train/ and, if wanted, validation/.

        Raises:
            DataError: a part is missing or damaged, or the shards were written with another tokenizer.
        """
        for part in ("tokenizer", "train"):
            if not (folder / part).is_dir():
                raise DataError(
                    f"{folder} has no folder {part}/",
                    hint=f"make {folder}/tokenizer with `dsv2 tokenizer`, then {folder}/train and {folder}/validation with `dsv2 prepare`",
                )
        tokenizer = Tokenizer.load(folder / "tokenizer")
        training = TokenShards.open(folder / "train")
        held_out = TokenShards.open(folder / "validation") if (folder / "validation").is_dir() else None
        for shards in (training, held_out):
            if shards is not None:
                shards.expect_tokenizer(tokenizer.fingerprint)
        return cls(training, held_out, tokenizer)


def run(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    tensorboard: bool = False,
    sampler: Callable[[PretrainRecipe, Tokenizer], Callable[[Transformer], Sequence[Sample]]] | None = None,
) -> None:
    """Load the recipe and the data, print the plan, train; ``sampler`` makes what draws the recipe's samples.

    Raises:
        ConfigError: a wrong recipe, or a run folder that exists and may not be continued.
        DataError: missing or damaged data.
    """
    make_deterministic()
    loaded = load_recipe(recipe, PretrainRecipe, folder="pretrain", overrides=overrides)
    exists = (out / RECIPE).exists()
    if exists and not resume:
        raise ConfigError(f"{out} already holds a run", hint="continue it with --resume, or choose another --out")
    if resume and not exists:
        raise ConfigError(f"{out} holds no run to resume: it has no {RECIPE}", hint="leave --resume out to begin one there")
    corpus = Corpus.open(Path(data))
    pretrain(loaded, corpus, Path(out), tensorboard=tensorboard, sample=sampler(loaded, corpus.tokenizer) if sampler else None)


def pretrain(
    recipe: PretrainRecipe,
    corpus: Corpus,
    out: Path,
    *,
    tensorboard: bool = False,
    sample: Callable[[Transformer], Sequence[Sample]] | None = None,
) -> Transformer:
    """Train, or go on training, the run in ``out``; return the model.

    Raises:
        ConfigError: the recipe does not fit the data, or differs from the one that the run began with.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, rows = checked_config(recipe, corpus), _rows(recipe, corpus)
    fresh = recipe.model.start is not None and not checkpoints(out)
    start_hash = check_start(recipe.model.start or "", config, corpus.tokenizer) if fresh else None
    recipe = _settled(recipe, corpus, out, device, start_hash)
    metrics = MetricsLog(out / "metrics.jsonl", tensorboard=tensorboard)
    require_determinism(recipe.run.deterministic)
    plan = LoopPlan(
        recipe.run, recipe.batch, recipe.learning_rate, recipe.optimizer, recipe.balance, autocast_dtype(recipe.run.precision),
        recipe.dropping, recipe.guard,
    )  # fmt: skip
    model = Transformer(config)
    if not checkpoints(out):
        begin_weights(model, recipe.model.start, recipe.run.seed)
    model.to(device)
    optimizer = make_optimizer(model, recipe.optimizer, products=plan.autocast)
    clear_leftovers(out, _WRITTEN)  # first: the space that they take may be what the run lacks
    _begin(recipe, corpus, out, device, start_hash)
    start = resume_from(out, model, optimizer, recipe.run.keep)
    metrics.cut_back(start.step if start else 0)
    loader = Loader(rows, seed=recipe.run.seed, workers=recipe.run.loader_workers)
    _print_plan(recipe, config, corpus, plan, start.step if start else 0)
    keep_freed_memory()  # from here on: what building the model freed should go back
    try:
        train(
            model, optimizer, corpus.tokenizer, loader, plan, out,
            metrics=metrics, start=start, validate=_validator(corpus, recipe, plan), sample=sample,
        )  # fmt: skip
    finally:
        metrics.close()
    return model


def _rows(recipe: PretrainRecipe, corpus: Corpus) -> Rows | Mixture:
    """Return what is read, after checking that no domain is read more often than it may be."""
    if recipe.mixture is None:
        return Rows(corpus.train, recipe.run.seq_len)
    mixture = Mixture(corpus.train, recipe.run.seq_len, recipe.mixture, seed=recipe.run.seed)
    mixture.epochs(-(-recipe.run.tokens // recipe.run.seq_len))
    return mixture


def checked_config(recipe: PretrainRecipe, corpus: Corpus) -> ModelConfig:
    """Return the model's config after checking what a recipe can get wrong against data and machine.

    Raises:
        ConfigError: something does not fit.
    """
    check_batch(recipe.batch)
    config, balance = recipe.model_config_for(corpus.tokenizer), recipe.balance
    if recipe.run.seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"run.seq_len = {recipe.run.seq_len} exceeds max_position_embeddings = {config.max_position_embeddings}",
            hint=f"set model.overrides.max_position_embeddings={recipe.run.seq_len}",
        )
    if (balance.device or balance.communication) and (config.n_group == 1 or config.num_moe_layers == 0):
        raise ConfigError(
            f"balance.device = {balance.device:g}, balance.communication = {balance.communication:g}: both need n_group > 1 and MoE layers"
        )
    if recipe.dropping.capacity_factor is not None and (config.n_group == 1 or config.num_moe_layers == 0):
        raise ConfigError(
            f"dropping.capacity_factor = {recipe.dropping.capacity_factor:g}: a device's budget needs n_group > 1 and MoE layers",
            hint="leave dropping.capacity_factor out",
        )
    per_parameter = 16 if recipe.optimizer.kind == "adamw" else 12  # fp32 weight, gradient, two moments; Muon keeps one
    needed, present = per_parameter * count_parameters(config).total, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available() and needed > present:
        raise ConfigError(
            f"weights, gradients and moments take {needed / 1e9:,.0f} GB; this machine has {present / 1e9:,.0f} GB",
            hint="choose a smaller preset, such as nano or small",
        )
    return config


def _settled(recipe: PretrainRecipe, corpus: Corpus, out: Path, device: torch.device, start_hash: str | None) -> PretrainRecipe:
    """Resolve what depends on the machine; a run that goes on keeps what it began with, and its thread count.

    Raises:
        ConfigError: the run in ``out`` began with another recipe or other data, or there are checkpoints without a recipe.
    """
    settled = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"precision": resolve_precision(recipe.run.precision, device)})}
    )
    if not (out / RECIPE).exists():
        if checkpoints(out):
            raise ConfigError(f"{out} holds checkpoints but no {RECIPE}: they belong to an unknown run", hint="choose another --out")
        return settled
    began = load_recipe(str(out / RECIPE), PretrainRecipe, folder="pretrain")
    wanted = settled if recipe.run.precision != "auto" else _same(settled, began, "precision")
    changed = _differences(began.model_dump(), _same(wanted, began, *MAY_CHANGE).model_dump())
    if changed:
        hint = "resume with the same recipe, or choose another --out"
        raise ConfigError(f"{out} began with another recipe; different: {', '.join(changed)}", hint=hint)
    plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    if plan["data"] != corpus.fingerprint:
        raise ConfigError(
            f"{out} began with other data: {plan['data'][:16]}, now {corpus.fingerprint[:16]}", hint="give the --data it began with"
        )
    if start_hash is not None and plan.get("start") != start_hash:
        raise ConfigError(
            f"{out} began from other weights than model.start = {recipe.model.start!r} holds now", hint="choose another --out"
        )
    if plan["threads"] != torch.get_num_threads():
        console().print(f"going on with {plan['threads']} threads, as the run began: sums depend on their number", markup=False)
        torch.set_num_threads(plan["threads"])
    return _same(began, settled, *MAY_CHANGE)


def _begin(recipe: PretrainRecipe, corpus: Corpus, out: Path, device: torch.device, start_hash: str | None) -> None:
    """Save recipe and plan of a run that begins now: last of all preparations, so that a failed start leaves nothing behind."""
    if not (out / RECIPE).exists():
        plan = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(device), "data": corpus.fingerprint}
        atomic_write_json(out / PLAN, plan | ({"start": start_hash} if start_hash else {}))
        atomic_write(out / RECIPE, dump_toml(recipe))


def _same(recipe: PretrainRecipe, other: PretrainRecipe, *names: str) -> PretrainRecipe:
    """Return the recipe with these fields of another's ``run``."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={name: getattr(other.run, name) for name in names})})


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key} ({a!r} then, {b!r} now)")
    return changed


def _validator(corpus: Corpus, recipe: PretrainRecipe, plan: LoopPlan) -> Callable[[Transformer], dict[str, DomainLoss]] | None:
    if corpus.validation is None:
        return None
    held_out = corpus.validation
    return lambda model: validate(model, held_out, recipe.run.seq_len, batch_rows=recipe.batch.micro_sequences, autocast=plan.autocast)


def _print_plan(recipe: PretrainRecipe, config: ModelConfig, corpus: Corpus, plan: LoopPlan, done: int) -> None:
    counts, steps = count_parameters(config), plan.steps()
    rate = recipe.learning_rate
    experts = f"{config.n_routed_experts or 0} routed experts top {config.num_experts_per_tok or 0}"
    rows = [
        ("model", f"{config.num_hidden_layers} layers, d {config.hidden_size}, {experts}"),
        ("parameters", f"{counts.total:,} total, {counts.activated_without_embedding:,} activated per token (input embedding not counted)"),
        ("latent cache", f"{cache_elements_per_token(config):,} numbers per token"),
        ("data", _describe_data(recipe, corpus)),
        (
            "steps",
            f"{len(steps):,} of {steps[0][1]} to {steps[-1][1]} sequences of {recipe.run.seq_len} tokens; {recipe.run.tokens:,} tokens",
        ),
        ("learning rate", _describe_rate(rate)),
        ("optimiser", "AdamW" if recipe.optimizer.kind == "adamw" else "Muon on the blocks' matrices, AdamW on the rest"),
        ("balance", _describe_balance(recipe, config)),
        ("precision", f"{recipe.run.precision} products, fp32 weights and moments; {torch.get_num_threads()} threads"),
    ]
    table("plan", ("what", "value"), rows)
    if done:
        console().print(f"resuming after step {done} of {len(steps)}")


def _describe_data(recipe: PretrainRecipe, corpus: Corpus) -> str:
    tokens, rows = corpus.train.num_tokens(), _rows(recipe, corpus)
    if isinstance(rows, Mixture) and recipe.mixture is not None:
        samples, stages = -(-recipe.run.tokens // recipe.run.seq_len), len(recipe.mixture.stages)
        read = ", ".join(f"{domain} {count:.2f}" for domain, count in rows.epochs(samples).items())
        last = rows.stage(samples - 1) + 1
        return f"{tokens:,} tokens; epochs by domain: {read}" + (f"; the run ends in stage {last} of {stages}" if last < stages else "")
    return f"{tokens:,} tokens in {', '.join(corpus.train.domains)}; {recipe.run.tokens / tokens:.2f} epochs"


def _describe_rate(rate: LearningRate) -> str:
    fall = (
        f"x{rate.decay_factor:g} at {list(rate.decay_points)} of the tokens"
        if rate.decay == "steps"
        else f"cosine to x{rate.final_share:g}"
    )
    return f"{rate.peak:g} after {rate.warmup_steps} steps, {fall}"


def _describe_balance(recipe: PretrainRecipe, config: ModelConfig) -> str:
    """Say what keeps the experts even, and that one process stands for all devices where the recipe speaks of devices."""
    balance, factor = recipe.balance, recipe.dropping.capacity_factor
    text = f"expert {balance.expert:g}, device {balance.device:g}, communication {balance.communication:g} per {balance.scope}"
    if factor is not None:
        text += f"; devices drop above {factor:g} x their mean load, {recipe.dropping.protected_share:.0%} of sequences never"
    speaks = balance.device or balance.communication or factor is not None
    return text + (f"; this process simulates all {config.n_group} devices" if speaks else "")
