"""Pools that change under load and lose nothing: a real cluster, clients that check every answer to the last bit."""

from __future__ import annotations

import json

import pytest

from support.cluster import RunningCluster
from support.exact_load import ExactLoad, asks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PROMPTS = asks(6, prompt_tokens=400, max_tokens=2, seed=1)
OUTPUTS = asks(6, prompt_tokens=20, max_tokens=80, seed=2)


def order(cluster: RunningCluster, *arguments: str) -> None:
    done = cluster.cli(*arguments, "--cluster", cluster.name, timeout_s=300.0)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)


def sizes(cluster: RunningCluster) -> tuple[int, int]:
    return len(cluster.workers("prefill")), len(cluster.workers("decode"))


def test_scale_flip_drain_and_roll_under_load_lose_no_request_and_change_no_token(disaggregated: RunningCluster) -> None:
    load = ExactLoad(disaggregated.base_url, "tiny")
    load.expect([*PROMPTS, *OUTPUTS])
    before = {worker["pid"] for role in ("prefill", "decode") for worker in disaggregated.workers(role)}
    with load.asking([*PROMPTS, *OUTPUTS], clients=4):
        order(disaggregated, "scale", "tiny", "--prefill", "2")
        (flipped,) = [worker["pid"] for worker in disaggregated.workers("prefill") if worker["worker_id"] == "tiny/prefill/1"]
        order(disaggregated, "flip", "tiny/prefill/1", "decode")
        assert sizes(disaggregated) == (1, 2)
        assert flipped in {worker["pid"] for worker in disaggregated.workers("decode")}
        order(disaggregated, "flip", "tiny/decode/1", "prefill")
        assert flipped in {worker["pid"] for worker in disaggregated.workers("prefill")}
        (drained,) = [worker["pid"] for worker in disaggregated.workers("decode")]
        order(disaggregated, "drain", "tiny/decode/0")
        assert drained not in {worker["pid"] for worker in disaggregated.workers("decode")}
        order(disaggregated, "roll", "tiny", "--role", "prefill")
        assert sizes(disaggregated) == (2, 1)
        after = {worker["pid"] for role in ("prefill", "decode") for worker in disaggregated.workers(role)}
        assert not after & (before | {flipped})
        disaggregated.wait_for("answers", lambda: load.served > 20 or load.wrong)
    assert load.wrong == []
    assert load.served > 20
    disaggregated.wait_for("every block back", disaggregated.nothing_leaks)


def test_the_autoscaler_follows_the_load_by_changing_roles(disaggregated: RunningCluster) -> None:
    load = ExactLoad(disaggregated.base_url, "tiny")
    load.expect([*PROMPTS, *OUTPUTS])
    assert sizes(disaggregated) == (2, 1)
    with load.asking(OUTPUTS, clients=6):
        order(disaggregated, "autoscaler", "tiny", "--mode", "on")
        disaggregated.wait_for("a second decode worker", lambda: sizes(disaggregated) == (1, 2))
    with load.asking(PROMPTS, clients=6):
        disaggregated.wait_for("a second prefill worker", lambda: sizes(disaggregated) == (2, 1))
        disaggregated.wait_for("answers", lambda: load.served > 20 or load.wrong)
        order(disaggregated, "autoscaler", "tiny", "--mode", "off")
    told = json.loads(disaggregated.cli("autoscaler", "tiny", "--json", "--cluster", disaggregated.name).stdout)
    flips = [one for one in told["models"][0]["decisions"] if one["action"] == "flip"]
    assert [one["after"] for one in flips][:2] == [[1, 2], [2, 1]]
    assert all(one["performed"] and one["reason"] for one in flips)
    assert load.wrong == []
    assert load.served > 20
    disaggregated.wait_for("every block back", disaggregated.nothing_leaks)


def test_a_model_that_nobody_uses_sleeps_and_wakes_for_a_request(disaggregated: RunningCluster) -> None:
    load = ExactLoad(disaggregated.base_url, "tiny")
    load.expect(OUTPUTS)
    order(disaggregated, "autoscaler", "tiny", "--mode", "on")
    disaggregated.wait_for("sleep", lambda: not disaggregated.status()["workers"])
    expected, load.answers = load.answers, {}
    load.expect(OUTPUTS)
    assert load.answers == expected
    assert sizes(disaggregated) == (1, 1)
    order(disaggregated, "autoscaler", "tiny", "--mode", "off")
