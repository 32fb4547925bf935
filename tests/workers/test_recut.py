"""A prefill and a decode worker whose blocks are cut otherwise, or hold another dtype: real workers, as a request meets them.

With one dtype the KV that arrives is what the decode worker would have computed itself, bit by bit, so in exact mode the answers,
and their twenty best log-probabilities, are those of a run in one process with blocks of a third size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import DecodeConfig, EngineConfig, PrefillConfig
from common.errors import HandshakeRefused
from common.types import Request
from support.tiny_models import make_tiny_model
from support.workers import Answer, Workers, request, running_workers

NEW_TOKENS = 10
LENGTHS = (1, 15, 16, 17, 32, 33, 64, 65, 150)
CHUNKED = PrefillConfig(chunk_tokens=24, layer_groups=2)  # chunks end within blocks of either side


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3)


def engine(exact: bool, block_tokens: int = 16, *, dtype: str = "float32", prefix_cache: bool = False) -> EngineConfig:
    return EngineConfig(
        dtype=dtype,  # type: ignore[arg-type]
        exact=exact,
        block_tokens=block_tokens,
        prefix_cache=prefix_cache,
        kv_pool_tokens=4096,
    )


def prompt_of(length: int, salt: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * salt + length)
    return torch.randint(3, 380, (length,), generator=generator).tolist()


def work() -> list[Request]:
    return [
        request(
            prompt_of(length),
            request_id=f"{length}-{temperature}",
            max_tokens=NEW_TOKENS,
            temperature=temperature,
            seed=5 + length,
            num_choices=2 if temperature else 1,
            logprobs=20,
        )
        for length in LENGTHS
        for temperature in (0.0, 0.9)
    ]


_references: dict[bool, list[Answer]] = {}


async def reference(model_path: Path, exact: bool) -> list[Answer]:
    if exact not in _references:
        local = DecodeConfig(local_prefill="always", step_tokens=4096)
        async with running_workers(model_path, engine=engine(exact), decode=local, num_prefill=0) as workers:
            _references[exact] = [await workers.generate(item) for item in work()]
    return _references[exact]


def kv_of_prompt(workers: Workers, prompt: list[int]) -> torch.Tensor:
    """The KV of a prompt's full blocks on the decode side, found by the names under which they were cached: [layer][head][K,V]
    [token][dim]."""
    found = workers.decode._host.engine
    blocks = found.blocks.match_prefix(prompt, "", len(prompt))
    return torch.cat([found.pool.tensor[block] for block in blocks], dim=3)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize(("there", "here", "transport"), [(16, 32, "shm"), (32, 16, "tcp"), (64, 8, "shm")])
async def test_blocks_of_another_size(model_path: Path, exact: bool, there: int, here: int, transport: str) -> None:
    expected = await reference(model_path, exact)
    async with running_workers(
        model_path,
        engine=engine(exact),
        prefill=CHUNKED.model_copy(update={"block_tokens": there}),
        decode=DecodeConfig(local_prefill="never", block_tokens=here),
        transports=(transport,),
    ) as workers:
        assert workers.prefill[0]._host.engine.layout.block_tokens == there
        assert workers.decode._host.engine.layout.block_tokens == here
        items = work()
        for together in (False, True):
            answers = await workers.generate_together(items) if together else [await workers.generate(item) for item in items]
            for item, ours, theirs in zip(items, answers, expected, strict=True):
                assert ours.token_ids == theirs.token_ids, item.request_id
                assert ours.finish == theirs.finish
                if exact:
                    assert ours.logprobs == theirs.logprobs, item.request_id
                assert ours.started is not None
                assert ours.started.timings.transport == transport
        await workers.assert_nothing_leaks()


@pytest.mark.parametrize(("there", "here"), [(16, 32), (32, 8)])
async def test_each_side_names_and_finds_its_own_blocks(model_path: Path, there: int, here: int) -> None:
    """Prefixes are cached under each side's own names: hits on either side, and on both, give the same bits."""
    shared = prompt_of(70, 9)
    local = DecodeConfig(local_prefill="always", step_tokens=4096)
    asked = [
        request([*shared[:length], *prompt_of(5, 10)], max_tokens=NEW_TOKENS, logprobs=20) for length in (31, 32, 33, 64, 70)
    ]
    async with running_workers(model_path, engine=engine(True), decode=local, num_prefill=0) as workers:
        expected = [await workers.generate(item) for item in asked]
    async with running_workers(
        model_path,
        engine=engine(True, prefix_cache=True),
        prefill=PrefillConfig(block_tokens=there),
        decode=DecodeConfig(local_prefill="never", block_tokens=here),
    ) as workers:
        await workers.generate(request(shared, max_tokens=1))
        for _ in range(2):
            for item, theirs in zip(asked, expected, strict=True):
                ours = await workers.generate(item)
                assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs), len(item.prompt_token_ids)
                assert ours.started is not None
                most = (len(item.prompt_token_ids) - 1) // min(there, here) * min(there, here)
                assert 0 < ours.started.cached_tokens <= most
        await workers.assert_nothing_leaks()


async def test_the_kv_is_the_same_bit_by_bit(model_path: Path) -> None:
    prompt = prompt_of(128, 3)
    pools = []
    for there, here, policy in ((16, 16, "always"), (16, 32, "never"), (64, 16, "never")):
        async with running_workers(
            model_path,
            engine=engine(True, prefix_cache=True),
            prefill=PrefillConfig(block_tokens=there),
            decode=DecodeConfig(local_prefill=policy, block_tokens=here),  # type: ignore[arg-type]
        ) as workers:
            await workers.generate(request(prompt, max_tokens=2))
            pools.append(kv_of_prompt(workers, prompt))
    assert pools[0].shape[3] == 128
    for pool in pools[1:]:
        assert torch.equal(pool, pools[0])


async def test_another_dtype_is_converted_on_the_way(model_path: Path) -> None:
    """The decode worker holds the prefill worker's float32 rounded to its bfloat16: not what it would have computed itself."""
    prompt = prompt_of(96, 4)
    computed = []
    for prefill, decode in (
        (PrefillConfig(block_tokens=32), DecodeConfig(local_prefill="never")),
        (PrefillConfig(block_tokens=32), DecodeConfig(local_prefill="never", dtype="bfloat16")),
    ):
        async with running_workers(
            model_path, engine=engine(False, prefix_cache=True), prefill=prefill, decode=decode
        ) as workers:
            answer = await workers.generate(request(prompt, max_tokens=4))
            assert len(answer.tokens) == 4
            computed.append(kv_of_prompt(workers, prompt))
            await workers.assert_nothing_leaks()
    assert computed[1].dtype == torch.bfloat16
    assert torch.equal(computed[0].to(torch.bfloat16), computed[1])


async def test_exact_blocks_that_attention_walks_over_otherwise_are_refused(model_path: Path) -> None:
    async with running_workers(
        model_path,
        engine=engine(True),
        decode=DecodeConfig(local_prefill="never"),
        prefill_engine=engine(True, 24),
    ) as workers:
        with pytest.raises(HandshakeRefused, match="block_tokens"):
            await workers.generate(request(prompt_of(40), max_tokens=2))
        await workers.assert_nothing_leaks()
