"""Pieces that are taken many at once, held against the same pieces one by one: in the state, and in the hand-off's books.

Both transfers are told the same in the same order. What is taken at once must have been VERIFIED one by one, and what one would
have refused, or taken for a repetition, must be left.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from common.clock import ManualClock
from common.types import Ticket
from kvtransfer.digest import DIGEST_BYTES, block_digest_of
from kvtransfer.found import FoundPieces
from kvtransfer.frames import encode_table
from kvtransfer.part import mask_of, runs_within
from kvtransfer.state import Arrival, IncomingTransfer, Seal
from kvtransfer.transports.base import PieceName, Written

NONCE = b"n" * 16
FIRST, BLOCKS, LAYERS = 3, 6, 4
TICKET = Ticket(NONCE, "r", 0, "d", 1, "p", 1, FIRST, tuple(range(100, 100 + BLOCKS)), 16 * 9, b"f" * 32, 10.0)
Run = tuple[list[int], int, int, list[bytes]]


def digest_of(name: PieceName, version: int = 0) -> bytes:
    return bytes([*name, version]) * 4


def streaming(part: tuple[int, ...]) -> IncomingTransfer:
    transfer = IncomingTransfer(replace(TICKET, part=part), ManualClock(), num_layers=LAYERS, lease_s=4.0)
    transfer.offer()
    transfer.writer_opened()
    return transfer


def books_of(transfer: IncomingTransfer) -> tuple[object, ...]:
    pieces = {block: sorted(pieces) for block, pieces in transfer._pieces.items() if pieces}
    return transfer.state, str(transfer.error), transfer.verified, pieces, transfer._layers_here


def some_run(chance: random.Random, part: tuple[int, ...]) -> Run:
    """As a rule what a writer sends; now and then a block twice, one of another ticket, other layers, or another content."""
    cuts = [(first, end - first) for first, end in runs_within(part, 0, LAYERS)]
    first, number = chance.choice([*cuts, *cuts, (0, 2), (2, 2), (1, 1), (0, 1), (3, 1), (3, 2), (0, 0)])
    blocks = chance.sample(range(FIRST, FIRST + BLOCKS), chance.randint(1, BLOCKS))
    if chance.random() < 0.1:
        blocks.append(chance.choice([blocks[0], FIRST - 1, FIRST + BLOCKS]))
    digests = [digest_of(PieceName(block, first, number), chance.random() < 0.02) for block in blocks]
    return blocks, first, number, digests


@pytest.mark.parametrize("part", [(), (0, 2), (0, 1, 3, 1)])
def test_at_once_is_as_one_by_one(part: tuple[int, ...]) -> None:
    taken = left = 0
    for seed in range(400):
        chance = random.Random(seed)
        at_once, one_by_one = streaming(part), streaming(part)
        runs = [some_run(chance, part) for _ in range(chance.randint(1, 8))]
        sealed_before = chance.choice([None, 0, 2])
        for index, (blocks, first, number, digests) in enumerate(runs):
            if index == sealed_before:
                seal = some_seal(chance, part)
                for transfer in (at_once, one_by_one):
                    if transfer.receiving and not transfer.verified:
                        transfer.sealed(seal)
            layers_before = {one_by_one._layers_here.get(block, 0) for block in blocks}
            whole = at_once.pieces_arrived(blocks, first, number, digests)
            names = [PieceName(block, first, number) for block in blocks]
            arrivals = [one_by_one.piece_arrived(name, digest, True) for name, digest in zip(names, digests, strict=True)]
            if whole:
                taken += 1
                assert set(arrivals) == {Arrival.VERIFIED}
            else:
                left += 1
                assert set(arrivals) != {Arrival.VERIFIED} or len(layers_before) > 1
                again = [at_once.piece_arrived(name, digest, True) for name, digest in zip(names, digests, strict=True)]
                assert again == arrivals, "what was left has left a trace"
            assert books_of(at_once) == books_of(one_by_one)
    assert min(taken, left) > 100


def some_seal(chance: random.Random, part: tuple[int, ...]) -> Seal:
    """Of blocks that are sent run by run; of one block, now and then, of another content."""
    digests = {}
    for block in range(FIRST, FIRST + BLOCKS):
        names = [PieceName(block, first, end - first) for first, end in runs_within(part, 0, LAYERS)]
        version = int(chance.random() < 0.1)
        digests[block] = block_digest_of([(name.first_layer, name.num_layers, digest_of(name, version)) for name in names])
    return Seal(NONCE, TICKET.num_tokens, digests)


def test_layers_of_runs_cover_the_part() -> None:
    """What the tests above take for granted."""
    assert mask_of((0, 1, 3, 1), LAYERS) == 0b1001
    assert list(runs_within((0, 1, 3, 1), 0, LAYERS)) == [(0, 1), (3, 4)]


@pytest.mark.parametrize("as_stated", [True, False])
def test_a_table_stands_for_what_was_written(as_stated: bool) -> None:
    names = [PieceName(block, 0, LAYERS) for block in range(5)]
    stated = [digest_of(name) for name in names]
    found = stated if as_stated else [*stated[:3], digest_of(names[3], version=1), stated[4]]
    assert len(stated[0]) == DIGEST_BYTES
    pieces = FoundPieces(encode_table(names, stated), None if as_stated else b"".join(found))
    written = [Written(name, digest, None, its) for name, digest, its in zip(names, stated, found, strict=True)]
    assert list(pieces) == written
    assert (len(pieces), pieces[3], pieces[1:3]) == (5, written[3], written[1:3])
    assert pieces.as_stated is as_stated
    assert pieces.rows() == [(*name, digest) for name, digest in zip(names, stated, strict=True)]
