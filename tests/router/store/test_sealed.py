from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.store.base import Epoch, Epochs
from router.store.sealed import Sealer

INCARNATION = bytes(range(16))
EPOCHS = Epochs((("model:m", Epoch(7, INCARNATION)), ("tenant:é", Epoch(2**60, INCARNATION))))
SECRET = "a secret of sixteen or more"


@given(
    key=st.binary(min_size=1, max_size=64),
    value=st.binary(max_size=300),
    counters=st.dictionaries(st.text(min_size=1, max_size=20), st.integers(0, 2**64 - 1), max_size=5),
    expires_ms=st.integers(0, 2**63),
)
def test_what_was_sealed_opens_as_it_was(key: bytes, value: bytes, counters: dict[str, int], expires_ms: int) -> None:
    epochs = Epochs(tuple((name, Epoch(counter, INCARNATION)) for name, counter in sorted(counters.items())))
    sealed = Sealer(SECRET).seal(key, value, epochs=epochs, expires_ms=expires_ms)
    opened = Sealer(SECRET).open(key, sealed)
    assert opened is not None
    assert (opened.value, opened.epochs, opened.expires_ms) == (value, epochs, expires_ms)


def test_one_changed_bit_anywhere_is_refused() -> None:
    sealed = Sealer(SECRET).seal(b"k", b"the value", epochs=EPOCHS, expires_ms=1_000)
    for position in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[position] ^= 1 << bit
            assert Sealer(SECRET).open(b"k", bytes(changed)) is None


def test_a_cut_or_lengthened_value_is_refused() -> None:
    sealed = Sealer(SECRET).seal(b"k", b"the value", epochs=EPOCHS, expires_ms=1_000)
    for length in range(len(sealed)):
        assert Sealer(SECRET).open(b"k", sealed[:length]) is None
    assert Sealer(SECRET).open(b"k", sealed + b"\0") is None


def test_a_value_belongs_to_its_key_and_its_secret() -> None:
    sealed = Sealer(SECRET).seal(b"k", b"value", epochs=EPOCHS, expires_ms=1_000)
    assert Sealer(SECRET).open(b"k", sealed) is not None
    assert Sealer(SECRET).open(b"j", sealed) is None
    assert Sealer(SECRET).open(b"kk", sealed) is None
    assert Sealer(SECRET + "!").open(b"k", sealed) is None


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    assert Sealer(SECRET).open(b"k", garbage) is None


def test_epochs_of_two_incarnations_are_a_mistake() -> None:
    mixed = Epochs((("a", Epoch(1, INCARNATION)), ("b", Epoch(1, bytes(16)))))
    with pytest.raises(ValueError, match="incarnations"):
        Sealer(SECRET).seal(b"k", b"v", epochs=mixed, expires_ms=1)
