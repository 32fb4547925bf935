"""The whole of it, as its users meet it: a real cluster (Ray, manager, router, workers), openai-python and a gRPC client."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator

import grpc
import httpx
import openai
import pytest

from common.wire import inference_pb2, inference_pb2_grpc
from support.cluster import WORKER_START_S, RunningCluster
from support.more_routers import Balanced, another_router
from support.steady_load import Question, ask

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PROMPT = [(7 * index) % 370 + 3 for index in range(120)]
FRESH = {"x-cache": "bypass"}  # an answer that is given again says nothing about workers
MESSAGES = [{"role": "user", "content": "tell me of the word that they had for it"}]


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{cluster.base_url}/v1", api_key="unused", max_retries=0, http_client=http, default_headers=FRESH
    ) as client:
        yield client


@pytest.fixture
async def async_client(cluster: RunningCluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{cluster.base_url}/v1",
        api_key="unused",
        max_retries=0,
        default_headers=FRESH,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )


def test_openai_python_does_what_its_users_do(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"

    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"

    streamed, usage, finish = "", None, None
    for chunk in client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.choices:
            streamed += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
        usage = chunk.usage or usage
    assert streamed == whole.choices[0].message.content
    assert finish == "length"
    assert usage is not None
    assert usage.prompt_tokens == whole.usage.prompt_tokens

    several = client.completions.create(model="tiny", prompt=PROMPT, n=3, seed=5, temperature=0.9, max_tokens=6, logprobs=2)
    again = client.completions.create(model="tiny", prompt=PROMPT, n=3, seed=5, temperature=0.9, max_tokens=6, logprobs=2)
    assert len({choice.text for choice in several.choices}) > 1
    assert [choice.text for choice in several.choices] == [choice.text for choice in again.choices]
    assert all(choice.logprobs and len(choice.logprobs.token_logprobs or []) == 6 for choice in several.choices)

    rules = {"presence_penalty": 0.5, "frequency_penalty": 2.0, "logit_bias": {"300": 100, "301": 100}}  # " fr" and " fro"
    forced = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, **rules).choices[0].text
    assert forced.replace(" fro", "").replace(" fr", "") == ""
    assert forced.count(" fr") == 12
    assert 0 < forced.count(" fro") < 12, "penalties on what was said make it say the other"

    echoed = client.completions.create(model="tiny", prompt=PROMPT[:20], echo=True, logprobs=1, max_tokens=1, temperature=0)
    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 21
    assert logprobs.token_logprobs[0] is None


def test_openai_python_sees_proper_exceptions(client: openai.OpenAI) -> None:
    def chat(**change: object) -> None:
        arguments: dict[str, object] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **change}
        client.chat.completions.create(**arguments)  # type: ignore[call-overload]

    with pytest.raises(openai.NotFoundError):
        chat(model="nobody")
    for field, value in {"temperature": 9, "n": 0, "top_p": 7, "max_tokens": -1}.items():
        with pytest.raises(openai.BadRequestError) as caught:
            chat(**{field: value})
        assert caught.value.param == field
    with pytest.raises(openai.BadRequestError, match=r"2048|context"):
        client.completions.create(model="tiny", prompt=[5] * 5000)


def test_prefill_happens_on_another_process_and_its_kv_travels(disaggregated: RunningCluster) -> None:
    body = {"model": "tiny", "prompt": [9, *PROMPT], "max_tokens": 4, "temperature": 0, "pdserve_timings": True}
    answer = httpx.post(f"{disaggregated.base_url}/v1/completions", json=body, trust_env=False, timeout=120.0)
    timings = answer.json()["timings"]
    assert timings["transport"] == "shm"
    assert timings["prefill_worker"] == disaggregated.workers("prefill")[0]["worker_id"]
    pids = {worker["pid"] for worker in disaggregated.status()["workers"]}
    assert len(pids) == 2


def test_every_process_shows_its_metrics(cluster: RunningCluster, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2)
    status = cluster.status()
    seen = {
        "vllm:time_to_first_token_seconds_count": cluster.base_url,
        "pdserve_pool_desired_workers": f"http://{status['manager_metrics_address']}",
    }
    texts = [httpx.get(f"{address}/metrics", trust_env=False).text for address in seen.values()]
    texts += [httpx.get(f"http://{worker['metrics_address']}/metrics", trust_env=False).text for worker in status["workers"]]
    for name, text in zip([*seen, *["pdserve_kv_blocks"] * len(status["workers"])], texts, strict=True):
        assert name in text
    assert all(f'role="{role}"' in texts[1] for role in ("prefill", "decode"))


def test_doctor_tries_every_link_and_leaves_nothing(cluster: RunningCluster) -> None:
    found = cluster.cli("doctor", "--json", "--cluster", cluster.name)
    told = json.loads(found.stdout)
    assert found.returncode == told["status"] in (0, 1), told["findings"]  # the machine may have what should be mended
    assert all(one["severity"] == "ok" for one in told["findings"] if one["area"] in ("config", "models", "ports", "cluster"))
    links = {link["transport"]: link for link in told["links"]}
    assert links["shm"]["in_use"]
    assert links["tcp"]["works"]
    assert all(link["mebibytes_per_s"] > 0 and link["latency_ms"] > 0 for link in links.values() if link["works"])
    assert "what to do" in cluster.cli("doctor", "--cluster", cluster.name).stdout
    cluster.wait_for("clean pools", cluster.nothing_leaks)


def test_an_operator_sees_a_request_in_top_and_logs(cluster: RunningCluster) -> None:
    """The same request in the figures of `top`, and in the logs of router and workers, by its id."""
    headers = {"x-request-id": "watched"}
    body = {"model": "tiny", "prompt": [11, *PROMPT], "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{cluster.base_url}/v1/completions", json=body, headers=headers, trust_env=False, timeout=120.0)
    assert answer.status_code == 200
    seen = json.loads(cluster.cli("top", "--once", "--json", "--cluster", cluster.name).stdout)
    assert seen["models"][0]["ttft"]["p50_s"] > 0
    assert [worker["state"] for worker in seen["workers"]] == ["ready", "ready"]
    assert all(worker["answers"] and worker["step_p50_s"] > 0 for worker in seen["workers"])
    drawn = cluster.cli("top", "--once", "--cluster", cluster.name)
    assert "tiny/decode/0" in drawn.stdout
    lines = cluster.cli("logs", "--request", "watched", "--json", "--cluster", cluster.name).stdout.splitlines()
    (decode,) = cluster.workers("decode")
    assert {json.loads(line)["process"] for line in lines} >= {"router", f"tiny/decode/0#{decode['incarnation']}"}
    assert "cluster starting" in cluster.cli("logs", "launcher", "--cluster", cluster.name).stdout
    status = json.loads(cluster.cli("status", "--json", "--cluster", cluster.name).stdout)
    assert status["up_s"] > 0
    assert all(process["up_s"] > 0 for process in (*status["routers"], *status["workers"]))


def test_a_grpc_client_does_the_same(cluster: RunningCluster, client: openai.OpenAI) -> None:
    expected = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert [model.id for model in stub.ListModels(inference_pb2.ListModelsRequest(), timeout=120.0).models] == ["tiny"]
        tokens = inference_pb2.TokenIds(ids=PROMPT)
        request = inference_pb2.InferenceRequest(model="tiny", prompt_token_ids=tokens, max_tokens=8, temperature=0)
        events = list(stub.Generate(request, timeout=120.0, metadata=tuple(FRESH.items())))
        assert "".join(event.text for event in events) == expected
        assert events[-1].usage.completion_tokens == 8
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(inference_pb2.InferenceRequest(model="nobody", prompt="x"), timeout=120.0))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(inference_pb2.InferenceRequest(model="tiny", prompt="x", temperature=9), timeout=120.0))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "temperature" in caught.value.details()


async def test_two_hundred_requests_with_random_cancels_and_disconnects(
    cluster: RunningCluster, async_client: openai.AsyncOpenAI
) -> None:
    chance = random.Random(3)
    gate = asyncio.Semaphore(12)

    async def one(number: int) -> str:
        prompt = [number + 3, *PROMPT[: chance.randrange(1, 100)]]
        how = chance.choice(["whole", "stream", "leave at once", "leave in the middle"])
        arguments = {"model": "tiny", "prompt": prompt, "max_tokens": chance.randrange(1, 30), "n": 1 + number % 2}
        async with gate:
            if how == "whole":
                await async_client.completions.create(**arguments)
            elif how == "leave at once":
                task = asyncio.ensure_future(async_client.completions.create(**arguments))
                await asyncio.sleep(chance.random() * 0.05)
                task.cancel()
                await asyncio.wait([task])
            else:
                stream = await async_client.completions.create(stream=True, **arguments)
                seen = 0
                async for _ in stream:
                    seen += 1
                    if how == "leave in the middle" and seen == 2:
                        await stream.close()
                        break
        return how

    outcomes = await asyncio.gather(*(one(number) for number in range(200)))
    assert len(set(outcomes)) == 4
    await async_client.close()
    await asyncio.to_thread(cluster.wait_for, "clean pools", cluster.nothing_leaks)


async def test_scaling_while_requests_run_fails_none_and_all_four_serve(
    disaggregated: RunningCluster, async_client: openai.AsyncOpenAI
) -> None:
    client = async_client.with_options(base_url=f"{disaggregated.base_url}/v1")
    stop = asyncio.Event()
    expected: dict[int, str] = {}
    count = 0

    async def load(lane: int) -> None:
        nonlocal count
        while not stop.is_set():
            number = count % 97  # more prompts than fit into the pools: there is always something to prefill
            count += 1
            answer = await client.completions.create(
                model="tiny", prompt=[number + 3, *PROMPT], max_tokens=10, temperature=0.8, seed=number
            )
            text = answer.choices[0].text
            assert expected.setdefault(number, text) == text, "the answer changed while scaling"

    lanes = [asyncio.ensure_future(load(lane)) for lane in range(4)]
    try:
        scaled = await asyncio.to_thread(
            disaggregated.cli,
            "scale",
            "tiny",
            "--prefill",
            "2",
            "--decode",
            "2",
            "--cluster",
            disaggregated.name,
            "--wait",
            str(WORKER_START_S),
        )
        assert scaled.returncode == 0, scaled.stderr

        def all_serve() -> bool:
            workers = disaggregated.status()["workers"]
            return len(workers) == 4 and all(worker["requests_served"] > 0 for worker in workers)

        await asyncio.to_thread(disaggregated.wait_for, "request served by each of four workers", all_serve)
        back = await asyncio.to_thread(
            disaggregated.cli,
            "scale",
            "tiny",
            "--prefill",
            "1",
            "--decode",
            "1",
            "--cluster",
            disaggregated.name,
            "--wait",
            str(WORKER_START_S),
        )
        assert back.returncode == 0, back.stderr
        await asyncio.to_thread(disaggregated.wait_for, "answers", lambda: count > 20)
    finally:
        stop.set()
        await asyncio.gather(*lanes)
    await async_client.close()
    assert count > 20
    assert len(await asyncio.to_thread(lambda: disaggregated.status()["workers"])) == 2


def test_routers_are_replaced_one_by_one_and_no_answer_is_lost(cluster: RunningCluster) -> None:
    """Two of them; each in turn is told to stop while it streams, and a new one comes. All give the same answers."""
    questions = [Question([index + 3, *PROMPT[:40]], seed=index, temperature=0.8, max_tokens=60) for index in range(5)]
    first = cluster.base_url
    with httpx.Client(trust_env=False, timeout=120.0) as client:
        known = [(question, ask(client, first, "tiny", question).text) for question in questions]
    with another_router(cluster) as second:
        load = Balanced(known, [first, second.base_url], "tiny")
        with load.asking(clients=6):
            cluster.wait_for("answers of both", lambda: all(load.served.get(url, 0) > 5 for url in load.urls))
            with another_router(cluster) as third:
                load.urls = [first, second.base_url, third.base_url]
                cluster.wait_for("answers of the third", lambda: load.served.get(third.base_url, 0) > 5)
                assert second.drain() == 0
                at_its_end = load.served[second.base_url]
                load.urls = [first, third.base_url]
                so_far = load.served[third.base_url]
                cluster.wait_for("answers without the second", lambda: load.served[third.base_url] > so_far + 5)
                load.urls = [first]
                assert third.drain() == 0
    assert load.wrong == []
    assert load.served[second.base_url] == at_its_end
    cluster.wait_for("one router and clean pools", lambda: len(cluster.status()["routers"]) == 1 and cluster.nothing_leaks())


def test_a_killed_prefill_worker_is_not_noticed(cluster: RunningCluster, client: openai.OpenAI) -> None:
    before = client.completions.create(model="tiny", prompt=[11, *PROMPT], max_tokens=8, temperature=0).choices[0].text
    old = cluster.workers("prefill")[0]
    os.kill(old["pid"], signal.SIGKILL)
    for _ in range(5):
        again = client.completions.create(model="tiny", prompt=[11, *PROMPT], max_tokens=8, temperature=0)
        assert again.choices[0].text == before

    def restarted() -> bool:
        ready = cluster.workers("prefill")
        return bool(ready) and ready[0]["incarnation"] > old["incarnation"] and ready[0]["pid"] != old["pid"]

    cluster.wait_for("new incarnation of the prefill worker", restarted)
    cluster.wait_for("clean pools", cluster.nothing_leaks)


async def test_a_killed_decode_worker_is_not_noticed(cluster: RunningCluster, async_client: openai.AsyncOpenAI) -> None:
    """There is but one: its answers, a greedy and a drawn one, wait for its next incarnation and go on there."""
    bodies = [
        {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, **sampling}
        for sampling in ({"temperature": 0}, {"temperature": 0.8, "seed": 5})
    ]
    unbroken = [await async_client.completions.create(**body) for body in bodies]
    (old,) = await asyncio.to_thread(cluster.workers, "decode")
    begun = [asyncio.Event() for _ in bodies]

    async def hear(body: dict[str, object], begun: asyncio.Event) -> tuple[str, list[str]]:
        text, finishes, heard = "", [], 0
        async for event in await async_client.completions.create(**body, stream=True):
            heard += 1
            if heard == 3:
                begun.set()
            text += event.choices[0].text
            finishes += [event.choices[0].finish_reason] if event.choices[0].finish_reason else []
        return text, finishes

    hearing = [asyncio.create_task(hear(body, event)) for body, event in zip(bodies, begun, strict=True)]
    await asyncio.gather(*(event.wait() for event in begun))
    os.kill(old["pid"], signal.SIGKILL)
    heard = await asyncio.gather(*hearing)
    assert heard == [(one.choices[0].text, [one.choices[0].finish_reason]) for one in unbroken]
    # On a busy machine an answer may have been computed whole before its reader asked for the kill.
    following = [old["incarnation"] + 1]
    await asyncio.to_thread(
        cluster.wait_for, "the next incarnation", lambda: [one["incarnation"] for one in cluster.workers("decode")] == following
    )
    metrics = await asyncio.to_thread(lambda: httpx.get(f"{cluster.base_url}/metrics", trust_env=False).text)
    assert "pdserve_router_migrations_total" in metrics
    await async_client.close()
    await asyncio.to_thread(cluster.wait_for, "clean pools", cluster.nothing_leaks)
