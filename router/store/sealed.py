"""A value as it lies in a shared store: an envelope that only a router with the secret can make.

    version (1) | expires, ms (8) | incarnation (16) | names (2) | per name: length (2), name, counter (8) | value | MAC (32)

The MAC is a keyed blake2b over the key under which the value lies and all of the above. So a value that somebody else wrote,
changed or moved to another key, or whose expiry was put off, is refused; so is one of another version of this format.
Nothing is parsed before the MAC is known to be right. Who can write to the store can still bring back what once lay under
the same key, as long as its time is not over.

The secret itself is never used as a key: the key is derived from it for this use alone.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

from router.store.base import Epoch, Epochs

_VERSION = 1
_HEAD = struct.Struct("!BQ16sH")
_NAME = struct.Struct("!H")
_COUNTER = struct.Struct("!Q")
_MAC_BYTES = 32


@dataclass(frozen=True, slots=True)
class Opened:
    value: bytes
    epochs: Epochs
    expires_ms: int


class Sealer:
    """Seals and opens under one secret. Immutable."""

    def __init__(self, secret: str) -> None:
        self._key = hashlib.blake2b(secret.encode(), digest_size=64, person=b"pdserve store").digest()

    def seal(self, key: bytes, value: bytes, *, epochs: Epochs, expires_ms: int) -> bytes:
        """All epochs are of one incarnation."""
        incarnations = {epoch.incarnation for _, epoch in epochs.pairs} or {bytes(16)}
        if len(incarnations) != 1:
            raise ValueError("epochs of different incarnations")
        parts = [_HEAD.pack(_VERSION, expires_ms, incarnations.pop(), len(epochs.pairs))]
        for name, epoch in epochs.pairs:
            encoded = name.encode()
            parts += (_NAME.pack(len(encoded)), encoded, _COUNTER.pack(epoch.counter))
        parts.append(value)
        body = b"".join(parts)
        return body + self._mac(key, body)

    def open(self, key: bytes, sealed: bytes) -> Opened | None:
        """None if it was not sealed for this key under this secret, or in another format."""
        body, mac = sealed[:-_MAC_BYTES], sealed[-_MAC_BYTES:]
        if len(body) < _HEAD.size or not hmac.compare_digest(mac, self._mac(key, body)):
            return None
        version, expires_ms, incarnation, num_names = _HEAD.unpack_from(body)
        if version != _VERSION:
            return None
        pairs: list[tuple[str, Epoch]] = []
        at = _HEAD.size
        for _ in range(num_names):
            (length,) = _NAME.unpack_from(body, at)
            at += _NAME.size
            name = body[at : at + length].decode()
            at += length
            (counter,) = _COUNTER.unpack_from(body, at)
            at += _COUNTER.size
            pairs.append((name, Epoch(counter, incarnation)))
        return Opened(body[at:], Epochs(tuple(pairs)), expires_ms)

    def _mac(self, key: bytes, body: bytes) -> bytes:
        mac = hashlib.blake2b(_NAME.pack(len(key)), digest_size=_MAC_BYTES, key=self._key)
        mac.update(key)
        mac.update(body)
        return mac.digest()
