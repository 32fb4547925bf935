"""Pools that are too small: nobody holds what somebody else needs to go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common.config import DecodeConfig, PrefillConfig
from support.planted_links import Plants
from support.workers import request, running_workers
from support.zoo import BLOCK, UNCACHED, Oracle, Stall, assert_no_ghosts, for_ever, is_free, prompt_of, until, within

PROMPT_BLOCKS, ANSWER_BLOCKS = 8, 2
LARGEST = PROMPT_BLOCKS + ANSWER_BLOCKS  # blocks of one request at its end
TIGHT = UNCACHED.model_copy(update={"kv_pool_tokens": LARGEST * 3 // 2 * BLOCK})


@pytest.mark.parametrize("tight", ["decode", "prefill", "both"])
async def test_vllm_57104_loads_that_wait_for_each_other(model_path: Path, oracle: Oracle, tight: str) -> None:
    """vllm#57104. There: two parked loads held the whole pool between them, and neither could go on.
    Ours: a prompt is admitted, on either side, when the pool can hold all of it: with room for one and a half requests, many at
    once all end, and with the tokens of an ample pool."""
    async with running_workers(
        model_path,
        engine=TIGHT if tight != "prefill" else UNCACHED,
        prefill_engine=TIGHT if tight != "decode" else UNCACHED,
        decode=DecodeConfig(local_prefill="never"),
        prefill=PrefillConfig(chunk_tokens=2 * BLOCK),
        transfer=for_ever(),
    ) as workers:
        work = [
            request(
                prompt_of(PROMPT_BLOCKS * BLOCK - index, 100 + index), request_id=f"t{index}", max_tokens=ANSWER_BLOCKS * BLOCK
            )
            for index in range(8)
        ]
        answers = await within(workers.generate_together(work))
        assert all(map(oracle.agrees, work, answers))
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)


@pytest.mark.parametrize("shortage", ["slots", "blocks"])
async def test_sglang_31473_nothing_is_prefilled_that_cannot_be_decoded(
    model_path: Path, oracle: Oracle, plants: Plants, shortage: str
) -> None:
    """sglang#31473. There: the prefill side computed and pinned prompts that the decode side had no room for, until neither
    moved.
    Ours: capacity is taken in one order, the decode side first: while it is full, no prefill worker hears of the next request,
    let alone holds KV for it."""
    engine = TIGHT if shortage == "blocks" else UNCACHED
    config = DecodeConfig(local_prefill="never", max_running=1 if shortage == "slots" else 8)
    async with running_workers(model_path, engine=engine, prefill_engine=UNCACHED, decode=config, transfer=for_ever()) as workers:
        # Enough to be busy with: the second one must be seen to wait, whatever the machine is busy with.
        first = request(prompt_of(PROMPT_BLOCKS * BLOCK, 110), request_id="first", max_tokens=90)
        second = request(prompt_of(PROMPT_BLOCKS * BLOCK, 111), request_id="second", max_tokens=6)
        scheduler = workers.decode._scheduler
        stall = Stall(workers.decode, after_steps=3)
        running = asyncio.ensure_future(workers.generate(first))
        await until(lambda: stall.stalled and scheduler.totals.generated_tokens > 0, "the first one decodes")
        waiting = asyncio.ensure_future(workers.generate(second))
        await until(lambda: scheduler.num_waiting == 1, "the second one waits")
        stall.release(steps=20)
        await until(lambda: stall.stalled, "and waits while the first one goes on")
        assert not running.done()
        assert scheduler.num_waiting == 1
        assert [run.request.request_id for run in plants.runs] == ["first"]
        assert await is_free(workers, workers.prefill_refs[0])
        stall.release()
        assert oracle.agrees(first, await within(running))
        assert oracle.agrees(second, await within(waiting))
        assert [run.request.request_id for run in plants.runs] == ["first", "second"]
        await workers.assert_nothing_leaks()
