"""Tools that a policy calls while it answers. What a tool writes is forced into the answer and left out of the loss."""

import ast
import operator
from fractions import Fraction
from typing import Protocol, runtime_checkable

from dsv2.engine.request import at_the_end

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@runtime_checkable
class Tool(Protocol):
    """Something that goes on where the policy called it."""

    call: str  # regular expression: it is the tool's turn behind a token at which the answer ends in a match, at most 256 characters

    def answer(self, text: str) -> str:
        """Return what to write behind ``text``, the policy's answer so far; empty: nothing, the policy goes on."""
        ...


class Calculator:
    """Writes results: behind ``<<12+34=`` it puts ``46>>``, as in the annotations of GSM8K. Whole numbers, fractions as p/q."""

    call: str = r"<<([0-9+\-*/(). ]{1,64})="

    def answer(self, text: str) -> str:
        """Return the result of the call that the text ends in, "?" where it has none; empty where it is no call."""
        call = at_the_end(self.call).search(text)
        if call is None:
            return ""
        try:
            value = _value(ast.parse(call[1].strip(), mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError):
            return "?>>"
        return f"{value}>>"


def tool_named(name: str) -> Tool | None:
    """Return a tool by the name that recipes give it; None for "none"."""
    return {"none": None, "calculator": Calculator()}[name]


def _value(node: ast.expr) -> Fraction:
    """Return the exact value of sums and products of numbers.

    Raises:
        ValueError: the expression holds anything else.
        ZeroDivisionError: it divides by zero.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        result: Fraction = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
        return result
    raise ValueError(f"{ast.dump(node)} is neither a number nor + - * /")
