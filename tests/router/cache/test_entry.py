"""What is kept of an answer, and what comes out of it again."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest

from common.errors import EngineFailure
from common.tokenizer import Tokenizer
from common.types import FinishReason, StageTimings, Started, TokenChunk, TokenLogprob, WorkerRef
from router.cache.entry import Entry, Recording, decode, encode, replay
from router.choice_text import choice_text
from router.dispatch import Admission, DispatchEvent
from router.validate import ValidCall
from support.cache_calls import Calls
from support.fake_cluster import EOS

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP


def recorded(call: ValidCall, *events: DispatchEvent) -> Entry:
    recording = Recording(call, 0, with_text=False)
    for number, event in enumerate(events):
        assert not recording.complete, f"complete before event {number}"
        recording.add(event)
    assert recording.complete
    kept = decode(encode(recording.entry(5.0)))
    assert kept is not None
    return kept


async def replayed(entry: Entry) -> list[DispatchEvent]:
    return [event async for event in replay(entry, num_prompt_tokens=9, now_s=1.0)]


def text_of(call: ValidCall, events: list[DispatchEvent]) -> list[tuple[str, Any, Any, int]]:
    """Text, finish reason, stop reason and number of tokens of each choice, as a client gets them."""
    texts = [choice_text(call, index) for index in range(call.num_choices)]
    said: list[list[Any]] = [["", None, None] for _ in texts]
    for event in events:
        for chunk in event.chunks:
            delta = texts[chunk.choice].push(chunk)
            said[chunk.choice][0] += delta.text
            if delta.finish_reason is not None:
                said[chunk.choice][1:] = delta.finish_reason, delta.stop_reason
    return [(*parts, text.num_tokens) for parts, text in zip(said, texts, strict=True)]


@pytest.mark.parametrize("cut", [1, 2, 3, 100])
@pytest.mark.parametrize("stop", [[], ["two"], ["wo th"], ["never"]])
@pytest.mark.parametrize(("finish", "stop_token"), [(STOP, EOS), (LENGTH, None)])
async def test_a_replayed_answer_reads_as_the_first(
    calls: Calls, tokenizer: Tokenizer, cut: int, stop: list[str], finish: FinishReason, stop_token: int | None
) -> None:
    call = await calls.completion(
        {"prompt": "x", "temperature": 0, "n": 2, "stop": stop, "max_tokens": 100, "stop_token_ids": [EOS]}
    )
    events = []
    for choice, said in enumerate(("one two three", "one two")):
        ids = tokenizer.encode(said, add_special_tokens=False)
        pieces = [tuple(ids[start : start + cut]) for start in range(0, len(ids), cut)]
        events += [DispatchEvent((TokenChunk(choice, piece),)) for piece in pieces[:-1]]
        events.append(DispatchEvent((TokenChunk(choice, pieces[-1], finish_reason=finish, stop_token_id=stop_token),)))
    recording = Recording(call, 0, with_text=True)
    for event in events:
        recording.add(event)
    entry = decode(encode(recording.entry(5.0)))
    assert entry is not None
    first = text_of(call, events)
    assert text_of(call, await replayed(entry)) == first
    assert recording.text == first[0][0]


async def test_log_probabilities_survive_even_infinite_ones(calls: Calls) -> None:
    call = await calls.completion({"prompt": "x", "temperature": 0, "logprobs": 2, "echo": True, "max_tokens": 5})
    report = TokenLogprob(7, -0.1, ((7, -0.1), (8, -math.inf)))
    worst = TokenLogprob(8, -math.inf)
    admission = Admission(Started(StageTimings(), 3, (None, worst)), WorkerRef("w", 1, "a"), 0.0, 0)
    entry = recorded(
        call,
        DispatchEvent((TokenChunk(0, (7,), (report,)),), admission),
        DispatchEvent((TokenChunk(0, (8,), (worst,), LENGTH),)),
    )
    (event,) = await replayed(entry)
    assert event.chunks[0].logprobs == (report, worst)
    assert event.admission is not None
    assert event.admission.started == Started(StageTimings(), 9, (None, worst))


async def test_limits_that_an_answer_serves(calls: Calls) -> None:
    call = await calls.completion({"prompt": "x", "temperature": 0, "max_tokens": 9})
    ended = recorded(call, DispatchEvent((TokenChunk(0, (7, 8), finish_reason=STOP, stop_token_id=EOS),)))
    assert [ended.serves(limit) for limit in (2, 3, 4)] == [False, True, True]
    cut = recorded(call, DispatchEvent((TokenChunk(0, (7, 8), finish_reason=LENGTH),)))
    assert not any(cut.serves(limit) for limit in (1, 2, 3))


async def test_a_stop_string_ends_an_answer_before_its_worker_does(calls: Calls, tokenizer: Tokenizer) -> None:
    call = await calls.completion({"prompt": "x", "temperature": 0, "stop": ["two"], "max_tokens": 50})
    ids = tuple(tokenizer.encode("one two three four", add_special_tokens=False))
    used = text_of(call, [DispatchEvent((TokenChunk(0, ids),))])[0][3]
    assert 0 < used < len(ids)
    at_once = recorded(call, DispatchEvent((TokenChunk(0, ids),)))
    one_by_one = recorded(call, *(DispatchEvent((TokenChunk(0, (token,)),)) for token in ids[:used]))
    assert at_once == one_by_one
    assert at_once.choices[0].tokens == list(ids[:used])
    assert [at_once.serves(limit) for limit in (used - 1, used)] == [False, True]
    # In the very token that reached the limit it may be either: it serves its own limit alone.
    assert not recorded(call, DispatchEvent((TokenChunk(0, ids[:used], finish_reason=LENGTH),))).serves(50)


async def test_a_long_answer_comes_in_pieces(calls: Calls) -> None:
    call = await calls.completion({"prompt": "x", "temperature": 0, "n": 2, "max_tokens": 400})
    ids = tuple(range(20)) * 60
    chunks = (TokenChunk(0, ids, finish_reason=LENGTH), TokenChunk(1, (), finish_reason=STOP, stop_token_id=EOS))
    events = await replayed(recorded(call, DispatchEvent(chunks)))
    assert [len(event.chunks[0].token_ids) for event in events] == [512, 512, 176, 0]
    assert [event.admission is not None for event in events] == [True, False, False, False]
    assert [event.chunks[0].finish_reason for event in events] == [None, None, LENGTH, STOP]
    assert sum((event.chunks[0].token_ids for event in events), ()) == ids


@pytest.mark.parametrize("data", [b"", b"null", b"\xff\xfe", b'{"version":1}', b'{"version":1,"created_s":1e999,"choices":[]}'])
def test_what_cannot_be_read_is_no_entry(data: bytes) -> None:
    assert decode(data) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 2), ("created_s", None), ("choices", []), ("more", 1), ("created_s", "soon")],
)
async def test_an_entry_of_another_shape_is_none(calls: Calls, field: str, value: Any) -> None:
    call = await calls.completion({"prompt": "x", "temperature": 0})
    entry = recorded(call, DispatchEvent((TokenChunk(0, (7,), finish_reason=LENGTH),)))
    assert decode(orjson.dumps(entry.model_dump() | {field: value})) is None


async def test_a_worker_that_answers_something_else_is_refused(calls: Calls) -> None:
    call = await calls.completion({"prompt": "x", "temperature": 0})
    with pytest.raises(EngineFailure):
        Recording(call, 0, with_text=False).add(DispatchEvent((TokenChunk(1, (7,)),)))
