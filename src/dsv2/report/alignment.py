"""How a tour's model came to answer: what it says before, between and after, how much is right, and the curves of its rewards."""

from collections.abc import Sequence
from pathlib import Path

from dsv2.report.page import ChapterSection, Section, TableSection
from dsv2.report.record import load_record
from dsv2.report.reinforcement import reward_sections

_MODELS = ("pre-trained", "fine-tuned", "after GRPO")


def alignment_sections(
    run: Path,
    gains: Sequence[tuple[str, str, str]],
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    known: Sequence[float],
) -> list[Section]:
    """Return the sections.

    Args:
        run: folder of GRPO.
        gains: of its held-out sums: a rate's name, before and after.
        questions: that were asked.
        answers: for each question those of the pre-trained, the fine-tuned and the final model.
        known: their shares of the instruction set answered word for word.
    """
    asked = tuple((question, *said) for question, said in zip(questions, answers, strict=True))
    rates = (*((name, "", before, after) for name, before, after in gains), ("instruction set", *(f"{share:.1%}" for share in known)))
    note = (
        "Held-out sums: several answers each, drawn at temperature 1; pass@k: at least one of k counts as right. The instruction set: "
        "answered word for word at temperature 0; the model was fine-tuned on its questions."
    )
    return [
        ChapterSection("From text to answers"),
        TableSection("What it answers", ("question", *_MODELS), asked),
        TableSection("How much is right", ("", *_MODELS), rates, note),
        *(section for section in reward_sections([load_record(run)], recipe=False) if not isinstance(section, ChapterSection)),
    ]
