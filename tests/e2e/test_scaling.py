"""Pools that change under load and lose nothing: a real cluster, clients that check every answer to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from support.cluster import RunningCluster, launched
from support.exact_load import ExactLoad, asks
from support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PROMPTS = asks(6, prompt_tokens=400, max_tokens=2, seed=1)
OUTPUTS = asks(6, prompt_tokens=20, max_tokens=80, seed=2)

AUTOSCALING = {
    "prefill": {"min_replicas": 0, "max_replicas": 2},
    "decode": {"min_replicas": 0, "max_replicas": 2},
    "idle_s": 6.0,
    "max_workers": 3,
    "target_utilization": 0.2,
    "target_ongoing_requests": 2.0,
    "look_back_period_s": 2.0,
    "flip_delay_s": 1.0,
    "upscale_delay_s": 2.0,
    "cooldown_s": 1.0,
    "interval_s": 0.5,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("scaling")
    path = make_tiny_model(folder / "tiny", seed=4)
    model = {
        "name": "tiny",
        "source": str(path),
        "engine": {"dtype": "float32", "exact": True, "kv_pool_tokens": 8192, "threads": 1},
        "decode": {"local_prefill": "never"},
        "autoscaling": AUTOSCALING,
    }
    with launched(
        folder, model_path=path, name="scaling", settings={"models": [model], "ray": {"num_cpus_per_worker": 0.01}}
    ) as running:
        yield running


def order(cluster: RunningCluster, *arguments: str) -> None:
    done = cluster.cli(*arguments, "--cluster", cluster.name, timeout_s=300.0)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)


def sizes(cluster: RunningCluster) -> tuple[int, int]:
    return len(cluster.workers("prefill")), len(cluster.workers("decode"))


def test_scale_flip_drain_and_roll_under_load_lose_no_request_and_change_no_token(cluster: RunningCluster) -> None:
    load = ExactLoad(cluster.base_url, "tiny")
    load.expect([*PROMPTS, *OUTPUTS])
    before = {worker["pid"] for role in ("prefill", "decode") for worker in cluster.workers(role)}
    with load.asking([*PROMPTS, *OUTPUTS], clients=4):
        order(cluster, "scale", "tiny", "--prefill", "2")
        (flipped,) = [worker["pid"] for worker in cluster.workers("prefill") if worker["worker_id"] == "tiny/prefill/1"]
        order(cluster, "flip", "tiny/prefill/1", "decode")
        assert sizes(cluster) == (1, 2)
        assert flipped in {worker["pid"] for worker in cluster.workers("decode")}
        order(cluster, "flip", "tiny/decode/1", "prefill")
        assert flipped in {worker["pid"] for worker in cluster.workers("prefill")}
        (drained,) = [worker["pid"] for worker in cluster.workers("decode")]
        order(cluster, "drain", "tiny/decode/0")
        assert drained not in {worker["pid"] for worker in cluster.workers("decode")}
        order(cluster, "roll", "tiny", "--role", "prefill")
        assert sizes(cluster) == (2, 1)
        after = {worker["pid"] for role in ("prefill", "decode") for worker in cluster.workers(role)}
        assert not after & (before | {flipped})
        cluster.wait_for("answers", lambda: load.served > 20 or load.wrong)
    assert load.wrong == []
    assert load.served > 20
    cluster.wait_for("every block back", cluster.nothing_leaks)


def test_the_autoscaler_follows_the_load_by_changing_roles(cluster: RunningCluster) -> None:
    load = ExactLoad(cluster.base_url, "tiny")
    load.expect([*PROMPTS, *OUTPUTS])
    assert sizes(cluster) == (2, 1)
    with load.asking(OUTPUTS, clients=6):
        order(cluster, "autoscaler", "tiny", "--mode", "on")
        cluster.wait_for("a second decode worker", lambda: sizes(cluster) == (1, 2), timeout_s=150.0)
    with load.asking(PROMPTS, clients=6):
        cluster.wait_for("a second prefill worker", lambda: sizes(cluster) == (2, 1), timeout_s=150.0)
        cluster.wait_for("answers", lambda: load.served > 20 or load.wrong)
        order(cluster, "autoscaler", "tiny", "--mode", "off")
    told = json.loads(cluster.cli("autoscaler", "tiny", "--json", "--cluster", cluster.name).stdout)
    flips = [one for one in told["models"][0]["decisions"] if one["action"] == "flip"]
    assert [one["after"] for one in flips][:2] == [[1, 2], [2, 1]]
    assert all(one["performed"] and one["reason"] for one in flips)
    assert load.wrong == []
    assert load.served > 20
    cluster.wait_for("every block back", cluster.nothing_leaks)


def test_a_model_that_nobody_uses_sleeps_and_wakes_for_a_request(cluster: RunningCluster) -> None:
    load = ExactLoad(cluster.base_url, "tiny")
    load.expect(OUTPUTS)
    order(cluster, "autoscaler", "tiny", "--mode", "on")
    cluster.wait_for("sleep", lambda: not cluster.status()["workers"], timeout_s=150.0)
    expected, load.answers = load.answers, {}
    load.expect(OUTPUTS)
    assert load.answers == expected
    assert sizes(cluster) == (1, 1)
