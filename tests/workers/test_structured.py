"""Grammars on real workers: the same tokens however they were computed, and every whole answer is what was asked for.

The reference is each choice alone (`support.structured_work`). What an answer must be is decided by `jsonschema` and `re`.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, replace

import jsonschema
import pytest

from common.config import DecodeConfig, PrefillConfig
from common.errors import InvalidRequest
from common.types import FinishReason, Grammar, GrammarKind
from support.structured_work import (
    END,
    ENDLESS,
    ENGINE,
    GRAMMARS,
    LOCAL,
    NEW_TOKENS,
    SCHEMA,
    WORDS,
    Reference,
    make_reference,
    prompt_of,
)
from support.tiny_models import make_tiny_model
from support.workers import request, running_workers

REMOTE = DecodeConfig(local_prefill="never")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return asyncio.run(make_reference(make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=5)))


def matches(name: str, text: str) -> bool:
    if name in ("schema", "endless"):
        schema = SCHEMA if name == "schema" else ENDLESS
        return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    if name == "choice":
        return text in WORDS
    if name == "regex":
        return re.fullmatch(r"[a-c]{3,9}-[0-9]+", text) is not None
    while (shorter := re.sub(r"\([0-9]{1,4}(,[0-9]{1,4}){2,9}\)", "1", text)) != text:
        text = shorter
    return text == "1"


def test_every_whole_answer_is_what_was_asked_for(reference: Reference) -> None:
    ended = []
    for item, answer in zip(reference.work, reference.answers, strict=True):
        name = item.request_id.split("-")[0]
        for choice, said in answer.token_ids.items():
            text = reference.tokenizer.decode(said)
            assert not {0, 1, 2} & set(said)
            if answer.finish[choice] is FinishReason.STOP:
                ended.append(name)
                assert matches(name, text), (item.request_id, text)
            else:
                assert len(said) == NEW_TOKENS
    assert set(ended) == set(GRAMMARS) - {"endless"}


@dataclass(frozen=True)
class Way:
    name: str
    decode: DecodeConfig = REMOTE
    prefill: PrefillConfig = PrefillConfig()
    together: bool = True
    kv_pool_tokens: int = 4096
    transport: str = "shm"


WAYS = [
    Way("local, batch, chunks of 16", decode=DecodeConfig(local_prefill="always", step_tokens=16)),
    Way("remote", together=False),
    Way("remote over tcp, batch, chunks of 16", prefill=PrefillConfig(chunk_tokens=16), transport="tcp"),
    Way("remote, preempted", decode=REMOTE.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}), kv_pool_tokens=400),
    Way("local, preempted", decode=LOCAL.model_copy(update={"watermark_blocks": 0, "growth_tokens": 0}), kv_pool_tokens=400),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
async def test_every_way_gives_the_reference(reference: Reference, way: Way) -> None:
    remote = way.decode.local_prefill == "never"
    async with running_workers(
        reference.model_path,
        engine=ENGINE.model_copy(update={"kv_pool_tokens": way.kv_pool_tokens}),
        prefill_engine=ENGINE,
        decode=way.decode,
        prefill=way.prefill,
        num_prefill=1 if remote else 0,
        transports=(way.transport,),
    ) as workers:
        if way.together:
            found = await workers.generate_together(reference.work)
        else:
            found = [await workers.generate(item) for item in reference.work]
        for ours, theirs, item in zip(found, reference.answers, reference.work, strict=True):
            assert ours.token_ids == theirs.token_ids, item.request_id
            assert (ours.finish, ours.logprobs) == (theirs.finish, theirs.logprobs), item.request_id
            assert ours.started is not None
            assert ours.started.timings.transport == (way.transport if remote else "")
        if "preempted" in way.name:
            assert workers.decode._scheduler.totals.preemptions > 0, "the pool was large enough: nothing was tested"
        await workers.assert_nothing_leaks()


async def test_an_answer_goes_on_elsewhere_from_any_place_of_its_grammar(reference: Reference) -> None:
    async with running_workers(reference.model_path, engine=ENGINE, decode=REMOTE, transports=("shm",)) as workers:
        work, wanted = [], []
        for item, answer in zip(reference.work, reference.answers, strict=True):
            choice = item.num_choices - 1
            said = answer.token_ids[choice]
            for there in sorted({1, len(said) // 3, len(said) // 2, len(said) - 1} - {0}):
                prompt = (*item.prompt_token_ids, *said[:there])
                name = f"{item.request_id}-{there}"
                work.append(
                    replace(
                        item,
                        prompt_token_ids=prompt,
                        num_choices=1,
                        first_choice=choice,
                        num_resumed_tokens=there,
                        request_id=name,
                    )
                )
                wanted.append((choice, said[there:], answer.finish[choice]))
        for item, found, (choice, rest, finish) in zip(work, await workers.generate_together(work), wanted, strict=True):
            assert found.token_ids[choice] == rest, item.request_id
            assert found.finish[choice] is finish


async def test_a_request_that_its_grammar_fails_ends_alone(reference: Reference) -> None:
    """Nothing left to draw, now or later, or a grammar that does not compile: one error, and nobody else notices."""
    good = next(item for item in reference.work if item.request_id == "schema-0.0")
    theirs = reference.answers[reference.work.index(good)]
    letters = {letter: reference.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc"}
    bad = [
        {"grammar": Grammar(GrammarKind.REGEX, "a(")},
        {"grammar": Grammar(GrammarKind.REGEX, "a+"), "bad_words": ((letters["a"],),)},
        {"grammar": Grammar(GrammarKind.REGEX, "[ab]{4}c"), "allowed_token_ids": (letters["a"], letters["b"])},
        {"grammar": Grammar(GrammarKind.REGEX, "ab"), "bad_words": ((letters["a"], letters["b"]),)},
    ]
    for decode, num_prefill in ((LOCAL, 0), (REMOTE, 1)):
        async with running_workers(
            reference.model_path, engine=ENGINE, decode=decode, num_prefill=num_prefill, transports=("shm",)
        ) as workers:
            work = [request(prompt_of(20), request_id=f"bad {index}", **fields) for index, fields in enumerate(bad)]
            gathering = asyncio.gather(*map(workers.generate, work), return_exceptions=True)
            ours, found = await asyncio.gather(workers.generate(good), gathering)
            assert ours.token_ids == theirs.token_ids
            assert [type(error) for error in found] == [InvalidRequest] * len(bad)
            assert {error.param for error in found if isinstance(error, InvalidRequest)} == {"grammar"}
            await workers.assert_nothing_leaks()


async def test_an_answer_ends_with_its_grammar_without_an_end_token(reference: Reference) -> None:
    async with running_workers(reference.model_path, engine=ENGINE, decode=LOCAL, num_prefill=0) as workers:
        grammar = Grammar(GrammarKind.REGEX, "abc")
        found = await workers.generate(request(prompt_of(20), max_tokens=40, min_tokens=20, grammar=grammar))
        assert reference.tokenizer.decode(found.tokens) == "abc"
        assert found.finish[0] is FinishReason.STOP
        cut = await workers.generate(request(prompt_of(20), max_tokens=2, grammar=grammar))
        assert cut.finish[0] is FinishReason.LENGTH


async def test_end_tokens_come_where_the_text_may_end_and_ordinary_stop_tokens_wherever_they_fit(reference: Reference) -> None:
    letters = [reference.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab"]
    eager = {"logit_bias": ((END, 99.0),), "stop_token_ids": (END,)}  # it wants to end at once
    async with running_workers(reference.model_path, engine=ENGINE, decode=LOCAL, num_prefill=0) as workers:
        some = await workers.generate(request(prompt_of(20), grammar=Grammar(GrammarKind.REGEX, "[ab]{3}[ab]*"), **eager))
        assert (len(some.tokens), some.finish[0]) == (3, FinishReason.STOP)
        more = await workers.generate(
            request(prompt_of(20), grammar=Grammar(GrammarKind.REGEX, "[ab]{3}[ab]*"), min_tokens=5, **eager)
        )
        assert (len(more.tokens), more.finish[0]) == (5, FinishReason.STOP)
        for stop in letters:
            cut = await workers.generate(
                request(
                    prompt_of(20),
                    max_tokens=40,
                    temperature=1.0,
                    stop_token_ids=(stop,),
                    logit_bias=((stop, 4.0),),
                    grammar=Grammar(GrammarKind.REGEX, "[ab]{30}"),
                )
            )
            assert cut.finish[0] is FinishReason.STOP
            assert stop not in cut.tokens
            assert len(cut.tokens) < 30
