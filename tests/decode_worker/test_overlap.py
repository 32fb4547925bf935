"""A worker's core on its thread over a tiny model, in exact mode: answers with overlapping steps are those without, bit by bit,
under preemption by swap and by recomputation, with other answers beside and without, aborted and not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.config import EngineConfig
from common.engine.attention import create_rows_attention
from common.engine.block_manager import BlockManager
from common.engine.captured.buckets import make_buckets
from common.engine.captured.steps import DecodeSteps
from common.engine.engine import Engine, build_engine
from common.engine.kv_pool import FIRST_BLOCK
from decode_worker.step_ahead import Asking, Wait, overlaps
from support.host_draws import HostDraws
from support.served_core import PLAIN_WORK, Answer, Served, one_by_one, request
from support.tiny_models import make_tiny_model

POOL_BLOCKS = 14


def built(path: Path, **changes: object) -> Engine:
    values = {"device": "cpu", "dtype": "float32", "block_tokens": 4, "kv_pool_tokens": 4 * POOL_BLOCKS, "prefix_cache": False}
    return build_engine(path, EngineConfig(**(values | changes)), threads=1, model_digest="m", tokenizer_digest="t")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return built(tiny, exact=True)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, Answer]:
    """Each by itself, step after step."""
    return one_by_one(engine, PLAIN_WORK)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
async def test_answers_are_those_of_each_alone(engine: Engine, alone: dict[str, Answer], preemption: str) -> None:
    served = Served(engine, overlap=True, preemption=preemption)
    assert await served.run(PLAIN_WORK) == alone
    totals = served.scheduler.totals
    assert totals.steps_ahead > 10
    assert totals.preemptions > 0, "the pool is not small enough for this test"
    assert totals.swapped_in == totals.swapped_out
    assert (totals.swapped_out > 0) == (preemption == "swap")
    assert engine.blocks.num_used == 0


async def test_what_only_a_token_reveals_is_thrown_away(engine: Engine, alone: dict[str, Answer]) -> None:
    """A stop token ends an answer one step after the next one was launched: nothing of that is seen, and no block is lost."""
    stop = alone["e"][5][0]
    first = next(place for place, (token_id, _) in enumerate(alone["e"]) if token_id == stop)
    stopped = replace(PLAIN_WORK[4], sampling=replace(PLAIN_WORK[4].sampling, stop_token_ids=(stop,)))
    served = Served(engine, overlap=True)
    answers = await served.run([stopped, PLAIN_WORK[1]])
    assert answers["e"] == alone["e"][:first]
    assert answers["b"] == alone["b"]
    assert served.scheduler.totals.surplus_rows == 1
    assert engine.blocks.num_used == 0


async def test_who_leaves_while_a_step_is_under_way_disturbs_nobody(engine: Engine, alone: dict[str, Answer]) -> None:
    work = [
        replace(item, sampling=replace(item.sampling, max_tokens=30)) if item.request_id in "ae" else item for item in PLAIN_WORK
    ]
    served = Served(engine, overlap=True, preemption="swap")
    answers = await served.run(work, abort=["a", "e"])
    assert answers == {name: alone[name] for name in "bcd"}
    assert engine.blocks.num_used == 0


@pytest.mark.parametrize("drawn", ["best by the device", "by the device", "by the device and the host"])
async def test_steps_of_fixed_shape_overlap_as_well(tiny: Path, drawn: str) -> None:
    """As on a GPU: a token is looked up where it was drawn; what only the host can draw is waited for."""
    engine = built(tiny, kernels="torch")
    attention = create_rows_attention("fast", engine.pool, engine.architecture.num_heads)
    runner = engine.runner.without_steps()
    buckets = make_buckets(8, POOL_BLOCKS, one_width=False)
    runner.steps = DecodeSteps(
        runner._model,
        engine.pool,
        attention,
        buckets,
        engine.pool.num_blocks - 1,
        vocab_size=engine.architecture.vocab_size,
        capture=False,
        draws=HostDraws() if drawn == "by the device" else None,
    )
    # The last block is the programs' own.
    blocks = BlockManager(engine.pool.num_blocks - 1, 4, engine.blocks.root, prefix_cache=False, first_block=FIRST_BLOCK)
    packed = replace(engine, runner=runner, blocks=blocks)
    work = [replace(item, sampling=replace(item.sampling, logprobs=None)) for item in PLAIN_WORK]
    if drawn == "best by the device":
        work = [replace(item, sampling=replace(item.sampling, temperature=0.0, min_tokens=0)) for item in work]
    one_by_one = await Served(packed, overlap=False).run(work)
    served = Served(packed, overlap=True, preemption="swap")
    assert await served.run(work) == one_by_one
    assert served.scheduler.totals.steps_ahead > 10
    assert blocks.num_used == 0


@pytest.mark.parametrize("sampling", [{"frequency_penalty": 0.4}, {"bad_words": ((5, 6),)}])
async def test_rules_that_look_at_tokens_make_steps_wait(engine: Engine, sampling: dict[str, object]) -> None:
    item = request("p", 6, **sampling)
    served = Served(engine, overlap=True)
    answers = await served.run([item])
    assert answers == await Served(engine, overlap=False).run([item])
    assert served.scheduler.totals.steps_ahead == 0
    assert served.scheduler.totals.waits[Wait.RULES.value] >= 10


def test_who_guesses_is_asked_until_there_were_none_for_a_while_and_then_now_and_then() -> None:
    asking = Asking()
    for _ in range(16):
        assert asking.is_due
        asking.asked(guessed=False)
    for _ in range(7):
        assert not asking.is_due
        asking.skipped()
    assert asking.is_due
    asking.asked(guessed=True)
    assert asking.is_due


def test_auto_overlaps_where_somebody_else_computes() -> None:
    assert overlaps("auto", "cuda", threads=10_000)
    assert not overlaps("auto", "cpu", threads=10_000)
    assert overlaps("on", "cpu", threads=10_000)
    assert not overlaps("off", "cuda", threads=1)
