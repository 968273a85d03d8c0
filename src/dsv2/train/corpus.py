"""What a run reads: training shards, held-out shards and the tokenizer that made both, in one folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dsv2.data.mixture import Mixture, MixtureRules
from dsv2.data.packing import Rows
from dsv2.data.shards import TokenShards
from dsv2.errors import DataError
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.loop import RunSection


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a run reads: training shards, held-out shards where there are any, and the tokenizer that made both."""

    train: TokenShards
    validation: TokenShards | None
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of all the data: equal fingerprints are equal data."""
        parts = [self.train.fingerprint, self.validation.fingerprint if self.validation else "", self.tokenizer.fingerprint]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Open ``folder``, which holds tokenizer/, train/ and, if wanted, validation/.

        Raises:
            DataError: a part is missing or damaged, or the shards were written with another tokenizer.
        """
        for part in ("tokenizer", "train"):
            if not (folder / part).is_dir():
                raise DataError(
                    f"{folder} has no folder {part}/",
                    hint=f"make {folder}/tokenizer with `dsv2 tokenizer`, then {folder}/train and {folder}/validation with `dsv2 prepare`",
                )
        tokenizer = Tokenizer.load(folder / "tokenizer")
        training = TokenShards.open(folder / "train")
        held_out = TokenShards.open(folder / "validation") if (folder / "validation").is_dir() else None
        for shards in (training, held_out):
            if shards is not None:
                shards.expect_tokenizer(tokenizer.fingerprint)
        return cls(training, held_out, tokenizer)


def training_rows(corpus: Corpus, run: RunSection, mixture: MixtureRules | None) -> Rows | Mixture:
    """Return the rows that a run reads.

    Raises:
        ConfigError: the mixture does not fit the shards, or a domain would be read more often than it may be.
    """
    if mixture is None:
        return Rows(corpus.train, run.seq_len)
    mixed = Mixture(corpus.train, run.seq_len, mixture, seed=run.seed)
    mixed.epochs(-(-run.tokens // run.seq_len))
    return mixed
