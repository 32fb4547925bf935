"""The sockets between two ranks, and how bytes cross them: in order, whole, or not at all.

    rank a  <---- one pair of connected sockets ---->  rank b          made before either process was, inherited by both

`send` and `receive` move a message of a known size; `swap` does both with several ranks at once, so that nobody waits for
somebody who waits for him. Each message bears a number and its size: two ranks that are not at the same place in
the same step find out at once. A peer that ended, and one that is silent for too long, are a RankLost.

A link belongs to one thread, or to one that sends and one that receives. Does not know what the bytes are.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Mapping, Sequence
from time import monotonic

from common.errors import EngineFailure, RankLost

_HEADER = struct.Struct("<IIQ")
_MAGIC = 0x50445253
_BUFFER_BYTES = 4 * 1024 * 1024
LINK_TIMEOUT_S = 120.0  # for one message of a rank that gives signs of life: beyond it the ranks wait for each other in a circle
MAX_MESSAGE_BYTES = 4 * 1024 * 1024 * 1024


def socket_pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (one, other):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)  # the kernel may grant less
    return one, other


class Link:
    def __init__(self, end: socket.socket, peer: str, timeout_s: float) -> None:
        """`peer` is for messages. `timeout_s` is how long the peer may let us wait for one message."""
        end.setblocking(False)
        self.socket = end
        self.peer = peer
        self.timeout_s = timeout_s
        self._sent = 0
        self._received = 0

    def send(self, payload: bytes | memoryview) -> None:
        outgoing = self.outgoing(payload)
        deadline_s = monotonic() + self.timeout_s
        while not outgoing.move():
            _wait({self.socket: select.POLLOUT}, deadline_s, self.peer)

    def receive(self) -> bytearray:
        """A message of whatever size."""
        header = bytearray(_HEADER.size)
        self._fill(memoryview(header), monotonic() + self.timeout_s)
        buffer = bytearray(self.check(header, None))
        self._fill(memoryview(buffer), monotonic() + self.timeout_s)
        return buffer

    def wait(self) -> None:
        """Until there is something to receive, or the peer has ended; for as long as it takes."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        poller.poll()

    def receive_into(self, buffer: memoryview) -> None:
        incoming = self.incoming(buffer)
        deadline_s = monotonic() + self.timeout_s
        while not incoming.move():
            _wait({self.socket: select.POLLIN}, deadline_s, self.peer)

    def outgoing(self, payload: bytes | memoryview) -> Outgoing:
        view = memoryview(payload).cast("B")
        header = _HEADER.pack(_MAGIC, self._sent & 0xFFFFFFFF, view.nbytes)
        self._sent += 1
        return Outgoing(self, header, view)

    def incoming(self, buffer: memoryview) -> Incoming:
        return Incoming(self, buffer)

    def check(self, header: bytes | bytearray, expected_bytes: int | None) -> int:
        magic, number, size_bytes = _HEADER.unpack(header)
        if magic != _MAGIC or number != self._received & 0xFFFFFFFF or size_bytes > MAX_MESSAGE_BYTES:
            raise EngineFailure(f"{self.peer} is not where this rank is: message {number} instead of {self._received}")
        if expected_bytes is not None and size_bytes != expected_bytes:
            raise EngineFailure(f"{self.peer} is not where this rank is: {size_bytes} bytes instead of {expected_bytes}")
        self._received += 1
        return int(size_bytes)

    def close(self) -> None:
        self.socket.close()

    def shut_down(self) -> None:
        """Wakes whoever waits on it, on both sides. From any thread."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed already

    def _fill(self, view: memoryview, deadline_s: float) -> None:
        while view.nbytes:
            count = self.take(view)
            if count is None:
                _wait({self.socket: select.POLLIN}, deadline_s, self.peer)
            else:
                view = view[count:]

    def take(self, view: memoryview) -> int | None:
        """What is there, at most as much as fits; None = nothing yet."""
        try:
            count = self.socket.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise RankLost(f"{self.peer} is gone") from error
        if count == 0:
            raise RankLost(f"{self.peer} is gone")
        return count


class Outgoing:
    """A message on its way out."""

    def __init__(self, link: Link, header: bytes, payload: memoryview) -> None:
        self.link = link
        self._left: list[memoryview] = [memoryview(header), payload]

    def move(self) -> bool:
        """As much as goes without waiting; whether all has gone."""
        while self._left:
            try:
                count = self.link.socket.sendmsg(self._left)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                raise RankLost(f"{self.link.peer} is gone") from error
            while self._left and count >= self._left[0].nbytes:
                count -= self._left.pop(0).nbytes
            if self._left and count:
                self._left[0] = self._left[0][count:]
        return True


class Incoming:
    """A message of a known size on its way in."""

    def __init__(self, link: Link, buffer: memoryview) -> None:
        self.link = link
        self._header = bytearray(_HEADER.size)
        self._left: list[memoryview] = [memoryview(self._header), buffer.cast("B")]
        self._size_bytes = buffer.nbytes

    def move(self) -> bool:
        while self._left:
            if not self._left[0].nbytes:
                self._left.pop(0)
                continue
            count = self.link.take(self._left[0])
            if count is None:
                return False
            self._left[0] = self._left[0][count:]
            if not self._left[0].nbytes and len(self._left) == 2:
                self.link.check(self._header, self._size_bytes)
        return True


def swap(links: Sequence[Link], payload: memoryview, into: Mapping[Link, memoryview]) -> None:
    """Sends `payload` to all of `links` and receives what each of them sends."""
    outgoing = [link.outgoing(payload) for link in links]
    incoming = [link.incoming(into[link]) for link in links]
    deadline_s = monotonic() + max(link.timeout_s for link in links)
    while True:
        outgoing = [message for message in outgoing if not message.move()]
        incoming = [message for message in incoming if not message.move()]
        if not outgoing and not incoming:
            return
        wanted = {message.link.socket: select.POLLIN for message in incoming}
        for message in outgoing:
            wanted[message.link.socket] = wanted.get(message.link.socket, 0) | select.POLLOUT
        _wait(
            wanted,
            deadline_s,
            ", ".join([message.link.peer for message in incoming] or [message.link.peer for message in outgoing]),
        )


def _wait(wanted: Mapping[socket.socket, int], deadline_s: float, peer: str) -> None:
    poller = select.poll()
    for end, events in wanted.items():
        if end.fileno() < 0:
            raise RankLost(f"{peer} is gone")
        poller.register(end, events)
    left_s = deadline_s - monotonic()
    if left_s <= 0 or not poller.poll(left_s * 1000.0):
        raise RankLost(f"{peer} said nothing in time")
