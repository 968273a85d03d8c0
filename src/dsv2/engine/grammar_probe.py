"""Compile a constraint in a process of its own, with a cap on its memory and time, to see whether it can be done.

A schema of a few hundred bytes can make the compiler take all memory (30 steps of "twice the next one" are 2^30 copies), which no limit
of the library stops and no thread survives. ``engine/constrain.py`` runs this file as a program before it compiles in its own process.
A JSON object comes in: ``packages`` (the folder that llguidance lies in), ``source``, ``limits``, ``memory_bytes`` and ``cpu_s``. One
goes out: ``complaint`` ("" if nothing is wrong) and ``grown_bytes``, what compiling added to the memory. It imports nothing of dsv2, so
that it starts in some 70 ms.
"""

import json
import sys
from typing import Any

STEPS = 4


class ByteVocabulary:
    """The smallest vocabulary: every byte, and an end."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    special_token_ids = [256]

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    """Read a job from stdin, compile it and go its first steps; write what came of it to stdout."""
    job: dict[str, Any] = json.load(sys.stdin)
    try:
        import resource
    except ImportError:  # not on Windows; the time limit of the caller remains
        resource = None  # type: ignore[assignment]
    else:
        resource.setrlimit(resource.RLIMIT_AS, (job["memory_bytes"], job["memory_bytes"]))
        resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_s"], job["cpu_s"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.insert(0, job["packages"])
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    vocabulary = LLTokenizer(TokenizerWrapper(ByteVocabulary()), n_vocab=257, eos_token=256)
    before = peak_bytes()
    matcher = LLMatcher(vocabulary, job["source"], log_level=0, limits=LLParserLimits(**job["limits"]))
    complaint = matcher.get_error() or walk(matcher)
    print(json.dumps({"complaint": complaint, "grown_bytes": peak_bytes() - before}))


def peak_bytes() -> int:
    """Return the most memory that this program held so far; 0 where the system does not say.

    On Linux not from getrusage, whose figure begins with that of the process that started this one.
    """
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), 0)
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def walk(matcher: Any) -> str:
    """Go the first few steps, where a grammar that is too large for its limits meets them; return what went wrong."""
    for step in range(STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() and step == 0:
            return "it allows no token at its beginning"
        allowed = mask & ~(1 << ByteVocabulary.eos_token_id)
        if matcher.is_error() or not allowed:
            break
        if not matcher.consume_token(allowed.bit_length() - 1):
            return "it is too complex"
    return ""


if __name__ == "__main__":
    main()
