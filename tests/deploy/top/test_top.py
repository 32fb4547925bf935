"""`pdserve top` against a manager's real gRPC face and real metrics: its figures, its widths, and a cluster that goes away."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cluster_state import state_path
from deploy.commands.figures import rate, share, short_time, size, span
from support.operated import Operated, announce, operated, readings, worker_info

LONG = ("smollm2-135m/prefill/0", "smollm2-135m/decode/0", "smollm2-135m/decode/1")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Operated]:
    with operated(tmp_path) as running:
        yield running


def look(cluster: Operated, *arguments: str) -> dict:
    found = cluster.cli("top", "--once", "--json", "--interval", "0.2", *arguments)
    assert found.exit_code == 0, found.output
    (line,) = found.stdout.splitlines()
    return json.loads(line)


def test_figures_are_those_of_the_processes(cluster: Operated) -> None:
    metrics = cluster.router.metrics
    for status, count in (("200", 6), ("429", 2), ("400", 9)):
        metrics.requests_total.labels("tiny", "/v1/completions", status).inc(count)
    metrics.requests_total.labels("", "/metrics", "200").inc(1000)
    for seconds in (0.05, 0.05, 0.05, 2.0):
        metrics.ttft_s.labels("tiny").observe(seconds)
    for result, count in (("hit-exact", 3), ("miss", 1), ("bypass", 50)):
        metrics.cache_requests.labels("tiny", result, "").inc(count)
    cluster.readings["tiny/decode/0"] = readings(generated_tokens=500, prefix_queries=10, prefix_hits=4)
    worker = cluster.workers["tiny/decode/0"].metrics
    worker.step_s.observe(0.012)
    worker.transferred("tcp", "ok")
    worker.transferred("", "TransferBroken")
    found = look(cluster)
    model, decode = found["models"][0], found["workers"][1]
    assert (model["prefill_ready"], model["decode_ready"], model["decode_desired"]) == (1, 1, 1)
    assert model["requests_per_s"] == model["failures_per_s"] == 0, "nothing happened between the two looks"
    assert 0.04 < model["ttft"]["p50_s"] <= 0.06
    assert 1.0 < model["ttft"]["p99_s"] <= 2.5
    assert model["tpot"]["p50_s"] is None
    assert model["cache_hits"] == 0.75
    assert decode["kv_used"] == 0.25
    assert decode["prefix_hits"] == 0.4
    assert (decode["transport"], decode["transfer_failures"]) == ("tcp", 1)
    assert 0.010 < decode["step_p50_s"] <= 0.015
    assert found["events"][0]["kind"] == "ready"
    assert found["latency_over_s"] is None


async def test_rates_are_over_the_time_between_two_looks(cluster: Operated, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.top.observer import Observer

    monkeypatch.setenv("PDSERVE_HOME", str(cluster.home))
    async with Observer(None) as observer:
        first = await observer.look()
        assert first.rates_over_s is None
        assert first.models[0].requests_per_s is None
        for status, count in (("200", 30), ("503", 10), ("499", 5)):
            cluster.router.metrics.requests_total.labels("tiny", "/v1/completions", status).inc(count)
        cluster.router.metrics.requests_total.labels("", "/metrics", "200").inc(1000)
        cluster.readings["tiny/prefill/0"] = readings(computed_tokens=700)
        second = await observer.look()
        assert second.rates_over_s
        model = second.models[0]
        assert model.requests_per_s == pytest.approx(4.5 * (model.failures_per_s or 0))
        assert second.routers[0].requests_per_s == pytest.approx(model.requests_per_s)
        assert (second.workers[0].tokens_per_s or 0) > (model.requests_per_s or 0) > 0  # 700 and 45 in about the same time
        assert second.workers[1].tokens_per_s == 0
        cluster.workers["tiny/decode/0"].stop()
        cluster.workers["tiny/decode/0"].stop = lambda: None
        third = await observer.look()
        assert [worker.answers for worker in third.workers] == [True, False]
        assert third.workers[1].tokens_per_s is None
        assert third.workers[1].kv_used == 0.25, "what the manager knows does not depend on it"


@pytest.mark.parametrize("width", [80, 104, 132, 200])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(width: int) -> None:
    from rich.console import Console

    from deploy.top.drawing import Frame, draw
    from deploy.top.picture import Changes, draw_up

    workers = [worker_info(one, state="draining", blocks_free=1, requests_waiting=12) for one in LONG]
    described = {
        "cluster": "local",
        "models": [{"name": "smollm2-135m", "desired_prefill": 1, "desired_decode": 2}],
        "routers": [{"router_id": "r", "http_address": "127.0.0.1:54321"}],
        "workers": [
            {
                "role": one.worker_id.split("/")[1],
                **{field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields if field.name not in ("role", "pace")},
            }
            for one in workers
        ],
        "events": [],
    }
    picture = draw_up(described, Changes({}, {}), at_s=0.0, up_s=5.0, first=True)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(draw(picture, Frame(width, None)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    assert all(one in text for one in LONG)
    assert "99%" in text


def test_what_has_no_room_is_left_out_and_what_is_wrong_stays() -> None:
    from rich.console import Console

    from deploy.top.drawing import Frame, draw
    from deploy.top.picture import Changes, draw_up

    described = {
        "cluster": "local",
        "models": [{"name": "m", "desired_prefill": 0, "desired_decode": 50}],
        "routers": [{"router_id": "r", "http_address": "127.0.0.1:54321"}],
        "workers": [
            {
                "role": "decode",
                **{field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields if field.name not in ("role", "pace")},
            }
            for one in (worker_info(f"m/decode/{n}", state="failed" if n == 49 else "ready") for n in range(50))
        ],
        "events": [{"at_s": 0.0, "kind": "lost", "worker_id": f"w{n}", "model": "m", "text": "x"} for n in range(30)],
    }
    picture = draw_up(described, Changes({}, {}), at_s=0.0, up_s=5.0, first=True)
    for height in (24, 40):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(draw(picture, Frame(80, height), away="gone"))
        lines = console.export_text().rstrip().splitlines()
        assert len(lines) <= height
        assert any("m/decode/49" in line and "failed" in line for line in lines)
        assert any("more that are well" in line for line in lines)
        assert "w29" in lines[-1], "the newest events stay"
        assert "gone" in lines[1]


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, home: Path, *arguments: str, rows: int = 30, columns: int = 80) -> None:
        self.seen = ""
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.environ.update(PDSERVE_HOME=str(home), TERM="xterm")
            os.execv(sys.executable, [sys.executable, "-m", "deploy.cli", *arguments])
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, text: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen):
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen[-3000:]!r}"
            assert self._read(), f"it ended without {text!r}: {self.seen[-3000:]!r}"
        self.seen = ""

    def press(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)

    def end(self) -> tuple[int, str]:
        """Exit status, and what was written since the last `until`."""
        while self._read():
            pass
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.seen

    def _read(self) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], 60.0)
        try:
            data = os.read(self._descriptor, 65_536) if ready else b""
        except OSError:
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)


@pytest.mark.long
def test_the_live_screen_survives_its_cluster_and_gives_the_terminal_back(cluster: Operated) -> None:
    terminal = Terminal(cluster.home, "top", "--interval", "0.2")
    terminal.until("tiny/decode/0")
    address = f"127.0.0.1:{cluster.port}"
    state_path(cluster.home, "local").unlink()
    terminal.until("no cluster 'local' runs here")
    terminal.until("trying again")
    announce(cluster.home, "local", address)
    terminal.until("q ends")
    terminal.press(b"q")
    status, rest = terminal.end()
    assert status == 0
    assert "\x1b[?1049l" in rest, "the alternative screen is left"
    assert "\x1b[?25h" in rest, "the cursor is back"


@pytest.mark.long
def test_ctrl_c_ends_the_screen_too_and_nothing_is_needed_to_begin_with(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "top")
    terminal.until("no cluster 'local' runs here")
    terminal.press(b"\x03")
    status, rest = terminal.end()
    assert status == 0
    assert "Traceback" not in rest


def test_one_look_at_nothing_is_a_failure(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from deploy.app import app

    found = CliRunner().invoke(app, ["top", "--once"], env={"PDSERVE_HOME": str(tmp_path)})
    assert found.exit_code == 1
    assert "no cluster 'local' runs here" in found.stderr


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (span(None), "-"),
        (span(59.9), "59 s"),
        (span(60), "1 m"),
        (span(3600 * 3 + 61), "3 h 1 m"),
        (span(86_400 * 5 + 3 * 3600), "5 d 3 h"),
        (short_time(0.00085), "850 us"),
        (short_time(0.0123), "12.3 ms"),
        (short_time(0.48), "480 ms"),
        (short_time(2.412), "2.41 s"),
        (rate(0.0), "0"),
        (rate(0.421), "0.42"),
        (rate(8.34), "8.3"),
        (rate(512.4), "512"),
        (rate(12_345), "12.3k"),
        (share(0.004), "<1%"),
        (share(0), "0%"),
        (share(0.756), "76%"),
        (size(1536), "1.5 KiB"),
        (size(3 * 2**30), "3.0 GiB"),
    ],
)
def test_figures_are_short(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("tensor", "pipeline", "shown"), [(1, 1, ""), (0, 0, ""), (2, 1, "TP 2"), (1, 3, "PP 3"), (2, 3, "TP 2 x PP 3")]
)
def test_ranks_are_drawn_where_there_are_any(cluster: Operated, tensor: int, pipeline: int, shown: str) -> None:
    changed = worker_info("tiny/decode/0", tensor_parallel=tensor, pipeline_parallel=pipeline)
    changed.metrics_address = cluster.manager.snapshot.workers[1].metrics_address
    cluster.manager.snapshot.workers[1].CopyFrom(changed)
    drawn = cluster.cli("top", "--once", "--interval", "0.2", width=110).stdout
    assert ("RANKS" in drawn) is bool(shown)
    if shown:
        rows = {line.split()[0]: line for line in drawn.splitlines() if line.startswith("tiny/")}
        assert re.search(rf"tiny/decode/0 +{shown} +ready", rows["tiny/decode/0"])
        assert re.search(r"tiny/prefill/0 +1 +ready", rows["tiny/prefill/0"])
