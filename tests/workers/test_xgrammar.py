"""Workers that read grammars with xgrammar: the same tokens alone, and handed over, together and preempted; and always valid."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from common.config import DecodeConfig, PrefillConfig
from common.engine.automata.plain_schema import is_plain
from common.tokenizer import Tokenizer
from common.types import FinishReason, Grammar, GrammarKind, Request
from support.structured_work import BIAS, END, ENGINE, LOCAL, NEW_TOKENS, WORDS, alone, prompt_of
from support.tiny_models import make_tiny_model
from support.workers import request, running_workers

pytest.importorskip("xgrammar")

SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "béta"]}, "maxItems": 3},
    },
    "required": ["ok", "age", "tags"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    "choice": Grammar(GrammarKind.CHOICE, json.dumps(WORDS)),
    "regex": Grammar(GrammarKind.REGEX, r"[a-c]{3,9}-[0-9]+"),  # which is llguidance's all the same
}
READ_BY_X = ENGINE.model_copy(update={"grammars": "xgrammar"})


def work() -> list[Request]:
    return [
        request(
            prompt_of(length),
            request_id=f"{name}-{temperature}",
            max_tokens=NEW_TOKENS,
            temperature=temperature,
            seed=length,
            num_choices=num_choices,
            logprobs=2,
            stop_token_ids=(END,),
            grammar=grammar,
            logit_bias=BIAS,
        )
        for (name, grammar), length in zip(GRAMMARS.items(), (31, 94, 46), strict=True)
        for temperature, num_choices in ((0.0, 1), (1.0, 2))
    ]


async def test_answers_are_valid_and_the_same_however_they_are_computed(tmp_path: Path) -> None:
    assert is_plain(SCHEMA)
    model = make_tiny_model(tmp_path, seed=5)
    tokenizer = Tokenizer.load(model)
    async with running_workers(model, engine=READ_BY_X, decode=LOCAL, num_prefill=0) as workers:
        expected = [await alone(workers, item) for item in work()]
    ended = []
    for item, answer in zip(work(), expected, strict=True):
        name = item.request_id.split("-")[0]
        for choice, said in answer.token_ids.items():
            if name != "regex" and answer.finish[choice] is FinishReason.STOP:
                ended.append(name)
                text = tokenizer.decode(said)
                assert text in WORDS if name == "choice" else jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text))
    assert set(ended) == {"schema", "choice"}
    async with running_workers(
        model,
        engine=READ_BY_X.model_copy(update={"kv_pool_tokens": 224}),
        prefill_engine=READ_BY_X,
        decode=DecodeConfig(local_prefill="never", watermark_blocks=0, growth_tokens=0),
        prefill=PrefillConfig(chunk_tokens=16),
        transports=("shm",),
    ) as workers:
        found = await workers.generate_together(work())
        for ours, theirs, item in zip(found, expected, work(), strict=True):
            assert ours.token_ids == theirs.token_ids, item.request_id
            assert (ours.finish, ours.logprobs) == (theirs.finish, theirs.logprobs), item.request_id
        assert workers.decode._scheduler.totals.preemptions > 0, "the pool was large enough: nothing was tested"
        await workers.assert_nothing_leaks()
