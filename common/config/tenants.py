"""Who may ask, for what share, and with which limits."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from common.api_keys import entry_of
from common.config.part import Part

TENANT_NAME = re.compile(r"[A-Za-z0-9._\-]{1,64}")


BandName = Literal["interactive", "batch", "background"]


class LimitsConfig(Part):
    """All routers count together where they share a Redis, but for `max_concurrent`; else each on its own."""

    requests_per_minute: int | None = Field(None, ge=1, description="More get 429. A minute's worth may come at once.")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Of prompts, when they are admitted, and of answers, as they are generated."
    )
    max_concurrent: int | None = Field(None, ge=1, description="Requests that wait or are computed at once.")


class TenantConfig(Part):
    keys: tuple[str, ...] = Field(
        (), repr=False, description="Its API keys, or their entries, as `pdserve keys new` prints them."
    )
    weight: float = Field(1.0, gt=0, le=1000, description="Its share of the workers, against other tenants in the same band.")
    bands: tuple[BandName, ...] = Field(
        ("interactive", "batch", "background"),
        min_length=1,
        description="Priorities that its requests may ask for; the first one is for requests that ask for none.",
    )
    limits: LimitsConfig = Field(LimitsConfig(), description="Of all its keys together.")
    key_limits: LimitsConfig = Field(LimitsConfig(), description="Of each of its keys.")
    admin: bool = Field(False, description="Its keys may call what administrates the router.")

    @field_validator("keys")
    @classmethod
    def _no_key_in_the_clear(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(entry_of(key) for key in keys)
