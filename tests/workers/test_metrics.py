"""What a scrape of real workers shows after a few requests: every part of it moves, and the parts agree."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.codec import work_from_wire
from common.config import DecodeConfig, EngineConfig, PrefillConfig, SpeculationConfig
from common.types import Grammar, GrammarKind, WorkAccount
from support.tiny_models import make_tiny_model
from support.workers import Workers, request, running_workers

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=4096)
_ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"  # as Prometheus asks
LETTERS = Grammar(GrammarKind.REGEX, "[a-z]{3,8}")


async def scrape(workers: Workers, address: str) -> tuple[str, dict[tuple[str, str], float]]:
    """The text, and values by name and the labels beyond those that every metric has."""
    where = (await workers.info(address)).metrics_address
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"http://{where}/metrics", headers={"accept": _ACCEPT})).text
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            more = ",".join(
                value for label, value in sorted(sample.labels.items()) if label not in ("model_name", "engine", "le")
            )
            values[sample.name, more] = sample.value
    return text, values


async def account_of(workers: Workers, prompt: list[int], name: str) -> WorkAccount:
    accounts = [
        event.account async for event in workers.open(request(prompt, max_tokens=6, request_id=name)) if event.HasField("account")
    ]
    (account,) = accounts
    return work_from_wire(account)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


async def test_a_scrape_tells_what_was_done(model_path: Path) -> None:
    speculation = SpeculationConfig(method="ngram")
    async with running_workers(
        model_path,
        engine=ENGINE,
        decode=DecodeConfig(local_prefill="never", speculation=speculation),
        prefill=PrefillConfig(chunk_tokens=16),
    ) as workers:
        prompt = [(7 * index) % 90 + 5 for index in range(70)]
        first = await account_of(workers, prompt, "a")
        again = await account_of(workers, prompt, "b")
        for _ in range(2):
            asked = request(prompt, max_tokens=6)
            await workers.generate(replace(asked, sampling=replace(asked.sampling, grammar=LETTERS)))
        await workers.assert_nothing_leaks()  # a worker counts its last step when the answer is already out
        _, decode = await scrape(workers, workers.decode_ref.address)
        text, prefill = await scrape(workers, workers.prefill_refs[0].address)

    assert (first.prefill_tokens, first.cached_tokens, first.decode_tokens) == (70, 0, 6)
    assert again.prefill_tokens + again.cached_tokens == 70
    assert again.cached_tokens == 64
    assert first.prefill_s > 0
    assert first.decode_s > 0
    done = prefill["pdserve_work_seconds_total", "prefill"]
    assert done > 0
    assert done <= prefill["pdserve_step_seconds_sum", ""], "a step's time from its schedule to its end"
    assert prefill["pdserve_work_seconds_total", "decode"] == 0
    assert decode["pdserve_work_seconds_total", "decode"] > 0
    assert decode["pdserve_transfer_hidden_seconds_count", ""] == 4
    assert decode["pdserve_transfer_exposed_seconds_count", ""] == 4
    assert decode["vllm:request_inference_time_seconds_count", ""] == 4
    assert decode["pdserve_grammar_requests_total", "compiled"] == decode["pdserve_grammar_requests_total", "cached"] == 1
    assert prefill["pdserve_grammar_requests_total", "compiled"] == prefill["pdserve_grammar_requests_total", "cached"] == 1
    assert decode["pdserve_grammar_compile_seconds_count", ""] == 1
    assert decode["pdserve_grammar_compile_seconds_sum", ""] > 0
    assert decode["pdserve_kv_leases_open", ""] == decode["pdserve_kv_lease_oldest_seconds", ""] == 0
    assert decode["pdserve_kv_leases_expired_total", ""] == 0
    assert decode["vllm:num_requests_running", ""] == 0, "boards know it by this name"
    if shutil.which("promtool"):
        command = ["promtool", "check", "metrics"]
        checked = await asyncio.to_thread(subprocess.run, command, input=text.encode(), capture_output=True, timeout=60)
        complaints = (checked.stdout + checked.stderr).decode().splitlines()
        assert [line for line in complaints if line.strip() and not line.startswith("vllm:")] == []
