"""Who calls: tenants as the configuration names them, and what a key says of its caller.

A tenant is what is fair to others: it has a weight in the queue, bands that it may use, limits, and a part of every cache that is
its own. Keys belong to tenants. A key without one is a tenant of its own, under the rules of `default`, and so is, on a router
without keys, everybody together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from common.config import LimitsConfig, RouterConfig, TenantConfig
from common.errors import PermissionDenied
from router.admission.bands import Band

DEFAULT = "default"
_SALT_OF_KEYS, _SALT_OF_NAMES = b"pdserve-tenant-v1", b"pdserve-tenant-v2\0"


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    label: str  # in metrics: of a bounded set
    weight: float
    bands: tuple[Band, ...]  # that it may use; the first one is for requests that ask for none
    limits: LimitsConfig  # of all its keys together
    key_limits: LimitsConfig  # of each of them
    admin: bool
    cache_salt: str  # no two tenants share an entry of any cache


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known of a caller from its key. Written by `router.keys`."""

    tenant: Tenant
    key_id: str = ""  # a piece of the key's digest; "" without keys

    def require_admin(self) -> None:
        """Raises PermissionDenied."""
        if not self.tenant.admin:
            raise PermissionDenied("this key is not for administration")


@dataclass(frozen=True, slots=True)
class Standing:
    """As whom, and how urgently, one call is made. Written by a front end, read by the gate."""

    identity: Identity
    band: Band


def standing_of(identity: Identity, band: Band | None) -> Standing:
    """Raises PermissionDenied for a band that is not the tenant's."""
    allowed = identity.tenant.bands
    if band is None:
        return Standing(identity, allowed[0])
    if band not in allowed:
        raise PermissionDenied(f"this key may use the priorities {', '.join(allowed)}", param="priority")
    return Standing(identity, band)


def tenants_of(config: RouterConfig) -> Mapping[str, Tenant]:
    """All that have a name, `default` among them."""
    rules = {DEFAULT: TenantConfig(), **config.tenants}
    return {name: _tenant(name, name, part, _salt(_SALT_OF_NAMES, name.encode())) for name, part in rules.items()}


def anonymous(config: RouterConfig) -> Identity:
    """Everybody, on a router without keys, which is on loopback only: it may administrate."""
    part = config.tenants.get(DEFAULT, TenantConfig())
    return Identity(_tenant(DEFAULT, DEFAULT, part.model_copy(update={"admin": True}), ""))


def tenant_of_key(config: RouterConfig, digest: bytes) -> Tenant:
    """Of a key that the configuration gives to nobody."""
    part = config.tenants.get(DEFAULT, TenantConfig())
    return _tenant(f"key {digest.hex()[:16]}", "keys", part, _salt(_SALT_OF_KEYS, digest))


def _tenant(name: str, label: str, part: TenantConfig, cache_salt: str) -> Tenant:
    return Tenant(
        name=name,
        label=label,
        weight=part.weight,
        bands=tuple(Band(band) for band in part.bands),
        limits=part.limits,
        key_limits=part.key_limits,
        admin=part.admin,
        cache_salt=cache_salt,
    )


def _salt(scheme: bytes, identity: bytes) -> str:
    return hashlib.sha256(scheme + identity).hexdigest()
