"""What a fine-tuning run reads: packed conversations, held-out ones, and how they came about."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv2.data.conversation_fim import FimCounts, add_fim, fenced_code
from dsv2.data.conversation_rows import ConversationRows, Samples, render_samples
from dsv2.data.conversations import Conversation, read_conversations
from dsv2.data.documents import read_documents
from dsv2.data.order import canonical, drawn_by_content
from dsv2.data.rows import ReadingReport
from dsv2.errors import DataError
from dsv2.tokenizer.tokenizer import Tokenizer
from dsv2.train.sft_recipe import SftRecipe

Paths = Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out conversations of one domain; ``num_bytes``: of what the assistant says in them."""

    rows: ConversationRows
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ConversationData:
    """Everything that a run reads, rendered and packed.

    Args:
        rows: to train on.
        held_out: by domain; empty without any.
        tokenizer: of the model, with the template that the conversations are written in.
        num_conversations: trained on, by domain.
        fim: documents told as fill-in-the-middle, and those that are too long for it.
        reports: what was read and refused, of the training files and of the validation files.
    """

    rows: ConversationRows
    held_out: dict[str, HeldOut]
    tokenizer: Tokenizer
    num_conversations: dict[str, int]
    fim: FimCounts
    reports: dict[str, ReadingReport]

    @property
    def fingerprint(self) -> str:
        """Hash of all samples and the tokenizer: equal fingerprints are equal data."""
        parts = [self.rows.samples.fingerprint, *(held.rows.samples.fingerprint for held in self.held_out.values())]
        return hashlib.sha256(" ".join([*parts, self.tokenizer.fingerprint]).encode()).hexdigest()


def open_conversations(
    recipe: SftRecipe, tokenizer: Tokenizer, paths: Paths, *, validation: Paths = (), fim_documents: Paths = ()
) -> ConversationData:
    """Read, render and pack what a run trains on and what it is validated on.

    Args:
        recipe: says how.
        tokenizer: of the model.
        paths: files and folders of conversations.
        validation: those held out; without any the recipe's share of the conversations.
        fim_documents: files of code for ``data.fim_share``; without any the fenced code of the answers.

    Raises:
        DataError: a file is missing or damaged, more rows are refused than the recipe allows, none is left, or a conversation has nothing
            to learn.
        ConfigError: the template does not fit the tokenizer, or there are too few documents for ``data.fim_share``.
    """
    tokenizer = tokenizer.with_template(recipe.data.template)
    reports = {"training": ReadingReport()}
    share = 0.0 if validation else recipe.data.validation_share
    conversations: list[Conversation] = []
    held: list[Conversation] = []
    for conversation in read_conversations(paths, reports["training"]):
        content = canonical([conversation.messages, conversation.tools])  # one that occurs twice is on one side
        (held if drawn_by_content(content, share) else conversations).append(conversation)
    domains = _rendered(conversations, tokenizer, recipe, reports["training"])
    if not domains:
        raise _none_left("to train on", reports["training"])
    counts = {domain: len(samples) for domain, samples in domains.items()}
    training = _together(domains)
    fim = FimCounts(0, 0)
    if recipe.data.fim_share:
        documents = [(f"{d.source}, {d.location}", d.text) for d in read_documents(fim_documents)] if fim_documents else None
        fim = add_fim(
            training, list(fenced_code(conversations)) if documents is None else documents, tokenizer,
            share=recipe.data.fim_share, seq_len=recipe.run.seq_len, seed=recipe.run.seed,
        )  # fmt: skip
    if validation:
        reports["validation"] = ReadingReport()
        held = list(read_conversations(validation, reports["validation"]))
    held_samples = _rendered(held, tokenizer, recipe, reports.get("validation", reports["training"]))
    if validation and not held_samples:
        raise _none_left("to validate on", reports["validation"])
    for name, report in reports.items():
        report.require_few_refused(name, recipe.data.max_refused)
    return ConversationData(
        ConversationRows(training, recipe.run.seq_len, pad_id=tokenizer.eos_id),
        {
            domain: HeldOut(ConversationRows(samples, recipe.run.seq_len, pad_id=tokenizer.eos_id), samples.label_bytes(tokenizer))
            for domain, samples in held_samples.items()
        },
        tokenizer, counts, fim, reports,
    )  # fmt: skip


def _rendered(conversations: Sequence[Conversation], tokenizer: Tokenizer, recipe: SftRecipe, report: ReadingReport) -> dict[str, Samples]:
    return render_samples(
        conversations, tokenizer, template=recipe.data.template, seq_len=recipe.run.seq_len, too_long=recipe.data.too_long, report=report
    )


def _none_left(purpose: str, report: ReadingReport) -> DataError:
    return DataError(f"no conversation is left {purpose}: {'; '.join(report.lines())}", hint="raise run.seq_len, or mend the files")


def _together(domains: dict[str, Samples]) -> Samples:
    found = Samples()
    for samples in domains.values():
        found.tokens += samples.tokens
        found.learn += samples.learn
        found.places += samples.places
        found.cut += samples.cut
    return found
