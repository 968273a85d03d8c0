"""How much of each domain a run reads: weights, in stages by tokens, as a function of the sample's number alone.

Samples go in blocks of 1000. Every block of a stage holds each domain as often as its weight says, in an order of its own; a domain's
rows are shuffled anew in each of its epochs. So the n-th sample is computed, not remembered: the resume state stays one integer, and
neither the batch size nor the number of ranks has a say.
"""

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from dsv2.config import Section
from dsv2.data.order import permute
from dsv2.data.packing import PackedRow, Rows
from dsv2.data.shards import TokenShards
from dsv2.errors import ConfigError, did_you_mean

BLOCK = 1000  # samples; the finest weight is 1 / BLOCK


class MixtureStage(Section):
    """A part of the curriculum."""

    tokens: int | None = Field(default=None, ge=1, description="How long it lasts, rounded up to 1000 samples; without it, to the end.")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(description="Share of the samples, by domain; any positive sum.")


class MixtureRules(Section):
    """What is read how often. Without stages every row is read once an epoch."""

    stages: tuple[MixtureStage, ...] = Field(default=(), description="In order; the last lasts to the end.")
    max_epochs: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="How often a domain may be read; a run that would read it more often is refused.",
    )


class Mixture:
    """Rows of several domains, and which of them the n-th sample is. It takes the place of :class:`~dsv2.data.packing.Rows`.

    Args:
        shards: where the tokens lie.
        seq_len: T, tokens in a row.
        rules: at least one stage.
        seed: of the order; 0 to 2**64 - 1.

    Raises:
        ConfigError: a stage names a domain that there is not, all its weights are 0, or only the last stage may last to the end.
    """

    def __init__(self, shards: TokenShards, seq_len: int, rules: MixtureRules, *, seed: int) -> None:
        self.seq_len = seq_len
        self.domains = shards.domains
        self._rules = rules
        self._seed = seed
        self._rows = [Rows(shards, seq_len, domain) for domain in self.domains]
        self._bounds = np.cumsum([0, *map(len, self._rows)])
        self._quotas = np.array([self._quota(stage) for stage in rules.stages], dtype=np.int64)
        lasts = [None if stage.tokens is None else -(-stage.tokens // (seq_len * BLOCK)) for stage in rules.stages]
        if None in lasts[:-1] or not lasts:
            raise ConfigError("mixture.stages: every stage but the last needs its tokens, and there must be one")
        # First block of each stage, and how many samples of each domain lie before it; the last stage has no end.
        self._begins = np.cumsum([0, *(last for last in lasts[:-1] if last is not None)])
        lens = np.diff(self._begins)
        self._before = np.cumsum(
            np.concatenate([np.zeros((1, len(self.domains)), dtype=np.int64), self._quotas[:-1] * lens[:, None]]), axis=0
        )

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def row(self, index: int) -> PackedRow:
        """Return a row by its number among those of all domains.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        domain = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return self._rows[domain].row(index - int(self._bounds[domain]))

    def indices(self, first_sample: int, num_samples: int) -> Int64[np.ndarray, "samples"]:
        """Return which rows the samples [first_sample, first_sample + num_samples) are."""
        domains, turns = self._turns(np.arange(first_sample, first_sample + num_samples, dtype=np.int64))
        chosen = np.zeros(num_samples, dtype=np.int64)
        for number, rows in enumerate(self._rows):
            mine = domains == number
            epochs, places = np.divmod(turns[mine].astype(np.uint64), np.uint64(len(rows)))
            chosen[mine] = self._bounds[number] + permute(places, epochs, size=len(rows), seed=self._seed).astype(np.int64)
        return chosen

    def stage(self, sample: int) -> int:
        """Return in which stage of the curriculum a sample lies, from 0."""
        return self._stage_of(sample // BLOCK)

    def epochs(self, num_samples: int) -> dict[str, float]:
        """Return how often the first samples read each domain.

        Raises:
            ConfigError: that is more than ``max_epochs`` allows.
        """
        read = self._read_before(num_samples)
        found = {domain: float(count) / len(rows) for domain, count, rows in zip(self.domains, read, self._rows, strict=True)}
        for domain, most in self._rules.max_epochs.items():
            self._require(domain)
            if found[domain] > most:
                raise ConfigError(
                    f"mixture.max_epochs: {domain} would be read {found[domain]:.2f} times; at most {most}",
                    hint="lower its weight, train on fewer tokens, or prepare more of it",
                )
        return found

    def _turns(self, samples: Int64[np.ndarray, "samples"]) -> tuple[Int64[np.ndarray, "samples"], Int64[np.ndarray, "samples"]]:
        """Return each sample's domain, and how many samples of that domain come before it."""
        blocks, places = np.divmod(samples, BLOCK)
        domains, turns = np.zeros_like(samples), np.zeros_like(samples)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            of_block, turns_of_block = self._block(block)
            domains[mine], turns[mine] = of_block[places[mine]], turns_of_block[places[mine]]
        return domains, turns

    def _block(self, block: int) -> tuple[Int64[np.ndarray, "samples"], Int64[np.ndarray, "samples"]]:
        """Return the same for all samples of a block."""
        stage = self._stage_of(block)
        quotas = self._quotas[stage]
        # Another seed than that of the rows: a block's order and a domain's order have nothing to do with each other.
        everywhere = np.arange(BLOCK, dtype=np.uint64)
        slots = permute(everywhere, np.full_like(everywhere, block), size=BLOCK, seed=self._seed ^ 0xB10C)
        domains = np.repeat(np.arange(len(quotas)), quotas)[slots.astype(np.int64)]
        turns = self._before[stage][domains] + (block - self._begins[stage]) * quotas[domains]
        for number in range(len(quotas)):
            turns[domains == number] += np.arange(quotas[number])
        return domains, turns

    def _stage_of(self, block: int) -> int:
        return int(np.searchsorted(self._begins, block, side="right")) - 1

    def _read_before(self, num_samples: int) -> Int64[np.ndarray, "domains"]:
        block, rest = divmod(num_samples, BLOCK)
        stage = self._stage_of(block)
        whole = self._before[stage] + (block - self._begins[stage]) * self._quotas[stage]
        domains, _ = self._turns(np.arange(num_samples - rest, num_samples, dtype=np.int64))
        return np.asarray(whole + np.bincount(domains, minlength=len(self.domains)))

    def _quota(self, stage: MixtureStage) -> list[int]:
        """Return how many of a block's samples each domain has: the weights to the nearest 1/1000, one at least where there is any."""
        for domain in stage.weights:
            self._require(domain)
        total = sum(stage.weights.values())
        if total <= 0:
            raise ConfigError(f"mixture.stages: weights = {stage.weights}; at least one must be above 0")
        exact = [stage.weights.get(domain, 0.0) / total * BLOCK for domain in self.domains]
        quotas = [max(int(share), 1) if share > 0 else 0 for share in exact]
        order = sorted(range(len(exact)), key=lambda number: (quotas[number] - exact[number], number))  # who is furthest below its share
        for number in order[: max(BLOCK - sum(quotas), 0)]:
            quotas[number] += 1
        quotas[int(np.argmax(quotas))] += BLOCK - sum(quotas)  # below 0 only where many tiny weights got one each
        return quotas

    def _require(self, domain: str) -> None:
        if domain not in self.domains:
            raise ConfigError(f"mixture: there is no domain {domain!r} in the shards", hint=did_you_mean(domain, self.domains))


def weights_of_epochs(shards: TokenShards, epochs: Mapping[str, float]) -> dict[str, float]:
    """Return the weights with which each domain is read so many times in a run of as many tokens as that makes.

    Raises:
        DataError: there is no such domain.
    """
    tokens = {domain: count * shards.num_tokens(domain) for domain, count in epochs.items()}
    return {domain: count / sum(tokens.values()) for domain, count in tokens.items()}
