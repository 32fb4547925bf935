"""Small clusters of real control code under seeded trouble: exact tokens or one typed error each, in time, and nothing is left.

The whole campaign is `python tests/simulation/run.py`; here are a few hundred seeds, and the simulation itself under test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.blocks import num_blocks
from support.simulation import campaign, oracle
from support.simulation.mutants import broken_by, digest_skipped
from support.simulation.network import Disorder, Point
from support.simulation.pool_cut import PoolCut
from support.simulation.scenario import UNEQUAL_BLOCKS, Trouble, draw_scenario
from support.simulation.world import simulate, simulated_rpc

RUN = Path(__file__).with_name("run.py")
QUICK_SEEDS = 250


def test_nothing_goes_wrong_in_a_few_hundred_seeds() -> None:
    report = campaign.run(range(1, QUICK_SEEDS + 1))
    assert not report.failures, report.text()
    assert report.seeds == QUICK_SEEDS
    # The trouble is real, and most requests live through it.
    assert 0.5 < report.endings["served"] / sum(report.endings.values()) < 0.95
    for ending in ("WorkerLost", "DeadlineExceeded", "DigestMismatch", "left"):
        assert report.endings[ending] > 0, report.text()
    for point in Point:
        assert report.points[point.value] > 0, report.text()


def test_without_trouble_every_request_is_served_whatever_the_order() -> None:
    with simulated_rpc():
        for seed in range(1000, 1060):
            scenario = draw_scenario(seed)
            requests = tuple(replace(request, leaves_s=None) for request in scenario.requests)
            verdict = simulate(replace(scenario, faults=(), disorder=Disorder(), requests=requests))
            assert verdict.ok, (seed, verdict.complaints)
            assert {ending.how for ending in verdict.endings} == {"served"}


def test_the_same_seed_gives_the_same_history() -> None:
    with simulated_rpc():
        for seed in (3, 8, 23):
            first, second = simulate(draw_scenario(seed)), simulate(draw_scenario(seed))
            assert first.history == second.history != 0
            assert first.endings == second.endings
            lines: list[str] = []
            assert simulate(draw_scenario(seed), lines.append).history == first.history
            assert any("GRANT" in line for line in lines)


def test_another_process_comes_to_the_same_history() -> None:
    mine = campaign.run(range(1, 21))
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RUN), "--seeds", "20", "--processes", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"history {mine.history:x}\n" in done.stdout


def test_a_failure_is_reported_with_its_replay_and_boiled_down() -> None:
    with broken_by(digest_skipped):
        verdict = campaign.first_failure(range(1, 200))
        assert verdict is not None
        seed = verdict.scenario.seed
        report = campaign.run([seed])
        assert f"--replay {seed}" in report.text()
        smaller = campaign.smallest(verdict.scenario)
        assert len(smaller.requests) < len(verdict.scenario.requests)
        assert not smaller.faults
        with simulated_rpc():
            assert not simulate(smaller).ok
            assert all(simulate(one).ok for _, one in smaller.smaller())


def test_seeds_bring_every_kind_of_trouble() -> None:
    scenarios = [draw_scenario(seed) for seed in range(1, 400)]
    assert {fault.trouble for scenario in scenarios for fault in scenario.faults} == set(Trouble)
    assert any(scenario.calm for scenario in scenarios)
    assert {(scenario.guesses, scenario.overlap) for scenario in scenarios} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    assert {(scenario.prefill_cut.block_tokens, scenario.decode_cut.block_tokens) for scenario in scenarios} == set(
        UNEQUAL_BLOCKS
    )
    assert any(scenario.decode_cut.wide for scenario in scenarios)
    assert {scenario.transports for scenario in scenarios} == {
        ("cuda_ipc",),
        ("cuda_ipc", "tcp"),
        ("shm",),
        ("shm", "tcp"),
        ("tcp",),
    }


@pytest.mark.parametrize("changed", [0, 5, 9])
def test_in_the_oracle_every_byte_counts(changed: int) -> None:
    prompt = tuple(range(10))
    other = (*prompt[:changed], 999, *prompt[changed + 1 :])
    assert oracle.answer(prompt, 5, seed=1, choice=0) != oracle.answer(other, 5, seed=1, choice=0)
    kv = oracle.KV(prompt).all()
    assert len(kv) == oracle.NUM_LAYERS * len(prompt) * oracle.TOKEN_BYTES
    assert oracle.answer(prompt, 1, seed=1, choice=0) == (oracle.draw(kv, 1, 0, 10),)
    broken = bytearray(kv)
    broken[changed] ^= 1
    assert oracle.draw(bytes(broken), 1, 0, 10) != oracle.draw(kv, 1, 0, 10)


@pytest.mark.parametrize("cut", [PoolCut(4), PoolCut(3), PoolCut(8, wide=True)], ids=str)
def test_in_a_pool_every_byte_counts_however_it_is_cut(cut: PoolCut) -> None:
    kv = oracle.KV(tuple(range(10)))
    table = (3, 1, 4, 2)[: num_blocks(10, cut.block_tokens)]
    content = bytearray(5 * cut.block_bytes)
    for index, block in enumerate(table):
        whole = cut.block_of(kv, index)
        for layer in range(oracle.NUM_LAYERS):  # as the engine writes it; a whole block must then look as the oracle says
            for position in range(index * cut.block_tokens, min((index + 1) * cut.block_tokens, 10)):
                keys, values = kv.planes[layer]
                row = slice(position * oracle.ROW_BYTES, (position + 1) * oracle.ROW_BYTES)
                cut.write(content, table, layer, position, bytes(keys[row] + values[row]))
                assert cut.read(content, table, layer, position) == bytes(keys[row] + values[row])
        if len(whole) == cut.block_bytes:
            assert content[block * cut.block_bytes : (block + 1) * cut.block_bytes] == whole
    assert cut.all_kv(content, table, 10) == kv.all()
    for at in range(table[0] * cut.block_bytes, (table[0] + 1) * cut.block_bytes):
        content[at] ^= 1
        assert cut.all_kv(content, table, 10) != kv.all()
        content[at] ^= 1
