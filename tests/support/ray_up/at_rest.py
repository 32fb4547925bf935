"""What is true of a cluster that nobody disturbs: answers cross the link and are right, nothing is open, all is scraped."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import grpc
import httpx

from common.metrics.access import metrics_token
from common.wire.worker_pb2 import InfoRequest
from common.wire.worker_pb2_grpc import WorkerStub
from support.ray_up.operator import MODEL, SLOTS, URL, Cluster, ask_all
from support.steady_load import Question


def known_answers(cluster: Cluster) -> list[tuple[Question, str]]:
    """Of an aggregated run: the decode worker alone."""
    cluster.pdserve(f"scale {MODEL} --prefill 0")
    known = []
    for question, reply in ask_all(cluster):
        assert reply.timings["transport"] is None
        known.append((question, reply.text))
    assert len({text for _, text in known}) > 1
    cluster.pdserve(f"scale {MODEL} --prefill 1")
    cluster.say(f"{len(known)} answers of an aggregated run: no prefill worker, each prompt computed where it is decoded")
    return known


def one_request_crosses_the_link(cluster: Cluster, known: list[tuple[Question, str]]) -> None:
    for (_, expected), (question, reply) in zip(known, ask_all(cluster), strict=True):
        timings = reply.timings
        assert timings["transport"] in ("tcp", "nixl"), timings
        assert timings["transfer_bytes"] > 0
        assert reply.text == expected
        cluster.say(
            f"{len(question.prompt)} tokens prefilled by {timings['prefill_worker']}, decoded by {timings['decode_worker']}:"
            f" {timings['transfer_bytes']} bytes of KV over {timings['transport']}, tokens equal,"
            f" TTFT {timings['ttft_ms']:.0f} ms"
        )


def nothing_is_open(cluster: Cluster) -> None:
    status = cluster.status()
    (worker,) = cluster.ready("decode")
    address, metrics = worker["address"], worker["metrics_address"]

    def call_without_token() -> grpc.StatusCode:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                WorkerStub(channel).Info(InfoRequest(), timeout=10.0)
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    assert cluster.laptop.in_network(call_without_token) is grpc.StatusCode.UNAUTHENTICATED

    def scrape(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.get(f"http://{metrics}/metrics", headers=headers, trust_env=False, timeout=10.0).status_code

    assert cluster.laptop.in_network(lambda: scrape("")) == 401
    assert cluster.laptop.in_network(lambda: scrape(metrics_token(cluster.token()))) == 200
    assert {router["http_address"].rpartition(":")[0] for router in status["routers"]} == {"127.0.0.1"}
    listening: dict[str, Counter[str]] = {}

    def advertised_ports_are_bound_to_their_host() -> bool:
        now = cluster.status()
        advertised = {one[key] for one in now["workers"] if one["state"] == "ready" for key in ("address", "metrics_address")}
        advertised |= {cluster.manager_address(), now["manager_metrics_address"]}
        listening.clear()
        bound = set()
        for name in ("head", *SLOTS):
            host = cluster.network.host(name)
            for line in host.run("ss -Htlnp").stdout.splitlines():
                # gRPC's sockets are of both families.
                local, who = re.sub(r"\[::ffff:([\d.]+)\]", r"\1", line.split()[3]), re.search(r'users:\(\("([^"]+)"', line)
                bound.add(local)
                address = local.rpartition(":")[0]
                inside = "loopback" if "127.0.0." in address else "all interfaces"
                where = "its host's address" if address == host.address else inside
                listening.setdefault(who.group(1) if who else "?", Counter())[where] += 1
        return advertised <= bound

    cluster.wait_for("ports on their host's address, not on every one", advertised_ports_are_bound_to_their_host, timeout_s=120.0)
    cluster.say("a call without the cluster's token and a scrape without the metrics' token are refused from another host")
    for who, places in sorted(listening.items()):
        cluster.say(f"`{who}` listens: " + ", ".join(f"{count} x {place}" for place, count in sorted(places.items())))
    # Ray gives each of its processes one port of Ray's, on all interfaces, which wants Ray's token.
    num_workers = len(status["workers"])
    assert listening["ray::WorkerActo"]["all interfaces"] == num_workers
    assert listening["ray::ManagerAct"]["all interfaces"] == 1
    assert set(listening["prometheus"]) == {"loopback"}


def prometheus_and_redis(cluster: Cluster, question: Question) -> None:
    def targets() -> list[dict[str, Any]]:
        answer = httpx.get("http://127.0.0.1:9090/api/v1/targets", trust_env=False, timeout=10.0).json()
        found: list[dict[str, Any]] = answer["data"]["activeTargets"]
        return found

    def all_up() -> bool:
        found = cluster.head.in_network(targets)
        return len(found) == 4 and all(one["health"] == "up" for one in found)

    cluster.wait_for("scraped targets", all_up, timeout_s=240.0)
    cluster.say("Prometheus on the head scrapes all 4 processes: 2 workers, manager, router")

    def served() -> str:
        body = {**question.body(MODEL), "stream": False, "stream_options": None}
        return httpx.post(f"{URL}/v1/completions", json=body, trust_env=False, timeout=60.0).headers["x-cache"]

    assert cluster.head.in_network(served) == "miss"
    cluster.wait_for("hit", lambda: cluster.head.in_network(served) == "hit-exact", timeout_s=120.0)
    cluster.say("the router's cache is in the Redis on the head: asked twice, computed once")
