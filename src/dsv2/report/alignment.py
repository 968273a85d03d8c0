"""How a tour's model came to answer: what it says before, between and after, how often sums are right, and the curves of its rewards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv2.report.page import ChapterSection, Section, TableSection
from dsv2.report.record import load_record
from dsv2.report.reinforcement import reward_sections


def alignment_sections(
    run: Path, before: Mapping[str, float], after: Mapping[str, float], questions: Sequence[str], answers: Sequence[Sequence[str]]
) -> list[Section]:
    """Return the sections.

    Args:
        run: folder of GRPO.
        before: its first evaluation.
        after: its last.
        questions: that were asked.
        answers: for each question those of the pre-trained, the fine-tuned and the final model.
    """
    asked = tuple((question, *said) for question, said in zip(questions, answers, strict=True))
    sections: list[Section] = [
        ChapterSection("From text to answers"),
        TableSection("What it answers", ("question", "pre-trained", "fine-tuned", "after GRPO"), asked),
    ]
    rates = tuple((name.rpartition("/")[2], f"{before[name]:.1%}", f"{after[name]:.1%}") for name in before if "pass@" in name)
    if rates:
        note = "Held-out sums, several answers each, drawn at temperature 1. pass@k: at least one of k answers is right."
        sections.append(TableSection("How often sums are right", ("", "fine-tuned", "after GRPO"), rates, note))
    return sections + [section for section in reward_sections([load_record(run)], recipe=False) if not isinstance(section, ChapterSection)]
