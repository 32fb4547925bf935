"""The default model as a cluster of groups: TP 2 prefills, TP 2 decodes, asked over HTTP; and a rank is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.model_store import ModelFiles
from support.cluster import RunningCluster, launched

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(240)]

QUESTION = {"role": "user", "content": "Name the capital of France and tell me a little about its rivers and its bridges."}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFiles) -> Iterator[RunningCluster]:
    model = {
        "name": "smollm2",
        "source": str(smollm2.path),
        "engine": {"kv_pool_tokens": 2048, "threads": 1, "kernels": "torch"},
        "prefill": {"tensor_parallel": 2},
        "decode": {"tensor_parallel": 2, "local_prefill": "never"},
    }
    with launched(
        tmp_path_factory.mktemp("ranks"), model_path=smollm2.path, name="ranks", settings={"models": [model]}
    ) as running:
        yield running


def ask(cluster: RunningCluster) -> str:
    body = {"model": "smollm2", "messages": [QUESTION], "max_tokens": 16, "temperature": 0}
    reply = httpx.post(f"{cluster.base_url}/v1/chat/completions", json=body, timeout=60.0, trust_env=False)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def test_the_default_model_serves_on_two_shards_and_survives_the_loss_of_one(cluster: RunningCluster) -> None:
    answer = ask(cluster)
    assert "Paris" in answer
    (decode,) = cluster.workers("decode")
    assert (decode["tensor_parallel"], decode["pipeline_parallel"], len(decode["rank_pids"])) == (2, 1, 1)
    os.kill(decode["rank_pids"][0], signal.SIGKILL)
    cluster.wait_for("a new group", lambda: [one["incarnation"] for one in cluster.workers("decode")] == [2], 60.0)
    (renewed,) = cluster.workers("decode")
    assert renewed["rank_pids"] != decode["rank_pids"]
    assert not Path(f"/proc/{decode['pid']}").exists()
    assert ask(cluster) == answer
    cluster.wait_for("free blocks", cluster.nothing_leaks)
