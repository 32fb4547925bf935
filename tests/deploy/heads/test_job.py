"""Heads from end to end on a tiny model: answers, training, a file that a worker loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.clock import ManualClock
from common.config import EngineConfig
from common.engine.engine import build_engine
from common.engine.heads.heads import load_heads
from common.errors import ConfigError
from common.model_store import resolve
from common.tokenizer import Tokenizer
from deploy.heads.answers import TEMPERATURES, ask
from deploy.heads.job import Job, make_heads
from deploy.heads.prompts import built_in_prompts
from support.tiny_models import make_tiny_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def job(model_path: Path, **changes: object) -> Job:
    small = Job(
        files=resolve(str(model_path)),
        output=None,
        prompts=None,
        num_answers=26,
        answer_tokens=12,
        num_guesses=2,
        num_words=40,
        width=16,
        passes=1.0,
        budget_s=1e9,
        threads=1,
    )
    return replace(small, **changes)  # type: ignore[arg-type]


def test_a_worker_finds_what_was_made(model_path: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    path, report = make_heads(job(model_path), tmp_path, ManualClock(), lines.append)
    digest = resolve(str(model_path)).digest()
    assert path == tmp_path / "heads" / f"{digest[:16]}.safetensors"
    heads = load_heads(path, model_path, model_digest=digest, device=torch.device("cpu"), dtype=torch.float32)
    assert heads.num_guesses == len(report.right) == 2
    assert report.num_tokens > report.num_held_back > 0
    assert any("loss" in line for line in lines)


def test_prompts_may_be_the_users_own(model_path: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\n  two  \n" * 13, encoding="utf-8")
    path, _ = make_heads(job(model_path, prompts=prompts, output=tmp_path / "mine"), tmp_path, ManualClock(), lambda _: None)
    assert path == tmp_path / "mine"
    prompts.write_text("only one\n", encoding="utf-8")
    for file, reason in ((prompts, "too few"), (tmp_path / "nowhere", "cannot read")):
        with pytest.raises(ConfigError, match=reason) as caught:
            make_heads(job(model_path, prompts=file), tmp_path, ManualClock(), lambda _: None)
        assert caught.value.param == "prompts"


def test_each_token_of_an_answer_has_the_row_that_it_was_drawn_from(model_path: Path) -> None:
    """Greedy answers: the model's head says the token from the row."""
    config = EngineConfig(device="cpu", dtype="float32", kernels="torch", prefix_cache=False, kv_pool_tokens=2048)
    engine = build_engine(model_path, config, threads=1, model_digest="m", tokenizer_digest="t")
    model = engine.runner._model
    answers = list(ask(engine, Tokenizer.load(model_path), ["a", "b", "c"], at_once=2, max_tokens=9, temperatures=(0.0,)))
    assert len(answers) == 3
    for answer in answers:
        assert len(answer.rows) == len(answer.tokens)
        logits = model.logits(torch.stack([row.values for row in answer.rows]))
        assert logits.argmax(dim=1).tolist() == list(answer.tokens)


def test_prompts_are_many_and_all_different() -> None:
    prompts = list(built_in_prompts())
    assert len(prompts) == len(set(prompts)) == 1200
    assert 0.0 in TEMPERATURES
    assert max(TEMPERATURES) > 0.0
