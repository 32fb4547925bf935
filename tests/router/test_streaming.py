from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import EngineFailure
from common.tokenizer import Tokenizer
from common.types import FinishReason, TokenChunk, TokenLogprob
from router.streaming import ChoiceDelta, ChoiceText, StopMatcher

TEXTS = st.text("abc", max_size=24)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def naive(text: str, stops: Iterable[str], *, include: bool) -> tuple[str, str | None]:
    """Reads character by character; the first end of a stop string ends the text, the longest of several wins."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@st.composite
def split_texts(draw: st.DrawFn) -> list[str]:
    text = draw(TEXTS)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=len(text))))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(pieces=split_texts(), stops=STOPS, include=st.booleans())
@settings(max_examples=500)
def test_any_split_gives_what_a_search_of_the_whole_text_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include=include)
    shown = ""
    expected, stop = naive("".join(pieces), stops, include=include)
    for piece in pieces:
        shown += matcher.feed(piece)
        assert expected.startswith(shown)  # nothing leaks on the way either
        if matcher.matched is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, matcher.matched) == (expected, stop)


@given(pieces=split_texts(), stops=STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = shown = ""
    for piece in pieces:
        seen += piece
        shown += matcher.feed(piece)
        if matcher.matched is not None:
            return
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


class Pieces:
    """A detokenizer whose token i is the i-th given piece of text."""

    def __init__(self, pieces: list[str], tail: str = "") -> None:
        self._pieces, self._tail = pieces, tail

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def push_all(self, token_ids: Sequence[int]) -> str:
        return "".join(self._pieces[token_id] for token_id in token_ids)

    def flush(self) -> str:
        return self._tail


def chunks_of(num_tokens: int, sizes: list[int], finish: FinishReason | None = FinishReason.LENGTH) -> list[TokenChunk]:
    chunks, start = [], 0
    for size in [*sizes, num_tokens]:
        ids = tuple(range(start, min(num_tokens, start + size)))
        start += len(ids)
        logprobs = tuple(TokenLogprob(token, -1.0) for token in ids)
        chunks.append(TokenChunk(0, ids, logprobs))
    return [*chunks, TokenChunk(0, (), (), finish)]


@given(pieces=split_texts(), stops=STOPS, sizes=st.lists(st.integers(0, 4), max_size=8), include=st.booleans())
@settings(max_examples=300)
def test_chunks_do_not_matter_and_reported_tokens_are_those_of_the_text(
    pieces: list[str], stops: list[str], sizes: list[int], include: bool
) -> None:
    choice = ChoiceText(0, Pieces(pieces), stops=tuple(stops), include_stop=include)
    deltas = [choice.push(chunk) for chunk in chunks_of(len(pieces), sizes)]
    expected, stop = naive("".join(pieces), stops, include=include)
    assert "".join(delta.text for delta in deltas) == expected
    ends = [delta for delta in deltas if delta.finish_reason is not None]
    assert [(end.finish_reason, end.stop_reason) for end in ends] == [
        (FinishReason.STOP, stop) if stop else (FinishReason.LENGTH, None)
    ]
    reported = [token for delta in deltas for token in delta.tokens]
    starts = [sum(map(len, pieces[:index])) for index in range(len(pieces))]
    if stop is None:
        assert [token.token_id for token in reported] == list(range(len(pieces)))
    else:
        assert [token.token_id for token in reported] == [index for index, start in enumerate(starts) if start < len(expected)]
    assert [token.offset for token in reported] == starts[: len(reported)]
    silent = ChoiceText(0, Pieces(pieces), stops=tuple(stops), include_stop=include, reports_tokens=False)
    texts = [silent.push(chunk) for chunk in chunks_of(len(pieces), sizes)]
    assert texts == [replace(delta, tokens=()) for delta in deltas]
    assert silent.num_tokens == choice.num_tokens


def test_nothing_comes_after_the_end() -> None:
    choice = ChoiceText(0, Pieces(["a", "STOP", "b"]), stops=("STOP",))
    first = choice.push(TokenChunk(0, (0, 1, 2)))
    assert (first.text, first.finish_reason, first.stop_reason) == ("a", FinishReason.STOP, "STOP")
    assert choice.finished
    assert choice.num_tokens == 2  # the third was not part of the answer
    assert choice.push(TokenChunk(0, (2,), (), FinishReason.LENGTH)) == ChoiceDelta(0)


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens() -> None:
    choice = ChoiceText(0, Pieces(["x", "x", "x"]), stops=("x",), min_tokens=2)
    texts = [choice.push(TokenChunk(0, (index,))).text for index in range(3)]
    assert texts == ["x", "x", ""]
    assert choice.finished


def test_a_stop_token_counts_and_only_the_clients_own_is_named() -> None:
    for named, reason in ((frozenset({9}), 9), (frozenset({8}), None)):
        choice = ChoiceText(0, Pieces(["a"]), client_stop_token_ids=named)
        delta = choice.push(TokenChunk(0, (0,), (), FinishReason.STOP, 9))
        assert (delta.text, delta.stop_reason, choice.num_tokens) == ("a", reason, 2)


def test_what_the_detokenizer_holds_back_is_flushed_and_searched() -> None:
    plain = ChoiceText(0, Pieces([""], tail="end"))
    assert plain.push(TokenChunk(0, (0,), (), FinishReason.LENGTH)).text == "end"
    stopped = ChoiceText(0, Pieces([""], tail="end"), stops=("nd",))
    delta = stopped.push(TokenChunk(0, (0,), (), FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason) == ("e", FinishReason.STOP)


def test_contradictory_chunks_are_refused() -> None:
    with pytest.raises(EngineFailure):
        ChoiceText(0, Pieces(["a"])).push(TokenChunk(0, (0,), (TokenLogprob(0, -1.0), TokenLogprob(0, -1.0))))


@given(text=st.text(max_size=20), stop=st.text(min_size=1, max_size=3))
@settings(max_examples=200)
def test_with_a_real_tokenizer_text_comes_out_as_it_went_in(tokenizer: Tokenizer, text: str, stop: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    choice = ChoiceText(0, tokenizer.stream(), stops=(stop,))
    shown = "".join(choice.push(TokenChunk(0, (token,))).text for token in ids)
    shown += choice.push(TokenChunk(0, (), (), FinishReason.LENGTH)).text
    assert shown == naive(text, (stop,), include=False)[0]
