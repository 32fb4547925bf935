"""A worker that finds no slot makes Ray's autoscaler start a node of its role: tried with Ray's fake provider of nodes.

Ray and its nodes run in namespaces of their own, so that nothing is left of them and no other Ray is met.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from support.host_namespaces import network_of_hosts, what_is_missing

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or "everything is there"),
]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HEAD_NODE_ID = "f" * 51 + "00000"  # as the fake provider numbers its nodes

EMPTY_LISTS = (
    *("cluster_synced_files", "initialization_commands", "rsync_exclude", "rsync_filter"),
    *("setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)

# On the head: nobody offers a slot, a worker of each role asks for one, and says where it is.
ASKING = """
import json, ray
from common.types import Role
from deploy.nodes import nodes_of, resources_of

ray.init(address="auto", log_to_driver=False)
before = [node for node in nodes_of(ray.nodes()) if node.alive]
assert not any(sum(node.slots.values()) for node in before), before

@ray.remote(num_cpus=0)
class Worker:
    def node(self):
        return ray.get_runtime_context().get_node_id()

workers = {role: Worker.options(resources=resources_of(role, slots=True)).remote() for role in Role}
placed = {role: ray.get(worker.node.remote(), timeout=240) for role, worker in workers.items()}
nodes = {node.node_id: node for node in nodes_of(ray.nodes())}
print(json.dumps({role: {each: nodes[node_id].slots[each] for each in Role} for role, node_id in placed.items()}))
"""


def test_a_worker_without_a_slot_gets_a_node_of_its_role() -> None:
    shipped = yaml.safe_load((REPOSITORY / "deploy/ray/aws.yaml").read_text(encoding="utf-8"))["available_node_types"]
    types = {
        name: {"resources": {**shipped[name]["resources"], "CPU": 1}, "min_workers": 0, "max_workers": 1, "node_config": {}}
        for name in ("prefill", "decode")
    }
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 5,
        "provider": {"type": "fake_multinode", "head_node_id": HEAD_NODE_ID},
        # What the launcher would have filled in.
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in EMPTY_LISTS},
        "file_mounts_sync_continuously": False,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            **types,
        },
    }
    with (
        tempfile.TemporaryDirectory(prefix="pdh-", dir="/var/tmp") as folder,
        network_of_hosts(Path(folder), ["one"]) as network,
    ):
        host = network.host("one")
        (host.home / ".bashrc").write_text(f"export PYTHONPATH={REPOSITORY}\n", encoding="utf-8")
        (host.home / "autoscaling.json").write_text(json.dumps(config), encoding="utf-8")
        (host.home / "asking.py").write_text(ASKING, encoding="utf-8")
        binaries = Path(sys.prefix) / "bin"
        host.run(
            "export RAY_FAKE_CLUSTER=1 AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_AUTH_MODE=disabled RAY_enable_autoscaler_v2=0"
            f" && {binaries}/ray start --head --num-cpus=1 --include-dashboard=false --disable-usage-stats"
            f" --object-store-memory=80000000 --node-ip-address={host.address} --autoscaling-config=/root/autoscaling.json"
        )
        asked = host.run(f"RAY_AUTH_MODE=disabled {binaries}/python /root/asking.py", timeout_s=300.0, check=False)
        monitor = host.run("tail -n 40 /tmp/ray/session_latest/logs/monitor.*", check=False).stdout
        assert asked.returncode == 0, asked.stderr[-3000:] + monitor
        assert json.loads(asked.stdout.splitlines()[-1]) == {
            "prefill": {"prefill": 1.0, "decode": 0.0},
            "decode": {"prefill": 0.0, "decode": 1.0},
        }
