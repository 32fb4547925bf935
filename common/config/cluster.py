"""Where processes run and how they are watched: Ray, network, health, and what stands beside the router."""

from __future__ import annotations

from pydantic import Field

from common.config.part import Part


class RayConfig(Part):
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


class NetworkConfig(Part):
    trusted: bool = Field(
        False,
        description="Your word that nobody but the cluster's hosts sees the network between them. Manager and workers then listen"
        " on their node's address; calls and KV links are authenticated, but not encrypted. Without it all stays on loopback.",
    )
    manager_port: int = Field(
        0, ge=0, le=65_535, description="Of the pool manager, for routers that `pdserve up` does not start; 0 takes a free one."
    )


class HealthConfig(Part):
    """When the pool manager gives up a worker that does not answer. One whose process ended is seen at once; one that hangs
    within interval_s + most_misses * timeout_s."""

    interval_s: float = Field(0.3, gt=0, description="Between two checks that are answered.")
    timeout_s: float = Field(0.7, gt=0, description="For an answer; the next check follows at once.")
    most_misses: int = Field(
        3,
        ge=2,
        description="So many checks in a row without an answer, and the worker is killed: if its process does nothing, or its"
        " host is not heard.",
    )
    busy_timeout_s: float = Field(
        10.0,
        gt=0,
        description="A worker whose process computes, or waits for a core or a disk, is given so long for an answer: on a machine"
        " with few cores a healthy one can be kept waiting for seconds.",
    )


class HeadConfig(Part):
    """What `pdserve up` starts beside the router, on loopback, and ends with it."""

    redis: bool = Field(False, description="A redis-server for the router's caches; there must be one in the PATH.")
    prometheus_port: int | None = Field(
        None,
        ge=1,
        le=65_535,
        description="A Prometheus that scrapes every process; there must be one in the PATH. Default: none.",
    )
