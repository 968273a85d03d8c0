"""Bubblewrap, where it is installed and works: a view of files, processes, network and users of the program's own, around all the rest."""

import contextlib
import selectors
import shutil
import sys
from functools import cache

from dsv2.tasks.event_loop import drive
from dsv2.tasks.inside.confine import LEVELS
from dsv2.tasks.process import Confined
from dsv2.tasks.scratch import scratch_folder
from dsv2.tasks.verdict import Limits

_VISIBLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime")


def bubblewrap(scratch: str) -> list[str]:
    """Return the command that puts the command behind it into namespaces of its own; [] where bubblewrap does not work."""
    return _command(scratch) if _works() else []


def _command(scratch: str) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        return []
    command = [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--dev", "/dev", "--chdir", "/"]
    command += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    for path in _VISIBLE:
        command += ["--ro-bind-try", path, path]
    if scratch:
        command += ["--bind", scratch, scratch]
    return [*command, "--"]


@cache
def _works() -> bool:
    """Try it once with a program that writes a file: bubblewrap may be there and not be allowed to make namespaces."""
    limits = Limits()
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        scratch = stack.enter_context(scratch_folder(limits.scratch_bytes))
        command = _command(scratch)
        if not command:
            return False
        job = ("script", "open('written', 'w').close()")
        process = Confined(job, selector, stdin=b"", limits=limits, level=LEVELS[0], wrapper=command, scratch=scratch)
        stack.callback(process.close)
        drive([process], selector, lambda *_: False)
        return process.level == LEVELS[-1] and process.status == 0
