"""What befalls a cluster under load: processes are killed or stopped, a link is cut, a host vanishes and comes back."""

from __future__ import annotations

import time
from typing import Any

from support.ray_up.operator import SLOTS, Cluster, ask_all

PARTITION_S = 10.0


def kill_a_process(cluster: Cluster) -> None:
    _fault(cluster, "its process was killed", "KILL")


def hang_a_process(cluster: Cluster) -> None:
    _fault(cluster, "its process was stopped", "STOP")


def _fault(cluster: Cluster, what: str, signal_name: str) -> None:
    worker = cluster.ready("decode")[0]
    # Told by the host itself: to get there takes as long as some detections.
    struck_at = float(cluster.host_of(worker).run(f"date +%s.%N; kill -{signal_name} {worker['pid']}").stdout)
    cluster.wait_for("two decode workers", lambda: _restarted(cluster, worker), timeout_s=240.0)
    noticed_s = cluster.told_at("worker given up", struck_at) - struck_at
    cluster.say(f"{worker['worker_id']} on {cluster.host_of(worker).name}: {what}; given up after {noticed_s:.2f} s")


def _restarted(cluster: Cluster, old: dict[str, Any]) -> bool:
    ready = cluster.ready("decode")
    return len(ready) == 2 and all(
        one["incarnation"] > old["incarnation"] for one in ready if one["worker_id"] == old["worker_id"]
    )


def partition(cluster: Cluster) -> None:
    worker = cluster.ready("decode")[0]
    host = cluster.host_of(worker)
    cut_at = time.time()
    host.cut()
    time.sleep(PARTITION_S)
    host.mend()
    healed_s = cluster.wait_for("two decode workers", lambda: _restarted(cluster, worker), timeout_s=360.0)
    noticed_s = cluster.told_at("worker given up", cut_at) - cut_at
    cluster.say(
        f"{host.name} was cut off for {PARTITION_S:.0f} s: {worker['worker_id']} given up after {noticed_s:.2f} s,"
        f" its successor ready {healed_s:.1f} s after the link was back"
    )
    old = host.run(f"test -d /proc/{worker['pid']}", check=False)
    assert old.returncode != 0, "the process that was given up must be gone once its host is heard again"


def vanish(cluster: Cluster) -> None:
    worker = cluster.ready("decode")[0]
    host = cluster.host_of(worker)
    gone_at = time.time()
    host.kill()
    cluster.wait_for("one decode worker", lambda: len(cluster.ready("decode")) == 1, timeout_s=60.0)
    noticed_s = cluster.told_at("worker given up", gone_at) - gone_at
    cluster.say(f"{host.name} vanished with {worker['worker_id']}: given up after {noticed_s:.2f} s; the other one serves on")
    time.sleep(5.0)


def come_back(cluster: Cluster) -> None:
    """The host is back, empty: Ray's autoscaler sets it up again, and its slot is taken by the worker that waits for one."""
    host = next(one for one in cluster.network.hosts.values() if one.process is None)
    host.start()
    host.mend()
    took_s = cluster.wait_for("two decode workers", lambda: len(cluster.ready("decode")) == 2, timeout_s=480.0)
    cluster.say(f"{host.name} is back: set up again by Ray and its worker ready after {took_s:.0f} s, with nobody's help")


def kill_guards(cluster: Cluster) -> None:
    """One of the two on each host; the other one does what is to be done when Ray ends there."""
    for name in SLOTS:
        cluster.network.host(name).run("kill -KILL $(pgrep -f '[d]eploy.node_guard' | head -n 1)")
    cluster.say("a guard of Ray's processes was killed on each host")


def kill_the_launcher(cluster: Cluster) -> None:
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
    cluster.wait_for("workers", lambda: bool(cluster.ready("prefill") and cluster.ready("decode")), timeout_s=360.0)
    ask_all(cluster)
    cluster.say("started again, it serves")
