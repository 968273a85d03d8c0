"""Samples: what a model writes while it trains, drawn with the engine; stage of ``dsv2 pretrain``.

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
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.chat import render_fim
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.corpus import Corpus
from dsv2.train.loop import Sample
from dsv2.train.pretrain import pretrain
from dsv2.train.recipe import PretrainRecipe
from dsv2.train.run_folder import RECIPE
from dsv2.train.samples import SamplesSection

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
    exists = (out / RECIPE).exists()
    if exists and not resume:
        raise ConfigError(f"{out} already holds a run", hint="continue it with --resume, or choose another --out")
    if resume and not exists:
        raise ConfigError(f"{out} holds no run to resume: it has no {RECIPE}", hint="leave --resume out to begin one there")
    corpus = Corpus.open(data)
    pretrain(loaded, corpus, out, tensorboard=tensorboard, sample=recipe_sampler(loaded, corpus.tokenizer))


def recipe_sampler(recipe: PretrainRecipe, tokenizer: Tokenizer) -> Callable[[Transformer], Sequence[Sample]]:
    """Return a function that lets a model continue the recipe's prompts and fill its holes.

    Raises:
        ConfigError: a prompt and ``samples.max_tokens`` exceed the context, or the tokenizer has no FIM markers.
    """
    section = recipe.samples
    prompts = _prompts(section, tokenizer)
    context = recipe.model_config_for(tokenizer).max_position_embeddings
    for shown, ids in prompts:
        if len(ids) + section.max_tokens > context:
            raise ConfigError(
                f"samples: the prompt {shown!r} has {len(ids)} tokens, max_tokens = {section.max_tokens}; the context holds {context}",
                hint="shorten samples.prompts or samples.fill, or lower samples.max_tokens",
            )

    def sample(model: Transformer) -> list[Sample]:
        texts = write(model, tokenizer, [ids for _, ids in prompts], _sampling(section, recipe.run.seed)) if prompts else []
        return [(shown, text) for (shown, _), text in zip(prompts, texts, strict=True)]

    return sample


def write(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[str]:
    """Continue prompts given as ids, number n with ``sampling.seed + n``; the model's training mode is left as it was."""
    assert sampling.seed is not None
    was_training = model.training
    engine = Engine(model.eval(), tokenizer, max_batch=len(prompts))
    requests = [Request(str(n), tuple(ids), replace(sampling, seed=(sampling.seed + n) % 2**63)) for n, ids in enumerate(prompts)]
    try:
        return [output.text for output in engine.generate(requests)]
    finally:
        model.train(was_training)


def _prompts(section: SamplesSection, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Return each prompt as people see it and its ids."""
    holes = [(f"{hole.prefix}{HOLE}{hole.suffix}", list(render_fim(tokenizer, hole.prefix, hole.suffix).tokens)) for hole in section.fill]
    return [(prompt, tokenizer.encode(prompt)) for prompt in section.prompts] + holes


def _sampling(section: SamplesSection, seed: int) -> SamplingParams:
    return SamplingParams(temperature=section.temperature, top_p=section.top_p, max_tokens=section.max_tokens, seed=seed)
