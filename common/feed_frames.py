"""What travels over a feed: the connection on which a decode worker tells a router what a step had to say to all of its requests.

    router -> worker    HELLO, ticket                          once; the ticket came over the authenticated channel
    worker -> router    HELLO, then frames: length (4 bytes, little-endian), `Deltas`

gRPC costs a third of a millisecond per message, at either end, however small the message: too much for a token, and much even for
a step. Requests, refusals, errors and cancellation stay with gRPC, where each request has a stream of its own.

A lane is a request's part of a feed. What is written for a lane is read in the same order, whatever else is in a frame.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import DecodeError

from common.errors import EngineFailure
from common.wire import worker_pb2

HELLO = b"pdserve feed 1\n"  # ends in the version: peers of another one are not understood, and refused
TICKET_BYTES = 32
MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH_BYTES = 4


class FrameWriter:
    """Collects until `take`; one per feed."""

    def __init__(self) -> None:
        self._deltas = worker_pb2.Deltas()
        self._frames: list[bytes] = []
        self._lanes: list[int] = []
        self._token_ids: list[int] = []

    def token(self, lane: int, token_id: int) -> None:
        self._lanes.append(lane)
        self._token_ids.append(token_id)

    def event(self, lane: int, event: worker_pb2.GenerateEvent) -> None:
        if self._lanes:  # a frame's events are read before its tokens
            self._cut()
        self._deltas.events.append(worker_pb2.LaneEvent(lane=lane, event=event))

    def take(self) -> bytes:
        """All of it; empty if there is nothing."""
        if self._lanes or self._deltas.events:
            self._cut()
        data = self._frames[0] if len(self._frames) == 1 else b"".join(self._frames)
        self._frames.clear()
        return data

    def _cut(self) -> None:
        deltas = self._deltas
        deltas.lanes.extend(self._lanes)
        deltas.token_ids.extend(self._token_ids)
        body = deltas.SerializeToString()
        self._frames.append(len(body).to_bytes(_LENGTH_BYTES, "little") + body)
        deltas.Clear()
        self._lanes.clear()
        self._token_ids.clear()


class FrameReader:
    """Cuts bytes as they come into messages. Raises EngineFailure at what no worker writes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[worker_pb2.Deltas]:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(buffer[:_LENGTH_BYTES], "little")
            if end - _LENGTH_BYTES > MAX_FRAME_BYTES:
                raise EngineFailure("the worker sent a frame that is too large")
            if len(buffer) < end:
                return
            try:
                deltas = worker_pb2.Deltas.FromString(bytes(buffer[_LENGTH_BYTES:end]))
            except DecodeError:
                raise EngineFailure("the worker sent a frame that cannot be read") from None
            if len(deltas.lanes) != len(deltas.token_ids):
                raise EngineFailure("the worker sent other tokens than it says")
            del buffer[:end]
            yield deltas
