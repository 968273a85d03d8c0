"""Samples: what a model writes while it trains, drawn with the engine; stages of ``dsv2 pretrain`` and ``dsv2 sft``.

The training room stands upstream of the engine and takes a callable. Samples draw from generators of their own: weights are the same
with and without them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dsv2.config import load_recipe
from dsv2.engine.engine import Engine
from dsv2.engine.request import Request, SamplingParams
from dsv2.errors import ConfigError
from dsv2.model.lora import merged
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.chat import render, render_fim
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.corpus import Corpus
from dsv2.train.loop import Sample
from dsv2.train.pretrain import pretrain
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.run_folder import load_stage_recipe, require_resume
from dsv2.train.samples import SamplesSection
from dsv2.train.sft import fine_tune
from dsv2.train.sft_data import open_conversations
from dsv2.train.sft_recipe import SftRecipe
from dsv2.train.start import open_start

HOLE = "\u27e8 ? \u27e9"  # where a sample's text belongs, in the prompt as people see it


def run(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    tensorboard: bool = False,
) -> None:
    """Stage of ``dsv2 pretrain``: load the recipe and the data, print the plan, train, and let the model write on the way.

    Raises:
        ConfigError: a wrong recipe, or a run folder that exists and may not be continued; a prompt that the model's context cannot hold,
            or a hole without markers in the tokenizer.
        DataError: missing or damaged data.
    """
    loaded = load_recipe(recipe, PretrainRecipe, folder="pretrain", overrides=overrides)
    require_resume(out, resume)
    corpus = Corpus.open(data)
    pretrain(loaded, corpus, out, tensorboard=tensorboard, sample=recipe_sampler(loaded, corpus.tokenizer))


def sft(
    target: str,
    overrides: Sequence[str] = (),
    *,
    data: Sequence[Path],
    out: Path,
    validation: Sequence[Path] = (),
    fim_documents: Sequence[Path] = (),
    resume: bool = False,
    tensorboard: bool = False,
) -> None:
    """Stage of ``dsv2 sft``: load recipe, model and conversations, print report and plan, train, and let the model answer on the way.

    Args:
        target: a recipe's name or file, whose model.start an override may give; or the model, which then has the recipe "default".
        overrides: of the recipe.
        data: files and folders of conversations.
        out: the run's folder.
        validation: held-out conversations.
        fim_documents: files of code to fill in the middle of.
        resume: go on with the run in ``out``.
        tensorboard: write metrics for TensorBoard as well.

    Raises:
        ConfigError: a wrong recipe, or a run folder that exists and may not be continued; a question that the context cannot hold.
        CheckpointError: there is no such model.
        DataError: missing or damaged conversations, or none to learn from.
    """
    recipe = load_stage_recipe(target, SftRecipe, "sft", overrides)
    require_resume(out, resume)
    recipe, start = open_start(recipe)
    conversations = open_conversations(recipe, start.tokenizer, data, validation=validation, fim_documents=fim_documents)
    sample = answer_sampler(recipe, start.config.max_position_embeddings, start.tokenizer)
    fine_tune(recipe, start, conversations, out, tensorboard=tensorboard, sample=sample)


def recipe_sampler(recipe: PretrainRecipe, tokenizer: Tokenizer) -> Callable[[Transformer], Sequence[Sample]]:
    """Return a function that lets a model continue the recipe's prompts and fill its holes.

    Raises:
        ConfigError: a prompt and ``samples.max_tokens`` exceed the context, or the tokenizer has no FIM markers.
    """
    prompts = [(prompt, tokenizer.encode(prompt)) for prompt in recipe.samples.prompts] + _holes(recipe.samples, tokenizer)
    return _sampler(recipe.samples, prompts, recipe.model_config_for(tokenizer).max_position_embeddings, tokenizer, recipe.run.seed)


def answer_sampler(recipe: SftRecipe, context: int, tokenizer: Tokenizer) -> Callable[[Transformer], Sequence[Sample]]:
    """Return a function that lets a model answer the recipe's questions, as its conversations are written, and fill its holes.

    Raises:
        ConfigError: a question and ``samples.max_tokens`` exceed the context, or the tokenizer lacks the markers.
    """

    def asked(question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        return render(tokenizer, messages, template=recipe.data.template, add_generation_prompt=True).tokens

    prompts = [(question, asked(question)) for question in recipe.samples.prompts] + _holes(recipe.samples, tokenizer)
    return _sampler(recipe.samples, prompts, context, tokenizer, recipe.run.seed)


def _sampler(
    section: SamplesSection, prompts: Sequence[tuple[str, list[int]]], context: int, tokenizer: Tokenizer, seed: int
) -> Callable[[Transformer], Sequence[Sample]]:
    for shown, ids in prompts:
        if len(ids) + section.max_tokens > context:
            raise ConfigError(
                f"samples: the prompt {shown!r} has {len(ids)} tokens, max_tokens = {section.max_tokens}; the context holds {context}",
                hint="shorten samples.prompts or samples.fill, or lower samples.max_tokens",
            )

    def sample(model: Transformer) -> list[Sample]:
        texts = write(model, tokenizer, [ids for _, ids in prompts], _sampling(section, seed)) if prompts else []
        return [(shown, text) for (shown, _), text in zip(prompts, texts, strict=True)]

    return sample


def write(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[str]:
    """Continue prompts given as ids, number n with ``sampling.seed + n``; the model's training mode is left as it was."""
    assert sampling.seed is not None
    was_training = model.training
    requests = [Request(str(n), tuple(ids), replace(sampling, seed=(sampling.seed + n) % 2**63)) for n, ids in enumerate(prompts)]
    try:
        with merged(model):
            engine = Engine(model.eval(), tokenizer, max_batch=len(prompts))
            return [output.text for output in engine.generate(requests)]
    finally:
        model.train(was_training)


def _holes(section: SamplesSection, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Return each hole as people see it and its ids."""
    return [(f"{hole.prefix}{HOLE}{hole.suffix}", list(render_fim(tokenizer, hole.prefix, hole.suffix).tokens)) for hole in section.fill]


def _sampling(section: SamplesSection, seed: int) -> SamplingParams:
    return SamplingParams(temperature=section.temperature, top_p=section.top_p, max_tokens=section.max_tokens, seed=seed)
