"""Token shards to a base model (section 3.1); ``dsv2.samples`` makes the stage of the command line of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dsv2.checkpoint.steps import checkpoints
from dsv2.data.loader import Loader
from dsv2.errors import ConfigError
from dsv2.files import sole_use
from dsv2.metrics import MetricsLog
from dsv2.model.accounting import count_parameters
from dsv2.model.config import ModelConfig
from dsv2.model.transformer import Transformer
from dsv2.train.corpus import Corpus, training_rows
from dsv2.train.loop import LoopPlan, Sample, resume_from, train
from dsv2.train.memory import keep_freed_memory, require_training_memory
from dsv2.train.muon import hidden_matrices
from dsv2.train.optimizer import make_optimizer
from dsv2.train.plan import print_plan
from dsv2.train.precision import autocast_dtype, require_determinism
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.run_folder import METRICS, Grounds, begin_run, settled_recipe
from dsv2.train.schedule import check_batch
from dsv2.train.start import begin_weights, check_start
from dsv2.train.validation import DomainLoss, validate


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
        ConfigError: the recipe does not fit the data or differs from the one that the run began with, or another process trains in ``out``.
    """
    with sole_use(out):
        return _pretrain(recipe, corpus, out, tensorboard, sample)


def _pretrain(
    recipe: PretrainRecipe, corpus: Corpus, out: Path, tensorboard: bool, sample: Callable[[Transformer], Sequence[Sample]] | None
) -> Transformer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, rows = checked_config(recipe, corpus), training_rows(corpus, recipe.run, recipe.mixture)
    fresh = recipe.model.start is not None and not checkpoints(out)
    start_hash = check_start(recipe.model.start or "", config, corpus.tokenizer) if fresh else None
    grounds = Grounds(corpus.fingerprint, device, start_hash)
    recipe = settled_recipe(recipe, out, grounds)
    metrics = MetricsLog(out / METRICS, tensorboard=tensorboard)
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
    begin_run(recipe, out, grounds)
    start = resume_from(out, model, optimizer, recipe.run.keep)
    metrics.cut_back(start.step if start else 0)
    loader = Loader(rows, seed=recipe.run.seed, workers=recipe.run.loader_workers)
    print_plan(recipe, config, corpus, rows, plan, start.step if start else 0)
    keep_freed_memory()  # from here on: what building the model freed should go back
    try:
        train(
            model, optimizer, corpus.tokenizer, loader, plan, out,
            metrics=metrics, start=start, validate=_validator(corpus, recipe, plan), sample=sample,
        )  # fmt: skip
    finally:
        metrics.close()
    return model


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
    require_training_memory(_training_bytes(recipe, config), hint="choose a smaller preset, such as nano or small")
    return config


def _validator(corpus: Corpus, recipe: PretrainRecipe, plan: LoopPlan) -> Callable[[Transformer], dict[str, DomainLoss]] | None:
    if corpus.validation is None:
        return None
    held_out = corpus.validation
    return lambda model: validate(model, held_out, recipe.run.seq_len, batch_rows=recipe.batch.micro_sequences, autocast=plan.autocast)


def _training_bytes(recipe: PretrainRecipe, config: ModelConfig) -> int:
    """Return the bytes of fp32 weights, gradients and moments: two a parameter, or one where Muon moves it."""
    needed = 16 * count_parameters(config).total
    if recipe.optimizer.kind == "muon":
        with torch.device("meta"):
            model = Transformer(config)
        needed -= 4 * sum(model.get_parameter(name).numel() for name in hidden_matrices(model))
    return needed
