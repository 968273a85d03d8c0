"""What ``dsv2 prepare`` counted: documents by step, examples of what was dropped, and where the time went; as JSON and to read."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter, process_time
from typing import Any, TypeVar

from dsv2.data.clean import Drop
from dsv2.data.pieces import Cleaned, Dropped, Encoded, Kept

EXAMPLES = 3  # of each rule
T = TypeVar("T")


class Tally:
    """Counts of one run; equal for any number of processes but for ``seconds`` and ``reused``.

    Attributes:
        read: documents and bytes that the sources held.
        drops: documents dropped, by rule.
        drop_bytes: their length as UTF-8, by rule.
        examples: the first few documents that each rule dropped.
        changed: documents in which an encoding was mended and items masked, by kind.
        documents: written, by domain; likewise ``tokens`` and ``num_bytes``.
        languages: documents written, by domain and language tag.
        turned: documents told as fill-in-the-middle.
        benchmarks: their ``texts``, and those ``too_short`` to be found in a document; empty where none were given.
        reused: pieces that an interrupted run had finished.
        seconds: of CPU time by step, summed over the processes.
    """

    def __init__(self) -> None:
        self.read: Counter[str] = Counter(documents=0, bytes=0, pieces=0)
        self.drops: Counter[str] = Counter()
        self.drop_bytes: Counter[str] = Counter()
        self.examples: dict[str, list[Dropped]] = {}
        self.changed: Counter[str] = Counter()
        self.languages: Counter[tuple[str, str]] = Counter()
        self.documents: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.turned = 0
        self.benchmarks: dict[str, int] = {}
        self.reused = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._start = perf_counter()

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the CPU seconds of a block to a step."""
        start = process_time()
        try:
            yield
        finally:
            self.seconds[step] += process_time() - start

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items on, and count the time that they take to come as reading."""
        source = iter(items)
        while True:
            with self.timed("read sources"):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def cleaned(self, piece: Cleaned) -> None:
        """Count a piece that went through the rules."""
        self.read.update(documents=len(piece.kept) + len(piece.dropped), pieces=1)
        self.read["bytes"] += sum(item.num_bytes for item in piece.kept) + sum(item.num_bytes for item in piece.dropped)
        self.reused += piece.reused
        self.changed.update(piece.changed)
        self._add_seconds(piece.seconds)
        for item in piece.dropped:
            self._drop(item)

    def duplicate(self, item: Kept, drop: Drop) -> None:
        """Count a document that is a duplicate."""
        self._drop(Dropped(item.domain, item.place, drop.rule, drop.why, item.num_bytes, item.excerpt))

    def _drop(self, item: Dropped) -> None:
        self.drops[item.rule] += 1
        self.drop_bytes[item.rule] += item.num_bytes
        examples = self.examples.setdefault(item.rule, [])
        if len(examples) < EXAMPLES:
            examples.append(item)

    def written(self, item: Kept, num_tokens: int) -> None:
        """Count a document that went to a shard."""
        self.documents[item.domain] += 1
        self.tokens[item.domain] += num_tokens
        self.num_bytes[item.domain] += item.num_bytes
        if item.language:
            self.languages[item.domain, item.language] += 1

    def encoded(self, piece: Encoded) -> None:
        """Count what encoding a piece took."""
        self.turned += piece.num_turned
        self._add_seconds(piece.seconds)

    def _add_seconds(self, seconds: Mapping[str, float]) -> None:
        for step, spent in seconds.items():
            self.seconds[step] += spent

    @property
    def elapsed_s(self) -> float:
        """Return the seconds since the beginning."""
        return perf_counter() - self._start

    def commonest(self) -> str:
        """Return the rule that dropped most documents."""
        return max(sorted(self.drops), key=lambda rule: self.drops[rule], default="no rule")

    def _slowest(self) -> list[tuple[str, float]]:
        return sorted(self.seconds.items(), key=lambda item: -item[1])

    def json(self, workers: int) -> str:
        """Return everything as JSON; the keys ``time`` and ``reused_pieces`` differ from run to run."""
        examples = {
            rule: [{"place": item.place, "domain": item.domain, "why": item.why, "text": item.excerpt} for item in items]
            for rule, items in sorted(self.examples.items())
        }
        languages: dict[str, dict[str, int]] = {}
        for (domain, language), count in sorted(self.languages.items()):
            languages.setdefault(domain, {})[language] = count
        written = {
            domain: {"documents": self.documents[domain], "tokens": self.tokens[domain], "bytes": self.num_bytes[domain]}
            for domain in sorted(self.documents)
        }
        content: dict[str, Any] = {
            "read": {"documents": self.read["documents"], "bytes": self.read["bytes"]},
            "written": written,
            "dropped": {rule: {"documents": self.drops[rule], "bytes": self.drop_bytes[rule]} for rule in sorted(self.drops)},
            "changed": dict(sorted(self.changed.items())),
            "languages": languages,
            "fill_in_the_middle": self.turned,
            "benchmarks": self.benchmarks,
            "examples": examples,
            "reused_pieces": self.reused,
            "time": {
                "seconds": round(self.elapsed_s, 3),
                "workers": workers,
                "cpu_seconds": {step: round(seconds, 3) for step, seconds in self._slowest()},
            },
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def markdown(self, workers: int) -> str:
        """Return a report for people."""
        return "\n".join([*self._counts(), *self._times(workers), *self._examples()]) + "\n"

    def _counts(self) -> Iterator[str]:
        documents, size = self.read["documents"], self.read["bytes"]
        yield from ("# What became of the documents", "", "| step | documents | share | bytes |", "| --- | ---: | ---: | ---: |")
        yield f"| read | {documents:,} | 100 % | {size:,} |"
        for rule in sorted(self.drops):
            share = 100 * self.drops[rule] / max(documents, 1)
            yield f"| dropped: {rule} | {self.drops[rule]:,} | {share:.2f} % | {self.drop_bytes[rule]:,} |"
        kept = self.documents.total()
        yield f"| **written** | {kept:,} | {100 * kept / max(documents, 1):.2f} % | {self.num_bytes.total():,} |"
        yield from ("", "| domain | documents | tokens | bytes | languages |", "| --- | ---: | ---: | ---: | --- |")
        for domain in sorted(self.documents):
            tags = Counter({language: count for (name, language), count in self.languages.items() if name == domain})
            shown = ", ".join(f"{language} {count}" for language, count in sorted(tags.items(), key=lambda tag: (-tag[1], tag[0]))[:8])
            name = domain.replace("|", "\\|")
            yield f"| {name} | {self.documents[domain]:,} | {self.tokens[domain]:,} | {self.num_bytes[domain]:,} | {shown} |"
        if self.changed:
            yield from (
                "",
                "Mended (documents) and masked (items): " + ", ".join(f"{k} {n:,}" for k, n in sorted(self.changed.items())) + ".",
            )
        if self.turned:
            yield from ("", f"Told as fill-in-the-middle: {self.turned:,} documents.")
        if self.benchmarks:
            texts, short = self.benchmarks["texts"], self.benchmarks["too_short"]
            yield from ("", f"Benchmarks: {texts:,} texts, labels and names among them; {short:,} are too short to be found in a document.")

    def _times(self, workers: int) -> Iterator[str]:
        rate = self.read["bytes"] / 1e6 / max(self.elapsed_s, 1e-9)
        total = max(sum(self.seconds.values()), 1e-9)
        yield from ("", "# Where the time went", "")
        found = f"{self.reused} of {self.read['pieces']} pieces were found finished"
        yield f"{self.elapsed_s:.1f} s, {rate:.2f} MB/s of text, {workers} workers; {found}."
        yield from ("", "| step | CPU seconds, all processes | share |", "| --- | ---: | ---: |")
        for step, seconds in self._slowest():
            yield f"| {step} | {seconds:.2f} | {100 * seconds / total:.0f} % |"

    def _examples(self) -> Iterator[str]:
        for rule, items in sorted(self.examples.items()):
            yield from ("", f"# Dropped by {rule}", "")
            for item in items:
                yield f"- {_plain(item.place)} ({_plain(item.domain)}): {_plain(item.why)}"
                if item.excerpt:
                    yield f"  > {_plain(item.excerpt)}"


def _plain(text: str) -> str:
    """Return text on one line, in which Markdown and HTML see no marks."""
    return "".join("\\" + character if character in "\\`*_[]<>#|&" else character for character in " ".join(text.split()))
