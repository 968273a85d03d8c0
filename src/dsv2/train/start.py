"""Where a run begins: with weights drawn by its seed, or with a checkpoint that it continues (Coder-V2; spec 9.1) or tunes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dsv2.checkpoint.folder import ModelFolder, open_folder
from dsv2.checkpoint.huggingface import fill_model
from dsv2.checkpoint.manifest import MANIFEST, verify_manifest
from dsv2.checkpoint.source import FolderSource
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import ConfigError
from dsv2.files import sha256_of
from dsv2.model.config import Head, ModelConfig
from dsv2.model.init import initialise
from dsv2.model.transformer import Transformer
from dsv2.presets import same_shape
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.tuning_recipe import TuningRecipe

R = TypeVar("R", bound=TuningRecipe)


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins from, opened without its weights."""

    opened: ModelFolder
    tokenizer: Tokenizer

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.opened.path

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.opened.config


def open_start(recipe: R, head: Head | None = "lm_head") -> tuple[R, Start]:
    """Open the checkpoint that a recipe begins from, without its weights.

    Args:
        recipe: of any stage that begins from a model.
        head: that the model must have; None: any.

    Returns:
        The recipe with the lengths that it leaves open, by the model's context: data are read and runs begun with this one. And the model.

    Raises:
        ConfigError: the recipe names none, or its rows are longer than the model's context allows.
        CheckpointError: there is none, it is damaged, of another head, or it has no tokenizer.
    """
    if not recipe.model.start:
        raise ConfigError("model.start is empty: which model is it to begin from?", hint="name its checkpoint or run: model.start=PATH")
    folder = latest_checkpoint(recipe.model.start)
    opened = open_folder(folder, head)
    return recipe.fitted(opened.config.max_position_embeddings), Start(opened, Tokenizer.load(folder))


def check_start(start: str, config: ModelConfig, tokenizer: Tokenizer) -> str:
    """Check that a run can continue from a checkpoint; return a hash of it for the run's plan.

    Args:
        start: path of a checkpoint, run or tour, or a model id.
        config: of the run's model.
        tokenizer: of the run's data.

    Returns:
        sha256 of its manifest, or of its config.json where it has none.

    Raises:
        ConfigError: ``start`` is empty, or the checkpoint is of another shape or another tokenizer.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    if not start:
        raise ConfigError(
            "model.start is empty: this recipe continues a pre-trained model", hint="name its checkpoint: model.start=PATH, weights only"
        )
    folder = latest_checkpoint(start)
    if (folder / "tokenizer.json").is_file() and Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"model.start = {start!r} has another tokenizer than the data", hint="prepare the data with its tokenizer")
    found = open_folder(folder).config
    if not same_shape(found, config):
        differ = [name for name, value in config.model_dump().items() if found.model_dump()[name] != value]
        raise ConfigError(
            f"model.start = {start!r} is of another shape than the run's model; different: {', '.join(differ)}",
            hint="set model.preset and model.overrides to those of the checkpoint",
        )
    return start_hash(folder)


def start_hash(folder: Path) -> str:
    """Return what identifies the weights that a run begins from: sha256 of their manifest, or of config.json where there is none."""
    named = folder / MANIFEST
    return sha256_of(named if named.is_file() else folder / "config.json")


def begin_weights(model: Transformer, start: str | None, seed: int) -> None:
    """Fill a model that begins its run: from ``start``, weights only, or else with initial values.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if start is None:
        initialise(model, seed)
        return
    folder = latest_checkpoint(start)
    require_intact(folder)
    fill_model(model, FolderSource(open_folder(folder)))


def require_intact(folder: Path) -> None:
    """Compare the hashes of a checkpoint's files with those of its manifest, where it has one.

    Raises:
        CheckpointError: a file is missing or has another hash.
    """
    if (folder / MANIFEST).is_file():
        verify_manifest(folder)
