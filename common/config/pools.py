"""The two pools of a model: what a prefill worker has of its own, and what a decode worker has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from common.config.engine import EngineConfig, ParallelConfig
from common.config.part import Part

_CPU_STEP_TOKENS = 128


class PoolConfig(ParallelConfig):
    """What a pool of workers has of its own. KV is cut anew, and converted, on its way from one pool to the other."""

    block_tokens: int | None = Field(
        None, ge=1, le=256, description="Tokens per KV block in this pool; default is engine.block_tokens."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of weights and KV in this pool; default is engine.dtype. Not in exact mode."
    )

    def engine(self, shared: EngineConfig) -> EngineConfig:
        """How this pool's engines compute, where the model's are to compute as `shared`."""
        own = {"block_tokens": self.block_tokens, "dtype": self.dtype}
        return shared.model_copy(update={name: value for name, value in own.items() if value is not None})


class PrefillConfig(PoolConfig):
    replicas: int = Field(1, ge=0, description="Prefill workers of this model.")
    chunk_tokens: int = Field(
        512, ge=1, description="A prompt is computed in chunks that end at multiples of this; a short one in a single chunk."
    )
    step_tokens: int | None = Field(
        None,
        ge=1,
        description="Prompts share a step up to so many tokens; a longer chunk goes alone. Default is chunk_tokens, on a CPU at"
        " most 128: what shares a longer step there waits for the others more than it gains.",
    )
    max_running: int = Field(32, ge=1, description="Most prompts in progress at once.")
    oldest_first_every: int = Field(
        8,
        ge=1,
        description="Urgent prompts go first, and short ones, but once in so many steps the oldest does; 1: it always does.",
    )
    layer_groups: int = Field(
        6, ge=1, description="A chunk's KV leaves in so many groups of layers while later layers compute; 1 sends whole chunks."
    )

    @property
    def shared_tokens(self) -> int:
        """That prompts may share a step up to."""
        return self.chunk_tokens if self.step_tokens is None else self.step_tokens

    def on(self, device: str) -> PrefillConfig:
        """With what is left open decided for that kind of device."""
        if self.step_tokens is not None or device != "cpu":
            return self
        return self.model_copy(update={"step_tokens": min(self.chunk_tokens, _CPU_STEP_TOKENS)})


class SpeculationConfig(Part):
    """Guessing tokens ahead and checking several in one step. Answers are the same with it and without."""

    method: Literal["off", "ngram", "draft", "medusa"] = Field(
        "ngram",
        description="ngram: what follows the last tokens wherever they stood before, in prompt, answer or the tenant's answers."
        " draft: what a small model says. medusa: ngram, and where it has nothing as good, heads on the model's last hidden row.",
    )
    max_draft_tokens: int = Field(
        8, ge=1, le=64, description="Most tokens guessed per sequence and step; how many are tried is measured, not configured."
    )
    min_match_tokens: int = Field(2, ge=1, le=16, description="ngram: so many tokens must agree for a guess.")
    shared_tokens: int = Field(
        16_384, ge=0, description="ngram: tokens of finished answers to look in, per tenant; 0 = only the request's own."
    )
    draft_model: str = Field(
        "",
        description="draft: a model with the same tokenizer, named as in `source`; it has to be on this machine.",
    )
    draft_kv_pool_tokens: int = Field(16_384, ge=16, description="draft: capacity of the small model's own KV pool, in tokens.")
    heads: str = Field(
        "",
        description="medusa: the file of the heads; empty = what `pdserve train-heads` made for this model, else what comes with"
        " pdserve, for the default model.",
    )

    @model_validator(mode="after")
    def _has_a_draft_model(self) -> SpeculationConfig:
        if self.method == "draft" and not self.draft_model:
            raise ValueError("method draft needs draft_model")
        return self


class DecodeConfig(PoolConfig):
    replicas: int = Field(1, ge=0, description="Decode workers of this model.")
    max_running: int = Field(64, ge=1, description="Most sequences in one step.")
    step_tokens: int = Field(
        256, ge=1, description="Most tokens computed in one step: decodes first, local prefill with the rest."
    )
    max_waiting: int = Field(1024, ge=0, description="Requests that may wait for blocks; more are refused with 429.")
    local_prefill: Literal["auto", "never", "always"] = Field(
        "auto",
        description="auto: prompts are prefilled here when that costs less than elsewhere, and when no prefill worker can.",
    )
    local_prefill_tokens: int = Field(
        32, ge=0, description="auto prefills locally up to so many uncached prompt tokens, while the router has no forecast."
    )
    watermark_blocks: int = Field(2, ge=0, description="Free blocks kept back, whatever runs, when a new request is admitted.")
    growth_tokens: int = Field(
        16,
        ge=0,
        description="A new request is admitted only if every answer in progress could still grow by so many tokens (less, where"
        " max_tokens ends it sooner). More of it: fewer preemptions, and fewer answers at a time.",
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto",
        description="The next step is prepared while one is computed; its tokens are read one step late. auto: on CUDA and where"
        " the machine has cores that do not compute, and with stages, which have nothing to do between two steps otherwise.",
    )
    preemption: Literal["auto", "recompute", "swap"] = Field(
        "auto",
        description="What becomes of an answer's KV when it loses its blocks. recompute: computed again. swap: kept in"
        " host memory. auto: what is expected to take less time, as measured.",
    )
    swap_bytes: int = Field(
        268_435_456, ge=0, description="Host memory for the KV of answers that lost their blocks, at most; 0 = none."
    )
    priority_aging_s: float = Field(
        10.0,
        gt=0,
        description="So many seconds of waiting outweigh one band of priority: a background request (two bands down) goes before"
        " an interactive one that comes 20 s later.",
    )
    max_overtaken: int = Field(
        16,
        ge=0,
        description="A request that finds no room is overtaken by so many smaller ones, at most; then all wait until it fits.",
    )
    speculation: SpeculationConfig = SpeculationConfig()

    @property
    def hands_off(self) -> bool:
        """Whether every prompt is computed by a prefill worker, so that nothing is served without one."""
        return self.local_prefill == "never"

    @model_validator(mode="after")
    def _has_where_to_swap(self) -> DecodeConfig:
        if self.preemption == "swap" and not self.swap_bytes:
            raise ValueError("preemption swap needs swap_bytes")
        return self
