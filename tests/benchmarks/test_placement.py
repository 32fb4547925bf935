"""The simulator, on small made-up traces: what must come out whatever the speed of anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.placement import decision_time, main
from benchmarks.placing.conditional import WAYS, cost_of
from benchmarks.placing.policies import POLICIES, TraceRow, rate_for, read_trace, simulate


def conversations(num: int, turns: int, gap_s: float) -> list[TraceRow]:
    """`num` at a time, each turn a block longer than the one before."""
    rows = []
    for turn in range(turns):
        for one in range(num):
            blocks = tuple(range(1000 * (one + 1), 1000 * (one + 1) + turn + 4))
            rows.append(TraceRow((turn * num + one) * gap_s, len(blocks) * 512 + 100, 10, blocks))
    return rows


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_every_request_once(policy: str) -> None:
    rows = conversations(5, 8, 0.5)
    found = simulate(rows, policy=policy, rate=4000, num_workers=3)
    assert len(found.ttft_s) == len(rows)
    assert min(found.ttft_s) > 0
    assert 0 <= found.hit_tokens < found.prompt_tokens
    assert found.hit_tokens % 512 == 0


def test_conversations_stay_where_they_are_cached() -> None:
    rows = conversations(6, 10, 2.0)
    best = sum(row.input_tokens - 512 - 100 for row in rows[6:])  # all but the newest block, from the second turn on
    assert simulate(rows, policy="predicted", rate=4000, num_workers=3).hit_tokens == best
    assert simulate(rows, policy="random", rate=4000, num_workers=6).hit_tokens < 0.7 * best


def test_a_rate_is_what_a_load_needs() -> None:
    rows = [TraceRow(float(second), 2000, 1, ()) for second in range(201)]
    rate = rate_for(rows, load=0.5, num_workers=2, cached=0.0)
    found = simulate(rows, policy="least_load", rate=rate, num_workers=2)
    assert found.busy == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(("length", "load"), [(64, 0.9), (4096, 0.0)])
def test_the_choice_of_here_or_there_is_near_the_better_one(length: int, load: float) -> None:
    alone_s, _ = cost_of(None, length=length, cached_share=0.0, load=load, num_prompts=20)
    costs = {}
    for name in ("router", "here", "there"):
        total_s, _ = cost_of(WAYS[name], length=length, cached_share=0.0, load=load, num_prompts=20)
        costs[name] = total_s - alone_s
    assert costs["router"] <= 1.05 * min(costs["here"], costs["there"])
    assert max(costs["here"], costs["there"]) > 1.3 * costs["router"], "the choice matters in this cell"


def test_both_formats_of_traces_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, lines = tmp_path / "t.csv", tmp_path / "t.jsonl"
    csv.write_text("arrival_ms,input_tokens,output_tokens,block512_hash_ids\n1000,700,5,0 7\n2500,2600,9,0 7-9\n")
    lines.write_text(
        json.dumps({"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 7]})
        + "\n"
        + json.dumps({"timestamp": 2500, "input_length": 2600, "output_length": 9, "hash_ids": [0, 7, 8, 9]})
    )
    assert read_trace(csv, None) == read_trace(lines, None) == [TraceRow(0, 700, 5, (0, 7)), TraceRow(1.5, 2600, 9, (0, 7, 8, 9))]
    assert main(["--trace", str(csv), "--loads", "0.5", "--policies", "predicted,dynamo", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["policy"] for row in rows] == ["predicted", "dynamo"]
    csv.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        main(["--trace", str(csv)])


def test_decisions_are_timed() -> None:
    assert float(decision_time(20, 0.5, turns=20)["place_p50_us"]) > 0
