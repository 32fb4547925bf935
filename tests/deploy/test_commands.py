"""Commands as somebody types them who does not know them yet: what they say, on which stream, and with which exit status."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ModelNotFound
from common.log_files import LogFile
from common.wire import registry_pb2, types_pb2
from deploy.app import app
from deploy.cluster_state import state_path
from deploy.logs.runs import begin_run
from support.operated import Operated, announce, operated, worker_info


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Operated]:
    with operated(tmp_path) as running:
        yield running


def run(home: Path, *arguments: str, **environment: str) -> object:
    return CliRunner().invoke(app, list(arguments), env={"PDSERVE_HOME": str(home), **environment})


def test_status_tells_what_there_is_and_what_went_wrong(cluster: Operated) -> None:
    cluster.manager.snapshot.workers.append(worker_info("tiny/decode/1", state="failed", pid=0, failure="out of memory"))
    cluster.manager.snapshot.models[0].desired_decode = 2
    cluster.manager.report = registry_pb2.AutoscalerReport(
        models=[registry_pb2.ModelAutoscaling(model="tiny", mode=registry_pb2.AUTOSCALER_MODE_DRY_RUN)]
    )
    found = cluster.cli("status")
    assert found.exit_code == 0, found.output
    for text in ("cluster local", "pdserve 0", "decode 1/2", "prefill 1/1", "autoscaler dry-run", "25% of 100", "cpu float32"):
        assert text in found.stdout
    assert "tiny/decode/1: given up: out of memory" in found.stdout
    told = json.loads(cluster.cli("status", "--json").stdout)
    assert told["autoscaler"] == {"tiny": "dry-run"}
    assert told["workers"][0]["up_s"] > 0
    assert told["up_s"] > 0
    assert told["events"][0]["kind"] == "ready"


def test_status_of_a_cluster_without_an_autoscaler_says_nothing_of_one(cluster: Operated) -> None:
    found = cluster.cli("status")
    assert found.exit_code == 0, found.output
    assert "autoscaler" not in found.stdout


@pytest.mark.parametrize("width", [80, 100, 140])
def test_status_fits_its_terminal(cluster: Operated, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from deploy.commands import cluster_drawing
    from deploy.commands.output import Output

    console = Console(width=width, record=True, file=io.StringIO())
    output = Output(stderr=False)
    output.__dict__["console"] = console
    monkeypatch.setattr(cluster_drawing, "out", output)
    described = json.loads(cluster.cli("status", "--json").stdout)
    described["workers"][0]["worker_id"] = "smollm2-135m/prefill/0"
    cluster_drawing.draw_status(described)
    lines = console.export_text().splitlines()
    table = [line for line in lines if line.startswith(("worker ", "smollm2", "tiny/"))]
    assert len(table) == 3
    assert max(map(len, table)) <= width
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("scale", "tiny", "--decode", "3", "--wait", "0"), registry_pb2.ScaleRequest(model="tiny", decode=3)),
        (("drain", "tiny/decode/0", "--wait", "1"), registry_pb2.DrainWorkerRequest(worker_id="tiny/decode/0", wait_s=1)),
        (
            ("flip", "tiny/prefill/0", "decode", "--wait", "1"),
            registry_pb2.FlipRequest(worker_id="tiny/prefill/0", role=types_pb2.ROLE_DECODE, wait_s=1),
        ),
        (("roll", "tiny", "--wait", "1"), registry_pb2.RollRequest(model="tiny", wait_s=1)),
        (
            ("roll", "tiny", "--role", "prefill", "--wait", "1"),
            registry_pb2.RollRequest(model="tiny", role=types_pb2.ROLE_PREFILL, wait_s=1),
        ),
    ],
)
def test_what_changes_a_cluster_asks_for_just_that_and_shows_what_came_of_it(
    cluster: Operated, arguments: tuple[str, ...], asked: object
) -> None:
    found = cluster.cli(*arguments)
    assert found.exit_code == 0, found.output
    assert cluster.manager.asked == [asked]
    assert "tiny/decode/0" in found.stdout


def test_the_autoscaler_explains_itself_and_is_told_what_to_do(cluster: Operated) -> None:
    pool = registry_pb2.PoolAutoscaling(
        min_replicas=1, max_replicas=4, desired=2, ready=1, pressure=1.5, signal="TTFT 3 s of 2 s"
    )
    decision = registry_pb2.AutoscalerDecision(at_s=1.0, action="grow", text="one more", reason="TTFT", decode_after=2)
    cluster.manager.report = registry_pb2.AutoscalerReport(
        models=[registry_pb2.ModelAutoscaling(model="tiny", mode=2, prefill=pool, decode=pool, decisions=[decision])]
    )
    found = cluster.cli("autoscaler", "tiny", "--mode", "dry-run")
    assert found.exit_code == 0, found.output
    assert cluster.manager.asked[0].mode == registry_pb2.AUTOSCALER_MODE_DRY_RUN
    for text in ("autoscaler dry-run", "1..4", "1.50", "TTFT 3 s of 2 s", "one more", "(not done)"):
        assert text in found.stdout
    (told,) = json.loads(cluster.cli("autoscaler", "--json").stdout)["models"]
    assert [one["pressure"] for one in told["pools"]] == [1.5, 1.5]
    assert (told["decisions"][0]["before"], told["decisions"][0]["after"]) == ([0, 0], [0, 2])
    cluster.manager.report = None
    found = cluster.cli("autoscaler")
    assert found.exit_code == 1
    assert "another version of pdserve" in found.stderr


def test_what_the_manager_refuses_is_one_line(cluster: Operated) -> None:
    cluster.manager.refuse = ModelNotFound("this cluster does not serve 'huge'", param="model")
    found = cluster.cli("scale", "huge", "--prefill", "1")
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr == "pdserve: this cluster does not serve 'huge'\n"


def test_a_manager_that_does_not_answer_is_said_to_be_the_manager(cluster: Operated) -> None:
    announce(cluster.home, "local", "127.0.0.1:9")
    found = cluster.cli("status")
    assert found.exit_code == 1
    assert "the manager of cluster 'local' does not answer at 127.0.0.1:9" in found.stderr


def test_of_several_clusters_the_right_one_is_asked(tmp_path: Path) -> None:
    with operated(tmp_path, "staging") as staging:
        assert "cluster staging" in staging.cli("status").stdout, "the only one there is"
        found = staging.cli("status", "--cluster", "local")
        assert found.exit_code == 1
        assert "no cluster 'local' runs here; what runs is: staging" in found.stderr
        down = staging.cli("down")
        assert down.exit_code == 0, "nobody stops what was not named"
        assert "what runs is: staging" in down.stderr
        announce(tmp_path, "tests", "127.0.0.1:9")
        found = staging.cli("status")
        assert found.exit_code == 1
        assert "several clusters here: staging, tests; choose with --cluster NAME" in found.stderr
        with operated(tmp_path, "local") as local:
            assert "cluster local" in local.cli("status").stdout
        (tmp_path / "clusters" / "mangled.json").write_text("{")
        assert "cluster staging" in staging.cli("status", "--cluster", "staging").stdout
    state_path(tmp_path, "tests").unlink()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("nonsense",), 2),
        (("scale",), 2),
        (("scale", "m"), 2),
        (("scale", "m", "--prefill", "-1"), 2),
        (("flip", "m/decode/0", "router"), 2),
        (("logs", "--level", "loud"), 2),
        (("logs", "--since", "yesterday"), 1),
        (("logs",), 1),
        (("logs", "--folder", "/nonexistent"), 1),
        (("top", "--interval", "0"), 2),
        (("top", "--once"), 1),
        (("status",), 1),
        (("drain", "m/decode/0"), 1),
        (("down",), 0),
        (("doctor", "--cluster", "none"), 1),
        (("doctor", "/nonexistent.yaml"), 2),
        (("config", "check", "/nonexistent.yaml"), 1),
        (("config", "explain", "router.http_prot"), 1),
        (("completion", "tcsh"), 2),
        (("completion", "bash"), 0),
    ],
)
def test_a_mistake_has_its_exit_status_and_no_traceback(tmp_path: Path, arguments: tuple[str, ...], status: int) -> None:
    found = run(tmp_path, *arguments)
    assert found.exit_code == status, found.output
    assert "Traceback" not in found.output
    if status:
        assert found.stderr or arguments[0] == "doctor"


def test_config_check_shows_every_problem_with_the_line_it_is_on(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("models:\n  - {name: m, source: m}\nrouter:\n  http_prot: 1\n  migrations: -1\n")
    found = run(tmp_path, "config", "check", str(path), "--set", "cluster=UP")
    assert (found.exit_code, found.stdout) == (1, "")
    assert f"{path}:4:3: unknown key 'router.http_prot'; did you mean 'http_port'?" in found.stderr
    assert "      http_prot: 1\n      ^\n" in found.stderr
    assert f"{path}:5:3: router.migrations: Input should be greater than or equal to 0, not -1" in found.stderr
    assert "How often the rest of an answer goes elsewhere" in found.stderr
    assert "--set cluster: cluster: String should match pattern" in found.stderr
    assert found.stderr.splitlines()[-1] == f"pdserve: {path}: 3 problems"


def test_config_show_says_where_each_value_is_from(tmp_path: Path) -> None:
    import yaml

    from common.config import load_config

    path = tmp_path / "c.yaml"
    path.write_text(
        "models: [{name: m, source: m, aliases: [a, b]}]\nrouter: {tenants: {t: {keys: [hidden1]}}}\n"
        "cache: {redis: {url: 'redis://:hidden2@h'}}\n"
    )
    options = ("--set", "router.http_port=81")
    whole = run(tmp_path, "config", "show", str(path), *options, PDSERVE_ROUTER__GRPC_PORT="82").stdout
    assert "hidden1" not in whole
    assert "hidden2" not in whole
    shown = yaml.safe_load(whole)
    plain = load_config(path, overrides=["router.http_port=81"], environment={"PDSERVE_ROUTER__GRPC_PORT": "82"})
    expected = plain.model_dump(mode="json")
    expected["router"]["tenants"]["t"]["keys"] = ["(hidden)"]
    expected["cache"]["redis"]["url"] = "(hidden)"
    assert shown == expected, "what is printed is the configuration"
    changed = run(tmp_path, "config", "show", str(path), "--changed", *options, PDSERVE_ROUTER__GRPC_PORT="82").stdout
    lines = {" ".join(line.split("#")[0].split()): line.partition("# ")[2].strip() for line in changed.splitlines()}
    assert lines["http_port: 81"] == "--set router.http_port"
    assert lines["grpc_port: 82"] == "PDSERVE_ROUTER__GRPC_PORT"
    assert lines["aliases: [a, b]"] == "c.yaml:1"
    assert "default" not in lines.values()
    assert yaml.safe_load(changed)["router"]["http_port"] == 81


def test_keys_are_explained(tmp_path: Path) -> None:
    one = run(tmp_path, "config", "explain", "router.http_port")
    assert "router.http_port  whole number >= 0 <= 65535  default 8000" in one.stdout
    assert "0 takes a free port." in one.stdout
    part = run(tmp_path, "config", "explain", "models[].decode").stdout
    assert "models[].decode.speculation.method  off | ngram | draft | medusa  default ngram" in part
    assert "did you mean 'router.http_port'" in run(tmp_path, "config", "explain", "http_prot").stderr
    markdown = run(tmp_path, "config", "schema", "--markdown").stdout
    assert "## models[].engine" in markdown
    assert "| `block_tokens` | whole number >= 1 <= 256 | `16` | Tokens per KV block. |" in markdown


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """A cluster that has logged in two runs and is gone."""
    for number in range(2):
        folder = begin_run(tmp_path, "local", f"{number}" * 32, keep=3)
        folder = folder.rename(folder.with_name(f"2026010{number + 1}-000000-x"))
        (folder / "run.json").unlink()
        for process in ("router", "tiny/decode/0#1"):
            file = LogFile(folder, process, max_bytes=10_000)
            for level in ("info", "error"):
                told = {"timestamp": f"2026-01-0{number + 1}T00:00:0{len(level)}Z", "process": process, "level": level}
                file.write(json.dumps({**told, "event": f"said {level}", "request_id": "r1", "run": number}))
            file.close()
    return tmp_path


def test_logs_of_a_cluster_that_is_gone(logged: Path) -> None:
    found = run(logged, "logs")
    assert found.exit_code == 0
    assert "the cluster does not run" in found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 4
    assert all("run=1" in line and "[r1]" in line for line in lines)
    assert "\x1b" not in found.stdout
    assert run(logged, "logs", "-n", "1").stdout.splitlines() == lines[-1:]
    assert len(run(logged, "logs", "decode", "--level", "error").stdout.splitlines()) == 1
    assert run(logged, "logs", "--request", "r2").stdout == ""
    assert "run=0" in run(logged, "logs", "--previous", "router").stdout
    told = [json.loads(line) for line in run(logged, "logs", "--json", "router").stdout.splitlines()]
    assert [one["level"] for one in told] == ["info", "error"]
    wrong = run(logged, "logs", "nobody")
    assert wrong.exit_code == 1
    assert "there are: router, tiny/decode/0" in wrong.stderr
    followed = run(logged, "logs", "-f")
    assert followed.exit_code == 0
    assert len(followed.stdout.splitlines()) == 4, "nothing to wait for"


@pytest.mark.long
def test_a_reader_that_leaves_and_ctrl_c_end_it_quietly(logged: Path) -> None:
    """In processes of their own: a closed pipe and a signal are theirs."""
    command = [sys.executable, "-m", "deploy.cli", "logs"]
    folder = next(iter(sorted((logged / "logs" / "local").iterdir(), reverse=True)))
    file = LogFile(folder, "manager", max_bytes=10_000_000)
    for number in range(5_000):
        file.write(json.dumps({"timestamp": "2026-01-02T00:00:00Z", "event": f"line {number}"}))
    environment = {**os.environ, "PDSERVE_HOME": str(logged)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reading:
        assert reading.stdout is not None
        assert reading.stderr is not None
        reading.stdout.readline()
        reading.stdout.close()
        complaint = reading.stderr.read().decode()
        assert reading.wait(60) == 0, complaint
    assert "Traceback" not in complaint
    assert "Broken" not in complaint
    (folder / "run.json").write_text(json.dumps({"launcher_pid": os.getpid(), "launcher_started": _started_at_me()}))
    following = [*command, "-f", "-n", "1", "manager"]
    with subprocess.Popen(following, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reading:
        assert reading.stdout is not None
        assert b"line 4999" in reading.stdout.readline()
        reading.send_signal(signal.SIGINT)
        _, complaint_bytes = reading.communicate(timeout=60)
        assert reading.returncode == 130
    assert b"Traceback" not in complaint_bytes
    file.close()


def _started_at_me() -> int:
    from deploy.cluster_state import started_at

    return started_at(os.getpid()) or 0


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colour_is_for_terminals_that_want_it(
    environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.commands.output import Output

    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    Output(stderr=False).print("[red]x[/]")
    assert ("\x1b[31m" in capsys.readouterr().out) == coloured


def test_status_draws_a_group_of_ranks_as_one_worker(cluster: Operated) -> None:
    """Whole, and while its next incarnation starts because a rank died; where nobody has ranks there is no such column."""
    assert "ranks" not in cluster.cli("status", width=200).stdout
    whole = worker_info("tiny/decode/0", tensor_parallel=2, pipeline_parallel=3, rank_pids=[71, 72, 73, 74, 75])
    dead = worker_info(
        "tiny/prefill/0", state="starting", tensor_parallel=2, pipeline_parallel=1, pid=0, failure="rank 1 is gone"
    )
    del cluster.manager.snapshot.workers[:]
    cluster.manager.snapshot.workers.extend([whole, dead])
    lines = cluster.cli("status", width=200).stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("tiny/decode/0")]
    assert re.search(r"tiny/decode/0 +TP 2 x PP 3 +ready .*, 71, 72, 73, 74, 75 ", row)
    (row, told) = [line for line in lines if line.startswith("tiny/prefill/0")]
    assert re.search(r"tiny/prefill/0 +TP 2 +starting ", row)
    assert told == "tiny/prefill/0: restarted: rank 1 is gone"
