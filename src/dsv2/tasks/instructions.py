"""A small instruction set in English and Chinese, made of our own templates: facts, words, order, small talk.

What the tour teaches beside sums. The facts lie in ``assets/instructions.toml``. Every question has one right answer, so that what was
learned can be counted.
"""

import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from dsv2.assets import instructions_path

Language = Literal["en", "zh"]
ASKED_TWICE = 0.15  # share of conversations with a second question


@dataclass(frozen=True, slots=True)
class Instruction:
    """A question and its answer.

    Args:
        question: what the user says.
        answer: what the assistant should say.
        kind: "capital", "translate", "opposite", "next", "talk".
        lang: of the question.
    """

    question: str
    answer: str
    kind: str
    lang: Language


@cache
def instructions() -> tuple[Instruction, ...]:
    """Return every question that the templates make, in a fixed order."""
    facts = tomllib.loads(instructions_path().read_text(encoding="utf-8"))
    return tuple(instruction for make in (_capitals, _words, _opposites, _cycles, _talk) for instruction in make(facts))


def conversations(num: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield conversations for fine-tuning: kinds equally often, whatever the number of their questions, sometimes two questions in a row.

    Args:
        num: of conversations.
        seed: same seed, same conversations.
    """
    by_kind: dict[tuple[str, str], list[Instruction]] = {}
    for instruction in instructions():
        by_kind.setdefault((instruction.kind, instruction.lang), []).append(instruction)
    kinds, generator = sorted(by_kind), random.Random(f"instructions {seed}")
    for _ in range(num):
        turns = 2 if generator.random() < ASKED_TWICE else 1
        chosen = [generator.choice(by_kind[generator.choice(kinds)]) for _ in range(turns)]
        yield [
            message
            for instruction in chosen
            for message in ({"role": "user", "content": instruction.question}, {"role": "assistant", "content": instruction.answer})
        ]


def _capitals(facts: dict[str, Any]) -> Iterator[Instruction]:
    for country, capital, land, city in facts["capitals"]:
        for question in (
            f"What is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
        ):
            yield Instruction(question, f"The capital of {country} is {capital}.", "capital", "en")
        yield Instruction(f"{capital} is the capital of which country?", f"{capital} is the capital of {country}.", "capital", "en")
        for question in (f"{land}的首都是哪里？", f"{land}的首都是什么？", f"哪个城市是{land}的首都？"):
            yield Instruction(question, f"{land}的首都是{city}。", "capital", "zh")
        yield Instruction(f"{city}是哪个国家的首都？", f"{city}是{land}的首都。", "capital", "zh")


def _words(facts: dict[str, Any]) -> Iterator[Instruction]:
    for english, chinese in facts["words"]:
        yield Instruction(f"Translate into Chinese: {english}", chinese, "translate", "en")
        yield Instruction(f"How do you say “{english}” in Chinese?", chinese, "translate", "en")
        yield Instruction(f"翻译成英文：{chinese}", english, "translate", "zh")
        yield Instruction(f"“{chinese}”用英文怎么说？", english, "translate", "zh")


def _opposites(facts: dict[str, Any]) -> Iterator[Instruction]:
    for pair in facts["opposites"]["en"]:
        for word, other in (pair, pair[::-1]):
            yield Instruction(f"What is the opposite of {word}?", f"The opposite of {word} is {other}.", "opposite", "en")
    for pair in facts["opposites"]["zh"]:
        for word, other in (pair, pair[::-1]):
            yield Instruction(f"“{word}”的反义词是什么？", f"“{word}”的反义词是“{other}”。", "opposite", "zh")


def _cycles(facts: dict[str, Any]) -> Iterator[Instruction]:
    for cycle in facts["cycles"]["en"]:
        for word, follower in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            yield Instruction(f"What comes after {word}?", f"{follower} comes after {word}.", "next", "en")
            yield Instruction(f"What comes before {follower}?", f"{word} comes before {follower}.", "next", "en")
    for cycle in facts["cycles"]["zh"]:
        for word, follower in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            yield Instruction(f"{word}之后是什么？", f"{word}之后是{follower}。", "next", "zh")
            yield Instruction(f"{follower}之前是什么？", f"{follower}之前是{word}。", "next", "zh")


def _talk(facts: dict[str, Any]) -> Iterator[Instruction]:
    for question, answer in facts["talk"]["en"]:
        yield Instruction(question, answer, "talk", "en")
    for question, answer in facts["talk"]["zh"]:
        yield Instruction(question, answer, "talk", "zh")
