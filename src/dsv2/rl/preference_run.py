"""A run on preferences over the loop of ``train/``: what a reward model and DPO have in common, from recipe to last checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv2.data.loader import Loader
from dsv2.errors import ConfigError
from dsv2.files import sole_use
from dsv2.metrics import MetricsLog
from dsv2.model.lora import adapt
from dsv2.model.transformer import Transformer
from dsv2.progress import console, table
from dsv2.rl.preference_data import PreferenceData
from dsv2.rl.preference_recipe import PreferenceRecipe
from dsv2.train.adapters import describe_trained, require_trainable
from dsv2.train.loop import LoopPlan, resume_from, train
from dsv2.train.losses import BalanceSection, Objective
from dsv2.train.memory import keep_freed_memory
from dsv2.train.optimizer import make_optimizer
from dsv2.train.plan import describe_rate
from dsv2.train.precision import autocast_dtype, require_determinism
from dsv2.train.run_folder import METRICS, Grounds, begin_run, settled_recipe
from dsv2.train.schedule import check_batch
from dsv2.train.start import Start, require_intact, start_hash


@dataclass(frozen=True, slots=True)
class Stage:
    """What tells one stage on preferences from another.

    Args:
        model: makes the model, without weights, on the CPU.
        fill: gives it the weights that the run begins from.
        objective: told the filled model, the loop's plan and the run's folder; returns what is minimised, and what gives the figures of
            held-out preferences.
        loss: of the plan, in words.
    """

    model: Callable[[Start], Transformer]
    fill: Callable[[Transformer, Start], None]
    objective: Callable[[Transformer, LoopPlan, Path], tuple[Objective, Callable[[Transformer], Mapping[str, Any]] | None]]
    loss: str


def run_preferences(
    recipe: PreferenceRecipe, start: Start, data: PreferenceData, out: Path, stage: Stage, *, tensorboard: bool = False
) -> Transformer:
    """Train, or go on training, the run in ``out``; return the model.

    Raises:
        ConfigError: the recipe does not fit model, data or machine, differs from the one that the run began with, or another process
            trains in ``out``.
    """
    with sole_use(out):
        return _run(recipe, start, data, out, stage, tensorboard)


def _run(recipe: PreferenceRecipe, start: Start, data: PreferenceData, out: Path, stage: Stage, tensorboard: bool) -> Transformer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = recipe.run.budget(len(data.rows))
    _check(recipe, start, data, budget.tokens // recipe.run.seq_len)
    grounds = Grounds(data.fingerprint, device, start_hash(start.folder))
    recipe = settled_recipe(recipe, out, grounds)
    metrics = MetricsLog(out / METRICS, tensorboard=tensorboard)
    require_determinism(recipe.run.deterministic)
    plan = LoopPlan(
        recipe.run.budget(len(data.rows)), recipe.batch, recipe.learning_rate, recipe.optimizer, BalanceSection(expert=0.0),
        autocast_dtype(recipe.run.precision), guard=recipe.guard,
    )  # fmt: skip
    model = stage.model(start)
    require_intact(start.folder)
    stage.fill(model, start)
    if recipe.lora is not None:  # an adapter's difference is 0 as yet: the objective finds the model that the run begins from
        adapt(model, recipe.lora, recipe.run.seed)
    model.to(device)
    begin_run(recipe, out, grounds)
    objective, evaluate = stage.objective(model, plan, out)
    optimizer = make_optimizer(model, recipe.optimizer, products=plan.autocast)
    state = resume_from(out, model, optimizer, recipe.run.keep)
    metrics.cut_back(state.step if state else 0)
    loader = Loader(data.rows, seed=recipe.run.seed, workers=recipe.run.loader_workers)
    print_plan(recipe, start, data, plan, model, stage.loss, state.step if state else 0)
    keep_freed_memory()
    try:
        train(
            model, optimizer, data.tokenizer, loader, plan, out,
            metrics=metrics, start=state, objective=objective, evaluate=evaluate,
        )  # fmt: skip
    finally:
        metrics.close()
    return model


def _check(recipe: PreferenceRecipe, start: Start, data: PreferenceData, most: int) -> None:
    check_batch(recipe.batch)
    smallest = recipe.batch.initial_sequences or recipe.batch.sequences
    if smallest > most:
        raise ConfigError(
            f"the preferences make {len(data.rows):,} rows, {most:,} in {recipe.run.epochs:g} epochs; a batch takes {smallest:,}",
            hint=f"lower batch.sequences to {max(1, most // 20)} or so, lower run.seq_len, or give more data",
        )
    longest = max(len(tokens) for rows in (data.rows, *data.held_out.values()) for tokens in rows.answers.tokens)
    context = start.config.max_position_embeddings
    if longest > context:
        raise ConfigError(f"an answer has {longest:,} tokens; the model's context holds {context:,}", hint=f"set run.seq_len={context}")
    require_trainable(start.config, recipe.lora, recipe.optimizer)


def print_plan(
    recipe: PreferenceRecipe, start: Start, data: PreferenceData, plan: LoopPlan, model: Transformer, loss: str, done: int
) -> None:
    """Print what was read and what the run is about to do; ``done`` steps of it are behind it."""
    for name, report in data.reports.items():
        for line in report.lines():
            console().print(f"{name}: {line}", markup=False, soft_wrap=True)
    steps, config, answers = plan.steps(), start.config, data.rows.answers
    held = ", ".join(f"{domain} {len(rows.answers.groups):,}" for domain, rows in data.held_out.items()) or "none"
    table(
        "plan",
        ("what", "value"),
        [
            ("model", f"{start.folder}: {config.num_hidden_layers} layers, d {config.hidden_size}"),
            ("trained", describe_trained(model, recipe.lora)),
            ("preferences", ", ".join(f"{domain} {count:,}" for domain, count in data.num_preferences.items())),
            ("answers", f"{len(answers):,}" + (f"; {answers.cut:,} without their beginning" if answers.cut else "")),
            *([("left out", ", ".join(f"{count:,}: {reason}" for reason, count in data.dropped.items()))] if data.dropped else []),
            ("held out", held),
            ("rows", f"{len(data.rows):,} of {recipe.run.seq_len} places, {data.rows.filled:.1%} filled"),
            ("loss", loss),
            ("steps", f"{len(steps):,} of {steps[-1][1]} rows; {recipe.run.epochs:g} epochs"),
            ("learning rate", describe_rate(recipe.learning_rate)),
            ("precision", f"{recipe.run.precision} products, fp32 weights and moments; {torch.get_num_threads()} threads"),
        ],
    )
    if done:
        console().print(f"resuming after step {done} of {len(steps)}")


def by_figure(domains: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Turn domain -> figure -> value into figure -> domain -> value, as metrics lines have it."""
    names = dict.fromkeys(name for figures in domains.values() for name in figures)
    return {name: {domain: figures[name] for domain, figures in domains.items() if name in figures} for name in names}
