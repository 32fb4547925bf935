"""Training on made-up answers whose next tokens follow from row and token: heads learn that, and only what can be learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.clock import ManualClock
from common.engine.heads.training import Lesson, Plan, train
from common.errors import ConfigError
from support.tiny_models import make_tiny_model

pytestmark = pytest.mark.long
WORDS = range(10, 26)
PLAN = Plan(num_guesses=2, num_words=16, width=48, passes=80.0, budget_s=1e9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_embeddings=True)


def answers(model: Path, count: int, *, follows: bool) -> list[Lesson]:
    """Token t is followed by t + 1, round and round; or by any. Rows are what the model's head would say the token from."""
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    head, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        first = int(torch.randint(16, (1,), generator=generator))
        tokens = torch.tensor([WORDS[(first + place) % 16] for place in range(40)])
        if not follows:
            tokens = torch.tensor(WORDS)[torch.randint(16, (40,), generator=generator)]
        rows = head[tokens] / norm + 0.05 * torch.randn(40, head.shape[1], generator=generator)
        found.append(Lesson(rows.bfloat16(), tokens))
    return found


def test_what_follows_is_learned(model: Path) -> None:
    weights, report = train(answers(model, 96, follows=True), model, "d" * 64, PLAN, ManualClock())
    assert report.words_cover == 1.0
    assert min(report.right) > 0.9
    assert min(report.right_so_far) > 0.9
    assert report.num_held_back == 8 * 40
    assert report.num_tokens == 88 * 40
    assert weights.description.model == "d" * 64


def test_what_does_not_follow_is_not(model: Path) -> None:
    """Held-back answers are not learned by heart."""
    _, report = train(answers(model, 48, follows=False), model, "d" * 64, PLAN, ManualClock())
    assert max(report.right) < 0.25


class Hurried(ManualClock):
    def monotonic_s(self) -> float:
        self.advance(1.0)
        return super().monotonic_s()


def test_it_ends_when_its_time_is_over(model: Path) -> None:
    lines: list[str] = []
    hurried = Plan(num_guesses=2, num_words=16, width=48, passes=1000.0, budget_s=5.0)
    train(answers(model, 24, follows=True), model, "d" * 64, hurried, Hurried(), lines.append)
    assert "time is over" in lines[-1]


def test_too_little_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        train(answers(model, 23, follows=True), model, "d" * 64, PLAN, ManualClock())
