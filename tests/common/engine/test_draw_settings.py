"""Settings of draws: kept from step to step they are what they would be if written anew."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import numpy as np

from common.engine.batch import SampleSpec
from common.engine.draw_settings import NUM_SETTINGS, KeptSettings, settings_of

SPEC = SampleSpec(position=3, seed=2**64 - 2, choice=1, temperature=0.7, top_k=9, top_p=0.9, min_p=0.05, logprobs=None)


def test_a_draw_is_eight_numbers() -> None:
    (row,) = settings_of([SPEC], [5]).tolist()
    assert row[:5] == [5, -2, 1, 3, 9]
    assert struct.unpack("<3d", struct.pack("<3q", *row[5:])) == (0.7, 0.9, 0.05)


def test_rows_are_those_of_the_last_step_whatever_was_there_before() -> None:
    chance = random.Random(2)
    memory = np.full((5, NUM_SETTINGS), 77, dtype=np.int64)
    kept = KeptSettings(memory)
    rows: list[SampleSpec | None] = []
    for _ in range(200):
        rows = [None if item is None else replace(item, position=item.position + 1) for item in rows]
        if chance.random() < 0.3 and rows:
            rows.pop(chance.randrange(len(rows)))
        if chance.random() < 0.4 and len(rows) < len(memory):
            another = replace(
                SPEC, seed=chance.randrange(2**64), temperature=chance.choice([0.0, 1.5]), top_k=chance.randrange(3)
            )
            rows.insert(chance.randrange(len(rows) + 1), chance.choice([another, None]))
        kept.fill(rows)
        for place in range(len(memory)):
            spec = rows[place] if place < len(rows) else None
            if spec is not None:
                assert memory[place].tolist() == settings_of([spec], [place])[0].tolist()
            else:
                assert memory[place, 0] == place
                assert memory[place, 5] == 0  # the best token
