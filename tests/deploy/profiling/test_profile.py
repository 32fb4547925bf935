"""Every stage of a step is seen as often as it happens, and the stages are the whole step but for what is called the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.config import EngineConfig
from common.engine.native.library import STAGES
from common.engine.profile.watched import StepProfile
from deploy.app import app
from deploy.profiling.steps import Profiles, Wanted, profile_steps
from support.tiny_models import make_tiny_model

WANTED = Wanted(batch=3, context=20, prompt=40, steps=4)
AROUND = {"scheduler", "prepare", "masks", "sampling", "account", "events"}
MATRICES = {"qkv", "output", "gate, up", "down", "head"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def profiles_of(path: Path, **changes: object) -> Profiles:
    settings = EngineConfig(**{"device": "cpu", "dtype": "float32", "kv_pool_tokens": 512, **changes})
    return profile_steps(path, settings, WANTED, threads=1)


def both(profiles: Profiles) -> tuple[StepProfile, StepProfile]:
    assert profiles.decode is not None
    assert profiles.prompt is not None
    return profiles.decode, profiles.prompt


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_each_stage_is_there_as_often_as_it_happens(tiny: Path, kernels: str) -> None:
    profiles = profiles_of(tiny, kernels=kernels)
    assert profiles.kernels == kernels
    for profile, rows, sequences in zip(both(profiles), (3, 40), (3, 1), strict=True):
        stages = {stage.stage: stage for stage in profile.stages}
        around = AROUND - {"sampling"} if kernels == "native" else AROUND  # there the best token is found in the head
        assert set(stages) == around | {"rest"} | ({*STAGES, "kernel calls"} if kernels == "native" else {"layers", "head"})
        assert {name: stages[name].calls for name in around} == dict.fromkeys(around, 1.0)
        if kernels == "torch":
            assert stages["layers"].calls == stages["head"].calls == 1.0
        else:
            assert all(stages[name].seconds > 0 for name in STAGES)
        assert profile.rows == rows
        assert profile.sequences == sequences
        assert sum(stage.seconds for stage in profile.stages) == pytest.approx(profile.seconds)
        assert profile.accounted == pytest.approx(1 - stages["rest"].share)
    decode, prompt = both(profiles)
    assert decode.steps == WANTED.steps
    assert prompt.tokens_in_kv == WANTED.prompt
    assert set(profiles.beside) == {"on the wire", "detokenise"}


def test_what_a_stage_reads_and_computes_is_what_its_matrices_are(tiny: Path) -> None:
    """The tiny model: 2 layers, hidden 64, 4 heads and 2 KV heads of 16, ffn 96 (all whole panels), 391 tokens."""
    from common.engine.loader import load_architecture

    made = load_architecture(tiny)
    hidden, heads, kv_heads, head_dim = made.hidden_size, made.num_heads, made.num_kv_heads, made.head_dim
    weights = {
        "qkv": made.num_layers * hidden * (heads + 2 * kv_heads) * head_dim,
        "output": made.num_layers * hidden * heads * head_dim,
        "gate, up": made.num_layers * 2 * hidden * made.ffn_size,
        "down": made.num_layers * hidden * made.ffn_size,
        "head": made.vocab_size * hidden,
    }
    decode, prompt = both(profiles_of(tiny, kernels="native"))
    for profile, rows, sampled in ((decode, 3, 3), (prompt, 40, 1)):
        stages = {stage.stage: stage for stage in profile.stages}
        for name, count in weights.items():
            assert stages[name].operations == 2 * count * (sampled if name == "head" else rows)
            assert 4 * count <= stages[name].read_bytes <= 4 * count * 1.35  # panels are padded
    attention = {stage.stage: stage for stage in prompt.stages}["attention"]
    pairs = 40 * 41 / 2
    assert attention.operations == 4 * heads * head_dim * made.num_layers * pairs
    assert attention.read_bytes == 40 * made.num_layers * 2 * kv_heads * head_dim * 4


def test_the_command_prints_tables_and_json(tiny: Path) -> None:
    asked = ["profile", str(tiny), "--batch", "2", "--context", "8", "--prompt", "16", "--steps", "2", "--dtype", "float32"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    for word in ("a decode step: 2 sequences", "a prompt's step: 1 sequences, 16 tokens", "attention", "rest", "GB/s"):
        assert word in shown.output
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert found["decode"]["rows"] == 2
    assert {stage["stage"] for stage in found["prompt"]["stages"]} > {"attention", "rest"}
    refused = CliRunner().invoke(app, ["profile", str(tiny), "--weights", "int3"])
    assert refused.exit_code == 1
    assert "weights" in refused.output
