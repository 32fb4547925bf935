"""The files that make clusters of several hosts: what Ray's launcher says of them; nothing of them is open to the world."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from common.config import load_config
from common.loopback import is_loopback

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CLOUDS = ("aws", "gcp")
SECRETS = re.compile(r"(?i)(BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}|password\s*[:=]\s*\S|[0-9a-f]{32,})")


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text(encoding="utf-8")))


# -- ray up ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", *CLOUDS])
def test_ray_accepts_it(name: str) -> None:
    config = prepare_config(read(f"ray/{name}.yaml"))
    validate_config(config)
    with pytest.raises(Exception, match=r"is not of type"):
        validate_config({**config, "max_workers": "many"})  # it does look


@pytest.mark.parametrize("name", ["local", *CLOUDS])
def test_every_node_is_started_with_a_token_and_the_head_with_everything(name: str) -> None:
    config = read(f"ray/{name}.yaml")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    assert any("deploy.ray_node head" in line for line in head)
    assert any("deploy.ray_node worker --head $RAY_HEAD_IP" in line for line in worker)
    assert head[-1].endswith("pdserve up ~/pdserve/deploy/configs/cluster.yaml --detach")
    for line in (*head, *worker):
        for program in re.findall(r"(?<![\w./-])(?:ray|python|pdserve) ", line):
            raise AssertionError(f"{program!r} in {line!r}: a login shell has a PATH of its own")


def test_the_local_provider_gets_the_autoscaler_that_starts_its_workers() -> None:
    assert any("--autoscaler v1" in line for line in read("ray/local.yaml")["head_start_ray_commands"])


def test_slots_of_local_hosts_are_those_of_the_hosts_that_it_names() -> None:
    config = read("ray/local.yaml")
    slots = re.findall(r"--slots ([\d.]+)=", config["worker_start_ray_commands"][-1])
    assert slots == config["provider"]["worker_ips"]
    assert config["min_workers"] == config["max_workers"] == len(slots)


@pytest.mark.parametrize("name", CLOUDS)
def test_node_types_of_clouds_offer_slots_within_their_own_bounds(name: str) -> None:
    config = read(f"ray/{name}.yaml")
    types = config["available_node_types"]
    for role in ("prefill", "decode"):
        assert types[role]["resources"][role] >= 1
        assert 0 < types[role]["min_workers"] <= types[role]["max_workers"] <= config["max_workers"]
    assert not set(types["head"]["resources"]) & {"prefill", "decode"}


@pytest.mark.parametrize("name", CLOUDS)
def test_hosts_of_clouds_have_no_address_outside(name: str) -> None:
    config = read(f"ray/{name}.yaml")
    assert config["provider"]["use_internal_ips"] is True
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        if name == "aws":
            assert node["SecurityGroupIds"], "the group that Ray makes opens ssh to everybody"
            assert node["SubnetIds"]
            assert node["MetadataOptions"] == {"HttpTokens": "required"}
        else:
            assert all("accessConfigs" not in interface for interface in node["networkInterfaces"])


def test_the_clusters_configuration_is_one_that_pdserve_takes() -> None:
    config = load_config(DEPLOY / "configs/cluster.yaml", environment={})
    assert config.ray.address == "auto"
    assert config.ray.slots
    assert config.network.trusted
    assert is_loopback(config.router.http_host), "off loopback a router needs keys"
    policy = config.health
    assert policy.interval_s + policy.timeout_s * policy.most_misses <= 2.5, "a worker that hangs, or whose host vanished"


# -- Kubernetes ------------------------------------------------------------------------------------------------------------


def kinds(path: str) -> dict[str, Any]:
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in documents(path)}


def test_the_ray_cluster_has_what_kuberay_requires() -> None:
    cluster = kinds("kubernetes/raycluster.yaml")["RayCluster/pdserve"]
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    pinned = re.search(r"^ray==(.+)$", (DEPLOY.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert spec["rayVersion"] == pinned[1]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container, *_) = group["template"]["spec"]["containers"]
        assert container["image"].startswith("pdserve:")
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        resources = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert resources == {group["groupName"]: 1}
    assert {group["groupName"] for group in spec["workerGroupSpecs"]} == {"prefill", "decode"}


def test_pods_have_no_privileges_and_secrets_come_from_secrets() -> None:
    cluster = kinds("kubernetes/raycluster.yaml")["RayCluster/pdserve"]["spec"]
    router = kinds("kubernetes/router.yaml")["Deployment/pdserve-router"]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"], router):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            for variable in container.get("env", ()):
                if "TOKEN" in variable["name"]:
                    assert "secretKeyRef" in variable["valueFrom"]


def test_ports_and_names_of_the_manifests_fit_the_configuration(tmp_path: Path) -> None:
    made = kinds("kubernetes/raycluster.yaml")
    path = tmp_path / "cluster.yaml"
    path.write_text(made["ConfigMap/pdserve"]["data"]["cluster.yaml"], encoding="utf-8")
    router = kinds("kubernetes/router.yaml")
    (container,) = router["Deployment/pdserve-router"]["spec"]["template"]["spec"]["containers"]
    overlay = {
        one["name"]: one.get("value", "10.1.2.3") for one in container["env"] if one["name"].startswith("PDSERVE_ROUTER__")
    }
    config = load_config(path, environment=overlay)
    assert config.router.authenticates
    assert config.router.http_host == "10.1.2.3"
    (service,) = made["Service/pdserve-manager"]["spec"]["ports"]
    assert f"pdserve-manager:{service['port']}" in container["command"]
    assert service["port"] == config.network.manager_port
    head = made["RayCluster/pdserve"]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {one["name"]: one["containerPort"] for one in head["ports"]}[service["targetPort"]] == service["port"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": config.router.http_port, "grpc": config.router.grpc_port}
    assert {one["targetPort"]: one["port"] for one in router["Service/pdserve"]["spec"]["ports"]} == ports
    assert router["Service/pdserve"]["spec"]["type"] == "ClusterIP"


def test_only_the_clusters_own_pods_and_named_clients_get_in() -> None:
    inner = kinds("kubernetes/raycluster.yaml")["NetworkPolicy/pdserve"]["spec"]
    assert inner["ingress"] == [{"from": [{"podSelector": inner["podSelector"]}]}]
    outer = kinds("kubernetes/router.yaml")["NetworkPolicy/pdserve-router"]["spec"]
    assert all(rule["from"] for rule in outer["ingress"])


# -- Docker ----------------------------------------------------------------------------------------------------------------


def test_the_image_has_a_pinned_base_and_an_ordinary_user() -> None:
    lines = (DEPLOY / "docker/Dockerfile").read_text(encoding="utf-8").splitlines()
    (base,) = (line.split()[1] for line in lines if line.startswith("FROM "))
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("root", "0", "0:0")
    copied = {line.split()[1] for line in lines if line.startswith("COPY ")}
    for package in ("common", "kvtransfer", "prefill_worker", "decode_worker", "router", "deploy"):
        assert package in copied
    config = load_config(DEPLOY / "configs/local.yaml", environment={})
    (exposed,) = (line.split()[1:] for line in lines if line.startswith("EXPOSE "))
    assert exposed == [str(config.router.http_port), str(config.router.grpc_port)]


def test_compose_publishes_to_this_machine_only_and_starts_what_pdserve_takes() -> None:
    compose = read("docker/compose.yaml")
    services = compose["services"]
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"
        assert re.search(r":v?\d+\.\d+", service["image"]), f"{name}'s image is not pinned"
        assert service["cap_drop"] == ["ALL"]
    settings = [item.removeprefix("--set=") for item in services["pdserve"]["command"] if item.startswith("--set=")]
    config = load_config(DEPLOY / "configs/local.yaml", overrides=settings, environment={})
    assert config.router.authenticates
    assert services["redis"]["network_mode"] == services["prometheus"]["network_mode"] == "service:pdserve"
    assert "127.0.0.1" in services["redis"]["command"]
    assert any("prometheus/local/prometheus.yml" in item for item in services["prometheus"]["command"])


FILES = sorted(path for folder in ("ray", "kubernetes", "docker") for path in (DEPLOY / folder).iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    assert not SECRETS.search(path.read_text(encoding="utf-8"))
