"""A cluster of several hosts as README says to make one, by `ray up` with deploy/ray/local.yaml, under load and under faults.

The hosts are namespaces of this machine (`support.host_namespaces`); everything else is what an operator has: ssh, rsync, Ray's
launcher, the files of deploy/ray. One test, because one cluster lives through all of it; TRANSCRIPT.md beside this file is what
the last run saw.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from common.metrics.access import metrics_token
from common.wire.worker_pb2 import InfoRequest
from common.wire.worker_pb2_grpc import WorkerStub
from support.host_namespaces import Host, HostNetwork, network_of_hosts, what_is_missing
from support.steady_load import Question, SteadyLoad, Tally, ask
from support.tiny_models import make_tiny_model

MISSING = what_is_missing("redis-server", "prometheus", "ss", "git")
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(MISSING is not None, reason=MISSING or "everything is there"),
]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TRANSCRIPT = Path(__file__).with_name("TRANSCRIPT.md")
URL = "http://127.0.0.1:8000"
MODEL = "tiny"
PDSERVE = "~/pdserve/.venv/bin/pdserve"
# Decode and prefill never share a host here, so that all KV between them crosses a link.
SLOTS = {"p0": "prefill:2", "d0": "decode:1", "d1": "decode:1"}
PARTITION_S = 10.0
_NOT_KEPT = shutil.ignore_patterns("pdserve", "tiny", ".ssh", ".ray", "host_key*", ".pyenv")

QUESTIONS = [
    Question([(7 * index + 31 * number) % 370 + 3 for index in range(60 + 20 * number)], number, 0.9 * (number % 2), 24)
    for number in range(6)
]


class Transcript:
    def __init__(self) -> None:
        self.outcome = "It did not come to its end."
        self._lines: list[str] = []
        self._started_s = time.monotonic()

    def say(self, text: str) -> None:
        line = f"- {time.monotonic() - self._started_s:6.1f} s  {text}"
        self._lines.append(line)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def write(self) -> None:
        head = (
            "# `ray up` on four hosts\n\n"
            "Written by `make test-cluster` (tests/hosts/test_ray_up.py). The hosts are network, PID, mount, UTS and IPC"
            f" namespaces of one machine with {os.cpu_count()} cores; while other programs run on"
            " it, times are longer.\nA model of random weights in exact mode; three clients"
            " stream without pause, and every answer is compared with that of an aggregated run.\n\n"
        )
        TRANSCRIPT.write_text(head + "\n".join(self._lines) + f"\n\n{self.outcome}\n", encoding="utf-8")


@pytest.fixture
def transcript() -> Iterator[Transcript]:
    told = Transcript()
    yield told
    told.write()


@pytest.fixture
def network() -> Iterator[HostNetwork]:
    # Not under /tmp: hosts have one of their own.
    with (
        tempfile.TemporaryDirectory(prefix="pdh-", dir="/var/tmp") as folder,
        network_of_hosts(Path(folder), ["laptop", "head", *SLOTS]) as hosts,
    ):
        yield hosts
        kept = os.environ.get("HOSTS_LOGS")  # where to look when it went wrong
        if kept:
            shutil.copytree(
                hosts.host("laptop").folder, Path(kept) / "laptop", dirs_exist_ok=True, ignore=_NOT_KEPT, symlinks=True
            )
            for name in ("head", *SLOTS):
                if (hosts.host(name).process) is not None:
                    logs = hosts.host(name).run(
                        "tar -cz -C / tmp/ray/session_latest/logs root/.cache/pdserve/logs | base64", check=False
                    )
                    (Path(kept) / f"{name}.tgz").write_bytes(base64.b64decode(logs.stdout))


class Cluster:
    """What the operator does, from the laptop or on the head."""

    def __init__(self, network: HostNetwork, transcript: Transcript) -> None:
        self.network = network
        self.head = network.host("head")
        self.laptop = network.host("laptop")
        self.say = transcript.say

    def furnish(self) -> None:
        """What README expects of hosts, and the lines of local.yaml and cluster.yaml that are the operator's."""
        model = make_tiny_model(self.laptop.folder / "tiny", seed=4)
        for host in self.network.hosts.values():
            shutil.copytree(model, host.home / "tiny")
            (host.home / ".bashrc").write_text("export PYTHONPATH=~/pdserve OMP_NUM_THREADS=1\n", encoding="utf-8")
        here = self.laptop.home / "pdserve"
        tracked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True, check=True
        )
        names = [name for name in tracked.stdout.decode().split("\0") if name and (REPOSITORY / name).is_file()]
        for name in names:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, here / name)
        (here / ".venv").symlink_to(Path(sys.prefix))
        _edit(here / "deploy/ray/local.yaml", self._mine)
        _edit(here / "deploy/configs/cluster.yaml", _tiny)

    def _mine(self, config: dict[str, Any]) -> None:
        workers = [self.network.host(name) for name in SLOTS]
        config["provider"].update(head_ip=self.head.address, worker_ips=[host.address for host in workers])
        config["auth"].update(ssh_user="root", ssh_private_key="~/.ssh/id_ed25519")
        config.update(min_workers=len(workers), max_workers=len(workers))
        # What is installed on this machine is installed on its namespaces.
        (install, *rest) = config["setup_commands"]
        assert "make install" in install
        config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/pdserve/.venv", *rest]
        config["head_setup_commands"] = []
        commands = config["head_start_ray_commands"]
        config["head_start_ray_commands"] = [line.replace("10.0.0.10", self.head.address) for line in commands]
        slots = " ".join(f"--slots {host.address}={SLOTS[host.name]}" for host in workers)
        (stop, start) = config["worker_start_ray_commands"]
        config["worker_start_ray_commands"] = [stop, start[: start.index("--slots")] + slots]

    def on_laptop(self, line: str, *, timeout_s: float = 240.0) -> str:
        with (self.laptop.folder / "said.log").open("a", encoding="utf-8") as log:
            done = self.laptop.run(f"cd ~/pdserve && PATH=~/pdserve/.venv/bin:$PATH && {line}", timeout_s=timeout_s)
            log.write(f"$ {line}\n{done.stdout}\n{done.stderr}\n")
        return done.stdout

    def pdserve(self, line: str, *, timeout_s: float = 180.0) -> str:
        return self.head.run(f"{PDSERVE} {line}", timeout_s=timeout_s).stdout

    def ray_exec(self, line: str) -> None:
        """As README has it."""
        self.on_laptop(f"ray exec deploy/ray/local.yaml '{line}'")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.pdserve("status --json"))
        return found

    def ready(self, role: str) -> list[dict[str, Any]]:
        return [one for one in self.status()["workers"] if one["role"] == role and one["state"] == "ready"]

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float = 120.0) -> float:
        started_s = time.monotonic()
        while not condition():
            assert time.monotonic() - started_s < timeout_s, f"no {what}: {self.status()}\n{self.log()[-6000:]}"
            time.sleep(0.5)
        return time.monotonic() - started_s

    def log(self) -> str:
        return (self.head.home / ".cache/pdserve/logs/local.log").read_text(encoding="utf-8", errors="replace")

    def told_at(self, text: str, after: float) -> float:
        """When a process of the cluster first logged `text` after this time (of the epoch)."""
        for line in self.log().splitlines():
            stamp = re.search(r'"timestamp": ?"([^"]+)"', line)
            if text in line and stamp:
                at = datetime.fromisoformat(stamp.group(1)).timestamp()
                if at >= after:
                    return at
        raise AssertionError(f"nobody said {text!r}:\n{self.log()[-4000:]}")

    def host_of(self, worker: dict[str, Any]) -> Host:
        address = worker["address"].rpartition(":")[0]
        return next(host for host in self.network.hosts.values() if host.address == address)

    def manager_address(self) -> str:
        return str(self._state()["manager_address"])

    def launcher_pid(self) -> int:
        return int(self._state()["launcher_pid"])

    def token(self) -> str:
        return str(self._state()["token"])

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.head.home / ".cache/pdserve/clusters/local.json").read_text(encoding="utf-8"))
        return state


def test_a_cluster_made_by_ray_up_serves_through_faults(network: HostNetwork, transcript: Transcript) -> None:
    cluster = Cluster(network, transcript)
    cluster.furnish()
    _up(cluster)
    known = _known_answers(cluster)
    _one_request_crosses_the_link(cluster, known)
    _nothing_is_open(cluster)
    _prometheus_and_redis(cluster, known[0][0])
    load = SteadyLoad(URL, MODEL, known, clients=3)
    cluster.head.in_network(load.start)
    total = Tally()
    try:
        for step in (_nothing_happens, _scale_up, _scale_down, _kill_a_process, _hang_a_process, _partition, _vanish, _return):
            started_s = time.monotonic()
            step(cluster)
            _judge(cluster, step.__name__.strip("_").replace("_", " "), load.phase(), total, time.monotonic() - started_s)
    finally:
        rest = load.stop()
    _judge(cluster, "end", rest, total, 0.0)
    _kill_the_launcher(cluster)
    _down(cluster)
    assert not total.failures
    assert not total.inexact
    transcript.outcome = f"**{total.answered} requests, {len(total.failures)} failed, {len(total.inexact)} inexact.**"


# -- the steps, in their order ---------------------------------------------------------------------------------------------


def _up(cluster: Cluster) -> None:
    cluster.on_laptop("ray get-auth-token --generate")
    started_s = time.monotonic()
    cluster.on_laptop("ray up -y deploy/ray/local.yaml", timeout_s=180.0)
    cluster.say(
        f"`ray up -y deploy/ray/local.yaml` returned after {time.monotonic() - started_s:.1f} s; the cluster can be asked"
    )
    cluster.wait_for("first workers", lambda: bool(cluster.ready("prefill") and cluster.ready("decode")), timeout_s=180.0)
    cluster.say(f"prefill and decode worker ready {time.monotonic() - started_s:.1f} s after the start")
    for worker in cluster.status()["workers"]:
        cluster.say(f"{worker['worker_id']} serves on host {cluster.host_of(worker).name}, {worker['address']}")
    (prefill,), (decode,) = cluster.ready("prefill"), cluster.ready("decode")
    assert cluster.host_of(prefill).name == "p0"
    assert cluster.host_of(decode).name in ("d0", "d1")


def _known_answers(cluster: Cluster) -> list[tuple[Question, str]]:
    """Of an aggregated run: the decode worker alone."""
    cluster.pdserve(f"scale {MODEL} --prefill 0")
    known = []
    for question, reply in _ask_all(cluster):
        assert reply.timings["transport"] is None
        known.append((question, reply.text))
    assert len({text for _, text in known}) > 1
    cluster.pdserve(f"scale {MODEL} --prefill 1")
    cluster.say(f"{len(known)} answers of an aggregated run: no prefill worker, each prompt computed where it is decoded")
    return known


def _one_request_crosses_the_link(cluster: Cluster, known: list[tuple[Question, str]]) -> None:
    for (_, expected), (question, reply) in zip(known, _ask_all(cluster), strict=True):
        timings = reply.timings
        assert timings["transport"] in ("tcp", "nixl"), timings
        assert timings["transfer_bytes"] > 0
        assert reply.text == expected
        cluster.say(
            f"{len(question.prompt)} tokens prefilled by {timings['prefill_worker']}, decoded by {timings['decode_worker']}:"
            f" {timings['transfer_bytes']} bytes of KV over {timings['transport']}, tokens equal,"
            f" TTFT {timings['ttft_ms']:.0f} ms"
        )


def _nothing_is_open(cluster: Cluster) -> None:
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

    cluster.wait_for("ports on their host's address, not on every one", advertised_ports_are_bound_to_their_host, timeout_s=30.0)
    cluster.say("a call without the cluster's token and a scrape without the metrics' token are refused from another host")
    for who, places in sorted(listening.items()):
        cluster.say(f"`{who}` listens: " + ", ".join(f"{count} x {place}" for place, count in sorted(places.items())))
    # Ray gives each of its processes one port of Ray's, on all interfaces, which wants Ray's token.
    num_workers = len(status["workers"])
    assert listening["ray::WorkerActo"]["all interfaces"] == num_workers
    assert listening["ray::ManagerAct"]["all interfaces"] == 1
    assert set(listening["prometheus"]) == {"loopback"}


def _prometheus_and_redis(cluster: Cluster, question: Question) -> None:
    def targets() -> list[dict[str, Any]]:
        answer = httpx.get("http://127.0.0.1:9090/api/v1/targets", trust_env=False, timeout=10.0).json()
        found: list[dict[str, Any]] = answer["data"]["activeTargets"]
        return found

    def all_up() -> bool:
        found = cluster.head.in_network(targets)
        return len(found) == 4 and all(one["health"] == "up" for one in found)

    cluster.wait_for("scraped targets", all_up, timeout_s=90.0)
    cluster.say("Prometheus on the head scrapes all 4 processes: 2 workers, manager, router")

    def served() -> str:
        body = {**question.body(MODEL), "stream": False, "stream_options": None}
        return httpx.post(f"{URL}/v1/completions", json=body, trust_env=False, timeout=60.0).headers["x-cache"]

    assert cluster.head.in_network(served) == "miss"
    cluster.wait_for("hit", lambda: cluster.head.in_network(served) == "hit-exact", timeout_s=30.0)
    cluster.say("the router's cache is in the Redis on the head: asked twice, computed once")


def _nothing_happens(cluster: Cluster) -> None:
    time.sleep(5.0)


def _scale_up(cluster: Cluster) -> None:
    cluster.ray_exec(f"pdserve scale {MODEL} --prefill 2 --decode 2")
    assert {cluster.host_of(worker).name for worker in cluster.ready("decode")} == {"d0", "d1"}
    time.sleep(3.0)


def _scale_down(cluster: Cluster) -> None:
    cluster.pdserve(f"scale {MODEL} --prefill 1 --decode 1")
    time.sleep(2.0)
    cluster.pdserve(f"scale {MODEL} --prefill 2 --decode 2")


def _kill_a_process(cluster: Cluster) -> None:
    _fault(cluster, "its process was killed", lambda worker: cluster.host_of(worker).run(f"kill -KILL {worker['pid']}"))


def _hang_a_process(cluster: Cluster) -> None:
    _fault(cluster, "its process was stopped", lambda worker: cluster.host_of(worker).run(f"kill -STOP {worker['pid']}"))


def _fault(cluster: Cluster, what: str, strike: Callable[[dict[str, Any]], object]) -> None:
    worker = cluster.ready("decode")[0]
    struck_at = time.time()
    strike(worker)
    cluster.wait_for("two decode workers", lambda: _restarted(cluster, worker), timeout_s=90.0)
    noticed_s = cluster.told_at("worker given up", struck_at) - struck_at
    cluster.say(f"{worker['worker_id']} on {cluster.host_of(worker).name}: {what}; given up after {noticed_s:.2f} s")


def _restarted(cluster: Cluster, old: dict[str, Any]) -> bool:
    ready = cluster.ready("decode")
    return len(ready) == 2 and all(
        one["incarnation"] > old["incarnation"] for one in ready if one["worker_id"] == old["worker_id"]
    )


def _partition(cluster: Cluster) -> None:
    worker = cluster.ready("decode")[0]
    host = cluster.host_of(worker)
    cut_at = time.time()
    host.cut()
    time.sleep(PARTITION_S)
    host.mend()
    healed_s = cluster.wait_for("two decode workers", lambda: _restarted(cluster, worker), timeout_s=180.0)
    noticed_s = cluster.told_at("worker given up", cut_at) - cut_at
    cluster.say(
        f"{host.name} was cut off for {PARTITION_S:.0f} s: {worker['worker_id']} given up after {noticed_s:.2f} s,"
        f" its successor ready {healed_s:.1f} s after the link was back"
    )
    old = host.run(f"test -d /proc/{worker['pid']}", check=False)
    assert old.returncode != 0, "the process that was given up must be gone once its host is heard again"


def _vanish(cluster: Cluster) -> None:
    worker = cluster.ready("decode")[0]
    host = cluster.host_of(worker)
    gone_at = time.time()
    host.kill()
    cluster.wait_for("one decode worker", lambda: len(cluster.ready("decode")) == 1, timeout_s=60.0)
    noticed_s = cluster.told_at("worker given up", gone_at) - gone_at
    cluster.say(f"{host.name} vanished with {worker['worker_id']}: given up after {noticed_s:.2f} s; the other one serves on")
    time.sleep(5.0)


def _return(cluster: Cluster) -> None:
    """The host is back, empty: Ray's autoscaler sets it up again, and its slot is taken by the worker that waits for one."""
    host = next(one for one in cluster.network.hosts.values() if one.process is None)
    host.start()
    host.mend()
    took_s = cluster.wait_for("two decode workers", lambda: len(cluster.ready("decode")) == 2, timeout_s=240.0)
    cluster.say(f"{host.name} is back: set up again by Ray and its worker ready after {took_s:.0f} s, with nobody's help")


def _kill_the_launcher(cluster: Cluster) -> None:
    """And what it started goes with it, on the other hosts too; then it is started again."""

    def ours() -> list[str]:
        return [line for line in cluster.network.leftover() if "ray::WorkerActor" in line or "ray::NodeKeeper" in line]

    before = ours()
    assert {line.partition(":")[0] for line in before} == set(SLOTS)
    cluster.head.run(f"kill -KILL {cluster.launcher_pid()}")
    started_s = time.monotonic()
    while left := ours():
        assert time.monotonic() - started_s < 60.0, left
        time.sleep(0.2)
    took_s = time.monotonic() - started_s
    cluster.say(f"the launcher was killed: {took_s:.1f} s later all {len(before)} processes of ours on other hosts are gone")
    cluster.pdserve("up ~/pdserve/deploy/configs/cluster.yaml --detach")
    cluster.wait_for("workers", lambda: bool(cluster.ready("prefill") and cluster.ready("decode")), timeout_s=180.0)
    _ask_all(cluster)
    cluster.say("started again, it serves")


def _down(cluster: Cluster) -> None:
    cluster.ray_exec("pdserve down")
    cluster.say("`ray exec deploy/ray/local.yaml 'pdserve down'`: stopped")
    cluster.on_laptop("ray down -y deploy/ray/local.yaml", timeout_s=120.0)
    started_s = time.monotonic()
    while left := cluster.network.leftover():
        assert time.monotonic() - started_s < 120.0, left
        time.sleep(0.5)
    cluster.say(
        "`ray down -y deploy/ray/local.yaml`: no process is left on any host,"
        f" {time.monotonic() - started_s:.0f} s after it returned"
    )


# -- small things ----------------------------------------------------------------------------------------------------------


def _ask_all(cluster: Cluster) -> list[tuple[Question, Any]]:
    def work() -> list[tuple[Question, Any]]:
        with httpx.Client(timeout=60.0, trust_env=False) as client:
            return [(question, ask(client, URL, MODEL, question)) for question in QUESTIONS]

    asked = cluster.head.in_network(work)
    for _, reply in asked:
        assert not reply.failure, reply.failure
    return asked


def _judge(cluster: Cluster, phase: str, tally: Tally, total: Tally, took_s: float) -> None:
    total.answered += tally.answered
    total.failures += tally.failures
    total.inexact += tally.inexact
    roads = ", ".join(
        f"{count} over {road}" if road != "prefilled locally" else f"{count} {road}" for road, count in tally.transports.items()
    )
    cluster.say(
        f"**{phase}** ({took_s:.0f} s): {tally.answered} requests right ({roads}), {len(tally.failures)} failed,"
        f" {len(tally.inexact)} inexact, slowest {tally.slowest_s:.1f} s"
    )
    for line in (tally.failures + tally.inexact)[:5]:
        cluster.say(line)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(yaml.safe_dump(config, sort_keys=False, width=1000), encoding="utf-8")


def _tiny(config: dict[str, Any]) -> None:
    """A model of random weights, small enough for many processes on few cores; KV travels for every prompt."""
    exact = {"exact": True, "kernels": "torch"}  # nothing to compile on every host
    engine = {"dtype": "float32", **exact, "kv_pool_tokens": 4096, "threads": 1, "prefix_cache": False}
    pools = {"prefill": {"replicas": 1}, "decode": {"replicas": 1, "local_prefill_tokens": 4}}
    config["models"] = [{"name": MODEL, "source": "~/tiny", "engine": engine, **pools}]
    config["router"] = {"placement": {"policy": "least_load"}}
