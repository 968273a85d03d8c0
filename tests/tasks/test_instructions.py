"""The tour's instruction set: every question has one answer, and conversations repeat with their seed."""

from collections import Counter

from dsv2.tasks.instructions import conversations, instructions


def test_every_question_has_one_answer_and_both_languages_have_every_kind() -> None:
    answers: dict[str, set[str]] = {}
    for instruction in instructions():
        answers.setdefault(instruction.question, set()).add(instruction.answer)
    assert {question for question, given in answers.items() if len(given) > 1} == set()
    assert len(answers) == len(instructions()) > 300
    kinds = {lang: {instruction.kind for instruction in instructions() if instruction.lang == lang} for lang in ("en", "zh")}
    assert kinds["en"] == kinds["zh"] == {"capital", "translate", "opposite", "next", "talk"}


def test_conversations_repeat_with_their_seed_and_ask_every_kind() -> None:
    made = list(conversations(400, seed=3))
    assert made == list(conversations(400, seed=3)) != list(conversations(400, seed=4))
    kind_of = {instruction.question: (instruction.kind, instruction.lang) for instruction in instructions()}
    counts = Counter(kind_of[message["content"]] for messages in made for message in messages if message["role"] == "user")
    assert len(counts) == 10 and min(counts.values()) > 20
    assert {len(messages) for messages in made} == {2, 4}
