"""What an engine is told, as it reads it: `common.config.EngineConfig` has these fields, with their help texts.

A protocol, so that whoever builds an engine without a configuration file needs nothing of what reads one.
"""

from __future__ import annotations

from typing import Protocol


class EngineSettings(Protocol):
    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    @property
    def exact_tile_rows(self) -> int: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def kv_pool_tokens(self) -> int: ...

    @property
    def device_memory_share(self) -> float | None: ...

    @property
    def captured_rows(self) -> int: ...

    @property
    def max_model_tokens(self) -> int | None: ...

    @property
    def kernels(self) -> str: ...

    @property
    def weights(self) -> str: ...

    @property
    def kv_dtype(self) -> str: ...

    @property
    def prefix_cache(self) -> bool: ...
