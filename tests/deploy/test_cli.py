"""The command line without a cluster: light, clear, with the right exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from common.clock import ManualClock
from common.config import RouterConfig
from deploy.app import app
from deploy.commands import keys
from router.keys import KeyRing

CLI = (sys.executable, "-m", "deploy.cli")


def run(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PDSERVE_HOME": str(home), **environment}
    return subprocess.run([*CLI, *arguments], env=variables, capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_command(tmp_path: Path) -> None:
    found = run("--help", home=tmp_path)
    assert found.returncode == 0
    for command in ("up", "down", "status", "doctor", "scale", "chat", "pull", "config", "keys", "version"):
        assert command in found.stdout


@pytest.mark.parametrize("command", [("status",), ("status", "--json"), ("scale", "m", "--prefill", "1"), ("chat", "hello")])
def test_without_a_cluster_it_says_how_to_start_one(tmp_path: Path, command: tuple[str, ...]) -> None:
    found = run(*command, home=tmp_path)
    assert found.returncode == 1
    assert "no cluster 'local' runs here" in found.stderr
    assert "pdserve up" in found.stderr
    assert "Traceback" not in found.stderr


def test_down_without_a_cluster_is_no_error(tmp_path: Path) -> None:
    assert run("down", home=tmp_path).returncode == 0


def test_usage_errors_have_status_two(tmp_path: Path) -> None:
    assert run("scale", home=tmp_path).returncode == 2
    assert run("nonsense", home=tmp_path).returncode == 2


def test_a_stale_state_file_counts_as_no_cluster(tmp_path: Path) -> None:
    """A launcher that was killed together with its janitor leaves a file; its pid may belong to somebody else by now."""
    state = {
        "cluster": "local",
        "cluster_id": "0" * 32,
        "launcher_pid": os.getpid(),
        "launcher_started": 1,
        "manager_address": "127.0.0.1:1",
        "token": "t",
    }
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "local.json").write_text(json.dumps(state))
    found = run("status", home=tmp_path)
    assert found.returncode == 1
    assert "no cluster" in found.stderr


def test_a_mangled_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "local.json").write_text("{")
    found = run("status", home=tmp_path)
    assert found.returncode == 1
    assert "local.json" in found.stderr


def test_config_commands(tmp_path: Path) -> None:
    assert run("config", "check", home=tmp_path).returncode == 0
    shown = yaml.safe_load(run("config", "show", "--set", "router.http_port=81", home=tmp_path).stdout)
    assert shown["router"]["http_port"] == 81
    assert shown["models"][0]["engine"]["block_tokens"] == 16
    schema = json.loads(run("config", "schema", home=tmp_path).stdout)
    assert schema["properties"]["models"]["minItems"] == 1
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("models:\n  - name: m\n    source: m\nrouter:\n  http_prot: 1\n")
    found = run("config", "check", str(wrong), home=tmp_path)
    assert found.returncode == 1
    assert "wrong.yaml:5" in found.stderr
    assert "http_port" in found.stderr


def test_keys_are_shown_once_and_known_by_their_entries(tmp_path: Path) -> None:
    command = CliRunner()
    made = command.invoke(keys.app, ["new", "--tenant", "acme"])
    key, line = made.stdout.strip(), made.stderr.splitlines()[-1]
    assert key not in made.stderr
    hashed = command.invoke(keys.app, ["hash"], input="chosen\n")
    assert "chosen" not in hashed.output
    file = tmp_path / "keys"
    file.write_text(f"{line}\n{hashed.stdout}")
    ring = KeyRing(RouterConfig.model_validate({"keys_file": str(file), "tenants": {"acme": {}}}), ManualClock())
    assert asyncio.run(ring.identify(f"Bearer {key}")).tenant.name == "acme"
    assert asyncio.run(ring.identify("Bearer chosen")).tenant.label == "keys"
    for words in (["new"], ["hash"]):
        refused = command.invoke(keys.app, [*words, "--tenant", "no name"], input="chosen\n")
        assert (refused.exit_code, refused.stdout) == (1, "")
    for text in ("", line.split()[1]):
        refused = command.invoke(keys.app, ["hash"], input=f"{text}\n")
        assert (refused.exit_code, refused.stdout) == (1, "")


def test_the_configuration_is_shown_without_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    router = {"api_keys": ["one"], "tenants": {"acme": {"keys": ["two"], "weight": 3}}}
    file.write_text(yaml.safe_dump({"models": [{"name": "m", "source": "m"}], "router": router}))
    shown = run("config", "show", str(file), home=tmp_path)
    assert "sha256" not in shown.stdout
    assert yaml.safe_load(shown.stdout)["router"]["tenants"]["acme"]["weight"] == 3


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    shown = yaml.safe_load(run("config", "show", home=tmp_path, PDSERVE_ROUTER__GRPC_PORT="77").stdout)
    assert shown["router"]["grpc_port"] == 77


def test_up_refuses_what_cannot_work_before_anything_is_started(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"models": [{"name": "m", "source": str(tmp_path / "nothing.gguf")}]}))
    found = run("up", str(config), home=tmp_path)
    assert found.returncode == 1
    assert "nothing.gguf" in found.stderr
    assert "Ray" not in found.stderr


@pytest.mark.parametrize("as_it_is_made", [True, False])
def test_an_interrupt_while_a_detached_cluster_starts_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_it_is_made: bool
) -> None:
    """The launcher is in a session of its own, which the terminal's Ctrl-C does not reach. Here a script stands for it."""
    begun, ended, launcher = tmp_path / "begun", tmp_path / "ended", tmp_path / "launcher"
    os.mkfifo(begun)
    launcher.write_text(f"#!/bin/sh\ntrap 'echo >{ended}; exit' INT\necho >{begun}\nwhile :; do sleep 0.02; done\n")
    launcher.chmod(0o700)

    def interrupt() -> None:
        begun.read_text()
        os.kill(os.getpid(), signal.SIGINT)

    class InterruptedAsItIsMade(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            interrupt()

    monkeypatch.setattr(sys, "executable", str(launcher))
    if as_it_is_made:
        monkeypatch.setattr(subprocess, "Popen", InterruptedAsItIsMade)
    else:
        threading.Thread(target=interrupt).start()
    found = CliRunner().invoke(app, ["up", "--detach"], env={"PDSERVE_HOME": str(tmp_path)})
    assert found.exit_code == 130
    assert ended.exists()


@pytest.mark.parametrize("starts", [True, False])
def test_a_log_is_replaced_by_who_starts_and_left_alone_by_who_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    """A cluster that runs goes on writing to its log while another launch of the same name is refused. A script stands for it."""
    log, launcher = tmp_path / "logs" / "local.log", tmp_path / "launcher"
    log.parent.mkdir()
    log.write_text("of the one that runs\n")
    announces = 'echo here >/dev/fd/"$6"\n' if starts else ""
    launcher.write_text(f"#!/bin/sh\necho of the new one\n{announces}")
    launcher.chmod(0o700)
    made: list[subprocess.Popen[bytes]] = []

    class Remembered(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            made.append(self)

    monkeypatch.setattr(sys, "executable", str(launcher))
    monkeypatch.setattr(subprocess, "Popen", Remembered)
    found = CliRunner().invoke(app, ["up", "--detach"], env={"PDSERVE_HOME": str(tmp_path)})
    assert len(made) == 1
    made[0].wait(60)
    assert found.exit_code == (0 if starts else 1)
    assert log.read_text() == ("of the new one\n" if starts else "of the one that runs\n")
    assert starts or "of the new one" in found.stderr
    assert list(log.parent.iterdir()) == [log]


def test_a_local_model_is_found_where_it_is(tmp_path: Path) -> None:
    from support.tiny_models import make_tiny_model

    model = make_tiny_model(tmp_path / "tiny")
    found = run("pull", str(model), home=tmp_path / "home")
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == model


def test_chat_with_nobody_at_the_address(tmp_path: Path) -> None:
    found = run("chat", "hello", "--url", "http://127.0.0.1:9", home=tmp_path)
    assert found.returncode == 1
    assert "no router answers" in found.stderr
