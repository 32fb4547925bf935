"""What is written for feeds is read again, in whatever pieces it comes."""

from __future__ import annotations

import random

import pytest

from common.errors import EngineFailure
from common.feed_frames import MAX_FRAME_BYTES, FrameReader, FrameWriter
from common.wire import types_pb2, worker_pb2


def event(choice: int) -> worker_pb2.GenerateEvent:
    return worker_pb2.GenerateEvent(chunks=[types_pb2.TokenChunk(choice=choice, token_ids=[choice, choice + 1])])


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def read(data: bytes, cuts: list[int]) -> list[tuple[int, str]]:
    """Per lane and in order: what came, token or event."""
    reader = FrameReader()
    found: list[tuple[int, str]] = []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        for deltas in reader.feed(data[start:end]):
            found += [(item.lane, f"event {item.event.chunks[0].choice}") for item in deltas.events]
            found += [(lane, f"token {token}") for lane, token in zip(deltas.lanes, deltas.token_ids, strict=True)]
    return found


def test_every_lane_reads_what_was_written_for_it_in_order_however_the_bytes_are_cut() -> None:
    rng = random.Random(3)
    for _ in range(200):
        writer, written, data = FrameWriter(), [], b""
        for number in range(rng.randrange(1, 30)):
            lane = rng.randrange(1, 4)
            if rng.random() < 0.3:
                writer.event(lane, event(number))
                written.append((lane, f"event {number}"))
            else:
                writer.token(lane, number)
                written.append((lane, f"token {number}"))
            if rng.random() < 0.3:
                data += writer.take()
        data += writer.take()
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(5)))
        found = read(data, cuts)
        assert sorted(found) == sorted(written)
        for lane in (1, 2, 3):
            assert [what for to, what in found if to == lane] == [what for to, what in written if to == lane]


def test_nothing_written_is_nothing_sent() -> None:
    writer = FrameWriter()
    assert writer.take() == b""
    writer.token(1, 2)
    assert writer.take()
    assert writer.take() == b""


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ((MAX_FRAME_BYTES + 1).to_bytes(4, "little"), "too large"),
        (framed(b"\xff\xff\xff"), "cannot be read"),
        (framed(worker_pb2.Deltas(lanes=[1, 2], token_ids=[1]).SerializeToString()), "other tokens"),
    ],
)  # fmt: skip
def test_what_no_worker_writes_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(EngineFailure, match=why):
        list(FrameReader().feed(data))
