from __future__ import annotations

import hashlib

import pytest

from common.api_keys import entry_of, new_key, parse_entry, slow_entry_of


def test_an_entry_is_the_digest_and_not_the_key() -> None:
    assert entry_of("secret") == "sha256:" + hashlib.sha256(b"secret").hexdigest()
    assert parse_entry(entry_of("secret")).matches("secret")
    assert not parse_entry(entry_of("secret")).matches("secret ")


def test_an_entry_stays_what_it_is() -> None:
    for entry in (entry_of("secret"), slow_entry_of("secret")):
        assert entry_of(entry) == entry


def test_slow_entries_have_salts() -> None:
    first, second = slow_entry_of("hunter2"), slow_entry_of("hunter2")
    assert first != second
    kind, salt, digest = first.split(":")
    assert kind == "scrypt"
    assert digest == hashlib.scrypt(b"hunter2", salt=bytes.fromhex(salt), n=16384, r=8, p=1, maxmem=2**26, dklen=32).hex()
    assert parse_entry(first).slow
    assert parse_entry(first).matches("hunter2")
    assert not parse_entry(second).matches("hunter3")


def test_new_keys_differ() -> None:
    keys = {new_key() for _ in range(50)}
    assert len(keys) == 50
    assert all(len(key) >= 43 and key.isascii() for key in keys)


@pytest.mark.parametrize("text", ["sha256:", "sha256:12", "sha256:" + "g" * 64, "scrypt:aa:bb", "scrypt:" + "a" * 64, ""])
def test_what_is_neither_key_nor_entry(text: str) -> None:
    with pytest.raises(ValueError, match=r"entry is|empty"):
        entry_of(text)
