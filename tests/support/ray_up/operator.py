"""Whoever runs the cluster: what README has an operator do from a laptop or on the head, and what can be read there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from support.host_namespaces import Host, HostNetwork
from support.ray_up.transcript import Transcript
from support.steady_load import Question, ask
from support.tiny_models import make_tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent.parent.parent
URL = "http://127.0.0.1:8000"
MODEL = "tiny"
PDSERVE = "~/pdserve/.venv/bin/pdserve"
# Decode and prefill never share a host here, so that all KV between them crosses a link.
SLOTS = {"p0": "prefill:2", "d0": "decode:1", "d1": "decode:1"}

QUESTIONS = [
    Question([(7 * index + 31 * number) % 370 + 3 for index in range(60 + 20 * number)], number, 0.9 * (number % 2), 24)
    for number in range(6)
]


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

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float = 240.0) -> float:
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


def ask_all(cluster: Cluster) -> list[tuple[Question, Any]]:
    def work() -> list[tuple[Question, Any]]:
        with httpx.Client(timeout=60.0, trust_env=False) as client:
            return [(question, ask(client, URL, MODEL, question)) for question in QUESTIONS]

    asked = cluster.head.in_network(work)
    for _, reply in asked:
        assert not reply.failure, reply.failure
    return asked


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
