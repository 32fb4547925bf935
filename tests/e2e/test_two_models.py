"""The configuration with two models as it is shipped, with both models: by name, by alias, by rule, and with one of them gone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from common.model_store import ModelFiles
from support.cluster import RunningCluster, launched

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(3000)]

# How soon four workers are up is not what is tested: a quarter of a minute of CPU time each, beside whatever else there is.
UP_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 300.0

SHIPPED = Path(__file__).parents[2] / "deploy" / "configs" / "two-models.yaml"
SMALL, LARGE = "smollm2-135m", "gemma3-270m"


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFiles, gemma3: ModelFiles) -> Iterator[RunningCluster]:
    """Its names and routes, with the models where they are, and small pools."""
    config: dict[str, Any] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("two")
    for model, path in zip(config["models"], (smollm2.path, gemma3.path), strict=True):
        model.update(source=str(path), engine={"kv_pool_tokens": 2048, "kernels": "torch", "threads": 1})
    config["models"][1]["engine"] |= {"dtype": "float32", "exact": True}  # what goes on elsewhere goes on to the last bit
    # A worker that dies has to be back within the wait, however busy the machine is.
    router = {"http_port": 0, "grpc_port": 0, "migration_wait_s": UP_TIMEOUT_S}
    settings = {"models": config["models"], "routing": config["routing"], "router": router}
    with launched(folder, model_path=smollm2.path, name="two", settings=settings, start_timeout_s=UP_TIMEOUT_S) as cluster:
        cluster.wait_for("both models", lambda: len(cluster.workers("decode")) == 2, timeout_s=UP_TIMEOUT_S)
        cluster.wait_for("both models", lambda: len(cluster.workers("prefill")) == 2, timeout_s=UP_TIMEOUT_S)
        yield cluster


def complete(cluster: RunningCluster, model: str, *, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    asked = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, **body}
    return httpx.post(
        f"{cluster.base_url}/v1/completions", json=asked, headers=headers, timeout=ANSWER_TIMEOUT_S, trust_env=False
    )


def test_both_models_behind_one_router(two_models: RunningCluster, tmp_path: Path) -> None:
    listed = httpx.get(f"{two_models.base_url}/v1/models", trust_env=False).json()["data"]
    assert {SMALL, LARGE, "auto", "best", "canary"} == {model["id"] for model in listed}
    by_name = {model: complete(two_models, model) for model in (SMALL, LARGE)}
    texts = {}
    for model, answer in by_name.items():
        assert (answer.status_code, answer.json()["model"]) == (200, model)
        assert "x-route-model" not in answer.headers
        texts[model] = answer.json()["choices"][0]["text"]
    assert len(set(texts.values())) == 2
    auto = complete(two_models, "auto")
    assert (auto.headers["x-route-model"], auto.json()["choices"][0]["text"]) == (SMALL, texts[SMALL])
    premium = complete(two_models, "auto", headers={"x-tier": "premium"})
    assert (premium.headers["x-route-model"], premium.json()["choices"][0]["text"]) == (LARGE, texts[LARGE])
    assert complete(two_models, "best").json()["choices"][0]["text"] == texts[LARGE]
    assert complete(two_models, "canary").headers["x-route-model"] in (SMALL, LARGE)

    # Only one of them has a chat template; who asks for either gets that one.
    chat = {"model": "best", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = httpx.post(f"{two_models.base_url}/v1/chat/completions", json=chat, timeout=ANSWER_TIMEOUT_S, trust_env=False)
    assert answer.headers["x-route-model"] == SMALL
    assert f"{LARGE}: InvalidRequest (messages)" in answer.headers["x-route-reason"]

    (tmp_path / "request.json").write_text('{"model": "best", "prompt": "hi"}')
    explained = two_models.cli("route", "explain", str(tmp_path / "request.json"), "--cluster", "two", timeout_s=ANSWER_TIMEOUT_S)
    assert explained.returncode == 0, explained.stderr
    assert explained.stdout.splitlines()[0] == f"best -> {LARGE}"

    # A worker of one model dies under an answer: that model alone pauses, and the answer is what it would have been.
    body = {"model": LARGE, "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    whole = complete(two_models, **body).json()["choices"][0]["text"]
    victim, heard = next(worker for worker in two_models.workers("decode") if worker["model"] == LARGE), ""
    url = f"{two_models.base_url}/v1/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=UP_TIMEOUT_S, trust_env=False) as stream:
        for number, line in enumerate(line for line in stream.iter_lines() if line.startswith("data: {")):
            if number == 2:
                os.kill(victim["pid"], signal.SIGKILL)
                assert complete(two_models, SMALL).json()["choices"][0]["text"] == texts[SMALL]
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            heard += "".join(choice["text"] for choice in event["choices"])
    assert heard == whole

    gone = two_models.cli("scale", LARGE, "--decode", "0", "--cluster", "two", timeout_s=ANSWER_TIMEOUT_S)
    assert gone.returncode == 0, gone.stderr
    two_models.wait_for("scaling", lambda: len(two_models.workers("decode")) == 1, timeout_s=ANSWER_TIMEOUT_S)
    fallen_back = complete(two_models, "best")
    assert (fallen_back.status_code, fallen_back.headers["x-route-model"]) == (200, SMALL)
    assert fallen_back.json()["choices"][0]["text"] == texts[SMALL]
    assert complete(two_models, LARGE).status_code == 503
