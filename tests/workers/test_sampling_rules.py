"""Penalties, bias, bans and allowed tokens on real workers: the same tokens however they were computed, and the right ones.

The reference is each choice alone, prefilled locally in one chunk; greedy ones are held against transformers' `generate`. Rules
are made from what the model says without them, so that each of them has something to change.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers

from common.config import DecodeConfig, EngineConfig, PrefillConfig
from common.errors import InvalidRequest
from common.types import FinishReason, Request
from support.tiny_models import make_tiny_model
from support.workers import Answer, Workers, request, running_workers

NEW_TOKENS = 14
MIN_TOKENS = 5
LOCAL = DecodeConfig(local_prefill="always", step_tokens=4096)
REMOTE = DecodeConfig(local_prefill="never")
ENGINE = EngineConfig(dtype="float32", exact=True, prefix_cache=False, kv_pool_tokens=4096)


@dataclass
class Reference:
    model_path: Path
    work: list[Request]
    answers: list[Answer]
    unruled: list[Answer]


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 380, (length,), generator=generator).tolist()


def ruled(item: Request, said: list[int]) -> list[Request]:
    """The request with several sets of rules that go against what it would say."""
    penalties = {"presence_penalty": 0.6, "frequency_penalty": 0.8, "repetition_penalty": 1.3}
    rewards = {"presence_penalty": -1.2, "frequency_penalty": -0.4, "repetition_penalty": 0.8}
    bans = {
        "logit_bias": tuple(sorted({said[0]: -100.0, said[2]: 1.5, item.prompt_token_ids[0]: 2.5, said[5]: -4.0}.items())),
        "bad_words": ((said[1],), (said[3], said[4]), (said[4], said[5], said[6])),
        "stop_token_ids": (said[2], said[7]),
        "min_tokens": MIN_TOKENS,
    }
    allowed = {"allowed_token_ids": tuple(dict.fromkeys([*said[:4], *item.prompt_token_ids[:4], 9])), "frequency_penalty": 1.2}
    together = {**penalties, **bans}
    sets = {"rewards": rewards, "bans": bans, "allowed": allowed, "together": together}
    return [
        replace(item, request_id=f"{item.request_id}-{name}", sampling=replace(item.sampling, **fields))
        for name, fields in sets.items()
    ]


async def alone(workers: Workers, item: Request) -> Answer:
    """Every choice in a request of its own."""
    whole = Answer()
    for index in range(item.num_choices):
        one = await workers.generate(replace(item, num_choices=1, first_choice=index, request_id=f"{item.request_id}-{index}"))
        whole.started = one.started
        whole.token_ids |= one.token_ids
        whole.logprobs |= one.logprobs
        whole.finish |= one.finish
    return whole


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return asyncio.run(make_reference(make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3)))


async def make_reference(model_path: Path) -> Reference:
    work, answers, unruled = [], [], []
    async with running_workers(model_path, engine=ENGINE, decode=LOCAL, num_prefill=0) as workers:
        for length, temperature, num_choices in ((31, 0.0, 1), (94, 0.0, 1), (46, 0.9, 3), (77, 0.9, 2)):
            plain = request(
                prompt_of(length),
                request_id=f"{length}",
                max_tokens=NEW_TOKENS,
                temperature=temperature,
                seed=length,
                num_choices=num_choices,
                top_p=0.95 if temperature else 1.0,
                logprobs=3,
                prompt_logprobs=2 if length > 50 else None,
            )
            said = await alone(workers, plain)
            for item in ruled(plain, said.token_ids[0]):
                work.append(item)
                answers.append(await alone(workers, item))
                unruled.append(said)
    return Reference(model_path, work, answers, unruled)


def test_every_rule_is_kept_and_changes_something(reference: Reference) -> None:
    for item, answer, unruled in zip(reference.work, reference.answers, reference.unruled, strict=True):
        sampling = item.sampling
        assert answer.token_ids != unruled.token_ids, item.request_id
        for choice, said in answer.token_ids.items():
            assert answer.finish[choice] is FinishReason.STOP or len(said) == NEW_TOKENS
            assert len(said) >= sampling.min_tokens
            assert not {token_id for token_id, value in sampling.logit_bias if value == -100} & set(said)
            assert not sampling.allowed_token_ids or set(said) <= set(sampling.allowed_token_ids)
            for word in sampling.bad_words:
                assert not any(tuple(said[i : i + len(word)]) == word for i in range(len(said)))
            # What is reported is what the model said, before any rule: rules lift tokens over better ones.
            reports = answer.logprobs[choice]
            assert [report.token_id for report in reports] == said
        if sampling.greedy:
            assert any(report.top[0][0] != report.token_id for report in answer.logprobs[0]), item.request_id


class Penalties(transformers.LogitsProcessor):
    """OpenAI's two, which transformers does not have."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self.prompt_tokens, self.presence, self.frequency = prompt_tokens, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt_tokens :], minlength=scores.shape[1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


class Allowed(transformers.LogitsProcessor):
    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self.token_ids = list(token_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.token_ids] = scores[:, self.token_ids]
        return kept


def test_greedy_answers_are_those_of_transformers(reference: Reference) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(reference.model_path, dtype=torch.float32)
    for item, answer in zip(reference.work, reference.answers, strict=True):
        sampling = item.sampling
        if not sampling.greedy:
            continue
        processors = [Penalties(item.num_prompt_tokens, sampling.presence_penalty, sampling.frequency_penalty)]
        if sampling.allowed_token_ids:
            processors.append(Allowed(sampling.allowed_token_ids))
        banned = [[token_id] for token_id, value in sampling.logit_bias if value == -100]
        prompt = torch.tensor([item.prompt_token_ids])
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(sampling.stop_token_ids) or None,
            min_new_tokens=sampling.min_tokens or None,
            repetition_penalty=sampling.repetition_penalty,
            sequence_bias=[[[token_id], value] for token_id, value in sampling.logit_bias] or None,
            bad_words_ids=[*map(list, sampling.bad_words), *banned] or None,
            logits_processor=transformers.LogitsProcessorList(processors),
        )[0, item.num_prompt_tokens :].tolist()
        if answer.finish[0] is FinishReason.STOP:
            assert found.pop() in sampling.stop_token_ids
        assert answer.tokens == found, item.request_id


@dataclass(frozen=True)
class Way:
    name: str
    decode: DecodeConfig = REMOTE
    prefill: PrefillConfig = PrefillConfig()
    together: bool = True
    kv_pool_tokens: int = 4096


WAYS = [
    Way("local", decode=LOCAL, together=False),
    Way("local, batch, chunks of 16", decode=DecodeConfig(local_prefill="always", step_tokens=16)),
    Way("remote", together=False),
    Way("remote, batch, chunks of 16", prefill=PrefillConfig(chunk_tokens=16)),
    Way("remote, preempted", decode=REMOTE.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}), kv_pool_tokens=260),
    Way("local, preempted", decode=LOCAL.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}), kv_pool_tokens=260),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
async def test_every_way_gives_the_reference(reference: Reference, way: Way) -> None:
    remote = way.decode.local_prefill == "never"
    engine = ENGINE.model_copy(update={"kv_pool_tokens": way.kv_pool_tokens})
    async with running_workers(
        reference.model_path,
        engine=engine,
        prefill_engine=ENGINE,
        decode=way.decode,
        prefill=way.prefill,
        num_prefill=1 if remote else 0,
        transports=("shm",),
    ) as workers:
        if way.together:
            found = await workers.generate_together(reference.work)
        else:
            found = [await workers.generate(item) for item in reference.work]
        for ours, theirs, item in zip(found, reference.answers, reference.work, strict=True):
            assert ours.token_ids == theirs.token_ids, item.request_id
            assert (ours.finish, ours.logprobs) == (theirs.finish, theirs.logprobs), item.request_id
            assert ours.started is not None
            assert theirs.started is not None
            assert ours.started.timings.transport == ("shm" if remote else "")
            assert ours.started.prompt_logprobs == theirs.started.prompt_logprobs
            assert len(ours.started.prompt_logprobs) == (0 if item.sampling.prompt_logprobs is None else item.num_prompt_tokens)
        if "preempted" in way.name:
            assert workers.decode._scheduler.totals.preemptions > 0, "the pool was large enough: nothing was tested"
        await workers.assert_nothing_leaks()


async def test_an_answer_that_goes_on_elsewhere_obeys_the_rules_of_its_beginning(reference: Reference) -> None:
    async with running_workers(reference.model_path, engine=ENGINE, decode=REMOTE, transports=("shm",)) as workers:
        for item, answer in zip(reference.work, reference.answers, strict=True):
            choice = item.num_choices - 1
            said = answer.token_ids[choice]
            there = min(len(said) - 1, 3 + item.num_prompt_tokens % 5)
            rest = replace(
                item,
                prompt_token_ids=(*item.prompt_token_ids, *said[:there]),
                num_choices=1,
                first_choice=choice,
                num_resumed_tokens=there,
                sampling=replace(item.sampling, prompt_logprobs=None),
            )
            found = await workers.generate(rest)
            assert found.token_ids[choice] == said[there:], item.request_id
            assert found.logprobs[choice] == answer.logprobs[choice][there:]


async def test_a_worker_refuses_rules_that_it_cannot_keep(reference: Reference) -> None:
    """The router finds these first; should it know another vocabulary, the engine must not fail for all."""
    refused = [
        {"logit_bias": ((999_999, 1.0),)},
        {"allowed_token_ids": (999_999,)},
        {"allowed_token_ids": (7,), "bad_words": ((7,),)},
    ]
    async with running_workers(reference.model_path, engine=ENGINE, decode=REMOTE, transports=("shm",)) as workers:
        for fields in refused:
            with pytest.raises(InvalidRequest):
                await workers.generate(request(prompt_of(20), **fields))
        beyond = request(prompt_of(20), min_tokens=2, stop_token_ids=(999_999,), bad_words=((999_999,), (5, 999_999)))
        assert len((await workers.generate(beyond)).tokens) == 8
