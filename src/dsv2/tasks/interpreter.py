"""The interpreter that a program gets: its command line, its environment, and the code of ours that it runs first."""

import os
import sys
from functools import cache
from importlib import resources

from dsv2.tasks import inside
from dsv2.tasks.channel import framed

# The modules of inside/ come compiled through the channel, before all else: to find and compile them took longer than the interpreter's
# start. The program does not see them.
_INSIDE = ("libc", "landlock", "confine", "wire", "launch")  # each after those that it imports
_BOOT = """
import marshal, posix, sys
channel, package = int(sys.argv[1]), "dsv2.tasks.inside"
def receive(size):
    received = b""
    while len(received) < size:
        part = posix.read(channel, size - len(received))
        if not part:
            posix._exit(1)
        received += part
    return received
sys.modules[package] = inside = type(sys)(package)
for name, code in marshal.loads(receive(int.from_bytes(receive(4), "little"))):
    sys.modules[f"{package}.{name}"] = inside.__dict__[name] = type(sys)(f"{package}.{name}")
    exec(code, inside.__dict__[name].__dict__)
for name in [name for name in sys.modules if name.startswith(package)]:
    del sys.modules[name]
inside.launch.main(channel)
"""
# -P -s -S and an empty environment are the parts of isolated mode (-I), which would also ignore the hash seed: with a random one
# a program that depends on the order of a set would be rewarded by chance.
_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT)
ENVIRONMENT = {"PYTHONHASHSEED": "0"}


def command(channel: int) -> list[str]:
    """Return the command line of an interpreter that waits for `own_code` at this handle."""
    return [os.path.realpath(sys.executable), *_FLAGS, str(channel)]


@cache
def own_code() -> bytes:
    """Return the modules of inside/, compiled, as the first message down; the second is for `inside.launch.main`."""
    folder = resources.files(inside)
    return framed([(name, compile((folder / f"{name}.py").read_text(), f"{name}.py", "exec", dont_inherit=True)) for name in _INSIDE])
