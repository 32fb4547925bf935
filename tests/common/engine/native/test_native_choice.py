"""Who computes, torch or the native kernels, and what becomes of an engine whose compiler is missing, broken or wrong.

What the compiler makes is made once, and kept in the cache that all tests share: where a test asks when a compiler runs and what
becomes of its output, one plays it that gives out what the real one made.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from structlog.testing import capture_logs

from common.config import EngineConfig, pdserve_home
from common.engine import engine_plan
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.models.llama import LlamaModel
from common.engine.native import build as build_module
from common.engine.native.build import build_library, compile_ahead
from common.engine.native.check import check_library
from common.engine.native.choice import Successor
from common.engine.native.library import Library
from common.engine.native.model import NativeModel
from common.errors import ConfigError
from support.played_compiler import gives_out, install_compiler
from support.tiny_gguf import make_tiny_gguf
from support.tiny_models import make_tiny_model

TOKENS = [int(token) for token in torch.randint(3, 384, (40,), generator=torch.Generator().manual_seed(0))]
BUILD_S = 120.0
SOURCE = Path(build_module.__file__).with_name("source")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return make_tiny_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf", quantisation=GGMLQuantizationType.Q4_1)


@pytest.fixture(scope="module")
def compiled() -> Path:
    """What the real compiler makes, with the flags that it is given in earnest."""
    return build_library(pdserve_home() / "kernels", check_library)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setenv("PDSERVE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def build(path: Path, **config: object) -> Engine:
    settings = EngineConfig(**{"device": "cpu", "dtype": "float32", "kv_pool_tokens": 2048, **config})
    return build_engine(path, settings, threads=1, model_digest="m", tokenizer_digest="t")


def settle(engine: Engine) -> None:
    successor = engine.runner._successor
    assert isinstance(successor, Successor)
    assert successor.wait(BUILD_S)


def logits(engine: Engine, first: int, end: int, table: list[int]) -> torch.Tensor:
    return engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(TOKENS[first:end], first, table),)))


@pytest.mark.parametrize("weights", ["model", "file"])
def test_torch_serves_until_the_kernels_are_compiled_and_both_share_the_kv(
    tiny: Path, in_blocks: Path, compiled: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: str
) -> None:
    source = in_blocks if weights == "file" else tiny
    gate = tmp_path / "gate"
    os.mkfifo(gate)  # the compiler takes until somebody writes to it
    calls = install_compiler(tmp_path, monkeypatch, f"read line < {gate}\n{gives_out(compiled)}")
    expected = logits(build(source, kernels="torch"), 0, 40, [1, 2, 3])
    with capture_logs() as logs:
        engine = build(source, weights=weights)
        first = logits(engine, 0, 25, [1, 2, 3])
        assert isinstance(engine.runner._model, LlamaModel)
        gate.write_text("go on\n")
        settle(engine)
        second = logits(engine, 25, 40, [1, 2, 3])
    assert isinstance(engine.runner._model, NativeModel)
    assert engine.runner._successor is None
    torch.testing.assert_close(first, expected[:25], rtol=1e-3, atol=1e-3)
    tolerance = 0.3 if weights == "file" else 1e-3  # rows are rounded to 8 bits then
    torch.testing.assert_close(second, expected[25:], rtol=tolerance, atol=tolerance)
    assert [entry["log_level"] for entry in logs] == ["info"]
    assert isinstance(build(source, weights=weights).runner._model, NativeModel)  # from the cache, at once
    assert calls.read_text().count("call") == 1


def test_a_file_that_is_large_in_full_waits_for_the_kernels(
    in_blocks: Path, compiled: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = install_compiler(tmp_path, monkeypatch, gives_out(compiled))
    monkeypatch.setattr(engine_plan, "_CHEAP_COPY_BYTES", 1 << 10)
    engine = build(in_blocks, weights="file")
    assert isinstance(engine.runner._model, NativeModel)
    assert calls.read_text().count("call") == 1


def test_one_compilation_serves_all_that_follow(
    tiny: Path, compiled: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = install_compiler(tmp_path, monkeypatch, gives_out(compiled))
    for _ in range(3):
        assert isinstance(build(tiny, kernels="native").runner._model, NativeModel)
    assert calls.read_text().count("call") == 1


def test_what_was_compiled_ahead_is_checked_and_served(
    tiny: Path, compiled: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = install_compiler(tmp_path, monkeypatch, gives_out(compiled))
    compile_ahead(pdserve_home() / "kernels")
    assert isinstance(build(tiny, kernels="auto").runner._model, LlamaModel)  # it is nobody's yet
    assert isinstance(build(tiny, kernels="native").runner._model, NativeModel)
    assert calls.read_text().count("call") == 1
    compile_ahead(pdserve_home() / "kernels")
    assert calls.read_text().count("call") == 1


def test_what_was_compiled_ahead_and_is_wrong_serves_nobody(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_compiler(tmp_path, monkeypatch, BROKEN["leaves rubbish"])
    compile_ahead(pdserve_home() / "kernels")
    with pytest.raises(ConfigError, match="kernels"):
        build(tiny, kernels="native")
    assert not list(home.rglob("decoder-*"))


BROKEN = {
    "fails": "echo 'decoder.cpp:1: error: no' >&2; exit 1",
    "leaves rubbish": 'while test "$1" != -o; do shift; done; echo rubbish > "$2"',
    "leaves nothing": "exit 0",
    "miscompiles": (  # without optimisation: it is wrong either way, and the second time it is asked it has it ready
        'while test "$1" != -o; do shift; done\n'
        'made=${0%/*}/made; test -f $made && exec cp $made "$2"\n'
        f'cp -r {SOURCE} "$2.source"; sed -i s/0.693359375f/0.70f/ "$2.source/vectors.h"\n'
        '$REAL -std=c++20 -O0 -march=native -shared -fPIC -pthread "$2.source/decoder.cpp" -o $made; status=$?\n'
        'rm -r "$2.source"; cp $made "$2"; exit $status'
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["missing", *BROKEN])
def test_without_a_sound_compiler_torch_goes_on_with_one_warning(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    if kind == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        install_compiler(tmp_path, monkeypatch, BROKEN[kind])
    with capture_logs() as logs:
        engine = build(tiny)
        settle(engine)
        for _ in range(3):
            logits(engine, 0, 40, [1, 2, 3])
    assert isinstance(engine.runner._model, LlamaModel)
    assert [entry["log_level"] for entry in logs] == ["warning"], logs
    assert not list(home.rglob("decoder-*"))
    with pytest.raises(ConfigError, match="kernels"):
        build(tiny, kernels="native")


def test_a_damaged_library_in_the_cache_is_built_again(
    tiny: Path, compiled: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = install_compiler(tmp_path, monkeypatch, gives_out(compiled))
    library = build_library(pdserve_home() / "kernels", check_library)
    library.unlink()
    library.write_bytes(b"half a library")
    engine = build(tiny)
    settle(engine)
    logits(engine, 0, 40, [1, 2, 3])
    assert isinstance(engine.runner._model, NativeModel)
    assert calls.read_text().count("call") == 2


def test_what_the_kernels_cannot_do_torch_does(tiny: Path) -> None:
    assert isinstance(build(tiny, dtype="float16").runner._model, LlamaModel)
    with pytest.raises(ConfigError, match="native"):
        build(tiny, kernels="native", dtype="float16")
    assert isinstance(build(tiny, kernels="torch").runner._model, LlamaModel)


def test_exact_mode_waits_for_the_kernels_and_switches_nothing_later(
    tiny: Path, compiled: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an empty cache, where fast mode would begin with torch; the compiler's part is played by what it made before."""
    asked = []

    def build_at_once(cache: Path, check: Callable[[Path], None]) -> Path:
        asked.append(cache)
        return compiled

    monkeypatch.setattr("common.engine.native.choice.build_library", build_at_once)
    with capture_logs() as logs:
        engine = build(tiny, exact=True)
    assert asked == [home / "kernels"]
    assert isinstance(engine.runner._model, NativeModel)
    assert engine.runner._successor is None
    assert [entry["event"] for entry in logs] == ["native kernels compute"]


def test_exact_mode_does_not_start_without_the_kernels_unless_torch_is_asked_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker that computes by torch beside others that do not would change bits where a request moves."""
    by_kernels = build(tiny, exact=True).layout
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PDSERVE_HOME", str(tmp_path / "empty"))
    for kernels in ("auto", "native"):
        with pytest.raises(ConfigError, match="no C\\+\\+ compiler") as refused:
            build(tiny, exact=True, kernels=kernels)
        assert refused.value.param == "engine.kernels"
    by_torch = build(tiny, exact=True, kernels="torch")
    assert isinstance(by_torch.runner._model, LlamaModel)
    assert by_torch.layout.fingerprint != by_kernels.fingerprint


def test_in_fast_mode_both_share_kv(tiny: Path) -> None:
    assert build(tiny).layout.fingerprint == build(tiny, kernels="torch").layout.fingerprint


def test_other_instructions_are_another_kind_of_exact(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = build(tiny, exact=True).layout
    known = Library.__init__

    def elsewhere(library: Library, path: Path) -> None:
        known(library, path)
        library.arithmetic = library.arithmetic.replace(" ", " f")

    monkeypatch.setattr(Library, "__init__", elsewhere)
    assert build(tiny, exact=True).layout.fingerprint != here.fingerprint
