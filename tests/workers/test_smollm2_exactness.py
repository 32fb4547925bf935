"""SmolLM2-135M, fp32: transformers, a run alone, a batch, and every road of the KV give the same tokens; in exact mode, bitwise.

The tiny models of `test_exactness` cover the grid; this holds the real weights, tokenizer and lengths against transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import DecodeConfig, EngineConfig, PrefillConfig
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer
from common.types import Request
from support.oracles import gguf_oracle
from support.read_once import weights_read_once
from support.workers import Answer, Workers, request, running_workers

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

NEW_TOKENS = 16
TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a village by the sea, there lived a clockmaker who",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Photosynthesis is the process by which plants convert light into energy. " * 6 + "In short,",
    "Q: What is the boiling point of water at sea level, in degrees Celsius?\nA:",
    "The quick brown fox jumps over the lazy dog. " * 15,
]


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    with weights_read_once():
        yield


@pytest.fixture(scope="module")
def prompts(smollm2: ModelFiles) -> list[list[int]]:
    tokenizer = Tokenizer.load(smollm2.path)
    return [tokenizer.encode(text) for text in TEXTS]


def work_of(prompts: list[list[int]]) -> list[Request]:
    greedy = [request(prompt, max_tokens=NEW_TOKENS, logprobs=5, model="smollm2-135m") for prompt in prompts]
    seeded = [
        request(prompt, max_tokens=NEW_TOKENS, logprobs=5, temperature=0.8, top_p=0.9, seed=11 + index, model="smollm2-135m")
        for index, prompt in enumerate(prompts[:3])
    ]
    return [*greedy, *seeded]


@dataclass(frozen=True)
class Way:
    name: str
    decode: DecodeConfig = DecodeConfig(local_prefill="never")
    prefill: PrefillConfig = PrefillConfig()
    transport: str = "shm"
    together: bool = True
    kv_pool_tokens: int = 4096
    exact: bool = True
    prefix_cache: bool = False


LOCAL = DecodeConfig(local_prefill="always", step_tokens=512)
WAYS = [
    Way("local, batch", decode=LOCAL),
    Way("local, chunks of 16", decode=DecodeConfig(local_prefill="always", step_tokens=16)),
    Way("local, chunks of 64", decode=DecodeConfig(local_prefill="always", step_tokens=64)),
    Way("remote, shm", prefill=PrefillConfig(chunk_tokens=64)),
    Way("remote, tcp, chunks of 16", transport="tcp", prefill=PrefillConfig(chunk_tokens=16)),
    Way("remote, chunks of 512, twice", prefill=PrefillConfig(chunk_tokens=512), prefix_cache=True),
    # Room for the prompts, not for the answers.
    Way("local, preempted", decode=LOCAL.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}), kv_pool_tokens=480),
    Way("fast, local, batch", decode=LOCAL, exact=False),
    Way("fast, remote, shm", exact=False),
]


async def answers(smollm2: ModelFiles, way: Way, work: list[Request]) -> list[Answer]:
    def engine(tokens: int) -> EngineConfig:
        return EngineConfig(dtype="float32", exact=way.exact, prefix_cache=way.prefix_cache, kv_pool_tokens=tokens)

    async with running_workers(
        Path(smollm2.path),
        name="smollm2-135m",
        engine=engine(way.kv_pool_tokens),
        prefill_engine=engine(4096),
        decode=way.decode,
        prefill=way.prefill,
        num_prefill=0 if way.decode.local_prefill == "always" else 1,
        transports=(way.transport,),
    ) as workers:
        found = await run(workers, work, together=way.together)
        if way.prefix_cache:
            found = await run(workers, work, together=way.together)
            assert any(answer.started and answer.started.cached_tokens for answer in found), "nothing was cached"
        if "preempted" in way.name:
            assert workers.decode._scheduler.totals.preemptions > 0
        await workers.assert_nothing_leaks()
        return found


async def run(workers: Workers, work: list[Request], *, together: bool) -> list[Answer]:
    if together:
        return await workers.generate_together(work)
    return [await workers.generate(item) for item in work]


_reference: list[Answer] = []


async def test_alone_it_says_what_transformers_says(smollm2: ModelFiles, prompts: list[list[int]]) -> None:
    """Greedy tokens are the oracle's iff each is its argmax after all before it: one forward pass a prompt shows that."""
    _reference[:] = await answers(smollm2, Way("local, alone", decode=LOCAL, together=False), work_of(prompts))
    model: Any = gguf_oracle(Path(smollm2.path))
    for prompt, answer in zip(prompts, _reference, strict=False):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer.tokens])).logits[0]
        assert len(answer.tokens) == NEW_TOKENS
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.tokens


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
async def test_every_way_says_the_same(smollm2: ModelFiles, prompts: list[list[int]], way: Way) -> None:
    assert _reference, "the test above has to run first"
    found = await answers(smollm2, way, work_of(prompts))
    for ours, theirs in zip(found, _reference, strict=True):
        assert ours.tokens == theirs.tokens
        if way.exact:
            assert ours.logprobs == theirs.logprobs
