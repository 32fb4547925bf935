"""The rest of an answer, computed by a worker that did not begin it, is the rest that the first worker would have computed.

What the router's dispatcher sends after a worker was lost (`router.answer`), at every token index, against the unbroken run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import DecodeConfig, EngineConfig, PrefillConfig
from common.errors import InvalidRequest
from common.types import TokenChunk
from router.answer import Answer
from support.tiny_models import make_tiny_model
from support.workers import Answer as Received
from support.workers import request, running_workers

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=2048)
PROMPT = [(11 * index) % 370 + 3 for index in range(37)]
LENGTH = 24


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.mark.parametrize("place", ["never", "always"])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "seed": 11},
        {"temperature": 1.3, "seed": 12, "top_p": 0.9, "min_tokens": 12, "stop_token_ids": tuple(range(3, 200))},
        {"temperature": 0.8, "seed": 13, "num_choices": 2, "logprobs": 3},
    ],
    ids=["greedy", "seeded", "min_tokens", "two choices"],
)
async def test_at_every_index_the_rest_is_the_same(model_path: Path, place: Any, sampling: dict[str, Any]) -> None:
    async with running_workers(
        model_path, engine=ENGINE, decode=DecodeConfig(local_prefill=place), prefill=PrefillConfig(chunk_tokens=16)
    ) as workers:
        whole = request(PROMPT, max_tokens=LENGTH, **sampling)
        unbroken = await workers.generate(whole)
        longest = max(map(len, unbroken.token_ids.values()))
        assert longest > 8
        for lost_after in range(longest):
            answer = Answer(whole)
            received = first_part(unbroken, lost_after)
            answer.add(received)
            rests = answer.rest()
            assert len(rests) == sum(chunk.finish_reason is None for chunk in received)
            for rest in rests:
                choice = rest.first_choice
                found = await workers.generate(rest)
                assert found.token_ids == {choice: unbroken.token_ids[choice][lost_after:]}
                assert found.finish == {choice: unbroken.finish[choice]}
                assert found.logprobs[choice] == unbroken.logprobs[choice][lost_after:]
        await workers.assert_nothing_leaks()


def first_part(unbroken: Received, num_tokens: int) -> list[TokenChunk]:
    """What had arrived of each choice when the worker was lost, as one chunk."""
    return [
        TokenChunk(
            choice,
            tuple(tokens[:num_tokens]),
            finish_reason=unbroken.finish[choice] if len(tokens) <= num_tokens else None,
        )
        for choice, tokens in unbroken.token_ids.items()
    ]


async def test_more_than_there_can_be_is_refused(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE, decode=DecodeConfig(local_prefill="always"), num_prefill=0) as workers:
        for resumed, most in ((len(PROMPT), 100), (8, 8)):
            bad = request(PROMPT, max_tokens=most)
            with pytest.raises(InvalidRequest, match="more of the answer") as raised:
                await workers.generate(type(bad)(**{**vars_of(bad), "num_resumed_tokens": resumed}))
            assert raised.value.param == "num_resumed_tokens"


def vars_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}
