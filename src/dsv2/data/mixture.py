"""How much of each domain a run reads: weights or epochs, in stages, as a function of the sample's number alone.

Samples go in blocks of 1000. Every block of a stage holds each domain as often as its weight says, in an order of its own; a domain's
rows are shuffled anew in each of its epochs. So the n-th sample is computed, not remembered: the resume state stays one integer, and
neither the batch size nor the number of ranks has a say.
"""

from typing import Annotated

import numpy as np
from jaxtyping import Int64
from pydantic import Field, model_validator

from dsv2.config import Section
from dsv2.data.order import permute
from dsv2.data.packing import PackedRow, Rows
from dsv2.data.shards import TokenShards
from dsv2.errors import ConfigError, did_you_mean

BLOCK = 1000  # samples; the finest weight is 1 / BLOCK
Amounts = dict[str, Annotated[float, Field(ge=0)]]  # by domain


class MixtureStage(Section):
    """A part of the curriculum, by weights or by epochs."""

    tokens: int | None = Field(
        default=None,
        ge=1,
        description="How long it lasts, rounded up to 1000 samples; without it, as long as its epochs make. Not of the last.",
    )
    weights: Amounts | None = Field(default=None, description="Share of the samples, by domain; any positive sum.")
    epochs: Amounts | None = Field(
        default=None,
        description="Instead of weights: how often the stage reads each domain, or in which proportion where its length is given.",
    )

    @model_validator(mode="after")
    def _check(self) -> "MixtureStage":
        if (self.weights is None) == (self.epochs is None):
            raise ValueError(f"{'neither' if self.weights is None else 'both'} of weights and epochs; a stage takes exactly one of them")
        return self


class MixtureRules(Section):
    """What is read how often."""

    stages: tuple[MixtureStage, ...] = Field(description="At least one, in order; the last lasts to the end of the run.")
    max_epochs: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="How often a domain may be read; a run that would read it more often is refused.",
    )

    @model_validator(mode="after")
    def _check(self) -> "MixtureRules":
        if not self.stages:
            raise ValueError("stages is empty; at least one stage is needed")
        for number, stage in enumerate(self.stages[:-1]):
            if stage.tokens is None and stage.epochs is None:
                raise ValueError(f"stages.{number} has weights and no tokens; only the last stage lasts to the end")
        if self.stages[-1].tokens is not None:
            last = f"stages.{len(self.stages) - 1}.tokens = {self.stages[-1].tokens}"
            raise ValueError(f"{last}; the last stage lasts to the end: leave its tokens out, run.tokens says how long the run is")
        return self


class Mixture:
    """Rows of several domains, and which of them the n-th sample is. It takes the place of :class:`~dsv2.data.packing.Rows`.

    Args:
        shards: where the tokens lie.
        seq_len: T, tokens in a row.
        rules: its stages.
        seed: of the order; 0 to 2**64 - 1.

    Raises:
        ConfigError: a stage names a domain that there is not, or all its weights or epochs are 0.
    """

    def __init__(self, shards: TokenShards, seq_len: int, rules: MixtureRules, *, seed: int) -> None:
        self.seq_len = seq_len
        self.domains = shards.domains
        self._rules = rules
        self._seed = seed
        self._rows = [Rows(shards, seq_len, domain) for domain in self.domains]
        self._bounds = np.cumsum([0, *map(len, self._rows)])
        shares = [self._shares(stage) for stage in rules.stages]
        self._quotas = np.array([_quotas(share) for share in shares], dtype=np.int64)
        made = [
            max(1, round(sum(share))) if stage.tokens is None else -(-stage.tokens // seq_len)
            for stage, share in zip(rules.stages, shares, strict=True)
        ]
        # First block of each stage, and how many samples of each domain lie before it; the last stage has no end.
        self._begins = np.cumsum([0, *(-(-samples // BLOCK) for samples in made[:-1])])
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
                    hint="lower its weight or epochs, train on fewer tokens, or prepare more of it",
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

    def _shares(self, stage: MixtureStage) -> list[float]:
        """Return in which proportion a stage reads the domains; with epochs, how many samples of each they make."""
        kind, given = ("weights", stage.weights) if stage.epochs is None else ("epochs", stage.epochs)
        given = given or {}
        for domain in given:
            self._require(domain)
        if sum(given.values()) <= 0:
            raise ConfigError(f"mixture.stages: {kind} = {given}; at least one must be above 0")
        sizes = [1 if stage.epochs is None else len(rows) for rows in self._rows]
        return [given.get(domain, 0.0) * size for domain, size in zip(self.domains, sizes, strict=True)]

    def _require(self, domain: str) -> None:
        if domain not in self.domains:
            raise ConfigError(f"mixture: there is no domain {domain!r} in the shards", hint=did_you_mean(domain, self.domains))


def _quotas(shares: list[float]) -> list[int]:
    """Return how many of a block's samples each domain has: its share to the nearest 1/1000, one at least where there is any."""
    exact = [share / sum(shares) * BLOCK for share in shares]
    quotas = [max(int(share), 1) if share > 0 else 0 for share in exact]
    order = sorted(range(len(exact)), key=lambda number: (quotas[number] - exact[number], number))  # who is furthest below its share
    for number in order[: max(BLOCK - sum(quotas), 0)]:
        quotas[number] += 1
    quotas[int(np.argmax(quotas))] += BLOCK - sum(quotas)  # below 0 only where many tiny weights got one each
    return quotas
