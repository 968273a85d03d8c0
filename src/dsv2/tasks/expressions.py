"""Mathematical expressions in LaTeX or plain writing: read without running anything, and evaluated within bounds.

An expression is a tree of tuples that begin with the name of an operation. Nothing is passed to eval or to a computer algebra system,
which would do both for a string that a model wrote; text, depth and the size of every number are limited instead.
"""

import cmath
import math
import re
from fractions import Fraction
from typing import Any

MAX_DEPTH = 40
MAX_BITS = 4096  # of an exact number
MAX_POINTS = 3

Tree = tuple[Any, ...]
Number = Fraction | complex

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|[A-Za-z]+|[^\W\d_A-Za-z]+|\S")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "ln", "log", "exp", "sqrt", "abs"}
_CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
_GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "phi", "omega", "rho", "sigma", "tau"}
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}


class NotRead(ValueError):
    """A text is no expression that is understood here."""


def read(text: str) -> Tree:
    """Return the tree of an expression that `answers.py` has already stripped of spacing commands.

    Raises:
        NotRead: it is none.
    """
    reader = _Reader(_TOKEN.findall(text))
    tree = reader.sum(0)
    if reader.next():
        raise NotRead(f"{reader.next()!r} follows an expression")
    return tree


class _Reader:
    """A reader by recursive descent; every method takes the depth it is at."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._place = 0
        self._bars = 0

    def next(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self, token: str = "") -> str:
        found = self.next()
        if not found or (token and found != token):
            raise NotRead(f"{token or 'something'} is missing before {found!r}")
        self._place += 1
        return found

    def sum(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise NotRead("too deeply nested")
        tree = self._product(depth)
        while self.next() in ("+", "-", "±"):
            tree = (self._take(), tree, self._product(depth))
        return tree

    def _product(self, depth: int) -> Tree:
        tree = self._signed(depth)
        while True:
            if self.next() in ("*", "/"):
                tree = (self._take(), tree, self._signed(depth))
            elif self._begins_factor():
                tree = ("*", tree, self._power(depth))
            else:
                return tree

    def _begins_factor(self) -> bool:
        token = self.next()
        if not token or token == "|":
            return token == "|" and not self._bars
        return token[0].isalnum() or token[-1].isdigit() or token[0] == "\\" or token in "({["

    def _signed(self, depth: int) -> Tree:
        signs = 0
        while self.next() in ("+", "-"):
            signs += self._take() == "-"
        if self.next() == "±":
            self._take()
            return ("±", ("number", Fraction(0)), self._power(depth))
        tree = self._power(depth)
        return ("negative", tree) if signs % 2 else tree

    def _power(self, depth: int) -> Tree:
        tree = self._atom(depth + 1)
        while self.next() in ("!", "%"):
            tree = (self._take(), tree)
        if self.next() == "^":
            self._take()
            tree = ("^", tree, self._exponent(depth + 1))
        return tree

    def _exponent(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise NotRead("too deeply nested")
        return self._signed(depth)

    def _atom(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise NotRead("too deeply nested")
        token = self._take()
        if token[-1].isdigit() and token.isascii():
            return self._number(token, depth)
        if token in _CLOSING:
            self._bars += token == "|"
            tree = self.sum(depth + 1)
            self._take(_CLOSING[token])
            self._bars -= token == "|"
            return ("abs", tree) if token == "|" else tree
        name = token.removeprefix("\\")
        if name in ("frac", "binom"):
            return (name, self._argument(depth), self._argument(depth))
        if name == "sqrt" and self.next() == "[":
            self._take()
            degree = self.sum(depth + 1)
            self._take("]")
            return ("root", degree, self._argument(depth))
        if name in _FUNCTIONS:
            return self._function(name, depth)
        if name in _CONSTANTS or name in _GREEK:
            return ("name", self._with_index(name))
        if token.isalpha() and token.isascii():
            return self._letters(token)
        raise NotRead(f"{token!r} is not known")

    def _number(self, token: str, depth: int) -> Tree:
        number: Tree = ("number", Fraction(token))
        if self.next() == "\\frac" and "." not in token:  # 1\frac{1}{2}: a mixed number, as the sets of questions write it
            fraction = self._atom(depth + 1)
            return ("+", number, fraction) if all(part[0] == "number" for part in fraction[1:]) else ("*", number, fraction)
        return number

    def _argument(self, depth: int) -> Tree:
        """Read what a command takes: a group, or one character, as in \\frac12."""
        token = self.next()
        if token.isdigit() and len(token) > 1:
            self._tokens[self._place : self._place + 1] = list(token)
        return self._atom(depth + 1)

    def _function(self, name: str, depth: int) -> Tree:
        power = None
        if self.next() == "^":
            self._take()
            power = self._argument(depth)
        base = None
        if name == "log" and self.next() == "_":
            self._take()
            base = self._argument(depth)
        argument = self._argument(depth) if name == "sqrt" else self._power(depth + 1)
        tree: Tree = ("/", ("ln", argument), ("ln", base)) if base else (name, argument)
        return ("^", tree, power) if power else tree

    def _letters(self, token: str) -> Tree:
        if len(token) > 2:
            raise NotRead(f"{token!r} is a word")
        tree: Tree = ("name", token[0] if len(token) > 1 else self._with_index(token))
        return ("*", tree, ("name", self._with_index(token[1]))) if len(token) > 1 else tree

    def _with_index(self, name: str) -> str:
        if self.next() != "_":
            return name
        self._take()
        if self.next() == "{":
            self._take()
            index = self._take()
            self._take("}")
        else:
            index = self._take()
        return f"{name}_{index}"


def value(tree: Tree, point: int = 0, sign: int = 1) -> Number:
    """Evaluate a tree: exactly while everything is rational, else in double precision.

    Args:
        tree: what `read` returned.
        point: which of MAX_POINTS places to evaluate at; a name has another value at each.
        sign: what ± stands for, 1 or -1.

    Raises:
        ArithmeticError, ValueError: it has no value there, or too large a one.
    """
    operation, *operands = tree
    if operation == "number":
        return _bounded(operands[0])
    if operation == "name":
        return _CONSTANTS[operands[0]] if operands[0] in _CONSTANTS else _sample(operands[0], point)
    numbers = [value(operand, point, sign) for operand in operands]
    return _bounded(_OPERATIONS[operation](*numbers) if operation != "±" else numbers[0] + sign * numbers[1])


def names(tree: Tree) -> set[str]:
    """Return the unknowns of a tree."""
    if tree[0] == "name":
        return {tree[1]} - _CONSTANTS.keys()
    return set().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))


def has_two_signs(tree: Tree) -> bool:
    """Tell whether a tree contains ±."""
    return tree[0] == "±" or any(has_two_signs(part) for part in tree[1:] if isinstance(part, tuple))


def _sample(name: str, point: int) -> complex:
    """Return a fixed number for a name: positive, negative, complex. Where two expressions agree at all three, they are taken for equal."""
    fraction = (sum(ord(letter) * 0.6180339887 ** (place + 1) for place, letter in enumerate(name)) * 0.7548776662) % 1
    return (complex(0.3 + fraction), complex(-2.6 - fraction), complex(0.7 + fraction, 1.3 - fraction / 2))[point]


def _bounded(number: Number) -> Number:
    if isinstance(number, Fraction):
        if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
            raise OverflowError("the number is too large")
    elif not cmath.isfinite(number):
        raise OverflowError("no finite number")
    return number


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1 and abs(exponent) * bits <= MAX_BITS:
            return Fraction(base ** int(exponent))
        if exponent == Fraction(1, 2):
            return _root(Fraction(2), base)
    return complex(base) ** complex(exponent)


def _root(degree: Number, number: Number) -> Number:
    if isinstance(degree, Fraction) and isinstance(number, Fraction) and degree == 2 and number >= 0:
        root = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
        if root * root == number:
            return root
    if isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2 and isinstance(number, Fraction) and number < 0:
        return -(complex(-number) ** complex(1 / degree))  # the real root
    return complex(number) ** complex(1 / degree)


def _factorial(number: Number) -> Number:
    if not isinstance(number, Fraction) or number.denominator != 1 or not 0 <= number <= 300:
        raise ValueError("no factorial")
    return Fraction(math.factorial(int(number)))


def _binomial(n: Number, k: Number) -> Number:
    if not (isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and 0 <= k <= n <= 1000):
        raise ValueError("no binomial coefficient")
    return Fraction(math.comb(int(n), int(k)))


_OPERATIONS: dict[str, Any] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "frac": lambda a, b: a / b,
    "negative": lambda a: -a,
    "%": lambda a: a / 100,
    "^": _power,
    "root": _root,
    "sqrt": lambda a: _root(Fraction(2), a),
    "!": _factorial,
    "binom": _binomial,
    "abs": abs,
    "ln": lambda a: cmath.log(complex(a)),
    "log": lambda a: cmath.log10(complex(a)),
    "exp": lambda a: cmath.exp(complex(a)),
    "sin": lambda a: cmath.sin(complex(a)),
    "cos": lambda a: cmath.cos(complex(a)),
    "tan": lambda a: cmath.tan(complex(a)),
    "cot": lambda a: 1 / cmath.tan(complex(a)),
    "sec": lambda a: 1 / cmath.cos(complex(a)),
    "csc": lambda a: 1 / cmath.sin(complex(a)),
    "arcsin": lambda a: cmath.asin(complex(a)),
    "arccos": lambda a: cmath.acos(complex(a)),
    "arctan": lambda a: cmath.atan(complex(a)),
}
