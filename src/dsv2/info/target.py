"""From what was typed to a config, and from a folder's files to what they show: weights, chat template, markers."""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dsv2.checkpoint.folder import INDEX, INT8, ModelFolder, open_folder, read_json
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import ConfigError, did_you_mean
from dsv2.model.config import ModelConfig
from dsv2.presets import PRESETS, PUBLISHED, Published, preset
from dsv2.tokenizer.recognise import is_ours, recognise, template_text
from dsv2.tokenizer.specials import CALL_BEGIN, CALLS_BEGIN, FIM_BEGIN, FIM_END, FIM_HOLE, OUTPUTS_BEGIN, SEP

_FIM_MARKERS, _TOOL_MARKERS = {FIM_BEGIN, FIM_HOLE, FIM_END}, {CALLS_BEGIN, CALL_BEGIN, SEP, OUTPUTS_BEGIN}


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that a model may be able to do, the answer, and what it rests on."""

    name: str
    answer: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint; dtype and file are None where there are no weights to look at."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Dtype:
    """The tensors of one dtype: how many, and how many numbers they hold."""

    name: str
    num_tensors: int
    num_elements: int


@dataclass(frozen=True, slots=True)
class Weights:
    """What the headers of a folder's files say, after they were checked against its config name by name and shape by shape.

    Args:
        num_files: .safetensors files.
        num_bytes: of those files on disk, headers included.
        num_tensors: in them.
        dtypes: of the tensors, the most frequent first.
        quantised: an int8 folder of ours.
    """

    num_files: int
    num_bytes: int
    num_tensors: int
    dtypes: tuple[Dtype, ...]
    quantised: bool


@dataclass(frozen=True, slots=True)
class Target:
    """What ``dsv2 info`` was asked about.

    Args:
        name: as typed.
        source: that was read, for reading: "preset v2", or a path.
        config: of the model.
        preset: its name, where a preset was meant.
        capabilities: with their evidence.
        folder: with weights in it; None without.
    """

    name: str
    source: str
    config: ModelConfig
    preset: str | None
    capabilities: tuple[Capability, ...]
    folder: ModelFolder | None = None

    @property
    def published(self) -> Published | None:
        """What DeepSeek says of the preset."""
        return PUBLISHED.get(self.preset or "")

    @property
    def weights(self) -> Weights | None:
        """What the headers say."""
        return None if self.folder is None else _summary(self.folder)

    def tensors(self) -> list[Tensor] | None:
        """List the tensors in the files, in published order; None without files."""
        found = None if self.folder is None else self.folder.entries.values()
        return None if found is None else [Tensor(entry.name, entry.shape, entry.dtype, entry.file.name) for entry in found]


def find_target(name: str) -> Target:
    """Return what ``name`` means: a preset or its id on the hub, a config.json, a model folder, or a run or tour: their latest step.

    Nothing is fetched: an id means what is known here of that release.

    Raises:
        ConfigError: it is none of these, or the config is not one of a DeepSeek-V2 model.
        CheckpointError: weights do not fit their config, or a file is damaged; names the tensor or the file.
    """
    path = Path(name)
    if not _exists(path):
        known = {published.hub_id: preset_name for preset_name, published in PUBLISHED.items()}.get(name, name)
        if known not in PRESETS:
            presets = f"presets: {', '.join(PRESETS)}"
            raise ConfigError(f"{name!r} is neither a preset nor an existing path; {presets}", hint=did_you_mean(name, PRESETS))
        return Target(name, f"preset {known}", preset(known), known, _of_preset(PUBLISHED.get(known)))
    if path.is_file():
        if path.suffix != ".json":
            raise ConfigError(f"{path} is no config.json", hint="give a model's config.json, or the folder that holds it")
        alone = tuple(Capability(what, "unknown", "a config says nothing of it; give its folder") for what in _NAMES)
        return Target(name, str(path), _read_config(path), None, alone)
    folder = latest_checkpoint(path)
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        opened = open_folder(folder)
        return Target(name, str(folder), opened.config, None, _of_folder(folder), opened)
    return Target(name, str(folder), _read_config(folder / "config.json"), None, _of_folder(folder))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def _read_config(file: Path) -> ModelConfig:
    fields = read_json(file)
    if fields.get("quantization_config") == INT8:  # an int8 folder of ours, without its weights
        del fields["quantization_config"]
    return ModelConfig.from_dict(fields, source=str(file))


def _summary(folder: ModelFolder) -> Weights:
    by_dtype: dict[str, list[int]] = {}
    for entry in folder.entries.values():
        by_dtype.setdefault(entry.dtype, []).append(prod(entry.shape))
    dtypes = [Dtype(name, len(sizes), sum(sizes)) for name, sizes in by_dtype.items()]
    dtypes.sort(key=lambda dtype: -dtype.num_tensors)
    num_bytes = sum(file.stat().st_size for file in folder.files)
    return Weights(len(folder.files), num_bytes, len(folder.entries), tuple(dtypes), folder.quantised)


# Capabilities -----------------------------------------------------------------------------------------------------------------------

_NAMES = ("fill in the middle", "chat template", "tools")


def _of_preset(published: Published | None) -> tuple[Capability, ...]:
    """Return what a release says of itself; a shape of ours can do what a run teaches it."""
    if published is None:
        return tuple(Capability(name, "unknown", "a shape alone: its tokenizer and its training decide") for name in _NAMES)
    fim = {True: "yes", False: "no", None: "unknown"}[published.fim]
    source = "a base model" if published.template is None else "as its tokenizer is published"
    tools = ("yes", "template v2.5 has tool calls") if published.tools else ("no", "tool calls came with template v2.5")
    return (
        Capability(_NAMES[0], fim, published.fim_source),
        Capability(_NAMES[1], published.template or "none", source),
        Capability(_NAMES[2], *tools),
    )


def _of_folder(folder: Path) -> tuple[Capability, ...]:
    """Return what a folder's tokenizer shows. No file says what a model was trained on."""
    settings = _read_if_there(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file():
        return tuple(Capability(name, "unknown", "the folder holds no tokenizer.json") for name in _NAMES)
    added = _objects(_read_if_there(folder / "tokenizer.json").get("added_tokens"))
    markers = {str(entry.get("content")) for entry in added}
    fim = ("no", "the tokenizer has no markers for it")
    if markers >= _FIM_MARKERS:
        fim = ("unknown", "the tokenizer has the markers; no file says whether the model was trained with them")
    template, where = _template(folder, settings, markers)
    tools = ("no", f"only template v2.5 has tool calls; this is {template}")
    if template == "v2.5" and markers >= _TOOL_MARKERS:
        tools = ("yes", "template v2.5 and its markers; no file says whether the model was trained with them")
    elif template == "v2.5":
        tools = ("no", "the tokenizer has no markers for them")
    return (Capability(_NAMES[0], *fim), Capability(_NAMES[1], template, where), Capability(_NAMES[2], *tools))


def _template(folder: Path, settings: dict[str, Any], markers: Collection[str]) -> tuple[str, str]:
    """Return the chat template and where it is."""
    text, where = template_text(folder, settings)
    if text is None:
        return "none", "no file holds one"
    known = recognise(text, markers)
    if known is None:
        return "unknown", f"{where}: neither v2's nor v2.5's roles"
    roles = "markers" if known == "v2.5" else "words"
    return known, f"{where}, word for word ours" if is_ours(text) else f"{where}: roles are {roles}"


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
