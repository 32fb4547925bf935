"""A whole engine with the kernels against one with torch: the same tokens, whoever shares a step and however a prompt is cut."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import EngineConfig
from common.engine.attention.paged import PagedAttention
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.operations import TorchOperations
from common.engine.triton_kernels import check
from common.engine.triton_kernels.operations import TritonOperations
from common.errors import ConfigError, EngineFailure
from support.tiny_gemma import WINDOW, make_tiny_gemma
from support.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[4]
TOKENS = [int(token) for token in torch.randint(3, 384, (200,), generator=torch.Generator().manual_seed(0))]
GREEDY = SampleSpec(position=0, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
SAMPLED = replace(GREEDY, temperature=0.9, top_k=60, top_p=0.9, min_p=0.01, seed=11, logprobs=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two heads that share their KV: the interpreter's time goes by the heads."""
    return make_tiny_model(tmp_path_factory.mktemp("narrow"), hidden=32, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gemma(tmp_path_factory.mktemp("gemma"), layers=6)


def build(path: Path, device: torch.device, **config: object) -> Engine:
    settings = EngineConfig(**{"device": device.type, "dtype": "float32", "kv_pool_tokens": 1024, "kernels": "triton", **config})
    return build_engine(path, settings, threads=1, model_digest="m", tokenizer_digest="t")


def generate(engine: Engine, prompt_tokens: int, cuts: list[int], spec: SampleSpec, count: int) -> list[tuple[object, ...]]:
    """A prompt in chunks, then token by token, with another sequence in every step."""
    own, other = engine.blocks.allocate(-(-(prompt_tokens + count) // 16)), engine.blocks.allocate(4)
    tokens, drawn, start = TOKENS[:prompt_tokens], [], 0
    for end in [*cuts, prompt_tokens, *range(prompt_tokens + 1, prompt_tokens + count)]:
        samples = (replace(spec, position=end),) if end >= prompt_tokens else ()
        item = SequenceSlice(tokens[start:end], start, own, samples)
        beside = SequenceSlice(TOKENS[50 : 50 + 1 + end % 3], 20, other)
        result = engine.runner.execute(ScheduledBatch((beside, item))).slices[1].tokens
        if result:
            tokens = [*tokens, result[0].token_id]
            report = result[0].logprob
            drawn.append((result[0].token_id, *(() if report is None else (token_id for token_id, _ in report.top))))
        start = end
    engine.blocks.release([*own, *other])
    return drawn


@pytest.mark.long
def test_tokens_are_those_of_torch(tiny: Path, device: torch.device) -> None:
    ours, torchs = build(tiny, device), build(tiny, device, kernels="torch")
    assert isinstance(ours.runner._operations, TritonOperations)
    assert isinstance(ours.runner._attention, PagedAttention)
    assert isinstance(torchs.runner._operations, TorchOperations)
    for cuts, spec in (([], GREEDY), ([17], SAMPLED)):
        assert generate(ours, 34, cuts, spec, 3) == generate(torchs, 34, cuts, spec, 3)


@pytest.mark.long
def test_tokens_are_those_of_torch_with_windows_and_normed_heads(gemma: Path, device: torch.device) -> None:
    ours, torchs = build(gemma, device), build(gemma, device, kernels="torch")
    assert generate(ours, WINDOW + 8, [WINDOW + 3], SAMPLED, 2) == generate(torchs, WINDOW + 8, [WINDOW + 3], SAMPLED, 2)


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.long
def test_logits_and_kv_of_exact_mode_are_the_same_bits_however_computed(narrow: Path, device: torch.device) -> None:
    """At once, in chunks with company, token by token, and after a prefix that was there before."""
    engine = build(narrow, device, exact=True)
    tables = [engine.blocks.allocate(3) for _ in range(4)]
    other = SequenceSlice(TOKENS[:5], 20, engine.blocks.allocate(2))

    def compute(table: list[int], ends: list[int], start: int = 0) -> torch.Tensor:
        for end in ends:
            item = SequenceSlice(TOKENS[start:end], start, table)
            batch = ScheduledBatch((item,) if len(ends) == 1 else (other, item))
            got, start = engine.runner.compute_logits(batch)[-1], end
        return got

    whole = compute(tables[0], [34])
    assert torch.equal(compute(tables[1], [3, 20, 34]), whole)
    assert torch.equal(compute(tables[2], [32, 33, 34]), whole)
    shared = [*tables[0][:1], *tables[3][1:]]
    assert torch.equal(compute(shared, [34], start=16), whole)
    kv = [engine.pool.tensor[table] for table in (*tables[:3], shared)]
    assert all(torch.equal(part, kv[0]) for part in kv[1:])


@pytest.mark.long
def test_drafts_are_drawn_as_if_nobody_had_guessed(tiny: Path, device: torch.device) -> None:
    engine = build(tiny, device)
    alone = [token for token, *_ in generate(engine, 30, [], GREEDY, 4)]
    table = engine.blocks.allocate(3)
    engine.runner.execute(ScheduledBatch((SequenceSlice(TOKENS[:30], 0, table, (GREEDY,)),)))
    samples = tuple(replace(GREEDY, position=31 + i) for i in range(3))
    item = SequenceSlice([alone[0], alone[1], 5 if alone[2] != 5 else 6], 30, table, samples, num_drafts=2)
    tokens = engine.runner.execute(ScheduledBatch((item,))).slices[0].tokens
    assert [token.token_id for token in tokens] == alone[1:3]


def test_kernels_that_are_wrong_do_not_serve(tiny: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = check.gated.gated_silu

    def wrong(gate_up: torch.Tensor) -> torch.Tensor:
        return right(gate_up) + 0.05

    monkeypatch.setattr(check.gated, "gated_silu", wrong)
    with pytest.raises(ConfigError, match=r"gated_silu is 0\.05 off") as caught:
        build(tiny, device)
    assert caught.value.param == "engine.kernels"


def test_auto_falls_back_to_torch_on_a_gpu_with_one_warning(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.engine.loader import load_architecture
    from common.engine.triton_kernels.choice import choose_operations

    def fail(*_: object, **__: object) -> None:
        raise EngineFailure("the kernel add_norm is 3 off in torch.bfloat16")

    monkeypatch.setattr(check, "check_kernels", fail)
    config, architecture = EngineConfig(kernels="auto"), load_architecture(tiny)
    layout = build(tiny, torch.device("cpu"), kernels="torch").layout
    announced: list[str] = []
    for settings, device in ((config, "cuda"), (EngineConfig(kernels="torch"), "cuda"), (config, "cpu")):
        assert choose_operations(settings, architecture, layout, torch.device(device), announced.append) is None
    assert announced == ["torch computes, for Triton's kernels cannot be had: the kernel add_norm is 3 off in torch.bfloat16"]


@pytest.mark.long
def test_what_cannot_be_had_is_refused_when_demanded(tiny: Path) -> None:
    """In a process without the interpreter, and without a GPU; Triton is not looked for unless asked for."""
    script = f"""
import sys
from pathlib import Path
import torch
from common.config import EngineConfig
from common.engine.engine import build_engine
from common.errors import ConfigError
torch.cuda.is_available = lambda: False
def build(kernels):
    return build_engine(Path({str(tiny)!r}), EngineConfig(device="cpu", dtype="float32", kernels=kernels, kv_pool_tokens=256),
        threads=1, model_digest="m", tokenizer_digest="t")
build("torch")
assert "triton" not in sys.modules
try:
    build("triton")
except ConfigError as error:
    assert "GPU" in error.message, error.message
else:
    sys.exit("not refused")
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tiny)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
