"""The plan that a run prints before it begins."""

import torch

from dsv2.data.mixture import Mixture
from dsv2.data.packing import Rows
from dsv2.model.accounting import cache_elements_per_token, count_parameters
from dsv2.model.config import ModelConfig
from dsv2.progress import console, table
from dsv2.train.corpus import Corpus
from dsv2.train.loop import LoopPlan
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.schedule import LearningRate


def print_plan(recipe: PretrainRecipe, config: ModelConfig, corpus: Corpus, rows: Rows | Mixture, plan: LoopPlan, done: int) -> None:
    """Print what a run is about to do; ``done`` steps of it are behind it."""
    counts, steps = count_parameters(config), plan.steps()
    rate = recipe.learning_rate
    experts = f"{config.n_routed_experts or 0} routed experts top {config.num_experts_per_tok or 0}"
    lines = [
        ("model", f"{config.num_hidden_layers} layers, d {config.hidden_size}, {experts}"),
        ("parameters", f"{counts.total:,} total, {counts.activated_without_embedding:,} activated per token (input embedding not counted)"),
        ("latent cache", f"{cache_elements_per_token(config):,} numbers per token"),
        ("data", _describe_data(recipe, corpus, rows)),
        (
            "steps",
            f"{len(steps):,} of {steps[0][1]} to {steps[-1][1]} sequences of {recipe.run.seq_len} tokens; {recipe.run.tokens:,} tokens",
        ),
        ("learning rate", describe_rate(rate)),
        ("optimiser", "AdamW" if recipe.optimizer.kind == "adamw" else "Muon on the blocks' matrices, AdamW on the rest"),
        ("balance", _describe_balance(recipe, config)),
        ("precision", f"{recipe.run.precision} products, fp32 weights and moments; {torch.get_num_threads()} threads"),
    ]
    table("plan", ("what", "value"), lines)
    if done:
        console().print(f"resuming after step {done} of {len(steps)}")


def _describe_data(recipe: PretrainRecipe, corpus: Corpus, rows: Rows | Mixture) -> str:
    tokens = corpus.train.num_tokens()
    if isinstance(rows, Mixture) and recipe.mixture is not None:
        samples, stages = -(-recipe.run.tokens // recipe.run.seq_len), len(recipe.mixture.stages)
        read = ", ".join(f"{domain} {count:.2f}" for domain, count in rows.epochs(samples).items())
        last = rows.stage(samples - 1) + 1
        return f"{tokens:,} tokens; epochs by domain: {read}" + (f"; the run ends in stage {last} of {stages}" if last < stages else "")
    return f"{tokens:,} tokens in {', '.join(corpus.train.domains)}; {recipe.run.tokens / tokens:.2f} epochs"


def describe_rate(rate: LearningRate) -> str:
    """Say how a learning rate rises and falls."""
    if rate.decay == "steps" and not rate.decay_points:
        return f"{rate.peak:g} after {rate.warmup_steps} steps, constant"
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
