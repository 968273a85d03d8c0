"""Tokens to text that may be shown: whole characters, and nothing of a stop string. No torch."""

from collections.abc import Sequence

from dsv2.engine.request import MAX_STOP_LEN, at_the_end
from dsv2.tokenizer.tokenizer import StreamDecoder


class TextStream:
    """The text of one answer as it grows.

    What ``push`` has returned is never taken back: an end that could still become a stop string is held until it is decided. Which stop
    string ends it does not depend on how the text was cut into tokens: the one that is completed first counts, of two that are completed by
    the same character the longer.

    Args:
        decoder: of this answer alone.
        stop: strings that end it.
        include_stop: leave the stop string in the text.
        min_tokens: a stop that is complete by this many tokens does not count; a stop string that only begins by then does.
        regex: ends it too, where the text ends in a match behind a token; the match stays. Empty: none.
    """

    def __init__(
        self, decoder: StreamDecoder, stop: Sequence[str], *, include_stop: bool = False, min_tokens: int = 0, regex: str = ""
    ) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._tokens_left = min_tokens
        self._regex = at_the_end(regex) if regex else None
        self._end = ""  # of the text, what the regular expression looks at
        self._held = ""
        self._exempt = 0  # characters of what is held that came with the first min_tokens tokens
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain. Sets ``stopped`` when a stop is complete."""
        exempt = self._tokens_left > 0
        self._tokens_left -= exempt
        text = self._decoder.push(token_id)
        certain = self._settle(text, exempt=exempt)
        if self._regex is None or self.stopped or not text:
            return certain
        self._end = (self._end + text)[-MAX_STOP_LEN:]
        if exempt or self._regex.search(self._end) is None:
            return certain
        self.stopped, held, self._held = True, self._held, ""
        return certain + held

    def finish(self) -> str:
        """Return what was held back, when no more tokens will come."""
        if self.stopped:
            return ""
        certain = self._settle(self._decoder.finish(), exempt=self._tokens_left > 0)
        held, self._held = ("", "") if self.stopped else (self._held, "")
        return certain + held

    def _settle(self, text: str, *, exempt: bool) -> str:
        if not self._stop or not text:
            return text
        text = self._held + text
        if exempt:
            self._exempt = len(text)
        end = self._first_stop(text)
        if end is not None:
            self.stopped, self._held = True, ""
            return text[:end]
        certain = len(text) - self._undecided(text)
        self._held = text[certain:]
        self._exempt = max(0, self._exempt - certain)
        return text[:certain]

    def _first_stop(self, text: str) -> int | None:
        """Return where the text is to be cut for the stop string that is completed first."""
        found = []
        for stop in self._stop:
            begin = text.find(stop, max(0, self._exempt + 1 - len(stop)))
            if begin >= 0:
                found.append((begin + len(stop), begin))
        return min(found)[0 if self._include_stop else 1] if found else None

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
