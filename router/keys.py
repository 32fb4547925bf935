"""Who calls, by API key. Keys are known by their entries only (`common.api_keys`); a key names its tenant.

A key that was right is remembered under a digest that only this process can make, so that the common case is one look-up. Any
other key is compared with all entries, whichever matches: the time says nothing about which one was close. Slow entries are tried
in a thread, a few callers at a time, and what was wrong is remembered too.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import OrderedDict
from pathlib import Path

from common.api_keys import KeyEntry, entry_of, parse_entry
from common.config import RouterConfig
from common.errors import AuthenticationFailed, ConfigError, Overloaded
from router.admission.tenants import DEFAULT, Identity, anonymous, tenant_of_key, tenants_of

_SCHEME = "bearer "
_REMEMBERED_WRONG = 1024
_TRYING_SLOWLY = 16  # callers that wait for slow entries; more are asked to come back


class KeyRing:
    """Raises ConfigError for a keys file that cannot be read."""

    def __init__(self, config: RouterConfig) -> None:
        self._anonymous = None if config.authenticates else anonymous(config)
        self._fast: list[tuple[KeyEntry, Identity]] = []
        self._slow: list[tuple[KeyEntry, Identity]] = []
        self._blind = secrets.token_bytes(32)
        self._right: dict[bytes, Identity] = {}
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._trying = asyncio.Lock()
        self._num_trying = 0
        tenants = tenants_of(config)
        given = [(text, "") for text in config.api_keys]
        given += [(text, name) for name, part in config.tenants.items() for text in part.keys]
        given += _read(Path(config.keys_file)) if config.keys_file else []
        for text, name in given:
            entry = parse_entry(text)
            if name and name not in tenants:
                raise ConfigError(f"the keys file names the tenant {name!r}, which is not configured", param="router.keys_file")
            tenant = tenants[name] if name else tenant_of_key(config, entry.digest)
            (self._slow if entry.slow else self._fast).append((entry, Identity(tenant, entry.digest.hex()[:16])))

    async def identify(self, authorization: str | None) -> Identity:
        """The caller of an `Authorization` header. Raises AuthenticationFailed."""
        if self._anonymous is not None:
            return self._anonymous
        given = authorization or ""
        if given[: len(_SCHEME)].lower() != _SCHEME:
            raise AuthenticationFailed("an API key is needed: Authorization: Bearer KEY")
        key = given[len(_SCHEME) :].strip()
        blinded = hmac.digest(self._blind, key.encode("utf-8", "surrogateescape"), "sha256")
        identity = self._right.get(blinded)
        if identity is None:
            identity = _matching(self._fast, key) or await self._try_slowly(key, blinded)
            self._right[blinded] = identity
        return identity

    async def _try_slowly(self, key: str, blinded: bytes) -> Identity:
        if not self._slow or blinded in self._wrong:
            raise AuthenticationFailed("the API key is not valid")
        if self._num_trying >= _TRYING_SLOWLY:
            raise Overloaded("too many unknown API keys are being checked", retry_after_s=1.0)
        self._num_trying += 1
        try:
            async with self._trying:
                identity = await asyncio.to_thread(_matching, self._slow, key)
        finally:
            self._num_trying -= 1
        if identity is None:
            self._wrong[blinded] = None
            if len(self._wrong) > _REMEMBERED_WRONG:
                self._wrong.popitem(last=False)
            raise AuthenticationFailed("the API key is not valid")
        return identity


def _matching(entries: list[tuple[KeyEntry, Identity]], key: str) -> Identity | None:
    found = [identity for entry, identity in entries if entry.matches(key)]  # all of them are tried
    return found[0] if found else None


def _read(path: Path) -> list[tuple[str, str]]:
    """Lines of `tenant entry`; what `pdserve keys new` prints. Blank lines and # comments are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys file {path}: {error}", param="router.keys_file") from error
    found = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        try:
            name, text = words
            if not text.startswith(("sha256:", "scrypt:")):
                raise ValueError("keys are not kept in the clear here")
            found.append((entry_of(text), name if name != DEFAULT else ""))
        except ValueError as error:
            message = f"{path}:{number}: wants a tenant and the entry of a key, as `pdserve keys new` prints them ({error})"
            raise ConfigError(message, param="router.keys_file") from error
    return found
