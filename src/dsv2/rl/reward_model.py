"""A reward model: the chat model's body with one number on its last hidden state at the end token (spec 6.3).

Its folder has the Hugging Face layout: config.json names DeepseekV2ForSequenceClassification with one label, and transformers'
AutoModelForSequenceClassification reads it (tests/rl compares the scores). ``score.weight`` [1, D] stands in place of ``lm_head.weight``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2.checkpoint.folder import ModelFolder, open_folder
from dsv2.checkpoint.huggingface import fill_model
from dsv2.checkpoint.layout import save_checkpoint
from dsv2.checkpoint.manifest import MANIFEST, verify_manifest
from dsv2.checkpoint.names import SCORE
from dsv2.checkpoint.shard import TensorSpec
from dsv2.checkpoint.source import FolderSource, Source
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import CheckpointError, RequestError
from dsv2.model.config import Head
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

TOKENS_AT_ONCE = 16_384  # places of one forward pass of ``score``


class RewardModel(Transformer):
    """A DeepSeek-V2 body that ends in a number."""

    head: ClassVar[Head] = "score"

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> "RewardModel":
        """Load a reward model from its folder, a run or a step of one, for scoring.

        Raises:
            CheckpointError: there is none, it is damaged, or it is a language model.
        """
        folder = latest_checkpoint(path)
        if (folder / MANIFEST).is_file():
            verify_manifest(folder)
        source = FolderSource(open_folder(folder, "score"))
        with torch.device("meta"):
            model = cls(source.config).to(dtype)
        model.to_empty(device="cpu")
        fill_model(model, source)
        return model.eval()

    def add_head(self) -> None:
        """Put the scalar head on the body."""
        self.score_head = nn.Linear(self.config.hidden_size, 1, bias=False)

    def rewards(self, hidden: Float[Tensor, "answers hidden"]) -> Float[Tensor, " answers"]:
        """Return the rewards of answers by the last hidden states at their ends, fp32."""
        with torch.autocast(hidden.device.type, enabled=False):  # one product of few rows, whose differences matter
            return nn.functional.linear(hidden.float(), self.score_head.weight.float()).squeeze(-1)

    @torch.no_grad()
    def score(self, answers: Sequence[Sequence[int]], *, tokens_at_once: int = TOKENS_AT_ONCE) -> list[float]:
        """Return the reward of each answered conversation; each is the same with and without the others.

        Args:
            answers: ids from BOS to the end token that closes the answer.
            tokens_at_once: how many places go through the model at a time, at least one conversation.

        Raises:
            RequestError: a conversation is empty or longer than the context.
        """
        for index, ids in enumerate(answers):
            if not 0 < len(ids) <= self.config.max_position_embeddings:
                raise RequestError(
                    f"answer {index} has {len(ids)} tokens; a reward needs 1 to {self.config.max_position_embeddings}",
                )
        found = [0.0] * len(answers)
        device, was_training = self.score_head.weight.device, self.training
        self.eval()
        try:
            for chosen in _by_length([len(ids) for ids in answers], tokens_at_once):
                tokens, positions, document_ids = (part.to(device) for part in side_by_side([answers[index] for index in chosen]))
                hidden = self(tokens, positions, document_ids).hidden[0]
                rewards = self.rewards(hidden[ends(document_ids)[0]])
                for index, reward in zip(chosen, rewards.tolist(), strict=True):
                    found[index] = reward
        finally:
            self.train(was_training)
        return found


def _by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield which sequences go together, shortest first: equal lengths share one call of attention."""
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and total + lengths[index] > most:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


def side_by_side(sequences: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "1 tokens"], Int[Tensor, "1 tokens"], Int[Tensor, "1 tokens"]]:
    """Return tokens, positions and document ids of one row that holds all sequences, without padding."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    tokens = torch.tensor([token for ids in sequences for token in ids])
    return tokens[None], positions[None], torch.repeat_interleave(torch.arange(len(sequences)), lengths)[None]


def ends(document_ids: Int[Tensor, "batch tokens"]) -> tuple[Int[Tensor, " answers"], Int[Tensor, " answers"]]:
    """Return where the documents of packed rows end, as indices into the flattened rows, and their ids; padding (id < 0) is left out."""
    last = torch.ones_like(document_ids, dtype=torch.bool)
    last[:, :-1] = document_ids[:, 1:] != document_ids[:, :-1]
    places = (last & (document_ids >= 0)).flatten().nonzero().squeeze(-1)
    return places, document_ids.flatten()[places]


# Folders ---------------------------------------------------------------------------------------------------------------------------


class WithNewHead:
    """A language model's weights with a head of zeros in place of its own: every reward is 0, the first pair-wise loss ln 2."""

    def __init__(self, source: Source) -> None:
        self.config, self._source = source.config, source
        specs = {name: spec for name, spec in source.specs.items() if name != "lm_head.weight"}
        self.specs = specs | {SCORE: TensorSpec(specs["model.norm.weight"].dtype, (1, self.config.hidden_size))}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return torch.zeros(1, self.config.hidden_size) if name == SCORE else self._source.read(name)


def reward_source(folder: ModelFolder) -> Source:
    """Return the weights that a reward model begins from: a reward model's own, or a language model's with a new head.

    Raises:
        CheckpointError: the folder is an int8 one.
    """
    if folder.quantised:
        raise CheckpointError(f"{folder.path} holds int8 rows, which are not trained", hint="begin from the model that they were made of")
    source = FolderSource(folder)
    return source if folder.head == "score" else WithNewHead(source)


def save_reward_model(folder: Path, model: RewardModel, tokenizer: Tokenizer) -> None:
    """Write a reward model's folder, or nothing.

    Raises:
        DataError: the disk is full or may not be written.
    """
    save_checkpoint(folder, model, tokenizer)
