"""What bounds a decode worker's steps and orders who is in them: of `common.config.DecodeConfig`, what its scheduler reads."""

from __future__ import annotations

from typing import Protocol

from decode_worker.admission import LocalPrefill


class DecodeLimits(LocalPrefill, Protocol):
    @property
    def max_running(self) -> int: ...

    @property
    def max_waiting(self) -> int: ...

    @property
    def step_tokens(self) -> int: ...

    @property
    def watermark_blocks(self) -> int: ...

    @property
    def growth_tokens(self) -> int: ...

    @property
    def priority_aging_s(self) -> float: ...

    @property
    def max_overtaken(self) -> int: ...
