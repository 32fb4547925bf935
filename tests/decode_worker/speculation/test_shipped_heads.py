"""The heads that come with us: found for the default model, worth their rows on fixed prompts, and changing no token.

Counts, not clocks: every guess is checked, whatever it costs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.clock import SystemClock
from common.config import DecodeConfig, EngineConfig, SpeculationConfig
from common.engine.engine import Engine, build_engine
from common.errors import ConfigError
from common.heads_store import heads_path
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer
from common.types import Request, SamplingParams
from decode_worker.events import Failed, Output
from decode_worker.scheduler import DecodeScheduler
from decode_worker.speculation.choice import GuessedModel, create_speculator
from decode_worker.speculation.speculator import AdaptiveSpeculator
from support.hostile_guesses import Headstrong
from support.tiny_heads import make_tiny_heads
from support.tiny_models import make_tiny_model

pytestmark = pytest.mark.model
MEDUSA = SpeculationConfig(method="medusa")
CONFIG = EngineConfig(device="cpu", prefix_cache=False, kv_pool_tokens=4096)
QUESTIONS = (
    "Why do leaves fall in autumn?",
    "Name three things to pack for a week at the sea.",
    "How does a bicycle stay upright?",
    "Write a short note to thank a neighbour for watering the plants.",
    "What is a mortgage?",
    "Tell a story about a clockmaker who is always late.",
)
NEW_TOKENS = 96
LEAST_TOKENS_PER_STEP = 1.45


@pytest.fixture(scope="module")
def engine(smollm2: ModelFiles) -> Engine:
    digest = Tokenizer.load(smollm2.path).digest
    return build_engine(smollm2.path, CONFIG, threads=1, model_digest=smollm2.digest(), tokenizer_digest=digest)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nothing was ever trained."""
    monkeypatch.setattr("decode_worker.speculation.choice.pdserve_home", lambda: tmp_path)
    return tmp_path


def shipped(engine: Engine, smollm2: ModelFiles) -> AdaptiveSpeculator:
    speculator = create_speculator(MEDUSA, SystemClock(), GuessedModel(str(smollm2.path), engine, CONFIG, 1))
    assert isinstance(speculator, AdaptiveSpeculator)
    return speculator


def answers(engine: Engine, tokenizer: Tokenizer, guesser: Headstrong | None) -> tuple[dict[str, list[int]], DecodeScheduler]:
    """Greedy ones, two at a time."""
    config = DecodeConfig(local_prefill="always", max_running=2)
    scheduler = DecodeScheduler(config, engine.layout, engine.blocks, SystemClock(), guesser)
    assert tokenizer.chat_template is not None
    for number, text in enumerate(QUESTIONS):
        prompt = tokenizer.chat_template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        sampling = SamplingParams(max_tokens=NEW_TOKENS, seed=0, temperature=0.0, stop_token_ids=tuple(tokenizer.eos_token_ids))
        tokens = tuple(tokenizer.encode(prompt, add_special_tokens=False))
        scheduler.submit(Request(str(number), "m", tokens, sampling), ())
    said: dict[str, list[int]] = {str(number): [] for number in range(len(QUESTIONS))}
    while not scheduler.is_idle:
        plan = scheduler.schedule()
        scheduler.complete(plan, engine.runner.execute(plan.batch))
        for event in scheduler.take_events():
            assert not isinstance(event, Failed), event
            if isinstance(event, Output):
                said[event.request_id] += [token_id for chunk in event.chunks for token_id in chunk.token_ids]
    return said, scheduler


def test_they_are_worth_their_rows_and_change_no_token(engine: Engine, smollm2: ModelFiles, home: Path) -> None:
    tokenizer = Tokenizer.load(smollm2.path)
    heads = shipped(engine, smollm2)._slow._heads
    plain, _ = answers(engine, tokenizer, None)
    guessed, scheduler = answers(engine, tokenizer, Headstrong(heads))
    assert guessed == plain
    steps = sum(scheduler.totals.steps_by_accepted)
    tokens_per_step = 1 + scheduler.totals.accepted_tokens / steps
    assert steps > 200
    assert tokens_per_step > LEAST_TOKENS_PER_STEP, (tokens_per_step, scheduler.totals.steps_by_accepted)


def test_heads_that_were_made_here_come_first_and_have_to_be_for_this_model(
    engine: Engine, smollm2: ModelFiles, home: Path, tmp_path: Path
) -> None:
    """Were the shipped ones taken, nobody would complain."""
    shipped(engine, smollm2)
    path = heads_path(home, smollm2.digest())
    path.parent.mkdir()
    make_tiny_heads(path, make_tiny_model(tmp_path / "tiny"))
    with pytest.raises(ConfigError, match="belongs to another model") as refused:
        shipped(engine, smollm2)
    assert refused.value.param == "decode.speculation.heads"
