"""Who may call: API keys, kept as digests only. A caller's key also names its tenant, which partitions every cache."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from common.errors import AuthenticationFailed

_SCHEME = "bearer "


class KeyRing:
    def __init__(self, api_keys: Sequence[str]) -> None:
        self._digests = tuple(_digest(key) for key in api_keys)

    def cache_salt(self, authorization: str | None) -> str:
        """The tenant of an `Authorization` header; "" when no keys are configured. Raises AuthenticationFailed."""
        if not self._digests:
            return ""
        given = authorization or ""
        if given[: len(_SCHEME)].lower() != _SCHEME:
            raise AuthenticationFailed("an API key is needed: Authorization: Bearer KEY")
        digest = _digest(given[len(_SCHEME) :].strip())
        # All keys are compared, whichever matches: the time taken says nothing about which one was close.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationFailed("the API key is not valid")
        return hashlib.sha256(b"pdserve-tenant-v1" + digest).hexdigest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
