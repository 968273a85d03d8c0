"""Sums and differences as questions, and demonstrations of which a known share is wrong.

A model that learned from such demonstrations answers right about as often as they did, and nearly always within a few tries: what is left
for reinforcement learning is to select the right answer among those that the model already gives (as V2 reads its own gains, section 4.4).
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsv2.errors import ConfigError

Split = Literal["train", "test"]

TEST_SHARE = 0.1  # of the pairs of numbers
CHINESE_SHARE = 0.25  # of the questions

STEP_SEPARATOR = re.compile("[,:]")  # of a working and the answer behind it

# With signs throughout: where words stand for some of them, a small model takes longer to find the digits.
_QUESTIONS = {"en": ("What is {}?", "Calculate {}.", "{} = ?"), "zh": ("{} 等于多少？", "计算 {}。")}
_NUMBER = re.compile(r"-?[0-9]+(?:[.,][0-9]+)*")
_EQUATION = re.compile(r"\s*([0-9]{1,18}(?:[+-][0-9]{1,18})+)=(-?[0-9]{1,18})\s*")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with one number as its answer.

    Args:
        question: what the user says.
        answer: digits, without separators.
        first: the number before the sign; never less than the second in a difference, so that no answer is negative.
        sign: "+" or "-".
        second: the number after it.
    """

    question: str
    answer: str
    first: int
    sign: str
    second: int


def problems(num: int, seed: int, digits: int = 3, split: Split = "train", *, stream: str = "prompts") -> Iterator[Problem]:
    """Yield problems, sums and differences equally often; some may come twice.

    Args:
        num: of problems.
        seed: same seed, same problems.
        digits: of each of the two numbers.
        split: which pairs of numbers may occur. A pair belongs to one split in any order and with either sign.
        stream: what they are for. Streams of one seed differ, so that what is asked is not what was just shown.

    Raises:
        ConfigError: numbers without digits.
    """
    if digits < 1:
        raise ConfigError(f"digits = {digits}; a number has at least 1")
    generator = random.Random(f"{stream} {seed} {digits} {split}")
    for _ in range(num):
        pair = _pair(generator, digits)
        while split_of(*pair) != split:
            pair = _pair(generator, digits)
        sign = generator.choice("+-")
        first, second = pair if sign == "+" else (max(pair), min(pair))
        lang = "zh" if generator.random() < CHINESE_SHARE else "en"
        question = generator.choice(_QUESTIONS[lang]).format(f"{first} {sign} {second}")
        yield Problem(question, str(first + second if sign == "+" else first - second), first, sign, second)


def split_of(first: int, second: int) -> Split:
    """Return the split of a pair of numbers, whatever their order: by hash, so that it never changes."""
    pair = f"{min(first, second)} {max(first, second)}".encode()
    drawn = int.from_bytes(hashlib.blake2b(pair, digest_size=8).digest(), "big") / 2**64
    return "test" if drawn < TEST_SHARE else "train"


def demonstrations(num: int, seed: int, wrong: float = 0.45, digits: int = 3, *, worked: bool = True) -> Iterator[list[dict[str, str]]]:
    """Yield conversations of one question and its answer, from the training split.

    With the working in front of it, an answer is learned by a million parameters in a minute and a half; without, not in three.

    Args:
        num: of conversations.
        seed: same seed, same conversations.
        wrong: share of them whose answer is a near miss; exactly so many, at random places.
        digits: of each number.
        worked: the answer comes behind its working, which is right even where the answer is not.

    Raises:
        ConfigError: a share outside of 0 to 1, or numbers without digits.
    """
    if not 0 <= wrong <= 1:
        raise ConfigError(f"wrong = {wrong}; a share is 0 to 1")
    generator = random.Random(f"demonstrations {seed}")
    misses = set(generator.sample(range(num), round(wrong * num)))
    for index, problem in enumerate(problems(num, seed, digits, stream="demonstrations")):
        answer = near_miss(problem, generator) if index in misses else problem.answer
        if worked:
            answer = f"{working(problem)}: {answer}"
        yield [{"role": "user", "content": problem.question}, {"role": "assistant", "content": answer}]


def exercises(num: int, seed: int, split: Split = "train", *, together: int = 5) -> Iterator[str]:
    """Yield texts such as exercise books have: a few sums of three digits, a line each, ``788 - 615: 8-5=3, 8-1=7, 7-6=1: 173``, all right.

    Args:
        num: of texts.
        seed: same seed, same texts.
        split: which pairs of numbers may occur.
        together: sums in a text.
    """
    asked = problems(num * together, seed, split=split, stream="exercises")
    lines = [f"{problem.first} {problem.sign} {problem.second}: {working(problem)}: {problem.answer}" for problem in asked]
    for first in range(0, len(lines), together):
        yield "\n".join(lines[first : first + together])


def working(problem: Problem) -> str:
    """Return the sum or difference as people do it on paper, units first: ``5+8=13, 4+7+1=12, 3+6+1=10``; a borrow is ``12-7-1=4``."""
    steps, carried = [], 0
    for place in range(len(str(problem.first))):
        first, second = problem.first // 10**place % 10, problem.second // 10**place % 10
        carry = "" if not carried else f"{problem.sign}1"
        if problem.sign == "+":
            result = first + second + carried
            carried = result // 10
        else:
            carried = int(first < second + carried)
            first += 10 * carried
            result = first - second - bool(carry)
        steps.append(f"{first}{problem.sign}{second}{carry}={result}")
    return ", ".join(steps)


def holds(step: str) -> bool:
    """Tell whether a step of a working, such as ``4+7+1=12``, is right as it stands; what is no sum or difference is not."""
    equation = _EQUATION.fullmatch(step)
    return equation is not None and sum(map(int, re.findall(r"[+-]?[0-9]+", equation[1]))) == int(equation[2])


def near_miss(problem: Problem, generator: random.Random) -> str:
    """Return a wrong answer such as people write: a wrong digit or, half the time where there is one, a carry (a borrow) forgotten."""
    forgotten = _forgotten_carries(problem)
    if forgotten and generator.random() < 0.5:
        return generator.choice(forgotten)
    digits = list(problem.answer)
    place = generator.randrange(len(digits))
    others = [digit for digit in "0123456789" if digit != digits[place] and (digit != "0" or place > 0 or len(digits) == 1)]
    digits[place] = generator.choice(others)
    return "".join(digits)


def final_number(text: str) -> str | None:
    """Return the last number of a text as it is written, separators and all; None without one."""
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _pair(generator: random.Random, digits: int) -> tuple[int, int]:
    least, most = 10 ** (digits - 1), 10**digits - 1
    return generator.randint(least, most), generator.randint(least, most)


def _forgotten_carries(problem: Problem) -> list[str]:
    """Return the answers of whoever forgets one carry of a sum, or one borrow of a difference."""
    found = []
    for place in range(1, len(str(problem.first)) + 1):
        first, second = problem.first % 10**place, problem.second % 10**place
        if problem.sign == "+" and first + second >= 10**place:
            found.append(str(int(problem.answer) - 10**place))
        elif problem.sign == "-" and first < second:
            found.append(str(int(problem.answer) + 10**place))
    return found
