"""A ticket is good for exactly what it says, on the worker it names; anything else is refused by name of the field."""

from __future__ import annotations

from dataclasses import fields, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from common.errors import StartupError, TicketRefused
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.ticket import MAX_TTL_S, check_shape, derive_secret, mint, verify

LAYOUT = KVLayout("model", "tokenizer", 2, 1, 8, 16, "float32", True)
SECRET = derive_secret("the cluster's token")
POOL_BLOCKS = 10


def minted(**changes: object) -> Ticket:
    arguments: dict[str, object] = {
        "secret": SECRET,
        "layout": LAYOUT,
        "request_id": "r-1",
        "attempt": 1,
        "decode_worker_id": "m/decode/0",
        "decode_incarnation": 7,
        "prefill": WorkerRef("m/prefill/0", 9, "127.0.0.1:1"),
        "first_block": 1,
        "blocks": (4, 9, 2),
        "num_tokens": 60,
        "ttl_s": 30,
    }
    return mint(**(arguments | changes))  # type: ignore[arg-type]


def check(ticket: Ticket, secret: bytes = SECRET, **changes: object) -> None:
    arguments: dict[str, object] = {
        "layout": LAYOUT,
        "prefill_worker_id": "m/prefill/0",
        "prefill_incarnation": 9,
        "decode_worker_id": "m/decode/0",
        "decode_incarnation": 7,
        "pool_blocks": POOL_BLOCKS,
    }
    verify(ticket, secret, **(arguments | changes))  # type: ignore[arg-type]


def test_a_minted_ticket_is_accepted() -> None:
    check(minted())
    check(minted(first_block=4, blocks=()))


def test_every_ticket_has_a_nonce_of_its_own() -> None:
    assert minted().nonce != minted().nonce


CHANGES: dict[str, object] = {
    "nonce": b"x" * 16,
    "request_id": "r-2",
    "attempt": 2,
    "decode_worker_id": "m/decode/1",
    "decode_incarnation": 8,
    "prefill_worker_id": "m/prefill/1",
    "prefill_incarnation": 10,
    "first_block": 2,
    "blocks": (4, 9, 3),
    "num_tokens": 61,
    "layout_fingerprint": b"f" * 32,
    "ttl_s": 31.0,
    "part": (0, 1),
    "mac": b"m" * 32,
}


@pytest.mark.parametrize("field", [field.name for field in fields(Ticket)])
def test_a_changed_field_is_refused(field: str) -> None:
    altered = replace(minted(), **{field: CHANGES[field]})
    assert altered != minted()
    with pytest.raises(TicketRefused) as refused:
        check(altered)
    assert refused.value.param == "mac"


def test_an_unsigned_ticket_is_refused() -> None:
    with pytest.raises(TicketRefused):
        check(replace(minted(), mac=b""))


def test_another_clusters_ticket_is_refused() -> None:
    with pytest.raises(TicketRefused):
        check(minted(), secret=derive_secret("another token"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefill_worker_id", "m/prefill/1"),
        ("prefill_incarnation", 10),
        ("decode_worker_id", "m/decode/1"),
        ("decode_incarnation", 8),
    ],
)
def test_a_ticket_for_somebody_else_is_refused(field: str, value: object) -> None:
    with pytest.raises(TicketRefused) as refused:
        check(minted(), **{field: value})
    assert refused.value.param == field


def test_a_ticket_of_another_layout_is_refused() -> None:
    with pytest.raises(TicketRefused) as refused:
        check(minted(), layout=replace(LAYOUT, exact=False))
    assert refused.value.param == "layout_fingerprint"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"blocks": (4, 10, 2)}, "blocks"),
        ({"blocks": (4, -1, 2)}, "blocks"),
        ({"blocks": (4, 4, 2)}, "blocks"),
        ({"blocks": (4, 2)}, "first_block"),
        ({"blocks": (4, 2, 3, 5)}, "first_block"),
        ({"first_block": -1, "blocks": (0, 1, 2, 3, 4)}, "first_block"),
        ({"num_tokens": 0, "first_block": 0, "blocks": ()}, "num_tokens"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"ttl_s": MAX_TTL_S * 2}, "ttl_s"),
    ],
)
def test_a_ticket_that_makes_no_sense_is_refused_even_if_it_is_signed(changes: dict[str, object], field: str) -> None:
    with pytest.raises(TicketRefused) as refused:
        check(minted(**changes))
    assert refused.value.param == field


def test_the_nonce_has_its_length() -> None:
    with pytest.raises(TicketRefused):
        check_shape(replace(minted(), nonce=b"short"), pool_blocks=POOL_BLOCKS, layout=LAYOUT)


@given(
    left=st.tuples(st.text(max_size=6), st.text(max_size=6), st.lists(st.integers(0, 9), max_size=4)),
    right=st.tuples(st.text(max_size=6), st.text(max_size=6), st.lists(st.integers(0, 9), max_size=4)),
)
def test_different_tickets_never_share_a_mac(left: tuple[str, str, list[int]], right: tuple[str, str, list[int]]) -> None:
    tickets = [
        minted(request_id=a, decode_worker_id=b, blocks=blocks, draw_nonce=lambda size: bytes(size))
        for a, b, blocks in (left, right)
    ]
    assert (tickets[0].mac == tickets[1].mac) == (left == right)


def test_a_secret_needs_a_token() -> None:
    assert derive_secret("a") != derive_secret("b")
    with pytest.raises(StartupError):
        derive_secret("")
