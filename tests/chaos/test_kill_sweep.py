"""A killed decode worker is not noticed: a selection of the token indices that `make chaos` goes through one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chaos.kill_sweep import WAYS, Said, differences, running_sweep
from support.chaos.zygote import Zygote
from support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("sweep") / "workers.log")
    yield made
    made.close()


async def test_after_some_tokens_of_each_way(zygote: Zygote, tmp_path: Path) -> None:
    async with running_sweep(zygote, make_tiny_model(tmp_path / "model", seed=5)) as sweep:
        for number, way in enumerate(WAYS):
            for num_tokens in (1 + number, 15 + number, 50 + number):  # at the border of a block, too
                kill = await sweep.kill_after(way, num_tokens)
                assert not kill.problems, (way, num_tokens)
        ways = {way: await sweep.expected(way) for way in WAYS}
    assert len({tuple(said.token_ids[0]) for said in ways.values()}) == len(WAYS)
    assert ways["n=2"].token_ids[0] != ways["n=2"].token_ids[1]
    assert all(len(tokens) == 72 for said in ways.values() for tokens in said.token_ids.values())


def test_a_difference_is_found() -> None:
    whole = Said({0: [1, 2]}, {0: "ab"}, {}, {0: "length"}, whole=True)
    assert differences(whole, whole) == []
    assert differences(Said({0: [1, 1, 2]}, {0: "aab"}, {}, {0: "length"}, whole=True), whole), "a token twice"
    assert differences(Said({0: [1, 2]}, {0: "ab"}, {}, {0: "length"}), whole), "an end that did not come"
    assert differences(Said({0: [1, 2]}, {0: "ab"}, {}, {0: "length"}, error="lost", whole=True), whole)
