"""The settings that must not change an answer, and what is asked under each combination of them.

One combination is a decode worker, a prefill worker, tiny models and six requests: plain and with a grammar, greedy and drawn,
with one choice and with several. The reference is each choice alone in workers without any of it: no guesses, one stage, whole
prompts, room for all. In exact mode tokens and log-probabilities are equal to the last bit, among workers of one number of shards
(others refuse to exchange KV); otherwise, in fp32, tokens are. And all tokens are those of one shard.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from common.config import DecodeConfig, EngineConfig, PrefillConfig, SpeculationConfig
from common.engine.core import SchedulerTotals
from common.types import Grammar, GrammarKind, Request
from support.hostile_guesses import Hostile
from support.pairwise import Combination, covering, product
from support.prefill_steps import PrefillSteps
from support.ranks import ranks_as_threads
from support.structured_work import BIAS, END, alone
from support.tiny_heads import make_tiny_heads
from support.tiny_models import make_tiny_model
from support.workers import Answer, Workers, patient, request, running_workers

NEW_TOKENS = 24
_TURNS = 12  # at most, until all that is to be tested has happened
SMALL_POOL_TOKENS = 272  # holds the longest request, and not all of them

DEGREES = {"1x1": (1, 1), "2x1": (2, 1), "1x2": (1, 2), "2x2": (2, 2)}  # shards x stages
AMPLE_POOL_TOKENS = 4096
PREEMPTION = ("none", "recompute", "swap")
PROMPTS = {
    "one by one": PrefillConfig(),
    "whole": PrefillConfig(chunk_tokens=64, step_tokens=512),
    "several chunks in a step": PrefillConfig(chunk_tokens=32, step_tokens=80),
    "one chunk in a step": PrefillConfig(chunk_tokens=16),
}
_SHARING = ("whole", "several chunks in a step")
# Those in between decide by what they measure whether to guess at all.
SPECULATION = ("off", "ngram", "draft", "medusa", "half right")
AXES = {
    "numerics": ("exact", "fast"),
    "speculation": SPECULATION,
    "decode": tuple(DEGREES),
    "prefill": tuple(DEGREES),
    "preemption": PREEMPTION,
    "overlap": ("off", "on"),
    "prompts": tuple(PROMPTS),
}


def allowed(one: Combination) -> bool:
    if one["numerics"] == "exact" and DEGREES[one["decode"]][0] != DEGREES[one["prefill"]][0]:
        return False  # they refuse each other
    return one["preemption"] == "none" or one["prompts"] != "one by one"  # alone nobody is preempted


def every_combination() -> list[Combination]:
    return product(AXES, allowed)


def few_combinations() -> list[Combination]:
    return covering(every_combination())


def name_of(one: Combination) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in one.items())


def _work() -> list[Request]:
    def prompt(length: int) -> list[int]:
        half = torch.randint(3, 380, (length - length // 2,), generator=torch.Generator().manual_seed(length)).tolist()
        return [*half, *half][:length]  # so that there is something to match

    regex = Grammar(GrammarKind.REGEX, r"[a-c]{3,9}-[0-9]+")
    choice = Grammar(GrammarKind.LARK, 'start: "(" item ("," item){2,9} ")"\nitem: /[0-9]{1,4}/ | start')
    kinds = (
        (17, 0.0, 1, None),
        (64, 0.8, 3, None),
        (46, 0.0, 1, regex),
        (75, 0.9, 2, choice),
        (90, 0.0, 1, None),
        (33, 0.9, 2, None),
    )
    return [
        request(
            prompt(length),
            request_id=f"{length}",
            max_tokens=NEW_TOKENS,
            temperature=temperature,
            seed=length,
            num_choices=num_choices,
            logprobs=3,
            **({} if grammar is None else {"grammar": grammar, "logit_bias": BIAS, "stop_token_ids": (END,)}),
        )
        for length, temperature, num_choices, grammar in kinds
    ]


def not_yet_tested(one: Combination, totals: SchedulerTotals, prefill: PrefillSteps) -> list[str]:
    """Who loses its blocks depends on who is computed when. What must not happen at all raises AssertionError."""
    preemption, speculation = one["preemption"], one["speculation"]
    assert preemption != "none" or totals.preemptions == 0, "the pool was too small"
    assert preemption == "swap" or totals.swapped_out == 0, "KV was swapped"
    assert speculation != "off" or totals.drafted_tokens == 0, "somebody guessed"
    assert one["overlap"] == "on" or totals.steps_ahead == 0, "steps overlapped"
    happened = {
        "preemption": preemption == "none" or totals.preemptions > 0,
        "swap": preemption != "swap" or totals.swapped_in > 0,
        "shared steps": one["prompts"] not in _SHARING or preemption != "none" or any(len(step) > 1 for step in prefill.steps),
        "guesses": speculation != "half right" or totals.accepted_tokens > 0,
        "overlap": one["overlap"] == "off" or speculation != "off" or totals.steps_ahead > 0,
    }
    return [name for name, has in happened.items() if not has]


@dataclass
class Grid:
    """Models and references; made once for many combinations."""

    folder: Path
    work: list[Request] = field(default_factory=_work)
    _references: dict[tuple[str, int], list[Answer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._model = make_tiny_model(self.folder / "model", seed=3, kv_heads=2)
        self._draft = make_tiny_model(self.folder / "draft", seed=3, layers=1, kv_heads=2)
        self._heads = make_tiny_heads(self.folder / "heads", self._model)

    async def check(self, one: Combination) -> None:
        """Raises AssertionError, naming the request, if an answer is not the reference's, or if nothing was tested."""
        exact = one["numerics"] == "exact"
        expected = await self._reference(one["numerics"], DEGREES[one["decode"]][0] if exact else 1)
        tokens = await self._reference(one["numerics"], 1)
        hostile = Hostile("half right", self.work, tokens) if one["speculation"] == "half right" else None
        async with self._workers(one, hostile) as workers:
            prefill = PrefillSteps(workers.prefill[0])
            missing: list[str] = []
            for _ in range(_TURNS):
                if one["prompts"] == "one by one":
                    found = [await workers.generate(item) for item in self.work]
                else:
                    found = await workers.generate_together(self.work)
                for ours, theirs, plain, item in zip(found, expected, tokens, self.work, strict=True):
                    assert ours.token_ids == plain.token_ids, item.request_id
                    assert ours.finish == theirs.finish, item.request_id
                    assert not exact or ours.logprobs == theirs.logprobs, item.request_id
                    assert ours.started is not None, f"{item.request_id} never started"
                    assert ours.started.timings.transport, f"{item.request_id} was prefilled locally"
                missing = not_yet_tested(one, workers.decode._scheduler.totals, prefill)
                if not missing:
                    break
            assert not missing, f"never happened: {missing}"
            await workers.assert_nothing_leaks()

    async def _reference(self, numerics: str, shards: int) -> list[Answer]:
        if (numerics, shards) not in self._references:
            degree = f"{shards}x1"
            plain = dict(zip(AXES, (numerics, "off", degree, degree, "none", "off", "one by one"), strict=True))
            async with self._workers(plain) as workers:
                self._references[numerics, shards] = [await alone(workers, item) for item in self.work]
        return self._references[numerics, shards]

    @asynccontextmanager
    async def _workers(self, one: Combination, hostile: Hostile | None = None) -> AsyncIterator[Workers]:
        def degree(side: str) -> dict[str, int]:
            shards, stages = DEGREES[one[side]]
            return {"tensor_parallel": shards, "pipeline_parallel": stages, "micro_batch_tokens": 8}

        engine = EngineConfig(
            dtype="float32", exact=one["numerics"] == "exact", prefix_cache=False, kv_pool_tokens=AMPLE_POOL_TOKENS
        )
        preempted = one["preemption"] != "none"
        guesses = one["speculation"] in ("ngram", "draft", "medusa")
        speculation = SpeculationConfig(
            method=one["speculation"] if guesses else "off",
            draft_model=str(self._draft) if one["speculation"] == "draft" else "",
            heads=str(self._heads),
        )
        with ranks_as_threads(), pytest.MonkeyPatch.context() as patch:
            if hostile is not None:
                patch.setattr("decode_worker.server.create_speculator", lambda *arguments, **named: hostile)
            async with running_workers(
                self._model,
                engine=engine.model_copy(update={"kv_pool_tokens": SMALL_POOL_TOKENS if preempted else AMPLE_POOL_TOKENS}),
                prefill_engine=engine,
                decode=DecodeConfig(
                    local_prefill="never",
                    step_tokens=64,
                    watermark_blocks=0,
                    growth_tokens=0,
                    preemption=one["preemption"] if preempted else "auto",
                    overlap=one["overlap"],
                    speculation=speculation,
                    **degree("decode"),
                ),
                prefill=PROMPTS[one["prompts"]].model_copy(update=degree("prefill")),
                transfer=patient("shm"),
            ) as workers:
                yield workers
