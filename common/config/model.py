"""A model that the cluster serves: name, source, engine, pools."""

from __future__ import annotations

from pydantic import Field, model_validator

from common.blocks import EXACT_TILE_TOKENS, exact_tile_blocks
from common.config.autoscaling import AutoscalingConfig
from common.config.engine import EngineConfig
from common.config.part import Part
from common.config.pools import DecodeConfig, PrefillConfig


class ModelConfig(Part):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._\-]+$", description="The name clients ask for.")
    source: str = Field(min_length=1, description="A name `pdserve pull` knows, a Hugging Face repo id, or a local path.")
    aliases: tuple[str, ...] = Field((), description="Other names for the same model.")
    engine: EngineConfig = EngineConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    autoscaling: AutoscalingConfig = AutoscalingConfig()

    @model_validator(mode="after")
    def _exact_sums_have_one_order(self) -> ModelConfig:
        if self.engine.exact and self.prefill.tensor_parallel != self.decode.tensor_parallel:
            raise ValueError(
                "exact mode needs one tensor_parallel in both pools: sums over other parts differ in their last bits"
                " (pipeline_parallel may differ)"
            )
        return self

    @model_validator(mode="after")
    def _exact_values_are_the_same_in_both_pools(self) -> ModelConfig:
        here, there = self.prefill.engine(self.engine), self.decode.engine(self.engine)
        if self.engine.exact and here.dtype != there.dtype:
            raise ValueError("exact mode needs one dtype in both pools: converted KV has other bits")
        tiles = {engine.block_tokens * exact_tile_blocks(engine.block_tokens) for engine in (here, there)}
        if self.engine.exact and len(tiles) > 1:
            raise ValueError(
                f"exact mode needs block_tokens that divide {EXACT_TILE_TOKENS} where the pools' differ: attention walks in tiles"
            )
        return self
