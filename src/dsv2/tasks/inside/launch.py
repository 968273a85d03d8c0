"""First code of a confined process: confine it, and only then read the program and run it in one of four roles.

script: the whole program, with its standard input and output. functions: the program, then expressions whose values are sent out. served:
the program, then calls that come in one by one. examiner: tests, which call functions of a served program in another process.

Down the channel come marshalled tuples behind their length, from the judge, whom we trust. Up go lines of JSON, which the judge believes no
more than the program: what a program can write there itself is what its functions could have returned.
"""

import builtins
import marshal
import os
import sys
from _json import encode_basestring_ascii

from dsv2.tasks.inside import confine, landlock, wire

# Annotations are quoted: programs would inherit `from __future__ import annotations`, with which an undefined name in theirs is no mistake.
TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from typing import Any

    Namespace = dict[str, Any]


class Channel:
    """The way to the judge and back."""

    def __init__(self, handle: int, room: int) -> None:
        self._handle = handle
        self._kept: list[object] = []
        self.encoder = wire.Encoder(room, self._keep)

    def _keep(self, thing: object) -> int:
        self._kept.append(thing)
        return len(self._kept) - 1

    def kept(self, number: int, _: str) -> object:
        """Return an object that was sent out by its number."""
        return self._kept[number]

    def receive(self) -> "Any":
        """Wait for the next message."""
        return marshal.loads(self._read(int.from_bytes(self._read(4), "little")))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._handle, min(size, 1 << 20))
            if not part:
                os._exit(1)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def ask(self, kind: str, *fields: str) -> "Any":
        """Send a line and wait for its answer. Where memory or stack give out halfway, end: the rest of one would be read as the next."""
        try:
            self.send(kind, *fields)
            return self.receive()
        except BaseException:
            os._exit(1)

    def send(self, kind: str, *fields: str) -> None:
        """Send a line; the fields are JSON already."""
        line = f'["{kind}"{"".join("," + field for field in fields)}]\n'.encode()
        while line:
            line = line[os.write(self._handle, line) :]

    def send_value(self, value: object) -> None:
        """Send a plain value; another object as the number under which it is kept here."""
        try:
            field = self.encoder.json(value)
        except Exception as error:  # too large, or an object that does not let itself be read
            self.send_raised(error)
        else:
            self.send("value", field)

    def send_raised(self, error: BaseException) -> None:
        """Send an exception as the name of its nearest builtin class and what it says."""
        name = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "builtins")
        try:
            said = f"{type(error).__name__}: {error}"[:300]
        except BaseException:
            said = type(error).__name__
        self.send("raised", encode_basestring_ascii(name), encode_basestring_ascii(said))


def main(handle: int) -> None:
    """Confine this process as the first message says, then do the job of the second."""
    asked = Channel(handle, 0).receive()
    channel = Channel(handle, asked["output_bytes"])
    scratch, rules = asked["scratch"], asked["landlock"]
    try:
        _close_all_but({handle, rules} - {-1})
        os.environ.pop("PWD", None)  # bubblewrap's
        os.umask(0o077)
        os.chdir(scratch or "/")
        confine.give_up_privileges(scratch)
        confine.limit_resources(*asked["limits"])
        confine.die_with_parent(asked["parent"])
        reached = asked["outer_level"] + confine.confine(landlock.rule_set(scratch) if scratch else rules, asked["seccomp"])
    except OSError as error:
        reached = f"nothing: {error}"
    if reached not in confine.LEVELS or confine.LEVELS.index(reached) < confine.LEVELS.index(asked["level"]):
        channel.send("refused", encode_basestring_ascii(reached))
        os._exit(1)
    channel.send("ready", encode_basestring_ascii(reached))
    role, *job = channel.receive()
    roles: dict[str, Any] = {"script": script, "functions": functions, "served": served, "examiner": examiner}
    roles[role](channel, *job)


def _close_all_but(kept: set[int]) -> None:
    """Close what else was inherited: the judge leaves nothing open, so it would be a bug of ours."""
    last = 2
    for handle in (*sorted(kept), 256):
        os.closerange(last + 1, handle)
        last = handle


def script(channel: Channel, program: str) -> None:
    """Run a whole program as the interpreter would; it ends with the program's exit status."""
    sys.argv[:] = ["program.py"]
    try:
        exec(compile(program, "program.py", "exec"), module_namespace("__main__"))
    except MemoryError as error:
        channel.send_raised(error)
        raise


def functions(channel: Channel, program: str, setup: str, calls: list[str]) -> None:
    """Define the program's functions, then send the value of each expression."""
    namespace = define(channel, program, setup)
    for call in calls:
        try:
            value = eval(call.strip(), namespace)
        except BaseException as error:
            channel.send_raised(error)
        else:
            channel.send_value(value)


def served(channel: Channel, program: str) -> None:
    """Define the program's functions and answer calls until the judge has enough."""
    namespace = define(channel, program, "")
    channel.send("defined")
    while True:
        name, positional, named = channel.receive()
        try:
            arguments, options = wire.decode(positional, channel.kept), wire.decode(named, channel.kept)
            value = namespace[name](*arguments, **options)
        except BaseException as error:
            channel.send_raised(error)
        else:
            channel.send_value(value)


def define(channel: Channel, program: str, setup: str) -> "Namespace":
    """Run a program under a name that is not __main__; say so and end if it fails."""
    namespace = module_namespace("program")
    try:
        exec(program, namespace)  # as text: the first call of compile() takes 1 ms, for types that only a syntax tree needs
        exec(setup, namespace)
    except BaseException as error:
        channel.send_raised(error)
        os._exit(1)
    return namespace


def module_namespace(name: str) -> "Namespace":
    """Return the names of a fresh module that is in sys.modules, as dataclasses and pickle expect."""
    module = type(sys)(name)
    sys.modules[name] = module
    module.__dict__["__builtins__"] = builtins
    return module.__dict__


class Elsewhere:
    """An object in the process of the served program. It can be passed back there and equals nothing else."""

    def __init__(self, number: int, type_name: str) -> None:
        self.number = number
        self.type_name = type_name

    def __repr__(self) -> str:
        return f"<{self.type_name} of the program>"


def examiner(channel: Channel, setup: str, statements: list[str], names: list[str], entry_point: str) -> None:
    """Run tests whose names of the program stand for calls to the other process; send pass or fail for each statement."""
    channel.encoder.keep = _number_of  # objects go back to where they are
    namespace = module_namespace("examiner")
    try:
        exec(setup, namespace)
        compiled = [compile(statement, "test.py", "exec") for statement in statements]
    except BaseException as error:
        channel.send("broken", encode_basestring_ascii(f"{type(error).__name__}: {error}"[:300]))
        return
    for name in [*names, *filter(None, [entry_point])]:
        namespace[name] = stand_in(channel, name)
    namespace["candidate"] = namespace.get(entry_point)
    for code in compiled:
        try:
            exec(code, namespace)
        except AssertionError as error:
            channel.send("fail", encode_basestring_ascii(f"AssertionError: {error}"[:300]))
        except BaseException as error:
            channel.send("fail", encode_basestring_ascii(f"{type(error).__name__}: {error}"[:300]))
        else:
            channel.send("pass")


def _number_of(thing: object) -> int:
    if isinstance(thing, Elsewhere):
        return thing.number
    raise TypeError(f"a program cannot be given an object of the test's own: {type(thing).__name__}")


def stand_in(channel: Channel, name: str) -> "Any":
    """Return a function that calls the one of this name in the served program."""

    def call(*positional: object, **named: object) -> "Any":
        kind, *fields = channel.ask("call", *(channel.encoder.json(value) for value in (name, positional, named)))
        if kind == "value":
            return wire.decode(fields[0], Elsewhere)
        error = getattr(builtins, fields[0], Exception)
        if error is StopIteration:  # would end a loop of the test's own, as if all had been looked at; as in generators (PEP 479)
            error = RuntimeError
        raise error(fields[1]) if isinstance(error, type) and issubclass(error, Exception) else Exception(fields[1])

    call.__name__ = name
    return call
