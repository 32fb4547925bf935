"""Requests with grammars for a tiny model, and what it answers to each of them alone, prefilled locally in one chunk."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.config import DecodeConfig, EngineConfig
from common.tokenizer import Tokenizer
from common.types import Grammar, GrammarKind, Request
from support.workers import Answer, Workers, request, running_workers

NEW_TOKENS = 48
LOCAL = DecodeConfig(local_prefill="always", step_tokens=4096)
ENGINE = EngineConfig(dtype="float32", exact=True, prefix_cache=False, kv_pool_tokens=4096)
END = 2

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "béta"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": {"type": "string"}, "minItems": 100}
WORDS = ["yes", "no, never", "péut-être"]
GRAMMARS = {
    "schema": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    "endless": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(ENDLESS)),
    "regex": Grammar(GrammarKind.REGEX, r"[a-c]{3,9}-[0-9]+"),
    "choice": Grammar(GrammarKind.CHOICE, json.dumps(WORDS)),
    "lark": Grammar(GrammarKind.LARK, 'start: "(" item ("," item){2,9} ")"\nitem: /[0-9]{1,4}/ | start'),
}
# Digits and what closes things are likelier, so that random weights come to an end.
BIAS = tuple((token_id, 9.0) for token_id in (END, 4, 63, 95))


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 380, (length,), generator=generator).tolist()


@dataclass
class Reference:
    model_path: Path
    tokenizer: Tokenizer
    work: list[Request]
    answers: list[Answer]


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


async def make_reference(model_path: Path) -> Reference:
    work, answers = [], []
    async with running_workers(model_path, engine=ENGINE, decode=LOCAL, num_prefill=0) as workers:
        for (name, grammar), length in zip(GRAMMARS.items(), (31, 94, 46, 77, 60), strict=True):
            for temperature, num_choices in ((0.0, 1), (1.0, 2)):
                item = request(
                    prompt_of(length),
                    request_id=f"{name}-{temperature}",
                    max_tokens=NEW_TOKENS,
                    temperature=temperature,
                    seed=length,
                    num_choices=num_choices,
                    top_p=0.95 if temperature else 1.0,
                    logprobs=2,
                    stop_token_ids=(END,),
                    grammar=grammar,
                    logit_bias=BIAS,
                    frequency_penalty=0.3,
                    bad_words=((9,), (66, 67)),
                )
                work.append(item)
                answers.append(await alone(workers, item))
    return Reference(model_path, Tokenizer.load(model_path), work, answers)
