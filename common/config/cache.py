"""What routers keep of answers, and where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from common.config.part import Part


class ExactCacheConfig(Part):
    """Answers to equal requests. Requests are equal if a model, left to itself, would answer them with the same tokens."""

    enabled: bool = Field(True, description="Give an answer again to an equal request: same tenant, greedy or with a seed.")
    ttl_s: float = Field(24 * 3600.0, gt=0, description="Life of an answer from when it was made; reading it does not renew it.")
    min_tokens: int = Field(1, ge=1, description="Shorter answers are not kept.")
    coalesce: bool = Field(True, description="Equal requests that are in progress at the same time share one generation.")
    sampled: bool = Field(
        False,
        description="Also give answers again that were sampled without a seed: who asks twice then gets the same answer twice.",
    )


class RedisConfig(Part):
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


class SemanticCacheConfig(Part):
    """Answers to similar questions: of one tenant, with everything but the last user text equal."""

    enabled: bool = Field(False, description="Give an answer again to a question that asks the same in other words.")
    max_wrong_hits: float = Field(
        0.01, gt=0, le=0.5, description="Bound on the share of wrong answers among hits; without evidence for it there are none."
    )
    max_wrong_requests: float | None = Field(
        None,
        gt=0,
        le=0.5,
        description="Bound on the share of wrong answers among all questions, hits or not; beside that on hits. Default: none.",
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


class CacheConfig(Part):
    """What the routers keep of answers, and where."""

    exact: ExactCacheConfig = ExactCacheConfig()
    semantic: SemanticCacheConfig = SemanticCacheConfig()
    max_bytes: int = Field(256 * 1024 * 1024, ge=0, description="Of the store in the router's process, when there is no Redis.")
    max_value_bytes: int = Field(1024 * 1024, ge=1, description="Larger entries are not kept.")
    redis: RedisConfig = RedisConfig()
