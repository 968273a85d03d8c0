"""The command line: ``dsv2 VERB ...``. It parses first (verbs/) and imports the stage, and with it torch, afterwards.

What a user can cause ends in ``error:`` and ``hint:`` on stderr and exit code 2.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import typer

from dsv2.errors import ConfigError, Dsv2Error, MissingExtra, did_you_mean, extra_of
from dsv2.files import is_disk_full
from dsv2.verbs import TRAINING, VERBS, Call, app

USER_ERROR, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 130, 141, 143  # exit codes
_LONGEST_MESSAGE = 1000  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C.

    Args:
        argv: the arguments after ``dsv2``; None: those of this process.
    """
    verb = ""
    try:
        with _ending_on_sigterm():
            call = parse(sys.argv[1:] if argv is None else argv)
            verb = call.verb if call else ""
            code = run(call) if call else 0
        sys.stdout.flush()  # here, where a full disk and a closed pipe still get their answer
        return code
    except Dsv2Error as error:
        return _complain(error.message, error.hint)
    except KeyboardInterrupt:
        return _complain("interrupted", VERBS[verb].resume if verb else None, code=INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
        return BROKEN_PIPE
    except Exception as error:
        if is_disk_full(error):
            return _complain(f"the disk is full: {error}", f"free some space, then: {VERBS[verb].resume}" if verb else None)
        if isinstance(error, OSError) and error.filename is not None:  # a file that may not be read, a name that is too long
            return _complain(f"{os.fsdecode(error.filename)}: {error.strerror}", None)
        raise


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, so that temporary files go with it; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(argv: Sequence[str]) -> Call | None:
    """Turn arguments into a Call without importing the stage; None when help or the version was all that was asked for.

    Raises:
        ConfigError: no such verb or option, or a value that does not fit.
    """
    arguments = list(argv) or ["--help"]
    if not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise ConfigError(f"there is no verb {arguments[0]!r}; verbs: {', '.join(VERBS)}", hint=did_you_mean(arguments[0], VERBS))
    try:
        result = typer.main.get_command(app).main(arguments, prog_name="dsv2", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message().rstrip(".").replace("Value error, ", "").replace("Input should be", "must be")
        named = arguments[0] if arguments[0] in VERBS else ""
        raise ConfigError(message[0].lower() + message[1:], hint=f"run: {' '.join(filter(None, ('dsv2', named, '--help')))}") from error
    return result if isinstance(result, Call) else None


def run(call: Call) -> int:
    """Import the stage of a call and run it; return its exit code.

    Raises:
        MissingExtra: the stage needs an optional package that is not installed.
    """
    # read by torch when it is imported: large tensors in huge pages. Training keeps freed memory, and aligning each tensor would leave gaps
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0" if call.verb in TRAINING else "1")
    module, _, function = VERBS[call.verb].target.partition(":")
    try:
        result = getattr(import_module(module), function)(**call.arguments)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        extra = extra_of(package)
        if extra is None:
            raise
        raise MissingExtra(package, extra, f"dsv2 {call.verb}") from error
    return result if isinstance(result, int) else 0  # a stage may return its report, for those who call it from Python


def _complain(message: str, hint: str | None, *, code: int = USER_ERROR) -> int:
    if len(message) > _LONGEST_MESSAGE:  # a value of a damaged file is in it
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    print(f"error: {message}" if code == USER_ERROR else message, file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code
