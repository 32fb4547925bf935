"""API keys, and the entries that stand for them at rest: who reads an entry cannot call with it.

    sha256:<64 hex>               of a key that `new_key` made: 256 random bits need neither a salt nor a slow hash
    scrypt:<salt>:<64 hex>        of a key that a person chose: guessing it is made slow

An entry is text in a configuration. It does not say whose key it is.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

_PREFIX = "pd-"
_SHA256 = re.compile("sha256:([0-9a-f]{64})")
_SCRYPT = re.compile("scrypt:([0-9a-f]{32,128}):([0-9a-f]{64})")
_COST, _BLOCK, _LANES = 2**14, 8, 1  # of scrypt: 16 MiB and some 40 ms for each try


@dataclass(frozen=True, slots=True)
class KeyEntry:
    digest: bytes
    salt: bytes = b""  # empty = sha256

    @property
    def slow(self) -> bool:
        """Whether checking a key against it takes long enough to be done in a thread."""
        return bool(self.salt)

    def matches(self, key: str) -> bool:
        """In a time that does not depend on how close the key is."""
        return hmac.compare_digest(_scrypt(key, self.salt) if self.salt else sha256_of(key), self.digest)


def parse_entry(text: str) -> KeyEntry:
    """Raises ValueError."""
    if found := _SHA256.fullmatch(text):
        return KeyEntry(bytes.fromhex(found[1]))
    if found := _SCRYPT.fullmatch(text):
        return KeyEntry(bytes.fromhex(found[2]), salt=bytes.fromhex(found[1]))
    raise ValueError("an entry is sha256:<64 hex digits> or scrypt:<salt>:<64 hex digits>")


def entry_of(text: str) -> str:
    """The entry of a key in the clear; an entry is left as it is. Raises ValueError."""
    if text.startswith(("sha256:", "scrypt:")):
        parse_entry(text)
        return text
    if not text:
        raise ValueError("an API key cannot be empty")
    return f"sha256:{sha256_of(text).hex()}"


def slow_entry_of(key: str) -> str:
    salt = secrets.token_bytes(16)
    return f"scrypt:{salt.hex()}:{_scrypt(key, salt).hex()}"


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(32)


def sha256_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _scrypt(key: str, salt: bytes) -> bytes:
    data = key.encode("utf-8", "surrogateescape")
    return hashlib.scrypt(data, salt=salt, n=_COST, r=_BLOCK, p=_LANES, maxmem=64 * 2**20, dklen=32)
