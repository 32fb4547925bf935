"""The load generator against a server that does exactly what the request's `fake` field says, on a real socket."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import statistics
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks import serve
from benchmarks.load import report
from benchmarks.load.client import EventCutter, Outcome, StreamReading
from benchmarks.load.drive import closed_loop, open_loop
from benchmarks.load.plan import Lengths, PlannedRequest, TokenIds, TraceScale, from_trace, mean_rate, synthetic


class FakeServer:
    """Answers as told by `fake`: {"chunks": [tokens of each chunk], "end": how the stream ends, ...}."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.keys: set[str | None] = set()
        routes = [
            Route("/v1/models", self.models),
            *(Route(path, self.generate, methods=["POST"]) for path in serve.PATHS.values()),
        ]
        self.app = Starlette(routes=routes)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake-model"}, {"id": "other"}]})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        fake = body.get("fake", {})
        if status := fake.get("status"):
            error = {"message": "no room", "type": "RateLimitError", "param": None, "code": None}
            return JSONResponse({"error": error}, status_code=status)
        if fake.get("end") == "not JSON":
            return Response("<html>", status_code=502)
        chat = request.url.path.endswith("chat/completions")
        return StreamingResponse(self.stream(body, fake, chat=chat), media_type="text/event-stream")

    async def stream(self, body: dict, fake: dict, *, chat: bool) -> AsyncIterator[bytes]:
        newline = "\r\n" if fake.get("crlf") else "\n"

        def event(payload: object) -> bytes:
            return f"data: {payload if isinstance(payload, str) else json.dumps(payload)}{newline}{newline}".encode()

        def choice(text: str, **more: object) -> dict:
            content = {"delta": {"content": text}} if chat else {"text": text}
            return {"choices": [{"index": 0, **content, "finish_reason": None, **more}]}

        chunks = fake.get("chunks", [1] * body["max_tokens"])
        if chat:
            yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for position, count in enumerate(chunks):
            yield f": keep-alive{newline}{newline}".encode()
            ids = {"token_ids": list(range(count))} if body.get("return_token_ids") and not fake.get("no_ids") else {}
            yield event(choice("x" * count, **ids))
            if position == 1 and fake.get("end") == "hang":
                await asyncio.Event().wait()
            if position == 1 and fake.get("end") == "error event":
                yield event({"error": {"message": "worker gone", "type": "ServiceUnavailableError"}})
                yield event("[DONE]")
                return
            if position == 1 and fake.get("end") == "malformed":
                yield event('{"choices": [}')
            if position == 1 and fake.get("end") == "die":
                raise ConnectionAbortedError
        yield event(choice("", finish_reason="length"))
        if not fake.get("no_usage"):
            usage = {"prompt_tokens": 7, "completion_tokens": sum(chunks), "prompt_tokens_details": {"cached_tokens": 3}}
            yield event({"choices": [], "usage": usage})
        if fake.get("end") != "no DONE":
            yield event("[DONE]")


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait in its backlog until the server is up
    server = uvicorn.Server(uvicorn.Config(fake.app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield fake, f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=60)
    listener.close()
    assert not thread.is_alive()


@pytest.fixture
def bench(running: tuple[FakeServer, str], tmp_path: Path):
    """Runs the program; gives its exit status, its JSON, and the bodies that the server saw."""
    fake, url = running

    def run(*arguments: str, **told: object) -> tuple[int, dict, list[dict]]:
        fake.bodies.clear()
        fake.keys.clear()
        path = tmp_path / "run.json"
        extra = ("--extra-body", json.dumps({"fake": told})) if told else ()
        status = serve.main(["--base-url", url, "--warmup", "0", "--json", str(path), *arguments, *extra])
        return status, json.loads(path.read_text()), fake.bodies

    return run


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("load", [("--concurrency", "3"), ("--rate", "500")])
def test_every_token_of_every_request_is_counted(bench, endpoint: str, load: tuple[str, str]) -> None:
    status, result, bodies = bench(*load, "--num-requests", "12", "--output-tokens", "5", "--endpoint", endpoint)
    figures = result["figures"]
    assert status == 0
    assert (figures["submitted"], figures["succeeded"], figures["errors"]) == (12, 12, {})
    assert (figures["output_tokens"], figures["prompt_tokens"], figures["cached_prompt_tokens"]) == (60, 84, 36)
    assert figures["tokens_per_chunk"] == 1.0
    assert figures["shorter_than_asked"] == 0
    assert len(bodies) == 12
    assert {body["model"] for body in bodies} == {"fake-model"}
    assert sorted(row["index"] for row in result["requests"]) == list(range(12))
    for row in result["requests"]:
        moments = [moment for moment, _ in row["chunks"]]
        assert len(moments) == 5
        assert row["intended_s"] <= row["sent_s"] <= moments[0]
        assert sorted(moments) == moments
        assert moments[-1] <= row["end_s"]


@pytest.mark.parametrize(
    ("told", "chunks", "tokens"),
    [
        ({"chunks": [1, 3, 2]}, [1, 3, 2], 6),  # ids say how many tokens a chunk has
        ({"chunks": [1, 3, 2], "no_ids": True}, [1, 1, 1], 6),  # only the usage says it
        ({"chunks": [1, 3, 2], "no_usage": True}, [1, 3, 2], 6),  # only the ids say it
        ({"chunks": [1, 3, 2], "no_usage": True, "no_ids": True}, [1, 1, 1], 3),  # nobody says it
        ({"chunks": [2, 2, 2], "crlf": True}, [2, 2, 2], 6),
    ],
)
def test_chunks_with_several_tokens(bench, told: dict, chunks: list[int], tokens: int) -> None:
    status, result, _ = bench("--concurrency", "1", "--num-requests", "2", "--output-tokens", "6", **told)
    assert status == 0
    assert [[count for _, count in row["chunks"]] for row in result["requests"]] == [chunks, chunks]
    assert result["figures"]["output_tokens"] == 2 * tokens
    assert result["figures"]["tokens_per_chunk"] == tokens / 3
    assert result["figures"]["shorter_than_asked"] == (0 if tokens == 6 else 2)


@pytest.mark.parametrize(
    ("told", "kind", "detail"),
    [
        ({"status": 429}, "HTTP 429: RateLimitError", "no room"),
        ({"end": "not JSON"}, "HTTP 502", "<html>"),
        ({"end": "error event"}, "error event: ServiceUnavailableError", "worker gone"),
        ({"end": "malformed"}, "malformed event", ""),
        ({"end": "no DONE"}, "ended without [DONE]", ""),
        ({"end": "die"}, "disconnected", "within the answer"),
        ({"end": "hang"}, "timeout", ""),
        ({"chunks": []}, "no tokens", ""),
    ],
)
def test_each_failure_is_counted_under_its_kind_and_in_no_figure(bench, told: dict, kind: str, detail: str) -> None:
    slo = ("--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000")
    status, result, _ = bench("--concurrency", "2", "--num-requests", "4", "--timeout-s", "1", *slo, **told)
    figures = result["figures"]
    assert status == 1
    assert list(figures["errors"]) == [kind]
    assert figures["errors"][kind]["count"] == 4
    assert detail in figures["errors"][kind]["example"]
    assert (figures["succeeded"], figures["output_tokens"], figures["ttft_ms"]) == (0, 0, {})
    assert (figures["slo"]["attainment"], figures["slo"]["goodput_requests_per_s"]) == (0, 0)


def test_a_server_that_is_not_there_is_an_error_and_not_a_crash(tmp_path: Path, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert serve.main(["--base-url", url, "--concurrency", "1"]) == 2
    assert url in capsys.readouterr().err
    path = tmp_path / "run.json"
    arguments = ["--base-url", url, "--model", "m", "--rate", "1000", "--num-requests", "3", "--json", str(path)]
    assert serve.main(arguments) == 1
    assert json.loads(path.read_text())["figures"]["errors"]["connection: ConnectionRefusedError"]["count"] == 3


def test_the_load_is_a_function_of_the_seed(bench) -> None:
    def bodies(*more: str) -> list[dict]:
        arguments = ("--concurrency", "1", "--num-requests", "6", "--input-tokens", "40:0.5", "--shared-prefix-tokens", "10")
        return [dict(body) for body in bench(*arguments, "--output-tokens", "2", *more)[2]]

    first, again, other = bodies(), bodies(), bodies("--seed", "1")
    assert first == again
    assert [body["prompt"] for body in first] != [body["prompt"] for body in other]
    assert len({tuple(body["prompt"][:10]) for body in first}) == 1
    assert len({tuple(body["prompt"][10:]) for body in first}) == 6
    assert len({body["seed"] for body in first}) == 6
    assert all(1_000 <= token_id < 30_000 for body in first for token_id in body["prompt"])
    sent = {key: first[0][key] for key in ("max_tokens", "temperature", "ignore_eos", "stream", "stream_options")}
    assert sent == {
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_warm_up_is_sent_and_not_counted_and_its_prompts_are_others(bench) -> None:
    _, result, bodies = bench("--concurrency", "1", "--num-requests", "3", "--warmup", "2", "--output-tokens", "1")
    assert result["figures"]["submitted"] == 3
    assert len({tuple(body["prompt"]) for body in bodies}) == 5


def test_the_key_is_sent_and_reported_nowhere(bench, running, capsys) -> None:
    for spelling in (["--api-key", "s3cret"], ["--api-key=s3cret"]):
        _, result, _ = bench("--concurrency", "1", "--num-requests", "1", *spelling)
        assert running[0].keys == {"Bearer s3cret"}
        assert "s3cret" not in json.dumps(result) + capsys.readouterr().out
        assert "***" in result["command"]


def test_the_report_names_its_conditions(bench, capsys) -> None:
    slo = ("--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000")
    _, result, _ = bench("--concurrency", "2", "--num-requests", "4", "--output-tokens", "3", *slo)
    machine = result["machine"]
    assert machine.keys() >= {"date", "commit", "cpu", "cores", "versions", "load_average_before", "load_average_after"}
    assert result["command"].startswith("python -m benchmarks.serve --base-url")
    out = capsys.readouterr().out
    for word in ("4 of 4 succeeded", "TTFT", "TPOT", "ITL", "E2E", "p99", "load average", machine["commit"], "attainment 100.0%"):
        assert word in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--rate", "1", "--concurrency", "1"],
        ["--rate", "0"],
        ["--rate", "1", "--slo-ttft-ms", "5"],
        ["--rate", "1", "--input-tokens", "0"],
        ["--rate", "1", "--token-ids", "9:3"],
        ["--rate", "1", "--extra-body", "[]"],
        ["--rate", "1", "--base-url", "localhost:8000"],
        ["--trace", "absent.csv"],
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_sent(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        serve.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


# --- loops ---


class ManualTimer:
    """Time passes only in `sleep_until`; `late_s` is how much the sleeper oversleeps."""

    def __init__(self, late_s: dict[float, float] | None = None) -> None:
        self.now_s = 100.0
        self._late_s = late_s or {}

    def now(self) -> float:
        return self.now_s

    async def sleep_until(self, moment_s: float) -> None:
        await asyncio.sleep(0)  # what was started before runs before time goes on
        self.now_s = max(self.now_s, moment_s + self._late_s.get(moment_s, 0.0))


def plan_at(*moments_s: float) -> list[PlannedRequest]:
    return [PlannedRequest(index, at_s, (1,), 2) for index, at_s in enumerate(moments_s)]


async def test_an_open_loop_starts_on_time_though_nothing_comes_back() -> None:
    timer = ManualTimer()
    started: list[tuple[int, float]] = []
    all_started = asyncio.Event()

    async def send(item: PlannedRequest, outcome: Outcome) -> None:
        started.append((item.index, timer.now()))
        if len(started) == 4:
            all_started.set()
        await all_started.wait()

    outcomes = await asyncio.wait_for(open_loop(plan_at(0.0, 0.5, 0.5, 7.0), send, timer), timeout=30)
    assert [outcome.intended_s for outcome in outcomes] == [100.0, 100.5, 100.5, 107.0]
    assert [index for index, _ in started] == [0, 1, 2, 3]


async def test_open_loop_latency_counts_from_the_planned_moment() -> None:
    timer = ManualTimer(late_s={101.0: 5.0})  # the generator is held up for five seconds: the user waited too

    async def send(item: PlannedRequest, outcome: Outcome) -> None:
        outcome.sent_s = outcome.end_s = timer.now()
        outcome.events = [(timer.now(), 1)]

    outcomes = await open_loop(plan_at(0.0, 1.0, 2.0), send, timer)
    assert [report.ttft_s(outcome) for outcome in outcomes] == [0.0, 5.0, 4.0]
    assert report.summarise(outcomes, None)["send_lag_ms"]["max"] == 5000.0


async def test_a_closed_loop_keeps_so_many_in_flight_and_sends_each_once() -> None:
    in_flight: list[int] = []
    seen: list[int] = []
    most = 0

    async def send(item: PlannedRequest, outcome: Outcome) -> None:
        nonlocal most
        in_flight.append(item.index)
        most = max(most, len(in_flight))
        for _ in range(1 + item.index % 3):
            await asyncio.sleep(0)
        in_flight.remove(item.index)
        seen.append(item.index)

    outcomes = await closed_loop(plan_at(*[0.0] * 20), send, ManualTimer(), concurrency=4)
    assert most == 4
    assert sorted(seen) == sorted(outcome.index for outcome in outcomes) == list(range(20))


# --- reading a stream ---


def test_events_are_the_same_however_the_bytes_are_cut() -> None:
    stream = b': hello\n\ndata: {"a":1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\nid: 7\n\ndata: [DONE]\n\ndata: unfinished'
    expected = [b'{"a":1}', b"two\nlines", b"[DONE]"]
    for size in range(1, len(stream) + 1):
        cutter = EventCutter()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [event for piece in pieces for event in cutter.feed(piece)] == expected


def test_a_chunk_counts_when_its_last_byte_came() -> None:
    now = iter([1.0, 2.0, 3.0, 4.0])
    outcome = Outcome(0, 0.5, 8)
    reading = StreamReading(outcome, lambda: next(now))
    reading.feed(b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n')
    reading.feed(b'data: {"choices": [{"delta": {"content": "a"}, "token_ids"')
    reading.feed(
        b': [5]}]}\n\ndata: {"choices": [{"delta": {"content": ""}, "token_ids": [6]}]}\n\n'
    )  # half a character: a token
    reading.feed(b'data: {"choices": [{"delta": {"reasoning": "c"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
    assert outcome.events == [(3.0, 1), (3.0, 1), (4.0, 1)]
    assert (outcome.finish_reason, reading.done, outcome.output_tokens) == ("stop", True, 3)
    assert report.ttft_s(outcome) == 2.5


@pytest.mark.parametrize("payload", [b"5", b"[]", b'{"choices": 3}', b'{"choices": [1]}', b"{"])
def test_an_event_of_the_wrong_shape_is_noted(payload: bytes) -> None:
    outcome = Outcome(0, 0.0, 8)
    StreamReading(outcome, lambda: 1.0).feed(b"data: " + payload + b"\n\n")
    assert outcome.error == "malformed event"


# --- figures ---


def answered(index: int, intended_s: float, *moments_s: float, tokens: int | None = None) -> Outcome:
    events = [(moment_s, 1) for moment_s in moments_s]
    return Outcome(
        index,
        intended_s,
        tokens or len(events),
        intended_s,
        moments_s[-1],
        events,
        usage_prompt_tokens=10,
        usage_completion_tokens=tokens,
    )


def test_percentiles_are_those_of_numpy() -> None:
    source = np.random.default_rng(3)
    for count in (1, 2, 3, 10, 99, 100, 1_001):
        values = source.lognormal(size=count).tolist()
        ours = report.percentiles(values)
        theirs = {f"p{p}": np.percentile(values, p) for p in report.PERCENTILES}
        assert ours == pytest.approx({"mean": np.mean(values), **theirs, "max": max(values)})
    assert report.percentiles([]) == {}


def test_figures_of_a_run_worked_out_by_hand() -> None:
    outcomes = [
        answered(0, 0.0, 1.0, 2.0, 3.0),  # TTFT 1, gaps 1 1, TPOT 1
        answered(1, 1.0, 1.5, 4.5, tokens=7),  # TTFT 0.5, gap 3, TPOT 0.5
        answered(2, 2.0, 10.0),  # TTFT 8; one token has no TPOT
        Outcome(3, 3.0, 4, 3.0, 3.1, error="HTTP 429", error_detail="no"),
    ]
    figures = report.summarise(outcomes, report.Slo(ttft_s=1.0, tpot_s=0.75))
    assert figures["duration_s"] == 10.0
    assert figures["requests_per_s"] == 0.3
    assert figures["output_tokens_per_s"] == 1.1
    assert figures["total_tokens_per_s"] == 4.1
    assert figures["ttft_ms"]["p50"] == 1000.0
    assert figures["ttft_ms"]["max"] == 8000.0
    assert figures["tpot_ms"]["mean"] == 750.0
    assert figures["itl_ms"]["max"] == 3000.0
    assert figures["e2e_ms"]["p50"] == 3500.0
    assert figures["errors"] == {"HTTP 429": {"count": 1, "example": "no"}}
    assert figures["slo"]["attainment"] == 0.25  # only request 1; a refusal is a miss
    assert figures["slo"]["goodput_requests_per_s"] == 0.1


def test_a_stall_that_tpot_forgives_misses_a_token_deadline() -> None:
    slo = report.Slo(ttft_s=1.0, tpot_s=1.0)
    smooth, stalled = answered(0, 0.0, 1.0, 2.0, 3.0, 4.0), answered(1, 0.0, 1.0, 3.9, 3.95, 4.0)
    early = answered(2, 0.0, 0.1, 2.0, 2.5, 4.0)  # a long gap, but every token is there when it is due
    assert [report.meets(outcome, slo) for outcome in (smooth, stalled, early)] == [True, True, False]
    assert [report.meets_every_deadline(outcome, slo) for outcome in (smooth, stalled, early)] == [True, False, True]


# --- plans ---

IDS = TokenIds(0, 50_000, seed=5)


def test_arrivals_are_poisson_and_lengths_have_the_asked_mean_and_spread() -> None:
    plan = synthetic(num_requests=4_000, rate=20.0, inputs=Lengths(50, 0.5), outputs=Lengths(9), shared_prefix_tokens=0, ids=IDS)
    gaps_s = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(plan)]
    assert plan[0].at_s == 0.0
    assert statistics.fmean(gaps_s) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 20, rel=0.1)  # an exponential's deviation is its mean
    sizes = [len(item.prompt_token_ids) for item in plan]
    assert statistics.fmean(sizes) == pytest.approx(50, rel=0.05)
    assert statistics.stdev(sizes) == pytest.approx(25, rel=0.1)
    assert {item.max_tokens for item in plan} == {9}
    assert mean_rate(plan) == pytest.approx(20, rel=0.05)


TRACE = "arrival_ms,input_tokens,output_tokens,block512_hash_ids\n1000,1300,500,0 14-15\n3000,1600,16,0 14 22-23\n9000,5,1,40\n"


def test_a_trace_keeps_its_shape_when_it_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    scale = TraceScale(length_divisor=16, max_input=90, max_output=20, rate_scale=2.0)
    plan = from_trace(path, num_requests=None, scale=scale, ids=IDS)
    assert [item.at_s for item in plan] == [0.0, 1.0, 4.0]
    assert [len(item.prompt_token_ids) for item in plan] == [81, 90, 1]
    assert [item.max_tokens for item in plan] == [20, 1, 1]
    first, second = (item.prompt_token_ids for item in plan[:2])
    assert first[:64] == second[:64]  # blocks 0 and 14, 32 tokens each
    assert first[64:81] != second[64:81]
    assert first[:32] != first[32:64]
    assert len(from_trace(path, num_requests=2, scale=scale, ids=IDS)) == 2


def test_a_trace_without_blocks_and_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_ms,input_tokens,output_tokens\n0,12,3\n52,12,3\n")
    plan = from_trace(path, num_requests=None, scale=TraceScale(), ids=IDS)
    assert [len(item.prompt_token_ids) for item in plan] == [12, 12]
    assert plan[0].prompt_token_ids != plan[1].prompt_token_ids
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="arrival_ms"):
        from_trace(path, num_requests=None, scale=TraceScale(), ids=IDS)


def test_a_rate_stretches_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    options = serve.parser().parse_args(["--trace", str(path), "--rate", "0.5"])
    assert [item.at_s for item in serve.make_plan(options)] == [0.0, 1.0, 4.0]  # 2 gaps in 4 s
