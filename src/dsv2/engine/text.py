"""Tokens to text that may be shown: whole characters, and nothing of a stop string. No torch."""

from collections.abc import Sequence

from dsv2.tokenizer.tokenizer import StreamDecoder


class TextStream:
    """The text of one answer as it grows.

    What ``push`` has returned is never taken back: an end that could still become a stop string is held until it is decided. The result
    does not depend on how the text was cut into tokens: the stop string that is completed first counts, of two that are completed by the
    same character the longer.

    Args:
        decoder: of this answer alone.
        stop: strings that end it.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain. Sets ``stopped`` when a stop string is complete."""
        return self._settle(self._decoder.push(token_id))

    def finish(self) -> str:
        """Return what was held back, when no more tokens will come."""
        if self.stopped:
            return ""
        certain = self._settle(self._decoder.finish())
        held, self._held = ("", "") if self.stopped else (self._held, "")
        return certain + held

    def _settle(self, text: str) -> str:
        if not self._stop or not text:
            return text
        text = self._held + text
        begin = self._first_stop(text)
        if begin is not None:
            self.stopped, self._held = True, ""
            return text[:begin]
        undecided = self._undecided(text)
        self._held = text[len(text) - undecided :]
        return text[: len(text) - undecided]

    def _first_stop(self, text: str) -> int | None:
        """Return where the stop string that is completed first begins."""
        found = [(begin + len(stop), begin) for stop in self._stop if (begin := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
