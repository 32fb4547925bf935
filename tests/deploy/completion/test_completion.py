"""Completion: what is offered for a line, that a real shell asks and is answered, and that nothing heavy is imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.app import app
from deploy.completion.answer import answer, candidates
from deploy.completion.command_tree import describe, load
from deploy.completion.scripts import SCRIPTS

TREE = describe(app)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which `one` runs, and where `two` has logged."""
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "one.json").write_text("{}")
    for cluster, processes in {"one": ("router", "tiny+decode+0", "tiny+prefill+10"), "two": ("big+decode+3",)}.items():
        run = tmp_path / "logs" / cluster / "20260101-000000-x"
        run.mkdir(parents=True)
        for process in processes:
            (run / f"{process}.jsonl").write_text("")
            (run / f"{process}.1.jsonl").write_text("")
    (tmp_path / "logs" / "one" / "20250101-000000-x").mkdir()
    monkeypatch.setenv("PDSERVE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sta", {"status"}),
        ("config ", {"check", "show", "explain", "schema"}),
        ("nonsense ", set()),
        (
            "logs --cluster one ",
            {"router", "tiny/decode/0", "tiny/prefill/10", "tiny/decode", "tiny/prefill", "decode", "prefill"},
        ),
        ("logs --cluster=two big/", {"big/decode/3", "big/decode"}),
        ("logs --cluster = two router b", {"big/decode/3", "big/decode"}),  # as bash cuts it; and a second process
        ("drain --cluster one ", {"tiny/decode/0", "tiny/prefill/10"}),
        ("drain --cluster one tiny/decode/0 ", set()),  # takes one
        ("flip --cluster one tiny/decode/0 ", {"prefill", "decode"}),
        ("scale --cluster one ", {"tiny"}),
        ("status --cluster ", {"one", "two"}),
        ("logs --level w", {"warning"}),
        ("logs --level=e", {"--level=error"}),
        ("logs --fo", {"--follow", "--folder"}),
        ("logs -n 3 --fo", {"--follow", "--folder"}),
        ("logs -- --fo", set()),
        ("up ", set()),  # a file: the shell's own business
        ("config explain router.http", {"router.http_host", "router.http_port"}),
        ("completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_what_is_offered(home: Path, line: str, expected: set[str]) -> None:
    assert {one.text for one in candidates(TREE, line.split(" "))} == expected


def test_every_command_and_option_of_the_command_line_is_offered() -> None:
    """Against what `--help` says, which comes from elsewhere."""
    from typer.testing import CliRunner

    def look(node: object, words: list[str]) -> None:
        told = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).stdout
        for name, child in node.commands.items():
            assert name in told
            look(child, [*words, name])
        if not node.commands:
            listed = {word.strip(",") for line in told.splitlines() for word in line.split() if word.startswith("--")}
            offered = {name for option in node.options for name in option.names if name.startswith("--")}
            assert {name for name in listed if name.rstrip("]") in offered} >= offered - {"--no-slow"}, words

    assert {"up", "down", "status", "top", "logs", "doctor", "scale", "chat", "config"} <= TREE.commands.keys()
    look(TREE, [])


def test_each_shell_gets_its_form(home: Path) -> None:
    assert answer("bash", ["stat"]) == "status\n"
    assert answer("fish", ["stat"]).startswith("status\tShows models")
    assert answer("zsh", ["stat"]).startswith("status:Shows models")
    assert answer("bash", []).splitlines() == list(TREE.commands)


def test_the_description_is_kept_until_the_code_changes(home: Path) -> None:
    assert load(home) == TREE
    kept = json.loads((home / "completion.json").read_text())
    kept["tree"]["commands"] = {}
    (home / "completion.json").write_text(json.dumps(kept))
    assert load(home).commands == {}, "it is read"
    (home / "completion.json").write_text(json.dumps({**kept, "fingerprint": "of other code"}))
    assert load(home) == TREE
    (home / "completion.json").write_text("{")
    assert load(home) == TREE


def test_nothing_heavy_is_imported_for_a_key_press(home: Path) -> None:
    load(home)
    script = (
        "import sys; sys.argv = ['pdserve', 'logs', '--cluster', 'one', '']\n"
        "from deploy.cli import main; main(); sys.stderr.write(' '.join(sys.modules))"
    )
    environment = {**os.environ, "_PDSERVE_COMPLETE": "bash"}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert "router" in found.stdout
    assert not {"typer", "rich", "pydantic", "grpc", "yaml", "asyncio", "torch", "ray"} & set(found.stderr.split())


def test_a_real_bash_completes(home: Path) -> None:
    """With the script as it is printed, and `pdserve` from the path."""
    program = home / "bin" / "pdserve"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m deploy.cli "$@"\n')
    program.chmod(0o755)
    script = f"""
{SCRIPTS["bash"]}
COMP_WORDS=(pdserve logs --cluster one tiny/d); COMP_CWORD=4; _pdserve
printf '%s\\n' "${{COMPREPLY[@]}}"
COMP_WORDS=(pdserve drain --cluster one ''); COMP_CWORD=4; _pdserve
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p pdserve
"""
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.splitlines() == [
        "tiny/decode",
        "tiny/decode/0",
        "tiny/decode/0",
        "tiny/prefill/10",
        "complete -o default -F _pdserve pdserve",
    ]
