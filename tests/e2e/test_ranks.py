"""A cluster of groups: TP 2 prefills, TP 2 decodes, asked over HTTP; how they are drawn; and a rank is killed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.cluster import RunningCluster, launched

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUESTION = {"role": "user", "content": "Name the capital of France and tell me a little about its rivers and its bridges."}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningCluster]:
    model = {
        "name": "tiny",
        "source": str(tiny_model),
        "engine": {"dtype": "float32", "kv_pool_tokens": 2048, "threads": 1, "kernels": "torch"},
        "prefill": {"tensor_parallel": 2},
        "decode": {"tensor_parallel": 2, "local_prefill": "never"},
    }
    with launched(tmp_path_factory.mktemp("ranks"), model_path=tiny_model, name="ranks", settings={"models": [model]}) as running:
        yield running


def ask(cluster: RunningCluster) -> str:
    body = {"model": "tiny", "messages": [QUESTION], "max_tokens": 16, "temperature": 0}
    reply = httpx.post(f"{cluster.base_url}/v1/chat/completions", json=body, timeout=120.0, trust_env=False)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def test_two_shards_say_what_one_worker_says_and_survive_the_loss_of_one(cluster: RunningCluster, groups: RunningCluster) -> None:
    answer = ask(groups)
    assert answer == ask(cluster)
    (decode,) = groups.workers("decode")
    assert (decode["tensor_parallel"], decode["pipeline_parallel"], len(decode["rank_pids"])) == (2, 1, 1)
    assert re.search(r"tiny/decode/0 +TP 2 +ready", groups.cli("status", "--cluster", groups.name).stdout)
    os.kill(decode["rank_pids"][0], signal.SIGKILL)
    groups.wait_for("a new group", lambda: [one["incarnation"] for one in groups.workers("decode")] == [2])
    (renewed,) = groups.workers("decode")
    assert renewed["rank_pids"] != decode["rank_pids"]
    assert "RankLost" in renewed["failure"]
    assert not Path(f"/proc/{decode['pid']}").exists()
    assert ask(groups) == answer
    groups.wait_for("free blocks", groups.nothing_leaks)
