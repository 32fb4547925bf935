"""Where Prometheus finds the metrics of a cluster: as the registry knows it, in the words of its HTTP service discovery.

Workers and the manager serve metrics on ports of their own, which change with every start; routers on their HTTP port.
"""

from __future__ import annotations

from typing import Any

from common.wire import registry_pb2, types_pb2

_ROLES = {types_pb2.ROLE_PREFILL: "prefill", types_pb2.ROLE_DECODE: "decode"}


def scrape_targets(snapshot: registry_pb2.ClusterSnapshot) -> tuple[dict[str, Any], ...]:
    cluster = {"cluster": snapshot.cluster}
    found = [
        (worker.metrics_address, {"process": "worker", "worker": worker.worker_id, "role": _ROLES.get(worker.role, "")})
        for worker in snapshot.workers
    ]
    found += [(router.http_address, {"process": "router"}) for router in snapshot.routers]
    found.append((snapshot.manager_metrics_address, {"process": "manager"}))
    return tuple({"targets": [address], "labels": {**cluster, **labels}} for address, labels in found if address)
