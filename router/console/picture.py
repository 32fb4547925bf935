"""The cluster as the console shows it: one JSON object, drawn from the manager's snapshot, workers' reports and this router.

    snapshot (a change or a health check, twice a second) ── take ──> meters ─┐
    reports of workers to placement (ten times a second) ─────────────────────┼── now() ──> {cluster, models, workers, links, ...}
    this router's queue, caches, requests in flight ──────────────────────────┘

Parts that come and go are objects by name, so that changes are small (`merge_patch`). Rates are rounded, so that noise is no
change. There is no prompt, no answer and no key in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from common.clock import Clock
from common.codec import role_from_wire
from common.config import Config
from common.errors import InvalidRequest
from common.metrics import RouterMetrics
from common.types import WorkerRef
from common.wire.registry_pb2 import ClusterEvent, ModelInfo
from common.wire.worker_pb2 import InfoReply, LinkUse
from router.console.meters import Meters
from router.front import Front
from router.openai_format import VERSION
from router.placement.fleet import Fleet
from router.registry import Registry

Json = dict[str, Any]


class Picture:
    """One per router. `take` is called after each snapshot, `now` whenever somebody looks."""

    def __init__(
        self,
        config: Config,
        *,
        front: Front,
        registry: Registry,
        fleet: Fleet,
        metrics: RouterMetrics,
        router_id: str,
        clock: Clock,
    ) -> None:
        self._config = config
        self._front = front
        self._registry = registry
        self._fleet = fleet
        self._metrics = metrics
        self._router_id = router_id
        self._clock = clock
        self._meters = Meters()
        self._started_s = clock.wall_s()

    def take(self) -> None:
        """Reads the totals of the snapshot."""
        now_s = self._clock.monotonic_s()
        for info in self._registry.snapshot.workers:
            for name, total in _totals(info).items():
                self._meters.take((name, info.worker_id, info.incarnation), total, now_s)
            for link in info.links:
                self._meters.take(_link_key(info, link), link.bytes, now_s)
        self._meters.end_round()

    def now(self) -> Json:
        now_s = self._clock.monotonic_s()
        snapshot = self._registry.snapshot
        suspects = self._registry.suspects()
        return {
            "cluster": self._cluster(now_s),
            "models": {model.name: self._model(model, snapshot.workers) for model in snapshot.models},
            "workers": {info.worker_id: self._worker(info, suspects, now_s) for info in snapshot.workers},
            "links": {
                f"{link.prefill_worker_id} > {info.worker_id}": self._link(info, link, now_s)
                for info in snapshot.workers
                for link in info.links
            },
            "routers": {
                router.router_id: {
                    "http": router.http_address,
                    "grpc": router.grpc_address,
                    "pid": router.pid,
                    "this": router.router_id == self._router_id,
                }
                for router in snapshot.routers
            },
            "router": self._router(),
            "queue": {
                f"{one.model} {one.band}": {
                    "model": one.model,
                    "band": str(one.band),
                    "requests": one.requests,
                    "tokens": one.tokens,
                    "oldest_s": round(one.oldest_s, 1),
                }
                for one in self._front.gate.readings()
                if one.requests
            },
            "cache": self._cache(),
        }

    @property
    def last_event(self) -> int:
        events = self._registry.snapshot.events
        return events[-1].sequence if events else 0

    def events(self, after: int = 0) -> list[Json]:
        """What happened to the pools, the oldest first; those with a later number."""
        return [_event(event) for event in self._registry.snapshot.events if event.sequence > after]

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _cluster(self, now_s: float) -> Json:
        connected = self._registry.connected
        return {
            "name": self._registry.snapshot.cluster,
            "version": VERSION,
            "manager_connected": connected,
            "manager_away_s": 0 if connected else round(now_s - self._registry.away_since_s),
            "metrics": self._registry.snapshot.manager_metrics_address,
        }

    def _model(self, model: ModelInfo, workers: Iterable[InfoReply]) -> Json:
        ready = Counter(_role(info) for info in workers if info.model == model.name and info.state == "ready")
        view = self._registry.view.models.get(model.name)
        return {
            "desired": {"prefill": model.desired_prefill, "decode": model.desired_decode},
            "ready": {"prefill": ready["prefill"], "decode": ready["decode"]},
            "max_model_tokens": self._registry.max_model_tokens(view) if view is not None else model.context_tokens,
            "asleep": model.wakes_on_demand,
        }

    def _worker(self, info: InfoReply, suspects: frozenset[WorkerRef], now_s: float) -> Json:
        ref = WorkerRef(info.worker_id, info.incarnation, info.address)
        shown = self._fleet.workers.get(ref)
        reporting = shown is not None and shown.reporting
        load = shown.load if shown is not None and shown.reporting else None
        key = (info.worker_id, info.incarnation)
        drafted = self._meters.per_second(("drafted", *key), now_s)
        accepted = self._meters.per_second(("accepted", *key), now_s)
        return {
            "role": _role(info),
            "model": info.model,
            "state": info.state,
            "suspect": ref in suspects,
            "incarnation": info.incarnation,
            "pid": info.pid,
            "tensor_parallel": max(1, info.tensor_parallel),
            "pipeline_parallel": max(1, info.pipeline_parallel),
            "rank_pids": list(info.rank_pids),
            "address": info.address,
            "metrics": info.metrics_address,
            "device": info.device,
            "dtype": info.dtype,
            "exact": info.exact,
            "failure": info.failure,
            "started_s": round(info.started_s, 1),
            "reporting": reporting,
            "running": info.requests_running if load is None else load.running,
            "waiting": info.requests_waiting if load is None else load.waiting,
            "decoding": info.pace.decoding if load is None else load.decoding,
            "queued_tokens": info.pace.queued_tokens if load is None else load.queued_tokens,
            "max_model_tokens": info.max_model_tokens,
            "kv": _kv(info),
            "rates": {
                "computed": round(self._meters.per_second(("computed", *key), now_s), 1),
                "generated": round(self._meters.per_second(("generated", *key), now_s), 1),
            },
            "totals": {
                "served": info.requests_served,
                "computed": info.pace.computed_tokens,
                "generated": info.pace.generated_tokens,
                "preemptions": info.preemptions,
                "prefix_queries": info.prefix_queries,
                "prefix_hits": info.prefix_hits,
                "drafted": info.drafted_tokens,
                "accepted": info.accepted_tokens,
            },
            "acceptance": round(accepted / drafted, 3) if drafted > 0 else None,  # lately
            "step_ms": round(shown.step_s * 1e3, 2) if shown is not None and reporting and shown.decoding else None,
        }

    def _link(self, info: InfoReply, link: LinkUse, now_s: float) -> Json:
        return {
            "prefill": link.prefill_worker_id,
            "decode": info.worker_id,
            "transport": link.transport,
            "transfers": link.transfers,
            "failures": link.failures,
            "bytes": link.bytes,
            "bytes_per_s": round(self._meters.per_second(_link_key(info, link), now_s)),
        }

    def _router(self) -> Json:
        in_flight = {model: count for model, count in self._front.in_flight.by_model.items() if count}
        return {
            "id": self._router_id,
            "started_s": round(self._started_s, 1),
            "draining": self._front.draining,
            "in_flight": in_flight,
            "authenticates": self._config.router.authenticates,
            "promises": {
                band: {"ttft_s": promise.ttft_s, "tpot_s": promise.tpot_s} for band, promise in self._config.router.slo.items()
            },
        }

    def _cache(self) -> Json:
        requests: Counter[str] = Counter()
        for metric in self._metrics.cache_requests.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    requests[sample.labels["result"]] += int(sample.value)
        semantic = self._config.cache.semantic
        classes, known = self._metrics.semantic.standing()
        return {
            "exact": self._config.cache.exact.enabled,
            "semantic": semantic.enabled,
            "embedder": semantic.embedder,
            "bound": semantic.max_wrong_hits,
            "known_questions": known,
            "requests": dict(requests),
            "classes": {
                kind.name: {
                    "state": kind.state,
                    "threshold": round(kind.threshold, 4),
                    "wrong_ratio": round(kind.wrong_ratio, 5),
                    "upper_bound": round(kind.upper_bound, 5),
                }
                for kind in classes
            },
        }


def _role(info: InfoReply) -> str:
    try:
        return role_from_wire(info.role).value
    except InvalidRequest:  # of a newer manager
        return ""


def _kv(info: InfoReply) -> Json:
    """Blocks; the parts add up to the total."""
    arriving, quarantined = info.blocks_arriving, info.blocks_in_transfer
    return {
        "total": info.blocks_total,
        "free": info.blocks_free - info.blocks_cached,
        "cached": info.blocks_cached,
        "used": max(0, info.blocks_total - info.blocks_free - quarantined - arriving),
        "arriving": arriving,
        "quarantined": quarantined,
    }


def _totals(info: InfoReply) -> dict[str, int]:
    return {
        "computed": info.pace.computed_tokens,
        "generated": info.pace.generated_tokens,
        "drafted": info.drafted_tokens,
        "accepted": info.accepted_tokens,
    }


def _link_key(info: InfoReply, link: LinkUse) -> tuple[str, str, int, str, int]:
    return ("link", info.worker_id, info.incarnation, link.prefill_worker_id, link.prefill_incarnation)


def _event(event: ClusterEvent) -> Json:
    return {
        "sequence": event.sequence,
        "at_s": round(event.at_s, 3),
        "kind": event.kind,
        "worker": event.worker_id,
        "model": event.model,
        "text": event.text,
    }
