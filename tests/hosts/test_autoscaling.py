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
    pytest.mark.timeout(240),
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or "everything is there"),
]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HEAD_NODE_ID = "f" * 51 + "00000"  # as the fake provider numbers its nodes

EMPTY_LISTS = (
    *("cluster_synced_files", "initialization_commands", "rsync_exclude", "rsync_filter"),
    *("setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)

# On the head, where nobody offers a slot: a worker of each role, as the pool manager has them launched, and after the prefill
# worker has become a decode worker a second prefill worker. Says what the nodes offer then, and whose slot each worker has.
ASKING = """
import asyncio, json, ray
from common.config import LoggingConfig, ModelConfig, RayConfig, TransferConfig
from common.types import Role, WorkerRef
from common.worker import WorkerSpec
from deploy.nodes import nodes_of
from deploy.ray_host import RayHost

ray.init(address="auto", log_to_driver=False)

class Server:
    def __init__(self, spec, kept):
        self.spec = spec
    async def start(self):
        return WorkerRef(self.spec.worker_id, self.spec.incarnation, "127.0.0.1:1")
    async def retire(self):
        return self
    async def wait_failed(self):
        await asyncio.Event().wait()

def offered():
    nodes = [node for node in nodes_of(ray.nodes()) if node.alive]
    return {role: sum(node.slots[role] for node in nodes) for role in Role}

def spec(worker_id):
    model = ModelConfig(name="m", source="/root/model")
    role = Role(worker_id.split("/")[1])
    return WorkerSpec(worker_id, 1, role, model, "/root/model", TransferConfig(), "", logging=LoggingConfig())

async def main():
    assert not any(offered().values())
    host = RayHost("fake", "0" * 32, RayConfig(slots=True, room_timeout_s=100), Server)
    prefill, decode = await asyncio.gather(host.launch(spec("m/prefill/0")), host.launch(spec("m/decode/0")))
    found = {"one of each": offered()}
    await prefill.start()
    await prefill.become(spec("m/decode/1"))
    await host.launch(spec("m/prefill/1"))
    found["flipped, and one more"] = offered()
    print(json.dumps(found))

asyncio.run(main())
"""


def test_a_worker_without_a_slot_gets_a_node_of_its_role_and_flips_are_made_up_for() -> None:
    """After a flip there are two decode workers; with a second prefill worker there are two of each. A second prefill node cannot
    be had: who asked for one would wait in vain."""
    shipped = yaml.safe_load((REPOSITORY / "deploy/ray/aws.yaml").read_text(encoding="utf-8"))["available_node_types"]
    types = {
        name: {"resources": {**shipped[name]["resources"], "CPU": 1}, "min_workers": 0, "max_workers": most, "node_config": {}}
        for name, most in (("prefill", 1), ("decode", 2))
    }
    config = {
        "cluster_name": "fake",
        "max_workers": 3,
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
        (host.home / "model").mkdir()
        for name in ("config.json", "model.safetensors"):
            (host.home / "model" / name).write_text("{}", encoding="utf-8")
        (host.home / "asking.py").write_text(ASKING, encoding="utf-8")
        binaries = Path(sys.prefix) / "bin"
        host.run(
            "export RAY_FAKE_CLUSTER=1 AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_AUTH_MODE=disabled RAY_enable_autoscaler_v2=0"
            # Nodes of one address do not tell apart whose sign of life was whose, and the silent ones would be repaired by ssh.
            " AUTOSCALER_HEARTBEAT_TIMEOUT_S=1000"
            f" && {binaries}/ray start --head --num-cpus=1 --include-dashboard=false --disable-usage-stats"
            f" --object-store-memory=80000000 --node-ip-address={host.address} --autoscaling-config=/root/autoscaling.json"
        )
        asked = host.run(f"RAY_AUTH_MODE=disabled {binaries}/python /root/asking.py", timeout_s=140.0, check=False)
        monitor = host.run("tail -n 40 /tmp/ray/session_latest/logs/monitor.*", check=False).stdout
        assert asked.returncode == 0, asked.stderr[-3000:] + monitor
        assert json.loads(asked.stdout.splitlines()[-1]) == {
            "one of each": {"prefill": 1.0, "decode": 1.0},
            "flipped, and one more": {"prefill": 1.0, "decode": 2.0},
        }
