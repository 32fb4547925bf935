"""The most telling cells of the chaos matrix, on real worker processes; and that the harness would notice if one went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.chaos.bulk import move_blocks
from support.chaos.cells import (
    CellResult,
    Policy,
    Signal,
    info_cell,
    link_cell,
    process_cell,
    prompt_of,
    rpc_cell,
    transport_cell,
)
from support.chaos.fault_transport import CORRUPTING, TransportFault, faults_over
from support.chaos.oracle import Oracle
from support.chaos.processes import Times
from support.chaos.rig import Ending, Rig, running_rig
from support.chaos.rpc_fault_proxy import RpcFault
from support.chaos.steps import DecodeStep, PrefillStep, Step
from support.chaos.tcp_fault_proxy import LinkFault
from support.chaos.zygote import Zygote
from support.tiny_models import make_tiny_model

TIMES = Times(lease_s=1.0, ticket_ttl_s=2.5, handshake_timeout_s=1.0, release_timeout_s=0.3)


@dataclass
class Bench:
    zygote: Zygote
    oracle: Oracle
    model_path: Path

    def rig(
        self,
        transport: str,
        policy: Policy = Policy.AUTO,
        *,
        proxied: bool = False,
        prefill_block_tokens: int | None = None,
        fences: bool = True,
        sabotage: bool = False,
    ) -> AbstractAsyncContextManager[Rig]:
        return running_rig(
            self.zygote,
            self.oracle,
            self.model_path,
            transport=transport,
            local_prefill=policy.value,
            times=TIMES,
            proxied=proxied,
            prefill_block_tokens=prefill_block_tokens,
            fences=fences,
            sabotage=sabotage,
        )


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("chaos") / "workers.log")
    yield made
    made.close()


@pytest.fixture
async def bench(zygote: Zygote, tmp_path: Path) -> AsyncIterator[Bench]:
    model_path = make_tiny_model(tmp_path / "model", seed=5)
    oracle = await Oracle.start(zygote, model_path)
    yield Bench(zygote, oracle, model_path)
    await oracle.close()


def without_problems(cell: CellResult) -> CellResult:
    assert cell.problems == [], f"{cell.row}, {cell.column}, {cell.policy}"
    return cell


SURFACES: tuple[tuple[Step, Signal], ...] = (
    (PrefillStep.MID_PIECE, Signal.KILL),
    (PrefillStep.MID_WRITE, Signal.STOP_CONT),
    (PrefillStep.BEFORE_REPLY, Signal.KILL),
)
IS_NOT_NOTICED: tuple[tuple[Step, Signal], ...] = (
    (PrefillStep.BEFORE_CLOSE, Signal.STOP_KILL),
    (DecodeStep.HALF_VERIFIED, Signal.KILL),
    (DecodeStep.WRITER_LET_IN, Signal.STOP_CONT),
)
BAD = (TransportFault.FLIPPED, TransportFault.SEAL_LIES, TransportFault.WRITTEN_LATE, TransportFault.MISPLACED)
OFFERED: tuple[tuple[Step, Signal], ...] = ((DecodeStep.OFFERED, Signal.STOP_CONT), (DecodeStep.OFFERED, Signal.KILL))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_worker_dies_or_stops_at_a_step(bench: Bench, transport: str) -> None:
    for policy, cells in ((Policy.NEVER, SURFACES), (Policy.AUTO, IS_NOT_NOTICED)):
        async with bench.rig(transport, policy) as rig:
            for number, (step, signal_) in enumerate(
                cells if policy is Policy.NEVER or transport == "tcp" else (*cells, *OFFERED)
            ):
                cell = without_problems(await process_cell(rig, policy, step, signal_, number))
                assert cell.reached
                if policy is Policy.NEVER:
                    assert cell.outcomes[0].ending is Ending.ERROR, "the fault had no effect"


@pytest.mark.parametrize("fault", [LinkFault.PAYLOAD_FLIPPED, LinkFault.SWAPPED, LinkFault.STALE, LinkFault.RESET])
async def test_a_bad_network_costs_time_and_nothing_else(bench: Bench, fault: LinkFault) -> None:
    policy = Policy.AUTO if fault is LinkFault.RESET else Policy.NEVER
    async with bench.rig("tcp", policy, proxied=True) as rig:
        cell = without_problems(await link_cell(rig, policy, fault, 24, 1, least_hits=1 if fault is LinkFault.RESET else 9))
        assert cell.faulted
        assert fault is LinkFault.RESET or cell.corruptions > 8


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_bad_memory_and_bad_writers_are_found_out(bench: Bench, transport: str) -> None:
    async with bench.rig(transport, Policy.NEVER) as rig:
        for fault in [fault for fault in BAD if fault in faults_over(transport)]:
            cell = without_problems(await transport_cell(rig, Policy.NEVER, fault, 24, 1))
            assert cell.faulted, fault
            assert cell.undetected == 0
            assert fault not in CORRUPTING or cell.corruptions > 8, fault


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_the_same_holds_where_blocks_are_cut_anew(bench: Bench, transport: str) -> None:
    async with bench.rig(transport, Policy.NEVER, prefill_block_tokens=16) as rig:
        for fault in (TransportFault.FLIPPED, TransportFault.WRITTEN_LATE):
            cell = without_problems(await transport_cell(rig, Policy.NEVER, fault, 16, 1))
            assert cell.faulted
            assert cell.undetected == 0
        cell = without_problems(await process_cell(rig, Policy.NEVER, PrefillStep.MID_WRITE, Signal.KILL, 0))
        assert cell.outcomes[0].ending is Ending.ERROR, "the fault had no effect"


async def test_lost_and_doubled_calls(bench: Bench) -> None:
    async with bench.rig("shm", proxied=True) as rig:
        for method, fault in (
            ("Handshake", RpcFault.RESPONSE_LOST),
            ("Run", RpcFault.RESPONSE_LOST),
            ("Run", RpcFault.DUPLICATED),
            ("Generate", RpcFault.RESPONSE_LOST),
        ):
            cell = without_problems(await rpc_cell(rig, Policy.AUTO, method, fault, 8, 1))
            assert cell.faulted, (method, fault)
        without_problems(await info_cell(rig, RpcFault.RESPONSE_LOST))


async def test_blocks_whose_writer_cannot_be_shut_out_are_kept_until_it_has_stopped(bench: Bench) -> None:
    async with bench.rig("shm", Policy.NEVER, fences=False) as rig:
        for number, signal_ in enumerate((Signal.STOP_CONT, Signal.STOP_KILL)):
            cell = without_problems(await process_cell(rig, Policy.NEVER, PrefillStep.MID_WRITE, signal_, number))
            assert cell.outcomes[0].ending is Ending.ERROR, "the fault had no effect"
    async with bench.rig("shm", proxied=True, fences=False) as rig:
        cell = without_problems(await rpc_cell(rig, Policy.AUTO, "Release", RpcFault.REQUEST_LOST, 8, 1))
        assert cell.faulted


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_healthy_blocks_raise_no_alarm(zygote: Zygote, transport: str) -> None:
    moved = await move_blocks(zygote, transport, 8192)
    assert (moved.alarms, moved.wrong) == (0, 0)
    assert moved.blocks >= 8192


# -- what the harness is worth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_worker_that_verifies_nothing_is_found_out(bench: Bench, transport: str) -> None:
    """The decode worker takes bytes as they come: a cell that is clean elsewhere must be full of problems. Swapped blocks would
    not do: attention does not care in which order it meets keys that carry their positions, so the tokens stay the same."""
    async with bench.rig(transport, sabotage=True) as rig:
        cell = await transport_cell(rig, Policy.AUTO, TransportFault.TORN, 24, 1)
    assert any(outcome.ending is Ending.WRONG for outcome in cell.outcomes), "other KV, and nobody noticed other tokens"
    assert cell.undetected > 8
    assert any("touched" in problem for problem in cell.problems)


async def test_blocks_that_are_freed_too_early_are_seen(bench: Bench) -> None:
    async with bench.rig("shm", Policy.NEVER) as rig:
        rig.fences = False  # and yet its decode worker frees the blocks of whom it shuts out
        cell = await process_cell(rig, Policy.NEVER, PrefillStep.MID_WRITE, Signal.STOP_CONT, 0)
    assert any("freed while a stopped process" in problem for problem in cell.problems)


async def test_what_is_held_is_seen(bench: Bench) -> None:
    async with bench.rig("shm") as rig:
        started = asyncio.Event()
        running = asyncio.ensure_future(rig.ask(rig.request(prompt_of(1), max_tokens=400), started=started))
        await started.wait()
        (held,) = await rig.leaks(timeout_s=0.0)
        assert "blocks" in held
        assert "1 requests_running" in held
        assert (await running).ending is Ending.EXACT
        assert await rig.leaks() == []


async def test_the_oracle_and_the_prompts_can_tell_requests_apart(bench: Bench) -> None:
    async with bench.rig("tcp") as rig:
        said = [await bench.oracle.tokens(rig.request(prompt_of(number), max_tokens=6)) for number in range(12)]
        assert len(set(said)) == 12
        wrong = rig.request(prompt_of(1), max_tokens=6)
        rig.oracle._known[(wrong.prompt_token_ids, wrong.sampling)] = said[2]
        assert (await rig.ask(wrong)).ending is Ending.WRONG
