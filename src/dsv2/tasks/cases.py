"""Tests of a program as the known sets of questions write them, and which part of each may be seen inside.

Whatever a test expects stays outside of the process that runs the program. An `assert f(...) == value` becomes the expression on its left,
which goes in, and the value on its right, which does not. Other statements run in a process of their own, the examiner, for which the
program's functions are calls to another process.
"""

import ast
import builtins
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2.errors import DataError


@dataclass(frozen=True)
class Asserts:
    """Statements as MBPP has them.

    Args:
        statements: each a test of its own, mostly ``assert f(x) == y``.
        setup: code that the statements need; it may use what the program defines.
    """

    statements: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class Check:
    """A function ``check(candidate)`` as HumanEval has it: one test.

    Args:
        code: defines it.
        entry_point: name of the program's function that is the candidate.
        setup: code whose definitions the tests use instead of the program's: the prompt.
    """

    code: str
    entry_point: str
    setup: str = ""


@dataclass(frozen=True)
class Stdio:
    """Pairs of standard input and the output that a whole program shall write to it.

    Blanks at the end of a line and empty lines at the end do not count.
    """

    pairs: tuple[tuple[str, str], ...]


Tests = Asserts | Check | Stdio


@dataclass(frozen=True)
class Call:
    """A test whose two halves can be parted.

    Args:
        expression: a call of the program's function; goes in.
        expected: what it shall return, of plain types; stays outside.
    """

    expression: str
    expected: Any


@dataclass(frozen=True)
class Calls:
    """Tests that need one process: the program's.

    Args:
        calls: one a test; together they are one test if `as_one`.
        setup: runs after the program, in its process.
        as_one: they are parts of a single test.
    """

    calls: tuple[Call, ...]
    setup: str
    as_one: bool


@dataclass(frozen=True)
class Examination:
    """Tests that need a second process.

    Args:
        setup: runs before them, there.
        statements: the tests.
        names: what they take from the program.
        entry_point: the function that is the candidate, or "".
    """

    setup: str
    statements: tuple[str, ...]
    names: tuple[str, ...]
    entry_point: str


def read_tests(record: Mapping[str, Any]) -> Tests:
    """Return the tests of a record of a data set.

    Args:
        record: with ``test_list`` (and ``test_setup_code``) as MBPP has it, with ``test`` and ``entry_point`` (and ``prompt``) as
            HumanEval, or with ``inputs`` and ``outputs``, lists of equal length.

    Raises:
        DataError: it has none of them, or they are empty or no text.
    """
    if "test_list" in record:
        statements = _texts(record, "test_list")
        return Asserts(statements, _text(record, "test_setup_code"))
    if "test" in record and "entry_point" in record:
        return Check(_text(record, "test"), _text(record, "entry_point"), _text(record, "prompt"))
    if "inputs" in record and "outputs" in record:
        inputs, outputs = _texts(record, "inputs"), _texts(record, "outputs")
        if len(inputs) != len(outputs):
            raise DataError(f"a record has {len(inputs)} inputs and {len(outputs)} outputs; each input needs one output")
        return Stdio(tuple(zip(inputs, outputs, strict=True)))
    raise DataError(
        f"a record has no tests of a known form; its fields are {', '.join(sorted(record)) or 'none'}",
        hint="give test_list (MBPP), test and entry_point (HumanEval), or inputs and outputs",
    )


def _text(record: Mapping[str, Any], name: str) -> str:
    text = record.get(name) or ""
    if not isinstance(text, str):
        raise DataError(f"{name} of a record is {type(text).__name__}; it must be text")
    return text


def _texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    texts = record[name]
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{name} of a record must be a list of texts and not empty; it is {str(texts)[:80]}")
    return tuple(texts)


def plan(tests: Asserts | Check) -> Calls | Examination:
    """Decide how tests are run: parted into calls where all of them allow it, else by an examiner.

    Raises:
        DataError: the tests themselves are no Python.
    """
    try:
        if isinstance(tests, Asserts) and not tests.statements:
            raise ValueError("there are none")
        if isinstance(tests, Check):
            return _calls_of_check(tests) or _check_examined(tests)
        return _calls_of_asserts(tests) or _asserts_examined(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"the tests are no Python: {error}") from error


def _calls_of_asserts(tests: Asserts) -> Calls | None:
    known = frozenset(_bound(ast.parse(tests.setup)))
    calls = []
    for statement in tests.statements:
        body = ast.parse(statement.strip()).body
        call = _call(body[0], known) if len(body) == 1 else None
        if call is None:
            return None
        calls.append(call)
    return Calls(tuple(calls), tests.setup, as_one=False)


def _calls_of_check(tests: Check) -> Calls | None:
    """Part a check whose body is nothing but asserts about the candidate."""
    functions = [node for node in ast.parse(tests.code).body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(functions) != 1 or len(functions[0].args.args) != 1:
        return None
    candidate, calls = functions[0].args.args[0].arg, []
    for statement in functions[0].body:
        if not isinstance(statement, ast.Assert):
            return None
        if isinstance(statement.test, ast.Constant) and statement.test.value is True:
            continue  # HumanEval's "assert True"
        left = statement.test.left if isinstance(statement.test, ast.Compare) else None
        if not (isinstance(left, ast.Call) and isinstance(left.func, ast.Name) and left.func.id == candidate and _is_plain_call(left)):
            return None
        left.func.id = tests.entry_point
        call = _call(statement, frozenset())
        if call is None:
            return None
        calls.append(call)
    return Calls(tuple(calls), "", as_one=True) if calls else None


def _call(statement: ast.stmt, known: frozenset[str]) -> Call | None:
    """Part `assert f(...) == literal`, or `assert Class(...).method(...) == literal`.

    Not if f is the test's own or, given anything but literals, a builtin: what it is given may tell what is expected.
    """
    if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare) and len(statement.test.ops) == 1):
        return None
    left, right = statement.test.left, statement.test.comparators[0]
    called = _made(left) or left
    if not (isinstance(statement.test.ops[0], ast.Eq) and isinstance(called, ast.Call) and isinstance(called.func, ast.Name)):
        return None
    if called.func.id in known or (hasattr(builtins, called.func.id) and not _is_plain_call(called)):
        return None
    try:
        return Call(ast.unparse(left), ast.literal_eval(right))
    except (ValueError, TypeError):
        return None  # the right side is computed


def _made(expression: ast.expr) -> ast.Call | None:
    """Return the call that makes the object in `Class(...).method(...)`.

    A class is known by its capital. What a method of another object is given, as in `f(x).issuperset(y)`, may tell what is expected.
    """
    method = expression.func if isinstance(expression, ast.Call) else expression
    made = method.value if isinstance(method, ast.Attribute) else None
    if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id[0].isupper():
        return made
    return None


def _is_plain_call(call: ast.Call) -> bool:
    try:
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
            ast.literal_eval(argument)
    except (ValueError, TypeError):
        return False
    return True


def _asserts_examined(tests: Asserts) -> Examination:
    imports, names = _missing_names([tests.setup, *tests.statements])
    return Examination(imports + tests.setup, tests.statements, names, "")


def _check_examined(tests: Check) -> Examination:
    statement = f"{tests.code}\ncheck(candidate)\n"
    imports, names = _missing_names([tests.setup, statement])
    return Examination(imports + tests.setup, (statement,), tuple(name for name in names if name != "candidate"), tests.entry_point)


def _missing_names(codes: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return what code uses without binding it, builtins apart: imports of Python's own modules, and the names of the program."""
    trees = [ast.parse(code.strip()) for code in codes]
    bound = {name for tree in trees for name in _bound(tree)}
    nodes = [node for tree in trees for node in ast.walk(tree)]
    free = {node.id for node in nodes if isinstance(node, ast.Name) and not hasattr(builtins, node.id)} - bound
    dotted = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    modules = free & dotted & sys.stdlib_module_names  # some tests count on the program's own imports
    return "".join(f"import {name}\n" for name in sorted(modules)), tuple(sorted(free - modules))


def _bound(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name
