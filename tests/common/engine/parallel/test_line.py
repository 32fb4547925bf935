"""A pipeline that stays full across steps: what it computes, and in which order its stages do.

Real shares, orders and sockets, a thread for each rank. The oracles are an engine of one process, and the stages' own records:
who began and who ended which part, in one list.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.in_flight_step import placeholder_of
from common.errors import EngineFailure
from common.types import Request
from decode_worker.step_ahead import overlaps
from support.ranks import ThreadRanks
from support.served_core import PLAIN_WORK, Answer, Served, one_by_one, request
from support.stages import Records, built
from support.tiny_models import make_tiny_model

DEGREES = [(1, 2), (1, 4), (2, 2)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), layers=4)


WORK = [
    *PLAIN_WORK,
    replace(request("f", 6, temperature=1.0), num_choices=3),
    request("p", 21, prompt_logprobs=1),
    request("q", 4, frequency_penalty=0.4),
]


def of_these(answers: dict[str, Answer], work: list[Request]) -> dict[str, Answer]:
    """Of all their choices."""
    names = {item.request_id for item in work}
    return {name: answer for name, answer in answers.items() if name.split(".")[0] in names}


@pytest.fixture(scope="module")
def alone(tiny: Path) -> dict[str, Answer]:
    """In one process, each by itself, step after step."""
    with built(tiny, 1, 1) as engine:
        return one_by_one(engine, WORK)


@pytest.mark.parametrize(("tensor", "pipeline"), DEGREES)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_answers_are_those_of_one_process(
    tiny: Path, alone: dict[str, Answer], tensor: int, pipeline: int, preemption: str
) -> None:
    """With stages alone to the bit. Drawn and greedy, forked, preempted, ended by a token, beside one that sees its tokens."""
    with built(tiny, tensor, pipeline) as engine:
        for work in (WORK, [item for item in WORK if item.request_id != "q"]):
            served = Served(engine, overlap=True, preemption=preemption)
            found = asyncio.run(served.run(work))
            expected = of_these(alone, work)
            if tensor == 1:
                assert found == expected
            else:
                assert {name: [token for token, _ in answer] for name, answer in found.items()} == {
                    name: [token for token, _ in answer] for name, answer in expected.items()
                }
            totals = served.scheduler.totals
            assert totals.steps_ahead > 10
            assert totals.preemptions > 0, "the pool is not small enough for this test"
            assert (totals.swapped_out > 0) == (preemption == "swap")
            assert totals.swapped_in == totals.swapped_out
            assert engine.blocks.num_used == 0


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_who_leaves_while_steps_are_under_way_disturbs_nobody(tiny: Path, kernels: str) -> None:
    work = [
        replace(item, sampling=replace(item.sampling, max_tokens=30)) if item.request_id in "ae" else item for item in WORK[:6]
    ]
    with built(tiny, 1, 1, kernels=kernels) as engine:
        alone = one_by_one(engine, WORK)
    with built(tiny, 1, 2, kernels=kernels) as engine:
        served = Served(engine, overlap=True, preemption="swap")
        answers = asyncio.run(served.run(work, abort=["a", "e"]))
        assert answers == of_these(alone, [item for item in work if item.request_id in "bcdf"])
        assert engine.blocks.num_used == 0


# -- the order of the stages -------------------------------------------------------------------------------------------


def spec(position: int) -> SampleSpec:
    return SampleSpec(position, 7, 0, 0.0, 0, 1.0, 0.0, None)


def decoding(position: int, tokens: list[int] | None = None) -> ScheduledBatch:
    """Four sequences, ten positions apart; without tokens each begins with what it drew before."""
    return ScheduledBatch(
        tuple(
            SequenceSlice(
                [placeholder_of(index) if tokens is None else tokens[index]],
                10 * index + position,
                list(range(1 + 10 * index, 1 + 10 * (index + 1))),
                (spec(10 * index + position + 1),),
            )
            for index in range(4)
        )
    )


def test_a_part_enters_while_the_last_stage_has_another_of_the_step_before(tiny: Path) -> None:
    """The last stage may not end the second part of a step before the first stage has begun the first part of the next one. A
    pipeline that runs empty between steps never gets past that."""
    with built(tiny, 1, 2, num_blocks=40) as engine:
        records, line = Records(engine), engine.runner
        before = line.launch(decoding(0, [5, 6, 7, 8]))
        steps = [before]
        for position in range(1, 6):
            records.held[1, (20 + position, 30 + position)] = (0, (0 + position + 1, 10 + position + 1))
        for position in range(1, 7):
            steps.append(line.launch(decoding(position)))
            steps[-2].collect()
        steps[-1].collect()
        for position in range(2, 6):
            assert records.place(0, (position + 1, 11 + position), ended=False) < records.place(
                1, (20 + position, 30 + position), ended=True
            )
        for stage in (0, 1):  # every stage ended a sequence's step before it began its next one
            for position in range(2, 6):
                for first in (0, 20):
                    part, following = (first + position, first + 10 + position), (first + position + 1, first + 11 + position)
                    assert records.place(stage, part, ended=True) < records.place(stage, following, ended=False)
        tokens = [[found.tokens[0].token_id for found in step.collect().slices] for step in steps]
    with built(tiny, 1, 1, num_blocks=40) as engine:
        expected, current = [], [5, 6, 7, 8]
        for position in range(7):
            current = [found.tokens[0].token_id for found in engine.runner.execute(decoding(position, current)).slices]
            expected.append(current)
    assert tokens == expected


def test_a_chunk_of_a_prompt_enters_while_the_last_stage_has_the_one_before(tiny: Path) -> None:
    """It waits for no token. All that is told of layers is true, and in order, for each chunk."""
    tokens, table = [3 + place * 7 % 300 for place in range(24)], list(range(1, 7))
    with built(tiny, 1, 2, num_blocks=40) as engine:
        records, told = Records(engine), []
        chunks = [ScheduledBatch((SequenceSlice(tokens[first : first + 3], first, table),)) for first in range(0, 24, 3)]
        steps = []
        for number, chunk in enumerate(chunks):
            start = chunk.slices[0].start
            if number < len(chunks) - 1:
                records.held[1, (start,)] = (0, (start + 3,))
            steps.append(engine.runner.launch(chunk, lambda layers, start=start: told.append((start, layers))))
            if number:
                steps[number - 1].collect()
        steps[-1].collect()
        assert told == [(start, layers) for start in range(0, 24, 3) for layers in (1, 2, 3, 4)]
        found = engine.runner.execute(ScheduledBatch((SequenceSlice(tokens[-1:], 24, [*table, 7], (spec(25),)),)))
    with built(tiny, 1, 1, num_blocks=40) as engine:
        engine.runner.execute(ScheduledBatch((SequenceSlice(tokens, 0, table),)))
        assert found == engine.runner.execute(ScheduledBatch((SequenceSlice(tokens[-1:], 24, [*table, 7], (spec(25),)),)))


def test_a_part_that_fails_takes_the_steps_behind_it_along(tiny: Path) -> None:
    """Also those whose own tokens were there. What its logits would have been is taken off the sockets all the same."""
    with built(tiny, 1, 2, num_blocks=40) as engine:
        engine.runner.execute(decoding(0, [5, 6, 7, 8]))
        group = engine.group
        assert isinstance(group, ThreadRanks)
        group.shares[1].pool.tensor[1] = float("nan")  # of the first sequence, in the last stage
        steps = [engine.runner.launch(decoding(1, [5, 6, 7, 8])), engine.runner.launch(decoding(2))]
        for step in steps:
            step.settle()
            with pytest.raises(EngineFailure, match="not finite"):
                step.collect()


def test_logits_that_fill_the_sockets_hold_up_nobody_for_ever(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage has more to say of a part than a socket holds, while the first one has more rows for it than a socket
    holds."""
    monkeypatch.setattr("common.engine.parallel.links._BUFFER_BYTES", 4096)
    tokens = [3 + place * 7 % 300 for place in range(200)]
    with built(tiny, 1, 2, num_blocks=60) as engine:
        item = SequenceSlice(tokens, 0, range(1, 51), (spec(200),), prompt_logprobs=0, next_token_ids=tokens[1:])
        found = engine.runner.execute(ScheduledBatch((item,)))
    with built(tiny, 1, 1, num_blocks=60) as engine:
        assert found == engine.runner.execute(ScheduledBatch((item,)))


def test_auto_overlaps_where_there_are_stages() -> None:
    assert overlaps("auto", "cpu", threads=10_000, stages=2)
    assert not overlaps("auto", "cpu", threads=10_000, stages=1)
    assert not overlaps("off", "cpu", threads=1, stages=2)
