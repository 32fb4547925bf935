"""The same answers with speculation and without, whoever guesses: real workers, tiny models, one reference.

The reference is each choice alone, prefilled locally, with nobody guessing. In exact mode, and with native kernels, whose rows do
not depend on their batch either, log-probabilities are equal to the last bit; in fast mode tokens are compared, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import DecodeConfig, EngineConfig, PrefillConfig, SpeculationConfig
from common.errors import ConfigError
from common.types import FinishReason, Request
from support import structured_work
from support.hostile_guesses import KINDS, Headstrong, Hostile, install
from support.tiny_heads import make_tiny_heads
from support.tiny_models import make_tiny_model
from support.workers import Answer, Workers, request, running_workers

NEW_TOKENS = 16
OFF = SpeculationConfig(method="off")
LOCAL = DecodeConfig(local_prefill="always", step_tokens=4096, speculation=OFF)
REMOTE = DecodeConfig(local_prefill="never", speculation=OFF)
DEFAULT = SpeculationConfig()


@dataclass(frozen=True)
class Mode:
    name: str
    engine: EngineConfig
    bitwise: bool


EXACT = Mode("exact", EngineConfig(dtype="float32", exact=True, prefix_cache=False, kv_pool_tokens=4096), True)
MODES = [
    EXACT,
    Mode("native bf16", EngineConfig(dtype="bfloat16", kernels="native", prefix_cache=False, kv_pool_tokens=4096), True),
    Mode(
        "native int8",
        EngineConfig(dtype="bfloat16", kernels="native", weights="int8", prefix_cache=False, kv_pool_tokens=4096),
        True,
    ),
    Mode("torch fp32", EngineConfig(dtype="float32", kernels="torch", prefix_cache=False, kv_pool_tokens=4096), False),
]


@dataclass
class Reference:
    work: list[Request]
    answers: list[Answer]


def prompt_of(length: int) -> list[int]:
    """Half of it stands there twice, so that there is something to match."""
    half = torch.randint(3, 380, (length - length // 2,), generator=torch.Generator().manual_seed(length)).tolist()
    return [*half, *half][:length]


def plain_work() -> list[Request]:
    work = []
    for length, temperature, num_choices in ((17, 0.0, 1), (46, 0.0, 1), (31, 0.8, 2), (64, 0.8, 1), (94, 1.3, 3)):
        work.append(
            request(
                prompt_of(length),
                request_id=f"{length}",
                max_tokens=NEW_TOKENS,
                temperature=temperature,
                seed=length,
                num_choices=num_choices,
                top_k=50 if temperature else 0,
                top_p=0.95 if temperature else 1.0,
                min_p=0.01 if temperature == 0.8 else 0.0,
                logprobs=5,
                prompt_logprobs=2 if length == 46 else None,
            )
        )
    return work


def ruled(item: Request, said: list[int]) -> Request:
    """The request with rules that go against what it would say."""
    rules: dict[str, Any] = {
        "presence_penalty": 0.6,
        "frequency_penalty": -0.8,
        "repetition_penalty": 1.3 if item.num_prompt_tokens % 2 else 0.8,
        "logit_bias": ((said[0], -100.0),),
        "bad_words": ((said[1],), (said[3], said[4])),
    }
    return replace(item, request_id=f"{item.request_id}-ruled", sampling=replace(item.sampling, **rules))


def ending(item: Request, said: list[int]) -> Request:
    """The request with an end token that it would say too early, and one that ends it."""
    sampling = replace(item.sampling, stop_token_ids=(said[2], said[9]), min_tokens=6)
    return replace(item, request_id=f"{item.request_id}-ending", sampling=sampling)


async def alone(workers: Workers, item: Request) -> Answer:
    whole = Answer()
    for index in range(item.num_choices):
        one = await workers.generate(replace(item, num_choices=1, first_choice=index))
        whole.started = one.started
        whole.token_ids |= one.token_ids
        whole.logprobs |= one.logprobs
        whole.finish |= one.finish
    return whole


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3)


_references: dict[str, Reference] = {}


async def reference_of(model_path: Path, mode: Mode) -> Reference:
    if mode.name not in _references:
        async with running_workers(model_path, engine=mode.engine, decode=LOCAL, num_prefill=0) as workers:
            work = plain_work()
            plain = [await alone(workers, item) for item in work]
            rules = [ruled(item, answer.token_ids[0]) for item, answer in zip(work, plain, strict=True)]
            found = [await alone(workers, item) for item in rules]
            ends = [ending(item, answer.token_ids[0]) for item, answer in zip(rules, found, strict=True)]
            ended = [await alone(workers, item) for item in ends]
            _references[mode.name] = Reference([*work, *rules, *ends], [*plain, *found, *ended])
            assert workers.decode._scheduler.totals.drafted_tokens == 0
    return _references[mode.name]


def assert_same(found: list[Answer], reference: Reference, mode: Mode) -> None:
    for ours, theirs, item in zip(found, reference.answers, reference.work, strict=True):
        assert ours.token_ids == theirs.token_ids, item.request_id
        assert ours.finish == theirs.finish, item.request_id
        for choice, reports in ours.logprobs.items():
            assert [report.token_id for report in reports] == ours.token_ids[choice], item.request_id
        if mode.bitwise:
            assert ours.logprobs == theirs.logprobs, item.request_id
            assert ours.started is not None
            assert theirs.started is not None
            assert ours.started.prompt_logprobs == theirs.started.prompt_logprobs


async def test_the_reference_has_something_to_lose(model_path: Path) -> None:
    reference = await reference_of(model_path, EXACT)
    finishes = [finish for answer in reference.answers for finish in answer.finish.values()]
    assert {FinishReason.STOP, FinishReason.LENGTH} == set(finishes)
    for item, answer in zip(reference.work, reference.answers, strict=True):
        assert all(len(said) >= item.sampling.min_tokens for said in answer.token_ids.values())


@dataclass(frozen=True)
class Way:
    name: str
    decode: DecodeConfig = LOCAL
    together: bool = True
    kv_pool_tokens: int = 4096

    @property
    def remote(self) -> bool:
        return self.decode.local_prefill == "never"


WAYS = [
    Way("local, one by one", together=False),
    Way("local, few rows", LOCAL.model_copy(update={"step_tokens": 24})),
    Way("remote", REMOTE),
    Way("local, preempted", LOCAL.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}), kv_pool_tokens=260),
    Way("remote, preempted", REMOTE.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}), kv_pool_tokens=260),
]


async def check(model_path: Path, mode: Mode, way: Way, guesses: str) -> None:
    reference = await reference_of(model_path, mode)
    decode = way.decode.model_copy(update={"speculation": DEFAULT}) if guesses == "default" else way.decode
    async with running_workers(
        model_path,
        engine=mode.engine.model_copy(update={"kv_pool_tokens": way.kv_pool_tokens}),
        prefill_engine=mode.engine,
        decode=decode,
        prefill=PrefillConfig(chunk_tokens=32),
        num_prefill=1 if way.remote else 0,
        transports=("shm",),
    ) as workers:
        scheduler = workers.decode._scheduler
        if guesses != "default":
            install(scheduler, Hostile(guesses, reference.work, reference.answers))
        if way.together:
            found = await workers.generate_together(reference.work)
        else:
            found = [await workers.generate(item) for item in reference.work]
        assert_same(found, reference, mode)
        await workers.assert_nothing_leaks()
        totals = scheduler.totals
        if guesses != "default":  # that decides by what it measures
            assert totals.drafted_tokens > 0, "nobody guessed: nothing was tested"
            assert (totals.accepted_tokens > 0) == (guesses != "always wrong") or guesses in ("random", "ngram")
        if "preempted" in way.name:
            assert totals.preemptions > 0, "the pool was large enough: nothing was tested"


GRID = [
    *((WAYS[3], guesses) for guesses in ("default", *KINDS)),
    *((WAYS[2], guesses) for guesses in ("default", "over-long", "half right")),
    *((way, guesses) for way in (WAYS[0], WAYS[1], WAYS[4]) for guesses in ("ngram", "half right")),
]


@pytest.mark.parametrize(("way", "guesses"), GRID, ids=lambda value: value if isinstance(value, str) else value.name)
async def test_answers_do_not_depend_on_guesses(model_path: Path, way: Way, guesses: str) -> None:
    await check(model_path, EXACT, way, guesses)


@pytest.mark.parametrize("guesses", ["ngram", "half right"])
@pytest.mark.parametrize("mode", MODES[1:], ids=lambda mode: mode.name)
async def test_nor_do_they_in_other_numerics(model_path: Path, mode: Mode, guesses: str) -> None:
    await check(model_path, mode, WAYS[3], guesses)


async def test_a_further_turn_finds_only_what_was_said(model_path: Path) -> None:
    """Blocks that wrong guesses had been in are cached with the answer; the next turn reuses them and says what it would have."""
    reference = await reference_of(model_path, EXACT)
    engine = EXACT.engine.model_copy(update={"prefix_cache": True})

    def next_turns() -> list[Request]:
        return [
            replace(
                item,
                request_id=f"{item.request_id}-next",
                num_choices=1,
                prompt_token_ids=(*item.prompt_token_ids, *answer.token_ids[0], 7, 8, 9),
                sampling=replace(item.sampling, prompt_logprobs=None),
            )
            for item, answer in zip(reference.work, reference.answers, strict=True)
        ]

    async with running_workers(model_path, engine=EXACT.engine, decode=LOCAL, num_prefill=0) as workers:
        expected = Reference(next_turns(), [await workers.generate(item) for item in next_turns()])
    both = Reference(reference.work + expected.work, reference.answers + expected.answers)
    for guesses in ("half right", "over-long"):
        async with running_workers(model_path, engine=engine, decode=LOCAL, num_prefill=0) as workers:
            install(workers.decode._scheduler, Hostile(guesses, both.work, both.answers))
            await workers.generate_together(reference.work)
            found = [await workers.generate(item) for item in expected.work]
            assert_same(found, expected, EXACT)
            for item, before, after in zip(reference.work, reference.answers, found, strict=True):
                said = item.num_prompt_tokens + len(before.token_ids[0])
                assert after.started is not None
                assert after.started.cached_tokens >= (said - 1) // 16 * 16


@pytest.mark.parametrize("guesses", ["ngram", "half right"])
async def test_an_answer_goes_on_elsewhere_from_any_token(model_path: Path, guesses: str) -> None:
    """A worker is lost after so many tokens, within a draft or not; the rest is the same with guesses and without."""
    reference = await reference_of(model_path, EXACT)
    async with running_workers(model_path, engine=EXACT.engine, decode=REMOTE, transports=("shm",)) as workers:
        for item, answer in list(zip(reference.work, reference.answers, strict=True))[1::3]:
            choice = item.num_choices - 1
            said = answer.token_ids[choice]
            rests = [
                replace(
                    item,
                    request_id=f"{item.request_id}-{there}",
                    prompt_token_ids=(*item.prompt_token_ids, *said[:there]),
                    num_choices=1,
                    first_choice=choice,
                    num_resumed_tokens=there,
                    sampling=replace(item.sampling, prompt_logprobs=None),
                )
                for there in range(1, len(said))
            ]
            answers = [Answer(token_ids={choice: said[there:]}) for there in range(1, len(said))]
            install(workers.decode._scheduler, Hostile(guesses, rests, answers))
            for rest, found in zip(rests, await workers.generate_together(rests), strict=True):
                there = rest.num_resumed_tokens
                assert found.token_ids[choice] == said[there:], rest.request_id
                assert found.logprobs[choice] == answer.logprobs[choice][there:]
                assert found.finish[choice] == answer.finish[choice]
        await workers.assert_nothing_leaks()


async def test_a_draft_model_with_the_same_weights_is_always_right(model_path: Path) -> None:
    """Greedy or seeded: the draft draws with the same random numbers. Penalties are not its business, so those are left out."""
    reference = await reference_of(model_path, EXACT)
    plain = Reference(reference.work[:5], reference.answers[:5])
    for engine in (EXACT.engine, EXACT.engine.model_copy(update={"prefix_cache": True})):
        async with running_workers(model_path, engine=engine, decode=drafting(LOCAL, model_path), num_prefill=0) as workers:
            assert_same([await workers.generate(item) for item in plain.work], plain, EXACT)
            assert_same(await workers.generate_together(plain.work), plain, EXACT)
            totals = workers.decode._scheduler.totals
            assert totals.drafted_tokens == totals.accepted_tokens > 0
            proposer = workers.decode._scheduler._speculator._slow
            assert (proposer.num_sequences, proposer._blocks.num_used) == (0, 0)


async def test_a_draft_model_with_other_weights_changes_nothing(model_path: Path, tmp_path: Path) -> None:
    reference = await reference_of(model_path, EXACT)
    other = make_tiny_model(tmp_path, seed=8)
    for way in (WAYS[2], WAYS[3]):
        async with running_workers(
            model_path,
            engine=EXACT.engine.model_copy(update={"kv_pool_tokens": way.kv_pool_tokens}),
            prefill_engine=EXACT.engine,
            decode=drafting(way.decode, other),
            num_prefill=1 if way.remote else 0,
            transports=("shm",),
        ) as workers:
            assert_same(await workers.generate_together(reference.work), reference, EXACT)
            await workers.assert_nothing_leaks()
            totals = workers.decode._scheduler.totals
            assert totals.drafted_tokens > totals.accepted_tokens


def drafting(decode: DecodeConfig, draft_model: Path) -> DecodeConfig:
    speculation = SpeculationConfig(method="draft", draft_model=str(draft_model), draft_kv_pool_tokens=2048)
    return decode.model_copy(update={"speculation": speculation})


async def test_a_draft_model_of_another_tokenizer_is_refused(model_path: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path, seed=3)
    file = other / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"model"', ' "model"', 1) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="another tokenizer"):
        async with running_workers(model_path, engine=EXACT.engine, decode=drafting(LOCAL, other), num_prefill=0):
            raise AssertionError("it started")


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2], WAYS[4]], ids=lambda way: way.name)
async def test_heads_change_nothing(model_path: Path, tmp_path: Path, way: Way) -> None:
    """Those that are never asked whether it pays, and those of the configuration, beside n-grams."""
    reference = await reference_of(model_path, EXACT)
    decode = way.decode.model_copy(update={"speculation": with_heads(make_tiny_heads(tmp_path / "heads", model_path))})
    for is_headstrong in (True, False):
        async with running_workers(
            model_path,
            engine=EXACT.engine.model_copy(update={"kv_pool_tokens": way.kv_pool_tokens}),
            prefill_engine=EXACT.engine,
            decode=decode,
            prefill=PrefillConfig(chunk_tokens=32),
            num_prefill=1 if way.remote else 0,
            transports=("shm",),
        ) as workers:
            scheduler = workers.decode._scheduler
            heads = scheduler._speculator._slow._heads
            if is_headstrong:
                install(scheduler, Headstrong(heads))
            if way.together:
                found = await workers.generate_together(reference.work)
            else:
                found = [await workers.generate(item) for item in reference.work]
            assert_same(found, reference, EXACT)
            await workers.assert_nothing_leaks()
            assert scheduler.totals.guesses_by_author["medusa"][0] > 0
            if is_headstrong:
                assert scheduler._speculator.rows == {}


async def test_the_first_step_after_a_hand_off_has_guesses(model_path: Path, tmp_path: Path) -> None:
    """The row that the first token was drawn from comes with the seal, and is the one that this worker would have had."""
    heads = make_tiny_heads(tmp_path / "heads", model_path)
    begun = []
    for decode, num_prefill in ((LOCAL, 0), (REMOTE, 1)):
        async with running_workers(
            model_path,
            engine=EXACT.engine,
            decode=decode.model_copy(update={"speculation": with_heads(heads)}),
            num_prefill=num_prefill,
            transports=("shm",),
        ) as workers:
            scheduler = workers.decode._scheduler
            install(scheduler, Headstrong(scheduler._speculator._slow._heads))
            await workers.generate(request(prompt_of(46), request_id="whole", max_tokens=3))
            assert scheduler.totals.drafted_tokens == 1, "of the only step before the last token"
            begun.append(scheduler._speculator.begun["whole"].to_bytes())
    assert begun[0] == begun[1]


async def test_an_answer_that_goes_on_elsewhere_has_guesses_at_once(model_path: Path, tmp_path: Path) -> None:
    """The rest of an answer is a request whose last row a prefill worker computes: nothing of the lost worker is needed."""
    reference = await reference_of(model_path, EXACT)
    item, said = reference.work[1], reference.answers[1].token_ids[0]
    decode = REMOTE.model_copy(update={"speculation": with_heads(make_tiny_heads(tmp_path / "heads", model_path))})
    async with running_workers(model_path, engine=EXACT.engine, decode=decode, transports=("shm",)) as workers:
        scheduler = workers.decode._scheduler
        install(scheduler, Headstrong(scheduler._speculator._slow._heads))
        for there in (1, 7, NEW_TOKENS - 3):
            before = scheduler.totals.drafted_tokens
            rest = replace(
                item,
                request_id=f"{item.request_id}-{there}",
                prompt_token_ids=(*item.prompt_token_ids, *said[:there]),
                num_resumed_tokens=there,
                sampling=replace(item.sampling, prompt_logprobs=None),
            )
            found = await workers.generate(rest)
            assert found.token_ids[0] == said[there:]
            assert scheduler.totals.drafted_tokens > before
            assert scheduler._speculator.begun[rest.request_id].values.isfinite().all()


async def test_heads_that_are_right_save_steps(model_path: Path, tmp_path: Path) -> None:
    """Only one token may be drawn, and only one can be guessed."""
    heads = make_tiny_heads(tmp_path / "heads", model_path, words=[5])
    decode = LOCAL.model_copy(update={"speculation": with_heads(heads)})
    async with running_workers(model_path, engine=EXACT.engine, decode=decode, num_prefill=0) as workers:
        scheduler = workers.decode._scheduler
        install(scheduler, Headstrong(scheduler._speculator._slow._heads))
        await workers.generate(request(prompt_of(40), max_tokens=81, allowed_token_ids=(5,)))
        assert scheduler.totals.guesses_by_author == {"medusa": (60, 60)}
        assert scheduler.totals.steps_by_accepted == [0, 0, 0, 20]


def with_heads(heads: Path) -> SpeculationConfig:
    return SpeculationConfig(method="medusa", heads=str(heads))


async def test_heads_of_another_model_are_refused(model_path: Path, tmp_path: Path) -> None:
    heads = make_tiny_heads(tmp_path / "heads", make_tiny_model(tmp_path / "other", seed=8))
    for path, reason in ((heads, "another model"), (tmp_path / "nowhere", "train-heads")):
        decode = LOCAL.model_copy(update={"speculation": with_heads(path)})
        with pytest.raises(ConfigError, match=reason) as caught:
            async with running_workers(model_path, engine=EXACT.engine, decode=decode, num_prefill=0):
                raise AssertionError("it started")
        assert caught.value.param == "decode.speculation.heads"


async def test_a_copy_takes_a_fraction_of_the_steps(model_path: Path) -> None:
    """A model that repeats itself is guessed right most of the time: what is configured by default, from end to end."""
    decode = LOCAL.model_copy(update={"speculation": DEFAULT})
    async with running_workers(model_path, engine=EXACT.engine, decode=decode, num_prefill=0) as workers:
        loop = request(prompt_of(40), max_tokens=200, allowed_token_ids=(5,))
        totals = workers.decode._scheduler.totals
        await workers.generate(loop)
        assert totals.accepted_tokens > 100
        assert totals.generated_tokens == 200
        assert workers.decode._scheduler._speculator.num_sequences == 0


@pytest.mark.parametrize("guesses", ["random", "always right", "over-long", "half right"])
async def test_nor_do_answers_of_a_given_form(model_path: Path, guesses: str) -> None:
    """A guess may leave the grammar, end it, or go on behind its end."""
    structured = await structured_work.make_reference(model_path)
    reference = Reference(structured.work, structured.answers)
    async with running_workers(model_path, engine=structured_work.ENGINE, decode=LOCAL, num_prefill=0) as workers:
        totals = workers.decode._scheduler.totals
        install(workers.decode._scheduler, Hostile(guesses, structured.work, structured.answers))
        assert_same(await workers.generate_together(reference.work), reference, EXACT)
        assert totals.drafted_tokens > 0
        assert totals.accepted_tokens > 0 or guesses == "random"
