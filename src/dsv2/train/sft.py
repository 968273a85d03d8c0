"""Conversations to a chat model: supervised fine-tuning (section 4.1; spec 6.1); ``dsv2.samples`` makes the command line's stage of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dsv2.checkpoint.steps import checkpoints
from dsv2.data.loader import Loader
from dsv2.errors import ConfigError
from dsv2.files import sole_use
from dsv2.metrics import MetricsLog
from dsv2.model.config import ModelConfig
from dsv2.model.lora import adapt
from dsv2.model.transformer import Transformer
from dsv2.progress import console, table
from dsv2.train.adapters import describe_trained, require_trainable
from dsv2.train.loop import LoopPlan, Sample, resume_from, train
from dsv2.train.memory import keep_freed_memory
from dsv2.train.optimizer import make_optimizer
from dsv2.train.plan import describe_rate
from dsv2.train.precision import autocast_dtype, require_determinism
from dsv2.train.run_folder import METRICS, Grounds, begin_run, settled_recipe
from dsv2.train.schedule import check_batch
from dsv2.train.sft_data import ConversationData
from dsv2.train.sft_recipe import SftRecipe
from dsv2.train.start import Start, begin_weights, start_hash
from dsv2.train.validation import DomainLoss, score_rows


def fine_tune(
    recipe: SftRecipe,
    start: Start,
    data: ConversationData,
    out: Path,
    *,
    tensorboard: bool = False,
    sample: Callable[[Transformer], Sequence[Sample]] | None = None,
) -> Transformer:
    """Fine-tune, or go on fine-tuning, the run in ``out``; return the model, with its adapters where the recipe has any.

    Raises:
        ConfigError: the recipe does not fit model, data or machine, differs from the one that the run began with, or another process
            trains in ``out``.
    """
    with sole_use(out):
        return _fine_tune(recipe, start, data, out, tensorboard, sample)


def _fine_tune(
    recipe: SftRecipe,
    start: Start,
    data: ConversationData,
    out: Path,
    tensorboard: bool,
    sample: Callable[[Transformer], Sequence[Sample]] | None,
) -> Transformer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check(recipe, start.config, len(data.rows))
    grounds = Grounds(data.fingerprint, device, start_hash(start.folder))
    recipe = settled_recipe(recipe, out, grounds)
    metrics = MetricsLog(out / METRICS, tensorboard=tensorboard)
    require_determinism(recipe.run.deterministic)
    plan = LoopPlan(
        recipe.run.budget(len(data.rows)), recipe.batch, recipe.learning_rate, recipe.optimizer, recipe.balance,
        autocast_dtype(recipe.run.precision), guard=recipe.guard,
    )  # fmt: skip
    model = Transformer(start.config)
    if recipe.lora is not None or not checkpoints(out):  # adapters add to the weights that the run began from, on resuming, too
        begin_weights(model, str(start.folder), recipe.run.seed)
    if recipe.lora is not None:
        adapt(model, recipe.lora, recipe.run.seed)
    model.to(device)
    optimizer = make_optimizer(model, recipe.optimizer, products=plan.autocast)
    begin_run(recipe, out, grounds)
    state = resume_from(out, model, optimizer, recipe.run.keep)
    metrics.cut_back(state.step if state else 0)
    loader = Loader(data.rows, seed=recipe.run.seed, workers=recipe.run.loader_workers)
    print_plan(recipe, start, data, plan, model, state.step if state else 0)
    keep_freed_memory()
    try:
        train(
            model, optimizer, data.tokenizer, loader, plan, out,
            metrics=metrics, start=state, validate=_validator(recipe, data, plan), sample=sample,
        )  # fmt: skip
    finally:
        metrics.close()
    return model


def _check(recipe: SftRecipe, config: ModelConfig, num_rows: int) -> None:
    check_batch(recipe.batch)
    most = recipe.run.budget(num_rows).tokens // recipe.run.seq_len
    smallest = recipe.batch.initial_sequences or recipe.batch.sequences
    if smallest > most:
        raise ConfigError(
            f"the conversations make {num_rows:,} rows, {most:,} in {recipe.run.epochs:g} epochs; a batch takes {smallest:,}",
            hint=f"lower batch.sequences to {max(1, most // 20)} or so, lower run.seq_len, or give more data",
        )
    require_trainable(config, recipe.lora, recipe.optimizer)


def _validator(recipe: SftRecipe, data: ConversationData, plan: LoopPlan) -> Callable[[Transformer], dict[str, DomainLoss]] | None:
    if not data.held_out:
        return None
    return lambda model: {
        domain: score_rows(model, held.rows, held.num_bytes, batch_rows=recipe.batch.micro_sequences, autocast=plan.autocast)
        for domain, held in data.held_out.items()
    }


def print_plan(recipe: SftRecipe, start: Start, data: ConversationData, plan: LoopPlan, model: Transformer, done: int) -> None:
    """Print what was read and what the run is about to do; ``done`` steps of it are behind it."""
    for name, report in data.reports.items():
        for line in report.lines():
            console().print(f"{name}: {line}", markup=False, soft_wrap=True)
    steps, config, samples, fim = plan.steps(), start.config, data.rows.samples, data.fim
    by_domain = ", ".join(f"{domain} {count:,}" for domain, count in data.num_conversations.items())
    held = ", ".join(f"{domain} {len(held.rows.samples):,}" for domain, held in data.held_out.items()) or "none"
    told = f"{fim.used:,} documents, {fim.used / len(samples):.1%} of the samples; {fim.too_long:,} passed over, longer than a row"
    balance = recipe.balance
    rows = [
        ("model", f"{start.folder}: {config.num_hidden_layers} layers, d {config.hidden_size}"),
        ("trained", describe_trained(model, recipe.lora)),
        ("conversations", by_domain + (f"; {samples.cut:,} cut to a row" if samples.cut else "")),
        *([("fill in the middle", told)] if fim.used else []),
        ("held out", held),
        ("rows", f"{len(data.rows):,} of {recipe.run.seq_len} places, {data.rows.filled:.1%} filled"),
        ("to learn", f"{samples.num_labels:,} of {samples.num_places:,} tokens: what the assistant writes"),
        ("steps", f"{len(steps):,} of {steps[-1][1]} rows; {recipe.run.epochs:g} epochs"),
        ("learning rate", describe_rate(recipe.learning_rate)),
        ("balance", f"expert {balance.expert:g}, device {balance.device:g}, communication {balance.communication:g}"),
        ("precision", f"{recipe.run.precision} products, fp32 weights and moments; {torch.get_num_threads()} threads"),
    ]
    table("plan", ("what", "value"), rows)
    if done:
        console().print(f"resuming after step {done} of {len(steps)}")
