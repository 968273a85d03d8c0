import re

from hypothesis import example, given
from hypothesis import strategies as st

from dsv2.engine.text import TextStream
from dsv2.tokenizer.tokenizer import StreamDecoder, Tokenizer


class Pieces(StreamDecoder):
    """A decoder whose ids are indices of given pieces of text."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def finish(self) -> str:
        return self.rest


def cut(text: str, stops: list[str]) -> str:
    """By definition: read letter by letter until a stop string is complete, then drop it (the longest that ends here)."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


SMALL_TEXT = st.text("ab.", max_size=14)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3)


@given(st.lists(st.text("ab.", max_size=4), max_size=8), SMALL_TEXT, STOPS)
@example(["ab."], "", ["ab.", "b"])
@example(["ab"], "", ["b", "ab"])
def test_the_cut_does_not_depend_on_the_tokens_and_nothing_is_taken_back(pieces: list[str], rest: str, stops: list[str]) -> None:
    truth = cut("".join(pieces) + rest, stops)
    stream, shown = TextStream(Pieces(pieces, rest), stops), ""
    for token in range(len(pieces)):
        shown += stream.push(token)
        assert truth.startswith(shown)
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == truth
    assert stream.stopped == (truth != "".join(pieces) + rest)


@given(st.lists(st.text("ab.", max_size=4), max_size=8), STOPS)
def test_no_more_is_held_than_could_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    stream, shown, read = TextStream(Pieces(pieces), stops), "", ""
    for token, piece in enumerate(pieces):
        shown, read = shown + stream.push(token), read + piece
        if stream.stopped:
            break
        held = read[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@given(st.text("a\u6cb3\u00e9\U0001f600", max_size=10))
def test_characters_come_whole(tokenizer: Tokenizer, text: str) -> None:
    stream, shown = TextStream(tokenizer.stream(), ["\U0001f600\U0001f600"]), ""
    for token in tokenizer.encode(text):
        shown += stream.push(token)
        assert "\ufffd" not in shown
        if stream.stopped:
            break
    assert shown + stream.finish() == cut(text, ["\U0001f600\U0001f600"])


def cut_late(pieces: list[str], stops: list[str], include_stop: bool, min_tokens: int) -> str:
    """By definition, with stops that count only when a later token than number ``min_tokens`` completes them."""
    text, exempt = "".join(pieces), len("".join(pieces[:min_tokens]))
    for end in range(exempt + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[:end] if include_stop else text[: end - max(map(len, ending))]
    return text


@given(st.lists(st.text("ab.", max_size=4), max_size=8), STOPS, st.booleans(), st.integers(0, 6))
@example(["ab", "b"], ["ab", "bb"], True, 1)
@example(["a", "", "b"], ["ab"], False, 2)
def test_stops_that_are_kept_and_stops_that_come_too_early(
    pieces: list[str], stops: list[str], include_stop: bool, min_tokens: int
) -> None:
    truth = cut_late(pieces, stops, include_stop, min_tokens)
    stream, shown = TextStream(Pieces(pieces), stops, include_stop=include_stop, min_tokens=min_tokens), ""
    for token in range(len(pieces)):
        shown += stream.push(token)
        assert truth.startswith(shown)
        if stream.stopped:
            break
    assert shown + stream.finish() == truth


@given(st.lists(st.text("ab.", max_size=4), max_size=8), st.sampled_from(["a+b", "b|ab", r"\.a", "[ab]{3}"]), STOPS, st.integers(0, 4))
@example(["ab", "."], "a+b", ["b."], 0)
@example(["ab.", "ab"], "a+b", [], 0)
def test_a_match_ends_the_text_behind_a_token_and_stays(pieces: list[str], regex: str, stops: list[str], min_tokens: int) -> None:
    """The first token beyond ``min_tokens`` that adds text and behind which all of it ends in a match, if no stop string came before."""
    ends = [n for n in range(min_tokens + 1, len(pieces) + 1) if pieces[n - 1] and re.search(rf"(?:{regex})\Z", "".join(pieces[:n]))]
    read = pieces[: ends[0]] if ends else pieces
    truth = cut_late(read, stops, False, min_tokens)
    stream, shown = TextStream(Pieces(pieces), stops, min_tokens=min_tokens, regex=regex), ""
    for token in range(len(pieces)):
        shown += stream.push(token)
        if stream.stopped:
            break
    assert shown + stream.finish() == truth
    assert stream.stopped == bool(ends or truth != "".join(read))
