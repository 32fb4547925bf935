"""How a worker's engine computes, and of how many processes it is made."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from common.config.part import Part


class EngineConfig(Part):
    """How a worker's engine computes and how much it holds. Every worker of one model shares it, but for what its pool says."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where tensors live; auto takes CUDA if present.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of weights and KV. auto: bfloat16 on CUDA and on CPUs with native support for it, else float32.",
    )
    exact: bool = Field(
        False,
        description="One order for every sum: logits do not depend on batch, chunks or prefix hits, bitwise.",
    )
    exact_tile_rows: int = Field(16, ge=1, description="Rows of the one GEMM tile of exact mode, where torch computes.")
    block_tokens: int = Field(16, ge=1, le=256, description="Tokens per KV block.")
    kv_pool_tokens: int = Field(32_768, ge=16, description="Capacity of each worker's KV pool, in tokens.")
    device_memory_share: float | None = Field(
        None,
        gt=0,
        le=0.98,
        description="On a GPU: the share of its memory that this engine may take. What weights and steps leave of it is the"
        " KV pool, instead of kv_pool_tokens. Workers that share a GPU each state their share.",
    )
    captured_rows: int = Field(
        256,
        ge=0,
        description="On a GPU: decode steps of up to so many sequences are captured once and replayed; 0 = none are.",
    )
    max_model_tokens: int | None = Field(
        None, ge=1, description="Longest prompt + output; default is what model and pool allow, whichever is less."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads per worker. Default: native kernels take all cores of the host while no other worker on it"
        " computes, and a fair part otherwise; torch, ranks and workers on several hosts have a fixed part.",
    )
    kernels: Literal["auto", "torch", "native", "triton"] = Field(
        "auto",
        description="What computes steps. native: C++ compiled on this machine, for CPUs. triton: torch's matrix products and"
        " Triton's kernels for all else, on CUDA. auto: native on a CPU, once it is compiled, triton on CUDA, each where it can"
        " be had, and torch elsewhere. In exact mode native kernels are compiled before the start, and have to be had.",
    )
    weights: Literal["auto", "model", "int8", "int4", "fp8", "file"] = Field(
        "auto",
        validate_default=True,
        description="How matrices are held. model: in dtype. int8: 8 bits, 64 weights to a scale, half the bytes to read per"
        " token. int4: 4 bits, a third of them. file: as a GGUF file holds them (Q4_0, Q4_1, Q8_0), on CPUs; no weight is rounded"
        " again, and loading needs no other copy. Native kernels compute with rows of 8 bits; torch computes with the rounded"
        " weights. fp8 is for GPUs; a CPU rounds and gains nothing. auto: file, if all matrices of the layers are in such blocks"
        " and native kernels may compute; model elsewhere, in exact mode, and where engine.dtype is float32 or float16. Name it"
        " where hosts with and without a GPU serve one model: they would come to different answers, and refuse each other's KV.",
    )
    kv_dtype: Literal["model", "int8"] = Field(
        "model",
        description="Of keys and values. model: as dtype. int8: 8 bits with a scale for each token and head, on CPUs; about half"
        " the memory and half the bytes to hand over and to read.",
    )
    grammars: Literal["llguidance", "xgrammar"] = Field(
        "llguidance",
        description="What reads grammars of structured output. xgrammar (an extra): its masks take less time, for JSON schemas of"
        " closed objects, lists, plain scalars and choices; llguidance reads all others.",
    )
    hang_s: float = Field(
        180.0,
        gt=0,
        description="A worker whose engine is at work and gives no sign for so long, not a layer and not a step, has failed and"
        " is replaced.",
    )
    prefix_cache: bool = Field(True, description="Keep the KV of finished requests and reuse it for equal prefixes.")
    rank_timeout_s: float = Field(
        10.0, gt=0, description="A worker of several processes ends when one of them gives no sign of life for so long."
    )

    @field_validator("weights")
    @classmethod
    def _a_named_type_is_that_of_weights(cls, weights: str, info: ValidationInfo) -> str:
        """Settled here, for the model: a pool may have a type of its own, and pools have to hold the same weights."""
        return "model" if weights == "auto" and info.data.get("dtype") in ("float32", "float16") else weights


class ParallelConfig(Part):
    """Ranks: processes that compute as one worker, on one host. Each has some heads (tensor) of some layers (pipeline)."""

    tensor_parallel: int = Field(
        1, ge=1, le=64, description="Processes that divide every layer of a worker; at most the model's KV heads."
    )
    pipeline_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="Stages of a worker, each with some of the layers; with tensor_parallel, processes of a stage.",
    )
    micro_batch_tokens: int = Field(
        64,
        ge=1,
        description="A step with stages is cut into parts of no fewer tokens, so that all stages have something to do; a step"
        " that goes on from tokens of the one under way into as many parts as stages, if each has a quarter of it.",
    )

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel
