"""From documents to token shards (``dsv2 prepare``), and from documents to a tokenizer (``dsv2 tokenizer``)."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from dsv2.config import load_recipe
from dsv2.data.clean import is_of
from dsv2.data.documents import Document, DocumentStream, InvalidUtf8, in_pieces, read_documents
from dsv2.data.flow import flow, hash_benchmarks, require_extras, working_in
from dsv2.data.pieces import Job
from dsv2.data.recipe import PrepareRecipe
from dsv2.data.shards import SHARD_TOKENS, ShardWriter, refuse_foreign_files
from dsv2.data.tally import Tally
from dsv2.errors import ConfigError, DataError
from dsv2.files import atomic_folder
from dsv2.progress import Bar, bar, console, table
from dsv2.tokenizer.specials import FIM_BEGIN
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.tokenizer.train import Compression, train_tokenizer
from dsv2.tokenizer.train import report as measure

BATCH_CHARACTERS = 1 << 20  # encoded at once, in the library's threads; some 100 bytes of memory each at worst
OVERRIDE = re.compile(r"[a-z_]+\.[a-z_]+=")  # of a recipe; all its keys lie in a section
SAMPLE_CHARACTERS = 1 << 20  # of each domain, kept while a tokenizer is trained, to measure it


@runtime_checkable
class Encoder(Protocol):
    """The part of a :class:`~dsv2.tokenizer.tokenizer.Tokenizer` that writing shards needs."""

    vocab_size: int
    eos_id: int

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of tokenizer.json."""

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool = True) -> list[list[int]]:
        """Return the ids of each text."""


@dataclass(frozen=True, slots=True)
class DomainCounts:
    """What was made of one domain.

    Attributes:
        domain: its name.
        num_documents: documents written.
        num_tokens: tokens written, with a BOS and an EOS for each document.
        num_bytes: length of the documents as UTF-8.
        num_skipped: blank documents left out.
        num_replaced: invalid characters that became U+FFFD.
    """

    domain: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_skipped: int
    num_replaced: int

    @property
    def bytes_per_token(self) -> float:
        """Return the UTF-8 bytes that a token of text carries; BOS and EOS carry none and are not counted."""
        return self.num_bytes / max(self.num_tokens - 2 * self.num_documents, 1)


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was written, and where.

    Attributes:
        out: the folder of shards.
        domains: counts, sorted by domain.
        ignored_files: files in the given folders that are of no readable kind.
        tally: what the rules of a recipe did; None without one.
    """

    out: Path
    domains: tuple[DomainCounts, ...]
    ignored_files: int
    tally: Tally | None = None

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all domains."""
        return sum(counts.num_tokens for counts in self.domains)

    def table(self) -> None:
        """Print the counts for people, on stderr."""
        columns = ("domain", "documents", "tokens", "bytes", "bytes/token", "blank, skipped", "characters replaced")
        rows = [
            (c.domain, c.num_documents, c.num_tokens, c.num_bytes, round(c.bytes_per_token, 2), c.num_skipped, c.num_replaced)
            for c in self.domains
        ]
        ignored = f", files of other kinds ignored: {self.ignored_files}" if self.ignored_files else ""
        table(f"{self.num_tokens:,} tokens in {self.out}{ignored}", columns, rows)
        if self.tally is not None and self.tally.drops:
            dropped = [(rule, count, self.tally.drop_bytes[rule]) for rule, count in sorted(self.tally.drops.items())]
            table(f"dropped; examples in {self.out / 'report.md'}", ("rule", "documents", "bytes"), dropped)


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """A trained tokenizer, and how well it compresses the first megabyte of each domain that it was trained on.

    Attributes:
        out: its folder.
        num_tokens: ids in use, of ``vocab_size``.
        domains: domain and compression, sorted by domain.
    """

    out: Path
    vocab_size: int
    num_tokens: int
    domains: tuple[tuple[str, Compression], ...]

    def table(self) -> None:
        """Print the compression for people, on stderr."""
        rows = [(domain, round(compression.bytes_per_token, 2)) for domain, compression in self.domains]
        table(f"{self.num_tokens:,} of {self.vocab_size:,} ids in {self.out}", ("domain", "bytes/token"), rows)


def prepare(documents: Iterable[Document], tokenizer: Encoder, out: str | Path, *, shard_tokens: int = SHARD_TOKENS) -> PrepareReport:
    """Write documents as token shards, each as BOS, its tokens, EOS; domains go to shards of their own.

    The same documents and tokenizer give the same bytes. ``out`` appears at the end and at once, in place of older shards.

    Args:
        documents: read once, a megabyte at a time.
        tokenizer: makes the ids; markers in the text stay text.
        out: folder to write.
        shard_tokens: size from which a shard is closed.

    Raises:
        DataError: there is no document, ``out`` holds something else than shards, or the disk is full.
    """
    num_documents: Counter[str] = Counter()
    num_tokens: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    total = documents.total_bytes if isinstance(documents, DocumentStream) else None
    with (
        ShardWriter(out, tokenizer.fingerprint, tokenizer.vocab_size, eos_id=tokenizer.eos_id, shard_tokens=shard_tokens) as writer,
        bar(total, "preparing", unit="bytes") as progress,
    ):
        for batch in in_pieces(_watched(documents, progress), BATCH_CHARACTERS):
            for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch], add_bos=True), strict=True):
                size = len(document.text.encode())
                writer.add(document.domain, [*ids, tokenizer.eos_id], size)
                num_documents[document.domain] += 1
                num_tokens[document.domain] += len(ids) + 1
                num_bytes[document.domain] += size
            progress.advance(0, documents=num_documents.total(), tokens=num_tokens.total())
    skipped, replaced, ignored = _left_out(documents)
    domains = tuple(
        DomainCounts(name, num_documents[name], num_tokens[name], num_bytes[name], skipped[name], replaced[name])
        for name in sorted(num_documents.keys() | skipped.keys() | replaced.keys())
    )
    return PrepareReport(Path(out), domains, ignored)


def prepare_by_recipe(
    documents: Iterable[Document],
    tokenizer: str | Path,
    out: str | Path,
    recipe: PrepareRecipe,
    *,
    benchmarks: str | Path | None = None,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> PrepareReport:
    """Write the documents that pass the rules of a recipe as token shards, with report.md and report.json beside them.

    The result is the same for any number of workers. Finished pieces lie in ``OUT.work`` until all is done: after an interruption the same
    call goes on from them.

    Args:
        documents: read once.
        tokenizer: its folder.
        out: folder to write.
        recipe: which rules are on.
        benchmarks: folder of .jsonl files whose text is to be kept out.
        workers: processes.
        shard_tokens: size from which a shard is closed.

    Raises:
        ConfigError: ``workers`` is below 1.
        DataError: no document is left, ``out`` holds something else than shards, or the disk is full.
        MissingExtra: a rule needs a package that is not installed.
    """
    if workers < 1:
        raise ConfigError(f"workers = {workers}; at least 1 is needed")
    require_extras(recipe)
    loaded, tally, out = Tokenizer.load(tokenizer), Tally(), Path(out)
    if recipe.fim.rate > 0 and FIM_BEGIN not in loaded.special_ids:
        hint = "use the tokenizer of Coder-V2 or V2.5, or one of dsv2 tokenizer; or set fim.rate=0"
        raise ConfigError(f"fim.rate = {recipe.fim.rate}, and the tokenizer {tokenizer} has no marker {FIM_BEGIN}", hint=hint)
    total = documents.total_bytes if isinstance(documents, DocumentStream) else None
    with (
        ShardWriter(out, loaded.fingerprint, loaded.vocab_size, eos_id=loaded.eos_id, shard_tokens=shard_tokens) as writer,
        working_in(out) as work,
        bar(total, "preparing", unit="bytes") as progress,
    ):
        job = Job(recipe, Path(tokenizer), work)
        if benchmarks is not None:
            with tally.timed("hash benchmarks"):
                grams, key, tally.benchmarks = hash_benchmarks(Path(benchmarks), recipe.contamination, work)
            job = Job(recipe, Path(tokenizer), work, grams, key)
        flow(_watched(documents, progress), job, writer, tally, workers)
        if not tally.documents:
            raise DataError(
                f"an empty corpus: all {tally.read['documents']} documents were dropped, most by {tally.commonest()}",
                hint="loosen that rule in the recipe, or give other documents",
            )
        if recipe.fim.rate > 0 and not any(is_of(name, recipe.fim.domains) for name in tally.documents):
            missed = f"WARNING: fim.rate = {recipe.fim.rate} turned nothing: no domain is of fim.domains = {list(recipe.fim.domains)}"
            console().print(f"{missed}; written: {', '.join(sorted(tally.documents)[:8])}", markup=False, soft_wrap=True)
        writer.attach("report.json", tally.json(workers))
        writer.attach("report.md", tally.markdown(workers))
    skipped, replaced, ignored = _left_out(documents)
    domains = tuple(
        DomainCounts(name, tally.documents[name], tally.tokens[name], tally.num_bytes[name], skipped[name], replaced[name])
        for name in sorted(tally.documents.keys() | skipped.keys() | replaced.keys())
    )
    return PrepareReport(out, domains, ignored, tally)


def run(
    sources: Sequence[str | Path],
    *,
    tokenizer: str | Path,
    out: str | Path,
    domain: str | None = None,
    invalid_utf8: InvalidUtf8 = "error",
    recipe: str | None = None,
    decontaminate: str | Path | None = None,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> PrepareReport:
    """Stage of ``dsv2 prepare``: files, folders or "-" (stdin) to a folder of token shards.

    Without a recipe, benchmarks and overrides every document is written as it is.

    Args:
        sources: see :func:`~dsv2.data.documents.read_documents`, also for ``domain`` and ``invalid_utf8``. What has the form
            ``section.key=value`` and is no file replaces a value of the recipe.
        tokenizer: folder of the tokenizer.
        out: folder to write.
        recipe: name of a shipped recipe of ``recipes/prepare``, or path of a TOML file.
        decontaminate: folder of benchmarks whose text is to be kept out.
        workers: processes.
        shard_tokens: size from which a shard is closed.

    Raises:
        ConfigError: an option is out of range.
        DataError: the input is missing, damaged or empty, or ``out`` cannot be written.
        MissingExtra: a rule needs a package that is not installed.
    """
    overrides = [str(source) for source in sources if OVERRIDE.match(str(source)) and not Path(source).exists()]
    documents = read_documents([source for source in sources if str(source) not in overrides], domain=domain, invalid_utf8=invalid_utf8)
    rules = load_recipe(recipe or "plain", PrepareRecipe, folder="prepare", overrides=overrides)
    if rules == PrepareRecipe() and decontaminate is None and workers == 1:
        report = prepare(documents, Tokenizer.load(tokenizer), out, shard_tokens=shard_tokens)
    else:
        report = prepare_by_recipe(
            documents, tokenizer, out, rules, benchmarks=decontaminate, workers=workers, shard_tokens=shard_tokens
        )  # fmt: skip
    report.table()
    return report


def train_tokenizer_stage(
    sources: Sequence[str | Path], *, out: str | Path, vocab_size: int = 4096, invalid_utf8: InvalidUtf8 = "error"
) -> TokenizerReport:
    """Stage of ``dsv2 tokenizer``: files, folders or "-" (stdin) to a folder with a tokenizer.

    Args:
        sources: see :func:`~dsv2.data.documents.read_documents`, also for ``invalid_utf8``; read once.
        out: folder to write; an older tokenizer there is replaced.
        vocab_size: the model's padded vocabulary, a multiple of 128.

    Raises:
        ConfigError: ``vocab_size`` cannot be.
        DataError: the input is missing, damaged or empty, or ``out`` holds something else or cannot be written.
    """
    out = Path(out)
    refuse_foreign_files(out, ("tokenizer.json", "tokenizer_config.json"))
    documents = read_documents(sources, invalid_utf8=invalid_utf8)
    samples: dict[str, list[str]] = {}
    with bar(documents.total_bytes, "reading", unit="bytes") as progress:
        tokenizer = train_tokenizer(_sampled(_watched(documents, progress), samples), vocab_size=vocab_size)
    with atomic_folder(out) as folder:
        tokenizer.save(folder)
    domains = tuple((domain, measure(tokenizer, texts)) for domain, texts in sorted(samples.items()))
    report = TokenizerReport(out, tokenizer.vocab_size, tokenizer.num_tokens, domains)
    report.table()
    return report


def _watched(documents: Iterable[Document], progress: Bar) -> Iterator[Document]:
    """Pass documents on and show how many bytes were read, as they lie on disk where that is known."""
    shown = 0
    for document in documents:
        if isinstance(documents, DocumentStream) and documents.total_bytes is not None:
            done = documents.bytes_read
        else:
            done = shown + len(document.text.encode())
        if done > shown:
            progress.advance(done - shown)
            shown = done
        yield document


def _sampled(documents: Iterable[Document], samples: dict[str, list[str]]) -> Iterator[str]:
    """Pass the texts on and keep the first ``SAMPLE_CHARACTERS`` of each domain."""
    room: dict[str, int] = {}
    for document in documents:
        left = room.setdefault(document.domain, SAMPLE_CHARACTERS)
        if left > 0:
            samples.setdefault(document.domain, []).append(document.text[:left])
            room[document.domain] = left - len(document.text)
        yield document.text


def _left_out(documents: Iterable[Document]) -> tuple[Counter[str], Counter[str], int]:
    """Return blank documents and replaced characters by domain, and ignored files; of a plain iterable nothing is known."""
    if isinstance(documents, DocumentStream):
        return documents.skipped, documents.replaced, documents.ignored_files
    return Counter(), Counter(), 0
