"""What the doctor says of machines, ports, models, stores and links that are not as they should be."""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from common.config import Config, RedisConfig, RouterConfig
from common.heads_store import heads_path
from common.model_store import resolve
from common.wire.worker_pb2 import InfoReply
from deploy.app import app
from deploy.diagnosis import machine, software
from deploy.diagnosis.finding import Finding, Severity, exit_status
from deploy.diagnosis.links import advise, recutting
from deploy.diagnosis.machine import check_machine, cpu_quota, memory_room_bytes
from deploy.diagnosis.models import check_models
from deploy.diagnosis.ports import check_ports, holder
from deploy.diagnosis.shared_store import check_store
from deploy.diagnosis.software import check_software, extras_of
from deploy.diagnosis.storage import check_storage
from support.ports import quiet_port
from support.redis_server import RedisServer, any_binary
from support.tiny_models import make_tiny_model


def by_what(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_machine_that_runs_the_tests_is_fit() -> None:
    findings = [*check_machine(), *check_software(None)]
    assert exit_status(findings) == 0, [finding for finding in findings if finding.severity is Severity.FAILURE]
    assert {"cores", "memory", "open files", "clock", "torch", "ray", "python"} <= by_what(iter(findings)).keys()


def test_exit_status_is_that_of_the_worst() -> None:
    ok, note, warning, failure = (Finding("a", "b", "c", severity) for severity in Severity)
    assert exit_status([]) == exit_status([ok, note]) == 0
    assert exit_status([ok, warning, note]) == 1
    assert exit_status([warning, failure, ok]) == 2


VERSION_2 = {
    "proc/self/cgroup": "0::/user/pod\n",
    "sys/fs/cgroup/cpu.max": "max 100000\n",
    "sys/fs/cgroup/user/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/user/pod/cpu.max": "400000 100000\n",
    "sys/fs/cgroup/user/memory.max": "max\n",
    "sys/fs/cgroup/user/pod/memory.max": "3000\n",
    "sys/fs/cgroup/user/pod/memory.current": "1000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/pod\n4:memory:/pod\n1:name=systemd:/pod\n",
    "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "150000\n",
    "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": "3000\n",
    "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": "1000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
}


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1], ids=["cgroup 2", "cgroup 1"])
def test_the_tightest_control_group_counts(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files)
    assert cpu_quota(root) == 1.5
    assert memory_room_bytes(root) == 2000
    assert cpu_quota(tmp_path / "elsewhere") is None
    assert memory_room_bytes(tmp_path / "elsewhere") is None


def test_a_machine_that_is_too_small_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(
        tmp_path,
        {
            **VERSION_2,
            "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 8000000 kB\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
            "sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet\n",
        },
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 1000))
    monkeypatch.setattr(machine, "clock_is_synchronised", lambda: False)
    found = by_what(check_machine(root))
    assert found["cores"].severity is Severity.WARNING
    assert "gives 1.5" in found["cores"].found
    assert "engine.threads" in found["cores"].advice
    assert found["memory"].severity is Severity.FAILURE
    assert "control group" in found["memory"].found
    assert found["open files"].severity is Severity.FAILURE
    assert "hard limit, 1000" in found["open files"].advice
    assert found["huge pages"].severity is found["clock source"].severity is found["clock"].severity is Severity.NOTE
    assert "logs" in found["clock"].means


def test_the_kernel_tells_about_its_clock() -> None:
    assert machine.clock_is_synchronised() in (True, False, None)


def test_packages_that_are_missing_or_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "1.0", "grpcio": "9.9", "redis": None}

    def version(name: str) -> str:
        found = versions.get(name, "99999.0")
        if found is None:
            raise software.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(software.metadata, "version", version)
    plain = by_what(check_software(None))
    assert plain["torch"].severity is Severity.FAILURE
    assert "1.0; >=" in plain["torch"].found
    assert plain["torch"].advice == "pip install 'pdserve[engine]'"
    assert "redis" not in plain, "nobody needs it here"
    config = Config.model_validate({"models": [{"name": "m", "source": "m"}], "cache": {"redis": {"url": "redis://x"}}})
    assert extras_of(config) == {"redis"}
    routed = {"predictor": "p.json", "embedder": "minilm"}
    assert extras_of(Config.model_validate({"models": [{"name": "m", "source": "s"}], "routing": routed})) == {"embed"}
    assert by_what(check_software(config))["redis"].severity is Severity.FAILURE


def test_a_port_that_is_taken_names_who_has_it() -> None:
    port = quiet_port()  # which nobody else takes when it is free again
    with socket.create_server(("127.0.0.1", port)):
        assert f"(pid {os.getpid()})" in (holder(port) or "")
        config = RouterConfig(http_port=port, grpc_port=0)
        found = by_what(check_ports(config, ours=frozenset()))
        assert found["HTTP"].severity is Severity.FAILURE
        assert f"pid {os.getpid()}" in found["HTTP"].found
        assert found["gRPC"].severity is Severity.OK
        assert by_what(check_ports(config, ours=frozenset({port})))["HTTP"].severity is Severity.OK
    assert by_what(check_ports(config, ours=frozenset()))["HTTP"].severity is Severity.OK
    assert holder(port) is None


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    config = RouterConfig(http_host="192.0.2.1", http_port=1, api_keys=("secret",))
    assert "cannot be had" in by_what(check_ports(config, ours=frozenset()))["HTTP"].found


def test_models_are_looked_for(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny")
    sources = {
        "here": str(tmp_path / "tiny"),
        "named": "smollm2-135m",
        "wrong": str(tmp_path / "nothing.gguf"),
        "hub": "org/name",
    }
    config = Config.model_validate({"models": [{"name": name, "source": source} for name, source in sources.items()]})
    found = by_what(check_models(config, tmp_path / "home"))
    assert {name: finding.severity for name, finding in found.items()} == {
        "here": Severity.OK,
        "named": Severity.NOTE,  # `up` fetches it
        "wrong": Severity.FAILURE,
        "hub": Severity.NOTE,
    }
    assert "sha256" in found["here"].found


def test_heads_that_are_missing_are_told_with_how_to_make_them(tmp_path: Path) -> None:
    source = str(make_tiny_model(tmp_path / "tiny"))
    given = tmp_path / "given.safetensors"

    def finding(heads: str) -> Finding:
        speculation = {"method": "medusa", "heads": heads}
        model = {"name": "m", "source": source, "decode": {"speculation": speculation}}
        return by_what(check_models(Config.model_validate({"models": [model]}), tmp_path))["m, heads"]

    for heads, path in (("", heads_path(tmp_path, resolve(source).digest())), (str(given), given)):
        assert finding(heads).severity is Severity.FAILURE
        assert "train-heads" in finding(heads).advice
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert finding(heads).severity is Severity.OK


def test_storage_that_is_full_or_closed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "not" / "yet"
    assert exit_status(check_storage(home, tmp_path)) == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert {one.severity for one in check_storage(home, tmp_path)} == {Severity.WARNING}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert {one.severity for one in check_storage(home, tmp_path)} == {Severity.FAILURE}
    monkeypatch.setattr("os.access", lambda path, how: False)
    assert "cannot be written to" in next(iter(check_storage(home, tmp_path))).found


def test_a_store_that_does_not_answer_is_told_without_its_password() -> None:
    (finding,) = check_store(RedisConfig(url="redis://:hunter2@127.0.0.1:9/0"))
    assert finding.severity is Severity.WARNING
    assert "hunter2" not in str(finding)
    (none,) = check_store(RedisConfig())
    assert none.severity is Severity.OK


def test_a_real_store_says_what_it_is() -> None:
    binary = any_binary()
    if binary is None:
        pytest.skip("no redis-server on this machine")
    server = RedisServer(binary, "--appendonly", "no")
    server.start()
    try:
        found = by_what(check_store(RedisConfig(url=server.url, operation_timeout_s=1.0)))
    finally:
        server.stop()
    assert found["redis"].severity is found["redis round trip"].severity is Severity.OK
    assert found["redis append-only file"].severity is Severity.NOTE
    assert "redis clock" not in found


@pytest.mark.parametrize(
    ("kind", "code", "param", "expected"),
    [
        ("tcp", "HandshakeRefused", "cluster_token", "same token"),
        ("nixl", "HandshakeRefused", "transports", "needed only for RDMA"),
        ("shm", "TransferBroken", "", "one host only"),
        ("tcp", "TransferBroken", "", "firewall"),
        ("tcp", "HandshakeRefused", "layout", "it failed (layout)"),
        ("shm", "WorkerLost", "", "it failed (WorkerLost)"),
    ],
)
def test_each_way_to_fail_has_advice(kind: str, code: str, param: str, expected: str) -> None:
    assert expected in advise(kind, code, param, "it failed")


def test_pools_between_which_kv_is_cut_anew_are_named() -> None:
    def worker(name: str, block_tokens: int, dtype: str) -> InfoReply:
        return InfoReply(worker_id=name, block_tokens=block_tokens, dtype=dtype)

    decode = worker("m/decode/0", 32, "bfloat16")
    assert not list(recutting(worker("m/prefill/0", 32, "bfloat16"), decode))
    for prefill in (worker("m/prefill/1", 16, "bfloat16"), worker("m/prefill/2", 32, "float32")):
        (finding,) = recutting(prefill, decode)
        assert finding.what == f"{prefill.worker_id} -> m/decode/0"
        assert f"blocks of {prefill.block_tokens} tokens in {prefill.dtype} become blocks of 32 in bfloat16" in finding.found
        assert exit_status([finding]) == 0, "it works"


def doctor(home: Path, *arguments: str) -> dict:
    found = CliRunner().invoke(app, ["doctor", *arguments, "--json"], env={"PDSERVE_HOME": str(home)})
    told = json.loads(found.stdout)
    assert told["status"] == found.exit_code
    return told


def test_a_configuration_is_checked_with_all_its_problems(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny")
    path = tmp_path / "cluster.yaml"
    good = {"models": [{"name": "tiny", "source": str(tmp_path / "tiny")}], "router": {"http_port": 0, "grpc_port": 0}}
    path.write_text(yaml.safe_dump(good))
    told = doctor(tmp_path, str(path))
    assert told["status"] == 0
    assert told["cluster"] is None
    path.write_text(yaml.safe_dump({**good, "router": {"http_prot": 1, "migrations": -1}}))
    told = doctor(tmp_path, str(path))
    assert told["status"] == 2
    wrong = [one["what"] for one in told["findings"] if one["area"] == "config"]
    assert sorted(wrong) == ["router.http_prot", "router.migrations"]
    plain = CliRunner().invoke(app, ["doctor", str(path)], env={"PDSERVE_HOME": str(tmp_path)})
    assert "2 things stand in the way of serving" in plain.stdout
    assert "pdserve config check" in plain.stdout
