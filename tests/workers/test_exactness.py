"""The same tokens however they were computed: one reference, many ways, tiny models in one process.

The reference is a run alone, prefilled locally in one chunk without any cache; greedy fp32 is itself held against transformers.
In exact mode the twenty best log-probabilities of every step must be equal to the last bit; in fast mode tokens are compared.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from common.config import DecodeConfig, EngineConfig, PrefillConfig, TransferConfig
from common.errors import PdserveError
from common.types import Request
from support.tiny_models import make_tiny_model
from support.workers import Answer, Workers, request, running_workers

BLOCK = 16
NEW_TOKENS = 12
PROMPT_LENGTHS = (1, 15, 16, 17, 33, 64, 90, 150)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * salt + length)
    return torch.randint(3, 380, (length,), generator=generator).tolist()


def all_requests() -> list[Request]:
    """Each prompt length, greedy and seeded; every fourth with three choices."""
    found = []
    for index, length in enumerate(PROMPT_LENGTHS):
        for temperature in (0.0, 0.9):
            found.append(
                request(
                    prompt_of(length),
                    request_id=f"{length}-{temperature}",
                    max_tokens=NEW_TOKENS,
                    temperature=temperature,
                    seed=77 + index,
                    num_choices=3 if index % 4 == 3 and temperature else 1,
                    top_k=50 if temperature else 0,
                    top_p=0.95 if temperature else 1.0,
                    logprobs=20,
                )
            )
    return found


def engine(
    exact: bool, dtype: str = "float32", kernels: str = "auto", *, prefix_cache: bool = False, kv_pool_tokens: int = 8192
) -> EngineConfig:
    changes = {"dtype": dtype, "exact": exact, "kernels": kernels}
    return EngineConfig(**{**changes, "prefix_cache": prefix_cache, "kv_pool_tokens": kv_pool_tokens})


async def one_by_one(workers: Workers, work: list[Request]) -> list[Answer]:
    return [await workers.generate(item) for item in work]


def assert_same(found: list[Answer], expected: list[Answer], work: list[Request], *, bitwise: bool) -> None:
    for ours, theirs, item in zip(found, expected, work, strict=True):
        assert ours.token_ids == theirs.token_ids, item.request_id
        assert ours.finish == theirs.finish
        if bitwise:
            assert ours.logprobs == theirs.logprobs, item.request_id


LOCAL = DecodeConfig(local_prefill="always", step_tokens=4096)
REMOTE = DecodeConfig(local_prefill="never")


@asynccontextmanager
async def reference_workers(model_path: Path, exact: bool, dtype: str, kernels: str = "auto") -> AsyncIterator[Workers]:
    async with running_workers(model_path, engine=engine(exact, dtype, kernels), decode=LOCAL, num_prefill=0) as workers:
        yield workers


Mode = tuple[bool, str, str]
MODES = [(True, "float32", "native"), (True, "bfloat16", "native"), (True, "bfloat16", "torch"), (False, "float32", "auto")]
_references: dict[Mode, list[Answer]] = {}


@pytest.fixture(params=MODES, ids=["exact-fp32", "exact-bf16", "exact-bf16-torch", "fast-fp32"])
def mode(request: pytest.FixtureRequest) -> Mode:
    chosen: Mode = request.param
    return chosen


@pytest.fixture
async def reference(model_path: Path, mode: Mode) -> list[Answer]:
    if mode not in _references:
        async with reference_workers(model_path, *mode) as workers:
            _references[mode] = await one_by_one(workers, all_requests())
    return _references[mode]


async def test_greedy_fp32_is_what_transformers_says(model_path: Path) -> None:
    oracle = transformers.LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for exact in (True, False):
        async with reference_workers(model_path, exact, "float32") as workers:
            for item in all_requests():
                if item.sampling.greedy:
                    prompt = torch.tensor([item.prompt_token_ids])
                    expected = oracle.generate(
                        prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
                    )
                    answer = await workers.generate(item)
                    assert answer.tokens == expected[0, prompt.shape[1] :].tolist(), item.request_id


@dataclass(frozen=True)
class Way:
    """A way of computing the same requests."""

    name: str
    decode: DecodeConfig = REMOTE
    prefill: PrefillConfig = PrefillConfig()
    transport: str = "shm"
    together: bool = False
    kv_pool_tokens: int = 8192


WAYS = [
    Way("local, batch", decode=LOCAL, together=True),
    Way("local, chunks of 16", decode=DecodeConfig(local_prefill="always", step_tokens=16), together=True),
    Way("local, chunks of 64", decode=DecodeConfig(local_prefill="always", step_tokens=64), together=True),
    Way("remote, inproc", transport="inproc"),
    Way("remote, shm", transport="shm"),
    Way("remote, tcp", transport="tcp"),
    Way("remote, batch, tcp", transport="tcp", together=True),
    Way("remote, chunks of 16", prefill=PrefillConfig(chunk_tokens=16), together=True),
    Way("remote, chunks of 64", prefill=PrefillConfig(chunk_tokens=64), together=True),
    Way("auto, batch", decode=DecodeConfig(local_prefill="auto", local_prefill_tokens=40), together=True),
    # Less room than three choices of the longest prompt grow to, also if a guess lets one of them end tokens before the others:
    # they preempt each other, however late other prompts come.
    Way(
        "remote, preempted",
        decode=REMOTE.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}),
        together=True,
        kv_pool_tokens=192,
    ),
    # Room for some of the prompts, none for growth.
    Way(
        "local, preempted",
        decode=LOCAL.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}),
        together=True,
        kv_pool_tokens=400,
    ),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
async def test_every_way_gives_the_reference(model_path: Path, mode: Mode, reference: list[Answer], way: Way) -> None:
    exact, dtype, kernels = mode
    work = all_requests()
    async with running_workers(
        model_path,
        engine=engine(exact, dtype, kernels, kv_pool_tokens=way.kv_pool_tokens),
        decode=way.decode,
        prefill=way.prefill,
        num_prefill=0 if way.decode.local_prefill == "always" else 1,
        transfer=TransferConfig.model_construct(transports=(way.transport,)),
        prefill_engine=engine(exact, dtype, kernels),
    ) as workers:
        answers = await (workers.generate_together(work) if way.together else one_by_one(workers, work))
        assert_same(answers, reference, work, bitwise=exact)
        if "preempted" in way.name:
            assert workers.decode._scheduler.totals.preemptions > 0, "the pool was large enough: nothing was tested"
        if way.decode.local_prefill == "never":
            assert {answer.started.timings.transport for answer in answers if answer.started} == {way.transport}
        await workers.assert_nothing_leaks()


SIDES = {"decode": (True, False), "prefill": (False, True), "both": (True, True)}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
async def test_prefix_hits_of_every_length_around_block_borders(model_path: Path, side: str, exact: bool) -> None:
    """Warm a cache with a prefix of each length, then ask for the whole: cached on the decode side, the prefill side, both."""
    decode_caches, prefill_caches = SIDES[side]
    shared = prompt_of(70, salt=9)
    suffix = prompt_of(9, salt=10)
    lengths = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65]

    def whole(length: int) -> Request:
        return request([*shared[:length], *suffix], max_tokens=NEW_TOKENS, logprobs=20)

    async with reference_workers(model_path, exact, "float32") as workers:
        expected = [await workers.generate(whole(length)) for length in lengths]
    hits = 0
    for length, answer in zip(lengths, expected, strict=True):
        async with running_workers(
            model_path,
            engine=engine(exact, prefix_cache=decode_caches),
            prefill_engine=engine(exact, prefix_cache=prefill_caches),
            decode=REMOTE,
        ) as workers:
            await workers.generate(request(shared[:length], max_tokens=1))
            # Twice: the second time the whole prompt is cached, up to its last token.
            for again in (False, True):
                found = await workers.generate(whole(length))
                assert found.tokens == answer.tokens, (length, again)
                if exact:
                    assert found.logprobs == answer.logprobs, (length, again)
                assert found.started is not None
                total = length + len(suffix)
                known = total - 1 if again else length
                assert found.started.cached_tokens == known // BLOCK * BLOCK, (length, again)
                hits += found.started.cached_tokens
            await workers.assert_nothing_leaks()
    assert hits > 0


async def test_two_kinds_of_exact_exchange_no_kv(model_path: Path) -> None:
    """Torch is exact and the kernels are, each in its own bits."""
    async with running_workers(
        model_path, engine=engine(True, kernels="native"), prefill_engine=engine(True, kernels="torch"), decode=REMOTE
    ) as workers:
        with pytest.raises(PdserveError, match="model_digest"):
            await workers.generate(request(prompt_of(40)))
        await workers.assert_nothing_leaks()


async def test_token_ids_do_not_depend_on_exact_mode_being_tested_by_accident(model_path: Path) -> None:
    """The inverse: another seed gives other tokens, so that the comparisons above can fail."""
    async with reference_workers(model_path, True, "float32") as workers:
        one = await workers.generate(request(prompt_of(40), max_tokens=NEW_TOKENS, temperature=1.0, seed=1))
        two = await workers.generate(request(prompt_of(40), max_tokens=NEW_TOKENS, temperature=1.0, seed=2))
        assert one.tokens != two.tokens
