"""The configuration: one YAML file, parsed once at the entry point into a frozen tree, and passed down by part.

Precedence: command line (`--set router.http_port=8001`) over environment (`PDSERVE_ROUTER__HTTP_PORT=8001`) over file over the
defaults below. An unknown key or a bad value is a ConfigError that names the key and, for the file, its line
(`common.config_file`). This is the only module that reads `os.environ` for configuration; help texts live in the fields.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, field_validator, model_validator

from common.api_keys import entry_of
from common.blocks import EXACT_TILE_TOKENS, exact_tile_blocks
from common.config_file import ConfigSource, Problem, find_problems, in_order, keys_given_twice, read_source
from common.errors import ConfigError
from common.loopback import is_loopback

ENVIRONMENT_PREFIX = "PDSERVE_"
_ENVIRONMENT_RESERVED = frozenset({"PDSERVE_HOME", "PDSERVE_CLUSTER_ID", "PDSERVE_CLUSTER_TOKEN", "PDSERVE_RAY_NODE"})

_TENANT_NAME = re.compile(r"[A-Za-z0-9._\-]{1,64}")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(_Part):
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
    weights: Literal["model", "int8", "int4", "fp8", "file"] = Field(
        "model",
        description="How matrices are held. int8: 8 bits, 64 weights to a scale, half the bytes to read per token. int4: 4 bits,"
        " a third of them. file: as a GGUF file holds them (Q4_0, Q4_1, Q8_0), on CPUs; no weight is rounded again, and loading"
        " needs no other copy. Native kernels compute with rows of 8 bits; torch computes with the rounded weights. fp8 is for"
        " GPUs; a CPU rounds and gains nothing.",
    )
    kv_dtype: Literal["model", "int8"] = Field(
        "model",
        description="Of keys and values. model: as dtype. int8: 8 bits with a scale for each token and head, on CPUs; about half"
        " the memory and half the bytes to hand over and to read.",
    )
    prefix_cache: bool = Field(True, description="Keep the KV of finished requests and reuse it for equal prefixes.")
    rank_timeout_s: float = Field(
        10.0, gt=0, description="A worker of several processes ends when one of them gives no sign of life for so long."
    )


class ParallelConfig(_Part):
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
        64, ge=1, description="A step with stages is cut into parts of no fewer tokens, so that all stages have something to do."
    )

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


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


class SpeculationConfig(_Part):
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
        "", description="medusa: the file of the heads; empty = where `pdserve train-heads` put those of this model."
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
        " the machine has cores that do not compute.",
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

    @model_validator(mode="after")
    def _has_where_to_swap(self) -> DecodeConfig:
        if self.preemption == "swap" and not self.swap_bytes:
            raise ValueError("preemption swap needs swap_bytes")
        return self


class PoolAutoscalingConfig(_Part):
    min_replicas: int = Field(1, ge=0, description="Fewest workers. 0 for both pools: the model sleeps when nobody uses it.")
    max_replicas: int = Field(1, ge=0, description="Most workers.")

    @model_validator(mode="after")
    def _in_order(self) -> PoolAutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class AutoscalingConfig(_Part):
    """How many workers a model has, decided by how it is used. `replicas` of the pools is what it starts with."""

    mode: Literal["off", "dry-run", "on"] = Field(
        "off", description="dry-run: decides and says why (`pdserve autoscaler`), and changes nothing."
    )
    prefill: PoolAutoscalingConfig = PoolAutoscalingConfig()
    decode: PoolAutoscalingConfig = PoolAutoscalingConfig()
    max_workers: int | None = Field(None, ge=1, description="Most workers of both pools together.")
    target_ttft_s: float = Field(1.0, gt=0, description="Prompts that wait are to be computed within this time.")
    target_queue_age_s: float = Field(0.5, gt=0, description="No request is to wait longer before anything is done for it.")
    target_tpot_s: float = Field(0.05, gt=0, description="Time per output token that decode workers are to keep.")
    target_kv_use: float = Field(0.8, gt=0, le=1, description="Share of the decode workers' KV that may be in use.")
    target_utilization: float = Field(0.7, gt=0, le=1, description="Share of time that prefill workers may be computing.")
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Sequences per decode worker; default is what target_tpot_s allows, as measured."
    )
    hysteresis: float = Field(
        0.8, gt=0, le=1, description="A pool shrinks, or lends a worker, only if the others would then be this far below target."
    )
    look_back_period_s: float = Field(5.0, gt=0, description="Signals are averages over this time.")
    flip_delay_s: float = Field(
        5.0, ge=0, description="How long a pool must be too small before another's worker changes its role."
    )
    upscale_delay_s: float = Field(15.0, ge=0, description="How long a pool must be too small before it gets more workers.")
    downscale_delay_s: float = Field(300.0, ge=0, description="How long a pool must be too large before it gets fewer.")
    cooldown_s: float = Field(10.0, ge=0, description="Least time between two changes of a model.")
    idle_s: float = Field(600.0, gt=0, description="A model that may sleep does so after nobody used it for this long.")
    interval_s: float = Field(1.0, gt=0, description="How often it is decided.")

    @property
    def may_sleep(self) -> bool:
        return self.prefill.min_replicas == 0 and self.decode.min_replicas == 0

    @field_validator("mode", mode="before")
    @classmethod
    def _as_yaml_has_it(cls, mode: object) -> object:
        """YAML takes a bare on or off for a truth value."""
        return {True: "on", False: "off"}[mode] if isinstance(mode, bool) else mode

    @model_validator(mode="after")
    def _can_serve(self) -> AutoscalingConfig:
        if self.mode == "off":
            return self
        if self.decode.max_replicas == 0:
            raise ValueError("decode.max_replicas is 0: nobody could ever serve the model")
        if self.decode.min_replicas == 0 and self.prefill.min_replicas > 0:
            raise ValueError("decode.min_replicas is 0 and prefill.min_replicas is not: a model sleeps as a whole")
        if self.max_workers is not None and self.max_workers < max(2, self.prefill.min_replicas + self.decode.min_replicas):
            raise ValueError("max_workers is below what min_replicas of the pools ask for")
        return self


class ModelConfig(_Part):
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


class TransferConfig(_Part):
    """How KV travels from prefill to decode workers."""

    transports: tuple[Literal["shm", "cuda_ipc", "tcp", "tcp_int8", "tcp_fp8", "nixl"], ...] = Field(
        ("cuda_ipc", "shm", "tcp"),
        min_length=1,
        description="Offered by decode workers, in order of preference, as far as their pool's memory can serve them: on a"
        " GPU that is cuda_ipc, elsewhere the others. nixl needs pdserve[nixl]. tcp_int8 and tcp_fp8 send a byte a value, which"
        " is lossy: for slow networks, not in exact mode.",
    )
    lease_s: float = Field(
        4.0, gt=0, description="A worker that is silent for so long during a transfer is given up by the other."
    )
    ticket_ttl_s: float = Field(60.0, gt=0, description="A remote prefill that takes longer has failed.")
    handshake_timeout_s: float = Field(5.0, gt=0, description="Budget for the first contact of two workers.")
    release_timeout_s: float = Field(2.0, gt=0, description="How long to wait for a writer's promise to stop, per try.")


class PlacementConfig(_Part):
    """How the router chooses workers."""

    policy: Literal[
        "predicted",
        "min_ttft",
        "least_load",
        "round_robin",
        "random",
        "cache_aware",
        "weighted",
        "dynamo",
        "aibrix",
        "loadaware",
    ] = Field(
        "predicted",
        description="predicted: least predicted time to the first token, with what the choice costs other requests;"
        " min_ttft: without that. The others are published formulas, for comparison (router/placement/policies.py).",
    )
    externality: float = Field(0.7, ge=0, description="predicted: weight of what a choice costs other requests.")
    report_interval_s: float = Field(0.1, gt=0, description="How often a worker is asked to report, at most.")
    report_timeout_s: float = Field(5.0, gt=0, description="A worker that reports nothing for so long is watched anew.")
    speculative_ttl_s: float = Field(30.0, gt=0, description="How long a dispatch counts as a cached prefix unless confirmed.")
    index_blocks: int = Field(2_000_000, ge=1, description="Most KV blocks whose place is remembered; about 100 bytes each.")


BandName = Literal["interactive", "batch", "background"]


class LimitsConfig(_Part):
    """Each router counts on its own."""

    requests_per_minute: int | None = Field(None, ge=1, description="More get 429. A minute's worth may come at once.")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Of prompts, when they are admitted, and of answers, as they are generated."
    )
    max_concurrent: int | None = Field(None, ge=1, description="Requests that wait or are computed at once.")


class TenantConfig(_Part):
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


class AdmissionConfig(_Part):
    """The queue before the workers. One per model."""

    max_queued_requests: int = Field(10_000, ge=0, description="Requests that may wait in a router; more get 429.")
    max_queued_tokens: int = Field(20_000_000, ge=0, description="Prompt and expected output of those that wait; more get 429.")
    room_pools: float = Field(
        2.0,
        gt=0,
        description="Tokens, prompt and expected output, that a decode worker is given at once, in units of its KV pool."
        " What exceeds it waits in the router, where it can still be reordered and refused.",
    )
    room_batches: float = Field(
        2.0, gt=0, description="Sequences that a decode worker is given at once, in units of decode.max_running."
    )
    expected_output_tokens: int = Field(512, ge=1, description="Room taken for a choice, if its max_tokens is not less.")
    prompt_token_cost: float = Field(1.0, ge=0, description="Of a computed prompt token, in what tenants are served.")
    output_token_cost: float = Field(2.0, ge=0, description="Of a generated token, in what tenants are served.")
    overdue_s: float = Field(60.0, gt=0, description="A request of a lower band that waits longer is overdue.")
    overdue_every: int = Field(
        8, ge=0, description="While one is overdue, one dispatch in so many is for its band; 0 keeps bands strict for ever."
    )
    ttft_slo_s: dict[BandName, PositiveFloat] = Field(
        {}, description="Time to the first token that a band is promised. What is predicted to miss it gets 429 at once."
    )
    slo_slack: float = Field(0.2, ge=0, description="A prediction may exceed the promise by this share.")


class SloConfig(_Part):
    """What the requests of a band are promised; for counting, nothing is refused for it."""

    ttft_s: float | None = Field(None, gt=0, description="Longest time to the first token.")
    tpot_s: float | None = Field(None, gt=0, description="Longest mean time per token after the first.")

    @model_validator(mode="after")
    def _promises_something(self) -> SloConfig:
        if self.ttft_s is None and self.tpot_s is None:
            raise ValueError("a promise needs ttft_s or tpot_s")
        return self


class PricesConfig(_Part):
    """Of a worker's hour, in any one currency. For metrics of cost."""

    prefill_hour: float = Field(0.0, ge=0, description="A prefill worker's.")
    decode_hour: float = Field(0.0, ge=0, description="A decode worker's.")

    @property
    def given(self) -> bool:
        return self.prefill_hour > 0 or self.decode_hour > 0


class ConsoleConfig(_Part):
    """The page at / and the JSON under /admin/v1 that it reads. With API keys, reading it needs one of a tenant with `admin`."""

    enabled: bool = Field(True, description="Serve the console on the HTTP port.")
    max_viewers: int = Field(32, ge=1, description="Pages that are kept up to date at the same time; more get 429.")


class RouterConfig(_Part):
    http_host: str = Field("127.0.0.1", description="Address of the OpenAI HTTP server.")
    http_port: int = Field(8000, ge=0, le=65_535, description="0 takes a free port.")
    grpc_host: str = Field("127.0.0.1", description="Address of the gRPC server.")
    grpc_port: int = Field(50_051, ge=0, le=65_535, description="0 takes a free port.")
    api_keys: tuple[str, ...] = Field(
        (),
        repr=False,
        description="Accepted bearer tokens, or their entries (`pdserve keys hash`); each is a tenant of its own."
        " No key here, in keys_file or in tenants means no authentication (loopback only).",
    )
    keys_file: str = Field(
        "",
        description="More keys: lines of a tenant and an entry, as `pdserve keys new` prints them. When it"
        " changes, it is read again by the next request.",
    )
    tenants: dict[str, TenantConfig] = Field({}, description="By name; `default` is for keys without a tenant.")
    admission: AdmissionConfig = AdmissionConfig()
    request_timeout_s: float = Field(600.0, gt=0, description="Budget of one request.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Budget for reaching a worker.")
    first_token_retries: int = Field(2, ge=0, description="Other workers tried when one dies before the first token.")
    migrations: int = Field(
        3, ge=0, description="How often the rest of an answer goes elsewhere when its worker dies; 0 ends it in an error."
    )
    migration_wait_s: float = Field(30.0, ge=0, description="How long such an answer waits for a worker that can take it over.")
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="Larger request bodies get 413.")
    max_choices: int = Field(16, ge=1, description="Largest n.")
    placement: PlacementConfig = PlacementConfig()
    slo: dict[BandName, SloConfig] = Field({}, description="By priority: what counts as goodput.")
    prices: PricesConfig = PricesConfig()
    console: ConsoleConfig = ConsoleConfig()
    grammar_timeout_s: float = Field(
        1.0, gt=0, description="How long a JSON schema, regular expression or grammar may take to compile before it is refused."
    )

    @property
    def authenticates(self) -> bool:
        return bool(self.api_keys or self.keys_file or any(tenant.keys for tenant in self.tenants.values()))

    @field_validator("api_keys")
    @classmethod
    def _no_key_in_the_clear(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(entry_of(key) for key in keys)

    @field_validator("tenants")
    @classmethod
    def _names_are_plain(cls, tenants: dict[str, TenantConfig]) -> dict[str, TenantConfig]:
        for name in tenants:
            if not _TENANT_NAME.fullmatch(name):
                raise ValueError(f"a tenant's name is up to 64 letters, digits, '.', '_' and '-', not {name[:80]!r}")
        return tenants

    @model_validator(mode="after")
    def _no_key_twice(self) -> RouterConfig:
        entries = [*self.api_keys, *(key for tenant in self.tenants.values() for key in tenant.keys)]
        if len(set(entries)) < len(entries):
            raise ValueError("an API key is given twice")
        return self

    @model_validator(mode="after")
    def _keys_off_loopback(self) -> RouterConfig:
        exposed = [host for host in (self.http_host, self.grpc_host) if not is_loopback(host)]
        if exposed and not self.authenticates:
            raise ValueError(f"binding to {exposed[0]} needs api_keys")
        return self


class RouteWhen(_Part):
    """All that is given must hold."""

    tokens_over: int | None = Field(None, ge=0, description="The prompt has more tokens, as the model of the rule counts them.")
    header: dict[str, str] = Field({}, description="Headers (metadata, over gRPC) of the call with exactly these values.")
    tenant: str | None = Field(None, min_length=1, description="The call comes from this tenant.")

    @model_validator(mode="after")
    def _says_something(self) -> RouteWhen:
        if self.tokens_over is None and self.tenant is None and not self.header:
            raise ValueError("a rule needs tokens_over, header or tenant")
        return self


class RouteRule(_Part):
    when: RouteWhen
    use: str = Field(description="The model that answers then.")


class ModelPrice(_Part):
    """In any one currency, per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class RouteAlias(_Part):
    """A name that stands for several models: either `candidates` with a policy, or `weights`."""

    candidates: tuple[str, ...] = Field((), description="Models; without prices they count as written from cheap to dear.")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="A canary: each model's share of the conversations. A conversation stays with its model."
    )
    policy: Literal["first", "cheapest", "predicted"] = Field(
        "first",
        description="first: as written. cheapest: by price. predicted: by predicted quality less cost; needs a predictor.",
    )
    strong_share: float | None = Field(None, ge=0, le=1, description="predicted: hold the mean cost here, 0 cheapest, 1 dearest.")
    quality_floor: float | None = Field(
        None, gt=0, le=1, description="predicted: hold the predicted quality at this part of the best candidate's."
    )
    fallback: tuple[str, ...] = Field((), description="Models that are tried after those, in this order.")

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.candidates, *self.weights, *self.fallback)))

    @model_validator(mode="after")
    def _holds_together(self) -> RouteAlias:
        if bool(self.candidates) == bool(self.weights):
            raise ValueError("give either candidates or weights")
        if self.weights and (self.policy != "first" or not any(self.weights.values())):
            raise ValueError("weights need no policy, and one of them above 0")
        if (self.strong_share is not None or self.quality_floor is not None) and self.policy != "predicted":
            raise ValueError("strong_share and quality_floor belong to policy: predicted")
        if self.policy == "predicted" and (self.strong_share is None) == (self.quality_floor is None):
            raise ValueError("policy: predicted needs strong_share or quality_floor, one of them")
        return self


class RoutingConfig(_Part):
    """Which model answers to a name that stands for several. A model that is asked for by its own name is not routed."""

    aliases: dict[str, RouteAlias] = Field({}, description="By the name that clients ask for, such as auto.")
    rules: tuple[RouteRule, ...] = Field((), description="For all these names; the first that holds decides.")
    prices: dict[str, ModelPrice] = Field({}, description="By model.")
    predictor: str | None = Field(None, description="File of the predictor, as written by benchmarks/routing.py --train.")

    @model_validator(mode="after")
    def _predictor_is_there(self) -> RoutingConfig:
        if self.predictor is None and any(alias.policy == "predicted" for alias in self.aliases.values()):
            raise ValueError("policy: predicted needs routing.predictor")
        return self

    @property
    def mentioned(self) -> frozenset[str]:
        """Every model that is named."""
        return frozenset(
            (
                *(model for alias in self.aliases.values() for model in alias.models),
                *(rule.use for rule in self.rules),
                *self.prices,
            )
        )


class ExactCacheConfig(_Part):
    """Answers to equal requests. Requests are equal if a model, left to itself, would answer them with the same tokens."""

    enabled: bool = Field(True, description="Give an answer again to an equal request: same tenant, greedy or with a seed.")
    ttl_s: float = Field(24 * 3600.0, gt=0, description="Life of an answer from when it was made; reading it does not renew it.")
    min_tokens: int = Field(1, ge=1, description="Shorter answers are not kept.")
    coalesce: bool = Field(True, description="Equal requests that are in progress at the same time share one generation.")
    sampled: bool = Field(
        False,
        description="Also give answers again that were sampled without a seed: who asks twice then gets the same answer twice.",
    )


class RedisConfig(_Part):
    """The Redis (7 or later) that the routers share. Needs pdserve[redis]."""

    url: str | None = Field(
        None,
        pattern=r"^(redis|rediss|unix)://",
        repr=False,
        description="redis://, rediss:// (TLS) or unix://. Default: none, each router keeps its own cache in its process.",
    )
    namespace: str = Field(
        "pdserve", pattern=r"^[A-Za-z0-9._\-]+$", description="First part of every key; clusters that share nothing differ here."
    )
    secret: str | None = Field(
        None,
        min_length=16,
        repr=False,
        description="Signs what is stored; the same in all routers. Default: the file below, else the cluster token, which is a"
        " new one for each `pdserve up`, so that a restarted cluster reads nothing of the one before.",
    )
    secret_file: str | None = Field(None, description="A file that holds the secret.")
    operation_timeout_s: float = Field(0.010, gt=0, le=1, description="Budget of one look-up; a slower answer counts as none.")
    connect_timeout_s: float = Field(0.5, gt=0, description="Budget for opening a connection; no request waits for it.")
    write_timeout_s: float = Field(2.0, gt=0, description="Budget of a write or an invalidation; no request waits for it.")
    queued_bytes: int = Field(
        64 * 1024 * 1024, ge=0, description="Writes that may wait to be sent; more are dropped and counted."
    )
    log_entries: int = Field(
        100_000, ge=100, description="Length of the change log. A router that falls further behind starts its indexes anew."
    )

    @model_validator(mode="after")
    def _one_secret(self) -> RedisConfig:
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("secret and secret_file exclude each other")
        return self


class SemanticCacheConfig(_Part):
    """Answers to similar questions: of one tenant, with everything but the last user text equal."""

    enabled: bool = Field(False, description="Give an answer again to a question that asks the same in other words.")
    max_wrong_hits: float = Field(
        0.01, gt=0, le=0.5, description="Bound on the share of wrong answers among hits; without evidence for it there are none."
    )
    ttl_s: float = Field(24 * 3600.0, gt=0, description="How long a question is remembered; at most as long as its answer.")
    sampling: Literal["greedy", "greedy_or_unset"] = Field(
        "greedy_or_unset", description="greedy: only requests with temperature 0. A seed or a temperature always rules it out."
    )
    embedder: Literal["hashed", "minilm"] = Field(
        "hashed", description="hashed: words and letters, no model. minilm: a small model on the CPU; needs pdserve[embed]."
    )
    budget_s: float = Field(0.015, gt=0, le=1, description="Longest time that a miss may cost for embedding its question.")
    shadow: float = Field(
        0.02, ge=0, le=1, description="Share of hits that are computed all the same, to find out whether they were right."
    )
    max_entries: int = Field(50_000, ge=1, description="Questions that a router remembers; the oldest make room.")
    shared_index: bool = Field(
        True,
        description="Questions that a router does not remember, or not yet, are looked for in Redis, if it has vector sets (8 and"
        " later).",
    )


class CacheConfig(_Part):
    """What the routers keep of answers, and where."""

    exact: ExactCacheConfig = ExactCacheConfig()
    semantic: SemanticCacheConfig = SemanticCacheConfig()
    max_bytes: int = Field(256 * 1024 * 1024, ge=0, description="Of the store in the router's process, when there is no Redis.")
    max_value_bytes: int = Field(1024 * 1024, ge=1, description="Larger entries are not kept.")
    redis: RedisConfig = RedisConfig()


class RayConfig(_Part):
    address: str | None = Field(
        None,
        description="Join this Ray cluster ('auto' = the one on this host made by `ray up`); default starts a private one.",
    )
    num_cpus_per_worker: float = Field(0.0, ge=0, description="Ray CPU resource that each worker takes.")
    slots: bool = Field(
        False,
        description="A prefill worker takes one `prefill` of its node and a decode worker one `decode`: resources that nodes are"
        " started with (deploy/ray). Without it Ray places workers wherever it has CPUs.",
    )
    room_timeout_s: float = Field(
        120.0, gt=0, description="How long a new worker waits for room; a host that the autoscaler has to start takes minutes."
    )


class NetworkConfig(_Part):
    trusted: bool = Field(
        False,
        description="Your word that nobody but the cluster's hosts sees the network between them. Manager and workers then listen"
        " on their node's address; calls and KV links are authenticated, but not encrypted. Without it all stays on loopback.",
    )
    manager_port: int = Field(
        0, ge=0, le=65_535, description="Of the pool manager, for routers that `pdserve up` does not start; 0 takes a free one."
    )


class HealthConfig(_Part):
    """When the pool manager gives up a worker that does not answer. One whose process ended is seen at once."""

    interval_s: float = Field(0.5, gt=0, description="Between two checks.")
    timeout_s: float = Field(
        3.0, gt=0, description="For an answer. On a machine with few cores a healthy worker can be kept waiting for seconds."
    )
    most_misses: int = Field(3, ge=1, description="So many checks in a row without an answer, and the worker is killed.")


class HeadConfig(_Part):
    """What `pdserve up` starts beside the router, on loopback, and ends with it."""

    redis: bool = Field(False, description="A redis-server for the router's caches; there must be one in the PATH.")
    prometheus_port: int | None = Field(
        None,
        ge=1,
        le=65_535,
        description="A Prometheus that scrapes every process; there must be one in the PATH. Default: none.",
    )


class TracingConfig(_Part):
    """OpenTelemetry. Needs pdserve[otel]."""

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+/?$",
        description="The collector's OTLP/gRPC address, such as http://127.0.0.1:4317. Default: nothing is traced.",
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of the traces that begin here; those that a client began are its to decide."
    )


class LoggingConfig(_Part):
    """Each process logs to its stderr and, in a cluster, to a file that `pdserve logs` reads."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is less important is not logged.")
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="Of what goes to stderr. auto: console on a terminal, JSON elsewhere. Files hold JSON."
    )
    folder: str | None = Field(
        None, description="Where each process keeps its file. Default: `pdserve up` makes a folder for each of its runs."
    )
    max_file_bytes: int = Field(
        16 * 1024 * 1024, ge=0, description="Most that a process keeps in files; the oldest half is thrown away. 0: no files."
    )
    keep_runs: int = Field(3, ge=1, description="Of how many runs of a cluster logs are kept, the present one among them.")


class Config(_Part):
    """The whole file."""

    cluster: str = Field("local", pattern=r"^[a-z0-9\-]+$", description="Name of the cluster on this machine.")
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    transfer: TransferConfig = TransferConfig()
    router: RouterConfig = RouterConfig()
    routing: RoutingConfig = RoutingConfig()
    cache: CacheConfig = CacheConfig()
    ray: RayConfig = RayConfig()
    network: NetworkConfig = NetworkConfig()
    health: HealthConfig = HealthConfig()
    head: HeadConfig = HeadConfig()
    logging: LoggingConfig = LoggingConfig()
    tracing: TracingConfig = TracingConfig()

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        seen: set[str] = set()
        for name in (name for model in models for name in (model.name, *model.aliases)):
            if name in seen:
                raise ValueError(f"the name {name!r} is given twice")
            seen.add(name)
        return models

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Config:
        names = {model.name for model in self.models}
        unknown = sorted(self.routing.mentioned - names)
        if unknown:
            raise ValueError(f"routing names {unknown[0]!r}, which is none of the models: {', '.join(sorted(names))}")
        taken = sorted(set(self.routing.aliases) & {name for model in self.models for name in (model.name, *model.aliases)})
        if taken:
            raise ValueError(f"routing.aliases has {taken[0]!r}, which is the name of a model")
        return self

    @model_validator(mode="after")
    def _one_redis(self) -> Config:
        if self.head.redis and self.cache.redis.url is not None:
            raise ValueError("head.redis and cache.redis.url exclude each other")
        return self

    def model_named(self, name: str) -> ModelConfig:
        for model in self.models:
            if name == model.name or name in model.aliases:
                return model
        raise ConfigError(f"no model {name!r} in the configuration", param="models")


@dataclass(frozen=True, slots=True)
class CheckedConfig:
    """A file as it was read: either `config`, or everything that is wrong with it."""

    source: ConfigSource
    config: Config | None
    problems: tuple[Problem, ...]


def load_config(path: Path, *, overrides: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> Config:
    """Reads, overlays and validates. `overrides` are `dotted.key=value` strings with YAML values. Raises ConfigError."""
    checked = check_config(path, overrides=overrides, environment=environment)
    if checked.config is not None:
        return checked.config
    first, *others = checked.problems
    more = f" (and {len(others)} more; `pdserve config check` shows them)" if others else ""
    raise ConfigError(first.line + more, param=first.key)


def check_config(path: Path, *, overrides: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> CheckedConfig:
    """Like `load_config`, for whoever wants to know everything: raises ConfigError only for what cannot be read at all."""
    variables = {
        name: value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in _ENVIRONMENT_RESERVED
    }
    source = read_source(path, overrides, variables, prefix=ENVIRONMENT_PREFIX)
    doubled = keys_given_twice(source)
    try:
        config = Config.model_validate(source.raw)
    except ValidationError as error:
        return CheckedConfig(source, None, in_order((*doubled, *find_problems(Config, source, error))))
    return CheckedConfig(source, None if doubled else config, in_order(doubled))


def pdserve_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Where models and the state of running clusters live: $PDSERVE_HOME or ~/.cache/pdserve."""
    return Path(environment.get("PDSERVE_HOME") or Path.home() / ".cache" / "pdserve")
