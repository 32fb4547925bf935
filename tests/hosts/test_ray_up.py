"""A cluster of several hosts as README says to make one, by `ray up` with deploy/ray/local.yaml, under load and under faults.

The hosts are namespaces of this machine (`support.host_namespaces`); everything else is what an operator has: ssh, rsync, Ray's
launcher, the files of deploy/ray. One test, because one cluster lives through all of it; TRANSCRIPT.md beside this file is what
the last run saw.
"""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.host_namespaces import HostNetwork, network_of_hosts, what_is_missing
from support.ray_up.at_rest import known_answers, nothing_is_open, one_request_crosses_the_link, prometheus_and_redis
from support.ray_up.faults import come_back, hang_a_process, kill_a_process, kill_guards, kill_the_launcher, partition, vanish
from support.ray_up.operator import MODEL, SLOTS, URL, Cluster
from support.ray_up.transcript import Transcript
from support.steady_load import SteadyLoad, Tally

MISSING = what_is_missing("redis-server", "prometheus", "ss", "git")
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(MISSING is not None, reason=MISSING or "everything is there"),
]

_NOT_KEPT = shutil.ignore_patterns("pdserve", "tiny", ".ssh", ".ray", "host_key*", ".pyenv")


@pytest.fixture
def transcript() -> Iterator[Transcript]:
    told = Transcript(Path(__file__).with_name("TRANSCRIPT.md"))
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


def test_a_cluster_made_by_ray_up_serves_through_faults(network: HostNetwork, transcript: Transcript) -> None:
    cluster = Cluster(network, transcript)
    cluster.furnish()
    up(cluster)
    known = known_answers(cluster)
    one_request_crosses_the_link(cluster, known)
    nothing_is_open(cluster)
    prometheus_and_redis(cluster, known[0][0])
    load = SteadyLoad(URL, MODEL, known, clients=3)
    cluster.head.in_network(load.start)
    total = Tally()
    try:
        for step in (nothing_happens, scale_up, scale_down, kill_a_process, hang_a_process, partition, vanish, come_back):
            started_s = time.monotonic()
            step(cluster)
            judge(cluster, step.__name__.strip("_").replace("_", " "), load.phase(), total, time.monotonic() - started_s)
    finally:
        rest = load.stop()
    judge(cluster, "end", rest, total, 0.0)
    kill_the_launcher(cluster)
    kill_guards(cluster)
    down(cluster)
    assert not total.failures
    assert not total.inexact
    transcript.outcome = f"**{total.answered} requests, {len(total.failures)} failed, {len(total.inexact)} inexact.**"


# -- the steps that are no faults ----------------------------------------------------------------------------------------


def up(cluster: Cluster) -> None:
    cluster.on_laptop("ray get-auth-token --generate")
    started_s = time.monotonic()
    cluster.on_laptop("ray up -y deploy/ray/local.yaml", timeout_s=480.0)
    cluster.say(
        f"`ray up -y deploy/ray/local.yaml` returned after {time.monotonic() - started_s:.1f} s; the cluster can be asked"
    )
    cluster.wait_for("first workers", lambda: bool(cluster.ready("prefill") and cluster.ready("decode")), timeout_s=480.0)
    cluster.say(f"prefill and decode worker ready {time.monotonic() - started_s:.1f} s after the start")
    for worker in cluster.status()["workers"]:
        cluster.say(f"{worker['worker_id']} serves on host {cluster.host_of(worker).name}, {worker['address']}")
    (prefill,), (decode,) = cluster.ready("prefill"), cluster.ready("decode")
    assert cluster.host_of(prefill).name == "p0"
    assert cluster.host_of(decode).name in ("d0", "d1")


def nothing_happens(cluster: Cluster) -> None:
    time.sleep(5.0)


def scale_up(cluster: Cluster) -> None:
    cluster.ray_exec(f"pdserve scale {MODEL} --prefill 2 --decode 2")
    assert {cluster.host_of(worker).name for worker in cluster.ready("decode")} == {"d0", "d1"}
    time.sleep(3.0)


def scale_down(cluster: Cluster) -> None:
    cluster.pdserve(f"scale {MODEL} --prefill 1 --decode 1")
    time.sleep(2.0)
    cluster.pdserve(f"scale {MODEL} --prefill 2 --decode 2")


def down(cluster: Cluster) -> None:
    cluster.ray_exec("pdserve down")
    cluster.say("`ray exec deploy/ray/local.yaml 'pdserve down'`: stopped")
    cluster.on_laptop("ray down -y deploy/ray/local.yaml", timeout_s=360.0)
    started_s = time.monotonic()
    while left := cluster.network.leftover():
        assert time.monotonic() - started_s < 120.0, left
        time.sleep(0.5)
    cluster.say(
        "`ray down -y deploy/ray/local.yaml`: no process is left on any host,"
        f" {time.monotonic() - started_s:.0f} s after it returned"
    )


def judge(cluster: Cluster, phase: str, tally: Tally, total: Tally, took_s: float) -> None:
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
