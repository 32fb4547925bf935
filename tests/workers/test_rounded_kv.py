"""KV in 8 bits between real workers: handed over as it is, and refused by whoever holds it in another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import DecodeConfig, EngineConfig
from common.errors import HandshakeRefused
from support.tiny_models import make_tiny_model
from support.workers import request, running_workers

REMOTE, LOCAL = DecodeConfig(local_prefill="never"), DecodeConfig(local_prefill="always")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3)


def engine(kv_dtype: str) -> EngineConfig:
    return EngineConfig.model_validate({"dtype": "float32", "exact": True, "kv_dtype": kv_dtype, "kv_pool_tokens": 2048})


async def test_a_prompt_computed_elsewhere_goes_on_bit_by_bit(model_path: Path) -> None:
    work = [
        request(
            torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(length)).tolist(),
            request_id=str(length),
            max_tokens=10,
            num_choices=choices,
            temperature=0.8 if choices > 1 else 0.0,
            seed=length,
            logprobs=10,
        )
        for length, choices in ((16, 1), (33, 3), (90, 1))
    ]
    async with running_workers(model_path, engine=engine("int8"), decode=LOCAL, num_prefill=0) as alone:
        expected = [await alone.generate(item) for item in work]
    async with running_workers(model_path, engine=engine("int8"), decode=REMOTE) as workers:
        found = [await workers.generate(item) for item in work]
        again = [await workers.generate(item) for item in work]  # from prefix caches
        await workers.assert_nothing_leaks()
    async with running_workers(model_path, engine=engine("model"), decode=LOCAL, num_prefill=0) as plain:
        unrounded = [await plain.generate(item) for item in work]
    for answers in (found, again):
        for one, other in zip(answers, expected, strict=True):
            assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    assert [answer.logprobs for answer in unrounded] != [answer.logprobs for answer in expected], "nothing was rounded"


async def test_pools_that_hold_kv_in_different_ways_refuse_each_other(model_path: Path) -> None:
    async with running_workers(model_path, engine=engine("int8"), decode=REMOTE, prefill_engine=engine("model")) as workers:
        with pytest.raises(HandshakeRefused, match="dtype") as refused:
            await workers.generate(request(list(range(3, 60))))
        assert refused.value.param == "dtype"
        await workers.assert_nothing_leaks()
