"""A reward model: the chat model's body with one number on its last hidden state at the end token (spec 6.3).

Its folder has the Hugging Face layout: config.json names DeepseekV2ForSequenceClassification with one label, and transformers'
AutoModelForSequenceClassification reads it (tests/rl compares the scores). ``score.weight`` [1, D] stands in place of ``lm_head.weight``.
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2.checkpoint.folder import ModelFolder, open_folder
from dsv2.checkpoint.huggingface import fill_model
from dsv2.checkpoint.manifest import MANIFEST, verify_manifest
from dsv2.checkpoint.names import SCORE
from dsv2.checkpoint.shard import TensorSpec
from dsv2.checkpoint.source import FolderSource, Source
from dsv2.checkpoint.steps import latest_checkpoint
from dsv2.errors import CheckpointError, ConfigError, RequestError
from dsv2.model.config import Head
from dsv2.model.transformer import Transformer
from dsv2.tokenizer.tokenizer import Tokenizer

TOKENS_AT_ONCE = 16_384  # places of one forward pass of ``score``
_ALIGNMENT = 64  # bytes, as torch allocates: products may round differently elsewhere


class RewardModel(Transformer):
    """A DeepSeek-V2 body that ends in a number."""

    head: ClassVar[Head] = "score"

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, verify: bool = True) -> "RewardModel":
        """Load a reward model from its folder, a run or a step of one, for scoring; hashes are compared first unless ``verify`` is False.

        Raises:
            CheckpointError: there is none, it is damaged, or it is a language model.
        """
        folder = latest_checkpoint(path)
        if verify and (folder / MANIFEST).is_file():
            verify_manifest(folder)
        source = FolderSource(open_folder(folder, "score"))
        with torch.device("meta"):
            model = cls(source.config).to(dtype)
        model.load_state_dict(_memory_for(model.state_dict()), assign=True)
        fill_model(model, source)
        return model.eval()

    def add_head(self) -> None:
        """Put the scalar head on the body."""
        self.score_head = nn.Linear(self.config.hidden_size, 1, bias=False)

    def rewards(self, hidden: Float[Tensor, "answers hidden"]) -> Float[Tensor, " answers"]:
        """Return the rewards of answers by the last hidden states at their ends, fp32."""
        with torch.autocast(hidden.device.type, enabled=False):  # one product of few rows, whose differences matter
            return nn.functional.linear(hidden.float(), self.score_head.weight.float()).squeeze(-1)

    def score(self, answers: Sequence[Sequence[int]], *, tokens_at_once: int = TOKENS_AT_ONCE) -> list[float]:
        """Return the reward of each answered conversation; see ``score_steps``."""
        return [found[0] for found in self.score_steps(answers, [[len(ids) - 1] for ids in answers], tokens_at_once=tokens_at_once)]

    @torch.no_grad()
    def score_steps(
        self, answers: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], *, tokens_at_once: int = TOKENS_AT_ONCE
    ) -> list[list[float]]:
        """Return the rewards of each answered conversation up to each of some tokens; each is the same with and without the others.

        No token sees a later one, so that one pass over a conversation has them all.

        Args:
            answers: ids from BOS to the end token that closes the answer.
            ends: of each conversation, indices of the last tokens that count.
            tokens_at_once: how many places go through the model at a time, at least one conversation.

        Raises:
            RequestError: a conversation is empty or longer than the context.
        """
        for index, ids in enumerate(answers):
            if not 0 < len(ids) <= self.config.max_position_embeddings:
                raise RequestError(
                    f"answer {index} has {len(ids)} tokens; a reward needs 1 to {self.config.max_position_embeddings}",
                )
        found: list[list[float]] = [[] for _ in answers]
        device, was_training = self.score_head.weight.device, self.training
        self.eval()
        try:
            for chosen in _by_length([len(ids) for ids in answers], tokens_at_once):
                tokens, positions, document_ids = (part.to(device) for part in side_by_side([answers[index] for index in chosen]))
                hidden = self(tokens, positions, document_ids).hidden[0]
                begin = 0
                for index in chosen:
                    places = torch.tensor([begin + end for end in ends[index]], device=device)
                    found[index] = self.rewards(hidden[places]).tolist()
                    begin += len(answers[index])
        finally:
            self.train(was_training)
        return found


class OffloadedRewardModel:
    """A reward model that is in memory only while it scores, and gives all of that memory back afterwards.

    Args:
        path: its folder, a run or a step of one; which step is settled here. It is read once here, its hashes compared, so that one that is
            missing or damaged ends the start of a run and not a step of it.
        tokenizer: of the policy whose answers it scores; None: not compared.
        seq_len: tokens that it must be able to read, prompt and answer.

    Raises:
        CheckpointError: there is none, it is damaged, or it is a language model.
        ConfigError: its tokenizer is another one, or its context is shorter.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer | None = None, seq_len: int = 0) -> None:
        self._folder = latest_checkpoint(path)
        context = RewardModel.load(self._folder).config.max_position_embeddings
        if context < seq_len:
            raise ConfigError(
                f"the reward model {self._folder} reads {context} tokens; prompts and answers may have run.seq_len = {seq_len}",
                hint=f"set run.seq_len={context} or less, or train a reward model from a model of longer context",
            )
        has_own = (self._folder / "tokenizer.json").is_file()
        if tokenizer is not None and has_own and Tokenizer.load(self._folder).fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"the reward model {self._folder} has another tokenizer than the policy, whose tokens it is to score",
                hint="train it from the model that the policy begins with: dsv2 reward",
            )

    def score(self, answers: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each answered conversation; see ``RewardModel.score``."""
        return RewardModel.load(self._folder, verify=False).score(answers)

    def score_steps(self, answers: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the rewards of each conversation up to each of some tokens; see ``RewardModel.score_steps``."""
        return RewardModel.load(self._folder, verify=False).score_steps(answers, ends)


def _memory_for(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of these shapes, not yet filled, in one mapping of their own: what malloc frees it may keep, this goes back whole."""
    begins, size = {}, 0
    for name, tensor in state.items():
        begins[name] = size
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # unmapped when its last tensor goes
    return {
        name: torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=begins[name]).view(tensor.shape)
        for name, tensor in state.items()
    }


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
