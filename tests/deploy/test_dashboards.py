"""Board, alert rules and scrape configuration speak of metrics that exist, and each rule fires when it should and not else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from common.metrics import (
    CostReadings,
    LeaseReadings,
    ManagerMetrics,
    MaskReadings,
    ObserveReadings,
    PoolReadings,
    PromiseReadings,
    QueueReadings,
    RouterMetrics,
    SemanticClass,
    WorkerMetrics,
    WorkerReadings,
)
from common.wire import registry_pb2, types_pb2, worker_pb2
from router.observe.targets import scrape_targets

FOLDER = Path(__file__).parents[2] / "deploy" / "dashboards"
BOARD: dict[str, Any] = json.loads((FOLDER / "pdserve.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PROMETHEUS_OWN = {"up"}
_NAME = re.compile(r"\b(?:vllm:|pdserve_)[a-z_]+")
_SELECTOR = re.compile(r"((?:vllm:|pdserve_)[a-z_]+)\{([^}]*)\}")
_LABEL = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)")
_OF_TARGETS = {"process", "worker", "instance", "job", "cluster"}  # what a scrape adds

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")

WORKER = WorkerReadings(
    requests_running=1,
    requests_waiting=1,
    blocks_total=8,
    blocks_free=2,
    blocks_cached=2,
    blocks_used=4,
    blocks_in_transfer=0,
    leases=LeaseReadings(),
    block_tokens=16,
    computed_tokens=1,
    generated_tokens=1,
    preemptions=1,
    prefix_queries=1,
    prefix_hits=1,
    drafted_tokens=2,
    accepted_tokens=1,
    steps_by_accepted=(1, 1),
    guesses_by_author={"ngram": (2, 1)},
    work_s={"prefill": 1.0, "decode": 1.0, "wasted": 1.0},
    masks=MaskReadings(),
)


def registries() -> dict[str, CollectorRegistry]:
    """One per kind of process, made by the product's own classes, with something in every gauge."""
    router = CollectorRegistry()
    metrics = RouterMetrics(router)
    metrics.read_inflight_from(lambda: {"m": 1})
    metrics.semantic.read_from(lambda: ([SemanticClass("m", "proven", 0.9, 0.0, 0.01)], 1), promised_ratio=0.01)
    metrics.store.read_size_from(lambda: (1, 1))
    metrics.store.read_breaker_from(lambda: "closed")
    metrics.admission.read_queues_from(lambda: [QueueReadings("m", "interactive", 1, 1, 0.0, 0.0)])
    cost = CostReadings("m", {"decode": 1.0}, 1.0, {"decode": 1}, {"decode": 1.0}, 1.0)
    readings = ObserveReadings((PromiseReadings("interactive", 1.0, 1.0),), (cost,), {("m", "interactive"): 1.0})
    metrics.observe.read_from(lambda: readings)
    worker = CollectorRegistry()
    WorkerMetrics(worker, model="m", role="decode", read=lambda: WORKER)
    manager = CollectorRegistry()
    pools = [PoolReadings("m", role, 1, {"ready": 1, "starting": 0}, 0) for role in ("prefill", "decode")]
    ManagerMetrics(manager, read=lambda: pools, routers=lambda: 1)
    return {"router": router, "worker": worker, "manager": manager}


def known() -> dict[str, set[str] | None]:
    """Every sample's name with its labels; None where no sample tells them yet."""
    names: dict[str, set[str] | None] = {}
    for registry in registries().values():
        for family in registry.collect():
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}[family.type]
            names.update({family.name + suffix: None for suffix in suffixes if family.name + suffix not in names})
            for sample in family.samples:
                names[sample.name] = set(sample.labels)
    return names


def expressions() -> Iterator[tuple[str, str]]:
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']!r}", target["expr"]
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["definition"]
    for rule in RULES:
        yield f"alert {rule['alert']}", rule["expr"]


def unknown_in(expression: str, names: dict[str, set[str] | None]) -> list[str]:
    found = [name for name in _NAME.findall(expression) if name not in names]
    for name, selector in _SELECTOR.findall(expression):
        labels = names.get(name)
        if labels:
            found += [f"{name}{{{label}}}" for label in _LABEL.findall(selector) if label not in labels | _OF_TARGETS]
    return found


def test_every_metric_and_label_that_board_and_alerts_name_exists() -> None:
    names = known()
    wrong = {where: unknown for where, expression in expressions() if (unknown := unknown_in(expression, names))}
    assert not wrong
    assert unknown_in('sum(rate(pdserve_transfers{x="1"}[1m])) + pdserve_no_such', names) == [
        "pdserve_transfers",
        "pdserve_no_such",
    ]
    assert unknown_in('pdserve_slo_met_ratio{slo="a",colour="b"}', names) == ["pdserve_slo_met_ratio{colour}"]


def test_no_label_of_a_target_is_one_of_its_metrics() -> None:
    """Prometheus would rename the metric's."""
    info = worker_pb2.InfoReply(metrics_address="a:1", role=types_pb2.ROLE_DECODE)
    router = registry_pb2.RouterInfo(http_address="b:1")
    snapshot = registry_pb2.ClusterSnapshot(workers=[info], routers=[router], manager_metrics_address="c:1")
    targets = {target["labels"]["process"]: set(target["labels"]) for target in scrape_targets(snapshot)}
    assert targets.keys() == registries().keys()
    for process, registry in registries().items():
        used = {label for family in registry.collect() for sample in family.samples for label in sample.labels}
        assert not used & (targets[process] | {"instance", "job"}), process


def test_the_board_shows_every_part_and_no_panel_twice() -> None:
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Overview", "Pools", "Hand-off", "Caches", "Speculation and structured output", "Fairness", "Cost"]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in BOARD["panels"]]
    covered = [(x + dx, y + dy) for x, y, w, h in places for dx in range(w) for dy in range(h)]
    assert len(set(covered)) == len(covered), "panels lie on each other"


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "runbook"}, rule["alert"]
        assert all(text.endswith(".") for text in rule["annotations"].values()), rule["alert"]


def promtool(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["promtool", *arguments], input=given, capture_output=True, check=False, timeout=60)


@needs_promtool
def test_promtool_accepts_rules_and_configuration() -> None:
    for arguments in (("check", "rules", str(FOLDER / "alerts.yaml")), ("check", "config", str(FOLDER / "prometheus.yaml"))):
        result = promtool(*arguments)
        assert result.returncode == 0, (result.stdout + result.stderr).decode()


@needs_promtool
@pytest.mark.long
def test_alerts_fire_and_do_not_fire() -> None:
    cases = Path(__file__).parent / "alerts_test.yaml"
    result = promtool("test", "rules", str(cases))
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
    tested: dict[str, set[int]] = {}
    for case in yaml.safe_load(cases.read_text())["tests"]:
        for query in case["promql_expr_test"]:
            assert f'alertname="{case["name"]}"' in query["expr"]
            tested.setdefault(case["name"], set()).update(sample["value"] for sample in query["exp_samples"])
    assert {name for name, outcomes in tested.items() if outcomes == {0, 1}} == {rule["alert"] for rule in RULES}


@needs_promtool
@pytest.mark.parametrize("process", ["router", "worker", "manager"])
def test_metrics_of_every_process_follow_the_conventions(process: str) -> None:
    """vLLM's names have colons, and some end as no name should; boards know them."""
    result = promtool("check", "metrics", given=generate_latest(registries()[process]))
    complaints = [line for line in result.stdout.decode().splitlines() + result.stderr.decode().splitlines() if line.strip()]
    ours = [line for line in complaints if not line.startswith("vllm:")]
    assert not ours
