"""`pdserve chat` against a server that plays back an answer: what it sends, what it shows, how it fails."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from rich.console import Console

from deploy.commands.waterfall import draw

TIMINGS = {
    "ttft_ms": 40.0,
    "tpot_ms": 5.0,
    "total_ms": 60.0,
    "stages_ms": {"router": 0.0, "prefill": 30.0, "transfer exposed": 10.0},
    "prefill_worker": "m/prefill/0",
    "decode_worker": "m/decode/0",
    "transport": "shm",
    "transfer_hidden_ms": 3.5,
    "transfer_bytes": 2 * 2**20,
    "transfer_blocks": 6,
    "cached_tokens": 16,
    "retries": 0,
}


class Playback(BaseHTTPRequestHandler):
    received: ClassVar[list[dict[str, Any]]]
    headers_seen: ClassVar[list[dict[str, str]]]

    def do_GET(self) -> None:
        self._answer(200, "application/json", json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.received.append(body)
        self.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        if body["messages"][-1]["content"] == "refuse":
            self._answer(429, "application/json", json.dumps({"error": {"message": "too much to do"}}))
            return
        events = [{"choices": [{"delta": {"content": piece}}]} for piece in ("Hel", "lo ", "[world]")]
        if body["messages"][-1]["content"] == "break":
            events.append({"error": {"message": "the worker was lost"}})
        else:
            events.append({"choices": [], "timings": TIMINGS})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._answer(200, "text/event-stream", text)

    def _answer(self, status: int, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Playback.received, Playback.headers_seen = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Playback) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join(60)


def chat(server: ThreadingHTTPServer, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "chat", "--url", url, *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )


def test_one_message_prints_the_answer_and_nothing_else_on_stdout(server: ThreadingHTTPServer) -> None:
    done = chat(server, "hi", "--max-tokens", "7")
    assert (done.returncode, done.stdout) == (0, "Hello [world]\n")
    (body,) = Playback.received
    assert (body["model"], body["max_tokens"], body["stream"]) == ("m", 7, True)
    assert body["messages"] == [{"role": "user", "content": "hi"}]


def test_the_waterfall_starts_each_stage_where_the_last_one_ended(server: ThreadingHTTPServer) -> None:
    done = chat(server, "hi", "--stats")
    assert Playback.headers_seen[0]["x-pdserve-timings"] == "1"
    lines = {line.strip().split("  ")[0]: line for line in done.stderr.splitlines()}
    prefill, exposed = lines["prefill"], lines["transfer exposed"]
    assert prefill.count("█") == 3 * exposed.count("█")
    assert exposed.index("█") == prefill.rindex("█") + 1
    assert "40.0 ms" in lines["first token"]
    assert "m/prefill/0 -> m/decode/0 over shm: 6 blocks, 2.0 MiB, 3.5 ms of it hidden; 16 tokens cached" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_an_answer_that_was_there_already_has_a_short_waterfall() -> None:
    stages = {"router": 2.0, "network": 0.5, "prefill": 0.0}
    timings = {"stages_ms": stages, "ttft_ms": 2.5, "tpot_ms": 0.0, "transport": None, "decode_worker": None}
    timings["cache"] = "hit-exact"
    written = io.StringIO()
    draw(timings, Console(file=written, width=120))
    assert written.getvalue().splitlines()[-1].strip() == "no worker was asked: hit-exact"
    assert "2.5 ms" in written.getvalue()


def test_a_conversation_remembers_until_it_is_cleared_and_survives_errors(server: ThreadingHTTPServer) -> None:
    done = chat(server, typed="one\nrefuse\nbreak\ntwo\n/clear\nthree\n/quit\nnever sent\n")
    assert done.returncode == 0, done.stderr
    assert "too much to do" in done.stderr
    assert "the worker was lost" in done.stderr
    said = [[message["content"] for message in body["messages"]] for body in Playback.received]
    assert said == [
        ["one"],
        ["one", "Hello [world]", "refuse"],
        ["one", "Hello [world]", "break"],
        ["one", "Hello [world]", "two"],
        ["three"],
    ]


def test_an_error_ends_a_single_message_with_status_one(server: ThreadingHTTPServer) -> None:
    done = chat(server, "refuse")
    assert done.returncode == 1
    assert "too much to do" in done.stderr
    assert "Traceback" not in done.stderr
