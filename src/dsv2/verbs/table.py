"""Where each verb goes, in river order."""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """Where a verb goes, what it does in one line, and what to do when it was interrupted."""

    target: str
    summary: str
    resume: str = "nothing half-written is left; run the same command again"


VERBS: dict[str, Verb] = {
    "tour": Verb(
        "dsv2.tour:run",
        "The whole river on a CPU, in minutes: text to chat.",
        "run the same command again; it continues where it stopped",
    ),
    "tokenizer": Verb("dsv2.data.prepare:train_tokenizer_stage", "Train a tokenizer on text."),
    "prepare": Verb("dsv2.data.prepare:run", "Turn text into token shards for training.", "run the same command again"),
    "pretrain": Verb(
        "dsv2.samples:run",
        "Train a model on token shards.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "sft": Verb(
        "dsv2.samples:sft",
        "Fine-tune a model on conversations.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "reward": Verb(
        "dsv2.rl.reward_training:run",
        "Train a reward model on judged answers.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "dpo": Verb(
        "dsv2.rl.dpo:run",
        "Train a model on pairs of answers, offline.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "grpo": Verb(
        "dsv2.rl.grpo:run",
        "Improve a chat model by rewards on its own answers.",
        "run the same command with --resume; it continues from the last checkpoint",
    ),
    "generate": Verb(
        "dsv2.engine.terminal:generate", "Continue a prompt, or files of them.", "run the same command again; answers of files are kept"
    ),
    "chat": Verb("dsv2.engine.terminal:chat", "Talk to a model in the terminal.", "run the same command again"),
    "convert": Verb("dsv2.checkpoint.convert:run", "Change a model's dtype or files; GGUF; merge."),
    "quantize": Verb("dsv2.engine.quantize:run", "Pack a model into few bits for the engine."),
    "report": Verb("dsv2.report:run", "Write the curves and samples of runs into one HTML file."),
    "info": Verb("dsv2.info:run", "Count a model's parameters, FLOPs and cache bytes.", "run the same command again"),
    "plan": Verb("dsv2.plan:run", "Plan training or serving on a cluster: memory, time, cost.", "run the same command again"),
    "doctor": Verb("dsv2.doctor:run", "Say what this machine offers and what is missing.", "run the same command again"),
}
TRAINING = ("tour", "pretrain", "sft", "reward", "dpo", "grpo")


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed command line: the verb and the keyword arguments of its stage."""

    verb: str
    arguments: dict[str, Any]
