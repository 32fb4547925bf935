"""How two engines share a GPU, as far as it shows without one: environments, refusals, servers of their own, arrangements."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from benchmarks.on_gpu import disaggregation, sharing
from benchmarks.on_gpu.disaggregation import ON_GPU, Arrangement, Found, Layout, Scale, arrangements, compare
from benchmarks.on_gpu.report import Report
from benchmarks.on_gpu.sharing import Role, Sharing, environment, environment_of, mps_server, obstacle_of
from common.errors import StartupError

SERVER = """#!/bin/sh
folder="$CUDA_MPS_PIPE_DIRECTORY"
if [ "$1" = "-f" ]; then
    test -d "$CUDA_MPS_LOG_DIRECTORY" || exit 3
    mkfifo "$folder/asked"
    touch "$folder/control"
    read -r word < "$folder/asked"
    echo "$word" > "$TOLD"
    exit 0
fi
read -r word
echo "$word" > "$folder/asked"
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the path, on a machine without an MPS server."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(sharing, "DEFAULT_PIPES", tmp_path / "nobody")
    return folder


def install(folder: Path, text: str) -> None:
    tool = folder / sharing.CONTROL
    tool.write_text(text)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


def test_a_server_of_our_own_lasts_as_long_as_it_is_needed(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    install(tools, SERVER)
    assert obstacle_of(Sharing.MPS, "cuda") is None
    with mps_server() as pipes:
        assert (pipes / "control").exists()
        assert pipes != sharing.DEFAULT_PIPES
    assert (tmp_path / "told").read_text() == "quit\n"
    assert not pipes.exists()


def test_a_server_that_is_there_is_used_and_left_alone(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tools, "#!/bin/sh\nexit 9\n")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "theirs"))
    with mps_server() as pipes:
        assert pipes == tmp_path / "theirs"
    assert (pipes / "control").exists()


def test_a_server_that_does_not_come_says_why(tools: Path) -> None:
    install(tools, "#!/bin/sh\necho no card\nexit 4\n")
    with pytest.raises(StartupError, match="ended with 4: no card"), mps_server():
        pass


def test_without_a_server_there_is_no_mps(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    obstacle = obstacle_of(Sharing.MPS, "cuda")
    assert obstacle is not None
    assert sharing.CONTROL in obstacle
    with pytest.raises(StartupError, match="no MPS server"), mps_server():
        pass


def test_prompts_come_second_and_may_not_take_everything() -> None:
    pipes = Path("/somewhere")
    assert environment_of(Role.PREFILL, None) == {}
    assert environment_of(Role.DECODE, pipes) == {"CUDA_MPS_PIPE_DIRECTORY": "/somewhere"}
    assert environment_of(Role.WHOLE, pipes) == environment_of(Role.DECODE, pipes)
    assert environment_of(Role.PREFILL, pipes) == {
        "CUDA_MPS_PIPE_DIRECTORY": "/somewhere",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "70",
        "CUDA_MPS_CLIENT_PRIORITY": "1",
    }


def test_an_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.delenv("NEW", raising=False)
    with environment({"KEPT": "within", "NEW": "1"}):
        assert (os.environ["KEPT"], os.environ["NEW"]) == ("within", "1")
    assert os.environ["KEPT"] == "before"
    assert "NEW" not in os.environ


def test_every_way_is_tried_or_named_with_its_reason(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise StartupError("no driver for green contexts")

    monkeypatch.setattr(sharing, "load_driver", no_driver)
    monkeypatch.setenv("PATH", str(tools))
    report = Report("disagg", "cuda")
    assert [item.name for item in arrangements(report, None)] == ["two whole engines", "apart (turns)", "apart (streams)"]
    assert len(report.notes) == 2
    assert "green" in report.notes[0]
    assert "no driver" in report.notes[0]
    assert [item.name for item in arrangements(report, Sharing.STREAMS)] == ["two whole engines", "apart (streams)"]
    install(tools, SERVER)
    assert [item.name for item in arrangements(report, Sharing.MPS)] == [
        "two whole engines",
        "apart (mps)",
        "two whole engines (mps)",
    ]


@pytest.mark.parametrize(("most", "found", "tries"), [(0, 0.0, 3), (15.0, 12.0, 3), (48.0, 48.0, 3), (24.0, 24.0, 3)])
def test_the_highest_rate_is_searched_by_halves(most: float, found: float, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def attainment(report: Report, layout: Layout, scale: Scale, limits: object, rate: float, name: str) -> float:
        asked.append(rate)
        return 0.95 if rate <= most else 0.3

    monkeypatch.setattr(disaggregation, "attainment", attainment)
    assert disaggregation.goodput_of(Report("disagg", "cuda"), Layout((), ()), ON_GPU, (0.0, 0.0), "some") == found
    assert len(set(asked)) == len(asked) <= tries


def test_the_best_way_is_held_against_the_better_of_the_whole_engines() -> None:
    report = Report("disagg", "cuda")
    found = {
        Arrangement(Sharing.TURNS, apart=False): Found(8.0, 0.4),
        Arrangement(Sharing.MPS, apart=False): Found(10.0, 0.5),
        Arrangement(Sharing.STREAMS, apart=True): Found(12.0, 0.2),
        Arrangement(Sharing.GREEN, apart=True): Found(12.0, 0.1),
    }
    compare(report, found)
    judged = {figure.check: figure for figure in report.figures if figure.target is not None}
    assert judged["D1"].value == pytest.approx(1.2)
    assert judged["D3"].value == pytest.approx(0.25)
    assert "best: apart (green)" in report.notes
    empty = Report("disagg", "cuda")
    compare(empty, {Arrangement(Sharing.TURNS, apart=False): Found(8.0, 0.4)})
    assert not empty.figures
