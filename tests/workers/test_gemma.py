"""A model whose layers see windows, served disaggregated: the same bits as in one process, whatever is cached and however cut."""

from __future__ import annotations

from pathlib import Path

import torch

from common.config import DecodeConfig, EngineConfig, PrefillConfig
from support.tiny_gemma import WINDOW, make_tiny_gemma
from support.workers import request, running_workers


async def test_remote_chunked_and_cached_prefill_give_the_same_bits(tmp_path: Path) -> None:
    folder = make_tiny_gemma(tmp_path / "gemma")
    prompt = torch.randint(3, 380, (4 * WINDOW + 5,), generator=torch.Generator().manual_seed(2)).tolist()
    work = [
        request(prompt[:length], request_id=f"{length}", max_tokens=2 * WINDOW, temperature=0.8, logprobs=5)
        for length in (WINDOW - 3, 2 * WINDOW, len(prompt))
    ]
    plain = EngineConfig(dtype="float32", exact=True, prefix_cache=False, kv_pool_tokens=2048)
    async with running_workers(folder, engine=plain, num_prefill=0, decode=DecodeConfig(local_prefill="always")) as alone:
        expected = [await alone.generate(item) for item in work]
    caching = plain.model_copy(update={"prefix_cache": True})
    async with running_workers(folder, engine=caching, prefill=PrefillConfig(chunk_tokens=32)) as workers:
        for _ in range(2):  # the second time from the caches
            found = [await workers.generate(item) for item in work]
            assert [(item.token_ids, item.logprobs) for item in found] == [(item.token_ids, item.logprobs) for item in expected]
        assert found[-1].started is not None
        assert found[-1].started.cached_tokens >= 4 * WINDOW - 16
        await workers.assert_nothing_leaks()
