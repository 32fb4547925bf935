"""Bytes between ranks: whole, in order, both ways at once, and never waited for in vain."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch

from common.engine.parallel.links import Link, socket_pair, swap
from common.engine.parallel.sums import SocketSum
from common.errors import EngineFailure, RankLost


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    one, other = socket_pair()
    links = Link(one, "the other", 5.0), Link(other, "the one", 5.0)
    yield links
    for link in links:
        link.close()


def test_messages_of_all_sizes_arrive_whole_and_in_order(pair: tuple[Link, Link]) -> None:
    numbers = random.Random(0)
    payloads = [numbers.randbytes(size) for size in (0, 1, 24, 4096, 300_000, 3_000_001, 5)]
    sender = threading.Thread(target=lambda: [pair[0].send(payload) for payload in payloads])
    sender.start()
    for index, payload in enumerate(payloads):
        if index % 2:
            assert bytes(pair[1].receive()) == payload
        else:
            into = bytearray(len(payload))
            pair[1].receive_into(memoryview(into))
            assert into == payload
    sender.join()


def test_both_may_send_more_at_once_than_sockets_hold(pair: tuple[Link, Link]) -> None:
    """With plain send and receive each would wait for the other to take something."""
    size = 16 * 1024 * 1024
    got: dict[int, bytearray] = {}

    def exchange(index: int) -> None:
        got[index] = bytearray(size)
        swap([pair[index]], memoryview(bytes([index + 1]) * size), {pair[index]: memoryview(got[index])})

    threads = [threading.Thread(target=exchange, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (got[0][:1], got[0][-1:], got[1][:1], got[1][-1:]) == (b"\x02", b"\x02", b"\x01", b"\x01")


def test_ranks_at_different_places_find_out(pair: tuple[Link, Link]) -> None:
    pair[0].send(b"12345678")
    with pytest.raises(EngineFailure, match="8 bytes instead of 4"):
        pair[1].receive_into(memoryview(bytearray(4)))


def test_the_end_of_a_peer_is_seen_at_once(pair: tuple[Link, Link]) -> None:
    waiting = threading.Timer(0.05, pair[0].close)
    waiting.start()
    with pytest.raises(RankLost, match="the one is gone"):
        pair[1].receive()
    with pytest.raises(RankLost):
        pair[1].send(b"x")
    waiting.join()


def test_a_wait_ends_when_this_side_shuts_down(pair: tuple[Link, Link]) -> None:
    waker = threading.Timer(0.05, pair[1].shut_down)
    waker.start()
    with pytest.raises(RankLost):
        pair[1].receive()
    waker.join()


def test_silence_has_an_end() -> None:
    one, other = socket_pair()
    silent, waiting = Link(one, "a", 0.05), Link(other, "the silent one", 0.05)
    with pytest.raises(RankLost, match="the silent one said nothing in time"):
        waiting.receive()
    with pytest.raises(RankLost, match="said nothing"):
        waiting.send(bytes(64 * 1024 * 1024))  # nobody takes it
    silent.close()
    waiting.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_taken_in_the_order_of_shards_everywhere(dtype: torch.dtype) -> None:
    """Three shards, values for which another order gives another sum."""
    ends: dict[tuple[int, int], Link] = {}
    for low, high in ((0, 1), (0, 2), (1, 2)):
        left, right = socket_pair()
        ends[low, high], ends[high, low] = Link(left, f"{high}", 5.0), Link(right, f"{low}", 5.0)
    parts = [torch.full((3, 5), value).to(dtype) for value in (1e8, -1e8, 1.0)]
    found: dict[int, torch.Tensor] = {}

    def add(shard: int) -> None:
        others = [ends[shard, other] for other in range(3) if other != shard]
        found[shard] = SocketSum(shard, others)(parts[shard])

    threads = [threading.Thread(target=add, args=(shard,)) for shard in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = ((parts[0].float() + parts[1].float()) + parts[2].float()).to(dtype)
    assert expected[0, 0] == 1.0
    assert all(torch.equal(found[shard], expected) for shard in range(3))
    for link in ends.values():
        link.close()
