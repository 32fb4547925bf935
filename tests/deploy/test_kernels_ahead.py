"""What is compiled while a cluster starts: by a compiler that is played, for what it makes is not asked here."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from common.config import EngineConfig
from deploy import kernels_ahead
from deploy.kernels_ahead import compile_kernels_ahead
from support.played_compiler import gives_out, install_compiler


def is_compiled(cache: Path, *engines: EngineConfig) -> bool:
    """And waits to be checked."""
    thread = compile_kernels_ahead(engines, cache)
    if thread is not None:
        thread.join(60)
        assert not thread.is_alive()
    return bool(list(cache.glob("decoder-*.unchecked")))


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The device file of a GPU that is not there yet."""
    monkeypatch.setattr(kernels_ahead, "_GPU", tmp_path / "gpu")
    return tmp_path / "gpu"


def test_what_workers_will_ask_for_is_compiled_and_waits_to_be_checked(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    made.write_bytes(b"a library")
    install_compiler(tmp_path, monkeypatch, gives_out(made))
    by_torch, by_default, on_gpus = EngineConfig(kernels="torch"), EngineConfig(), EngineConfig(device="cuda")
    assert not is_compiled(tmp_path / "a", by_torch, on_gpus)
    assert is_compiled(tmp_path / "b", by_torch, by_default)
    gpu.touch()
    assert not is_compiled(tmp_path / "c", by_default)
    assert is_compiled(tmp_path / "d", EngineConfig(device="cpu"))


@pytest.mark.parametrize("kind", ["missing", "fails"])
def test_who_starts_a_cluster_hears_nothing_of_a_compiler_that_is_not_to_be_had(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The workers will: they know whether they serve without."""
    if kind == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        install_compiler(tmp_path, monkeypatch, "exit 1")
    with capture_logs() as logs:
        assert not is_compiled(tmp_path / "cache", EngineConfig(device="cpu"))
    assert [entry["log_level"] for entry in logs] == ["info"]
    assert not list(tmp_path.glob("cache/*.unfinished"))
