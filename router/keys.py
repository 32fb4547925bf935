"""Who calls, by API key. Keys are known by their entries only (`common.api_keys`); a key names its tenant.

A key that was right is remembered under a digest that only this process can make, so that the common case is one look-up. Any
other key is compared with all entries, whichever matches: the time says nothing about which one was close. Slow entries are tried
in a thread, a few callers at a time, and what was wrong is remembered too.

The keys file is looked at again when a key is asked for, at most once in `_LOOK_S`: a key that was taken out is refused from
then on, whatever was remembered. A file that cannot be understood changes nothing, and is spoken of in the log.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from common.api_keys import KeyEntry, parse_entry
from common.clock import Clock
from common.config import RouterConfig
from common.errors import AuthenticationFailed, ConfigError, Overloaded
from common.logs import get_logger
from router.admission.tenants import Identity, anonymous, tenant_of_key, tenants_of
from router.keys_file import KeysFile

log = get_logger(__name__)

_SCHEME = "bearer "
_REMEMBERED_WRONG = 1024
_TRYING_SLOWLY = 16  # callers that wait for slow entries; more are asked to come back
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class _Known:
    """The keys as they were at some time, and what was found out about callers' keys meanwhile."""

    fast: list[tuple[KeyEntry, Identity]] = field(default_factory=list)
    slow: list[tuple[KeyEntry, Identity]] = field(default_factory=list)
    right: dict[bytes, Identity] = field(default_factory=dict)
    wrong: OrderedDict[bytes, None] = field(default_factory=OrderedDict)


class KeyRing:
    """Raises ConfigError for a keys file that cannot be read."""

    def __init__(self, config: RouterConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._anonymous = None if config.authenticates else anonymous(config)
        self._file = KeysFile(Path(config.keys_file)) if config.keys_file else None
        self._blind = secrets.token_bytes(32)
        self._trying = asyncio.Lock()
        self._num_trying = 0
        self._known = self._read()
        self._look_s = clock.monotonic_s() + _LOOK_S

    async def identify(self, authorization: str | None) -> Identity:
        """The caller of an `Authorization` header. Raises AuthenticationFailed."""
        if self._anonymous is not None:
            return self._anonymous
        given = authorization or ""
        if given[: len(_SCHEME)].lower() != _SCHEME:
            raise AuthenticationFailed("an API key is needed: Authorization: Bearer KEY")
        key = given[len(_SCHEME) :].strip()
        self._look_again()
        known = self._known
        blinded = hmac.digest(self._blind, key.encode("utf-8", "surrogateescape"), "sha256")
        identity = known.right.get(blinded)
        if identity is None:
            identity = _matching(known.fast, key) or await self._try_slowly(known, key, blinded)
            known.right[blinded] = identity
        return identity

    async def _try_slowly(self, known: _Known, key: str, blinded: bytes) -> Identity:
        if not known.slow or blinded in known.wrong:
            raise AuthenticationFailed("the API key is not valid")
        if self._num_trying >= _TRYING_SLOWLY:
            raise Overloaded("too many unknown API keys are being checked", retry_after_s=1.0)
        self._num_trying += 1
        try:
            async with self._trying:
                identity = await asyncio.to_thread(_matching, known.slow, key)
        finally:
            self._num_trying -= 1
        if identity is None:
            known.wrong[blinded] = None
            if len(known.wrong) > _REMEMBERED_WRONG:
                known.wrong.popitem(last=False)
            raise AuthenticationFailed("the API key is not valid")
        return identity

    def _look_again(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._file is None or now_s < self._look_s:
            return
        self._look_s = now_s + _LOOK_S
        if not self._file.changed():
            return
        try:
            self._known = self._read()
        except ConfigError as error:
            log.error("the keys file is not understood; the keys before it stay", reason=error.message)
        else:
            log.info("the keys file was read again", keys=len(self._known.fast) + len(self._known.slow))

    def _read(self) -> _Known:
        """Raises ConfigError."""
        config, known = self._config, _Known()
        tenants = tenants_of(config)
        given = [(parse_entry(text), "") for text in config.api_keys]
        given += [(parse_entry(text), name) for name, part in config.tenants.items() for text in part.keys]
        given += self._file.entries() if self._file is not None else []
        for entry, name in given:
            if name and name not in tenants:
                raise ConfigError(f"the keys file names the tenant {name!r}, which is not configured", param="router.keys_file")
            tenant = tenants[name] if name else tenant_of_key(config, entry.digest)
            (known.slow if entry.slow else known.fast).append((entry, Identity(tenant, entry.digest.hex()[:16])))
        return known


def _matching(entries: list[tuple[KeyEntry, Identity]], key: str) -> Identity | None:
    found = [identity for entry, identity in entries if entry.matches(key)]  # all of them are tried
    return found[0] if found else None
