"""Workers of several processes: the same tokens at every degree of either side, and one end for all of a group.

Real rank processes, gRPC and KV links. The reference is a run alone in one process, prefilled locally.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import pytest
import torch

from common.config import DecodeConfig, EngineConfig, PrefillConfig
from common.engine.heads.heads import load_heads
from common.engine.parallel.group import RankGroup
from common.engine.parallel.model import ShareOrder
from common.errors import ConfigError, HandoffError, PdserveError, RankLost
from common.model_store import resolve
from common.types import Request, WorkerRef
from decode_worker.server import DecodeWorker
from kvtransfer.ranks.parts import rank_name
from kvtransfer.ranks.rank_senders import GroupOutgoing
from prefill_worker.server import PrefillWorker
from support.forked_ranks import forked_ranks
from support.hostile_guesses import Headstrong, install
from support.tiny_heads import make_tiny_heads
from support.tiny_models import make_tiny_model
from support.workers import Answer, Workers, patient, request, running_workers

NEW_TOKENS = 10
HEAD_DIM = 16  # of the tiny model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three KV heads: two shards have two and one of them."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3, layers=3, heads=6, kv_heads=3)


@pytest.fixture(scope="module", autouse=True)
def ranks_are_forked() -> Iterator[None]:
    with forked_ranks():
        yield


def engine(exact: bool, **changes: object) -> EngineConfig:
    return EngineConfig(**{"dtype": "float32", "exact": exact, "kv_pool_tokens": 2048, "prefix_cache": False, **changes})


def work() -> list[Request]:
    def prompt(length: int) -> list[int]:
        return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(length)).tolist()

    return [
        request(
            prompt(length),
            request_id=f"{length}",
            max_tokens=NEW_TOKENS,
            temperature=temperature,
            seed=length,
            num_choices=3 if temperature else 1,
            logprobs=20,
            prompt_logprobs=1 if length == 90 else None,
        )
        for length, temperature in ((1, 0.0), (16, 0.9), (33, 0.0), (90, 0.0), (150, 0.9))
    ]


@asynccontextmanager
async def groups(
    model_path: Path,
    decode: tuple[int, int],
    prefill: tuple[int, int] | None = None,
    *,
    exact: bool = False,
    local: bool = False,
    chunk_tokens: int = 512,
    watermark_blocks: int = 2,
    transport: str = "shm",
    num_prefill: int = 1,
    preemption: str = "recompute",
    **changes: object,
) -> AsyncIterator[Workers]:
    """Degrees are (tensor, pipeline)."""
    async with running_workers(
        model_path,
        engine=engine(exact, **{"rank_timeout_s": 120.0, **changes}),
        decode=DecodeConfig(
            tensor_parallel=decode[0],
            pipeline_parallel=decode[1],
            micro_batch_tokens=4,
            local_prefill="always" if local else "never",
            step_tokens=chunk_tokens,
            watermark_blocks=watermark_blocks,
            growth_tokens=0,
            preemption=preemption,
        ),
        prefill=PrefillConfig(
            tensor_parallel=(prefill or decode)[0],
            pipeline_parallel=(prefill or decode)[1],
            micro_batch_tokens=4,
            chunk_tokens=chunk_tokens,
        ),
        num_prefill=0 if prefill is None else num_prefill,
        transfer=patient(transport),
    ) as workers:
        refs = (workers.decode_ref, *workers.prefill_refs)
        pids = [pid for ref in refs for pid in (await workers.info(ref.address)).rank_pids]
        yield workers
    await until_gone(pids)


async def answers(workers: Workers, *, together: bool) -> list[Answer]:
    if together:
        return await workers.generate_together(work())
    return [await workers.generate(item) for item in work()]


def assert_same(found: list[Answer], expected: list[Answer], *, bitwise: bool) -> None:
    for ours, theirs, item in zip(found, expected, work(), strict=True):
        assert ours.token_ids == theirs.token_ids, item.request_id
        if bitwise:
            assert ours.logprobs == theirs.logprobs, item.request_id
            assert ours.started is not None
            assert theirs.started is not None
            assert ours.started.prompt_logprobs == theirs.started.prompt_logprobs


_references: dict[tuple[bool, int], list[Answer]] = {}


async def reference(model_path: Path, *, exact: bool, tensor: int = 1) -> list[Answer]:
    """Alone, locally, whole prompts. In exact mode the bits belong to the number of shards."""
    if (exact, tensor) not in _references:
        async with groups(model_path, (tensor, 1), exact=exact, local=True) as workers:
            _references[exact, tensor] = await answers(workers, together=False)
    return _references[exact, tensor]


def bytes_by_pair(prompt_tokens: int, giving: tuple[int, int], taking: tuple[int, int]) -> Counter[tuple[int, int]]:
    """What each rank of one side has to give each of the other, head for head: three layers, three heads, blocks of 16."""

    def owner(layer: int, head: int, degrees: tuple[int, int]) -> int:
        shards, stages = (np.array_split(np.arange(3), degree) for degree in degrees)
        (shard,) = [number for number, heads in enumerate(shards) if head in heads]
        (stage,) = [number for number, layers in enumerate(stages) if layer in layers]
        return stage * degrees[0] + shard

    head_bytes = 2 * 16 * HEAD_DIM * 4  # K and V, fp32
    found: Counter[tuple[int, int]] = Counter()
    for layer, head in itertools.product(range(3), range(3)):
        found[owner(layer, head, giving), owner(layer, head, taking)] += -(-prompt_tokens // 16) * head_bytes
    return found


async def assert_bytes_went_rank_to_rank(workers: Workers, giving: tuple[int, int], taking: tuple[int, int]) -> None:
    """By both sides' books, kept by the ranks that wrote and by those that verified. So none went through rank 0 but its own."""
    by_hand = sum((bytes_by_pair(len(item.prompt_token_ids), giving, taking) for item in work()), Counter())
    assert workers.prefill[0]._handoff._ranks.written_bytes == by_hand
    received = await workers.decode._handoff._ranks.received_bytes()
    names = [rank_name("tiny/prefill/0", giver) for giver in range(giving[0] * giving[1])]
    assert set().union(*received) == set(names)
    assert {
        (giver, taker): found[name] for taker, found in enumerate(received) for giver, name in enumerate(names) if name in found
    } == by_hand


@pytest.mark.parametrize(
    ("decode", "prefill", "transport"),
    [((2, 1), (1, 2), "tcp"), ((1, 1), (2, 1), "shm"), ((2, 2), (1, 1), "shm"), ((2, 1), (1, 2), "nixl")],
    ids=str,
)
async def test_tokens_are_those_of_one_process(
    model_path: Path, decode: tuple[int, int], prefill: tuple[int, int], transport: str
) -> None:
    """Remote prefill between groups of all kinds: whatever a rank has computed is what another degree's ranks go on with, and it
    went there directly."""
    if transport == "nixl":
        pytest.importorskip("nixl_cu13")
    expected = await reference(model_path, exact=False)
    async with groups(model_path, decode, prefill, transport=transport) as workers:
        found = await answers(workers, together=False)
        assert_same(found, expected, bitwise=False)
        assert all(answer.started and answer.started.timings.transport == transport for answer in found)
        await assert_bytes_went_rank_to_rank(workers, prefill, decode)
        info = await workers.info(workers.decode_ref.address)
        assert (info.tensor_parallel, info.pipeline_parallel, len(info.rank_pids)) == (*decode, decode[0] * decode[1] - 1)
        await workers.assert_nothing_leaks()


def by_gloo(patch: pytest.MonkeyPatch) -> None:
    """Ranks exchange sums and rows as those on GPUs do, but for who carries them."""
    start = RankGroup.start

    def start_by_gloo(order: ShareOrder, *arguments: Any, **options: Any) -> RankGroup:
        return start(replace(order, backend="gloo"), *arguments, **options)

    patch.setattr(RankGroup, "start", start_by_gloo)


def rendezvous_folders() -> set[Path]:
    return set(Path(gettempdir()).glob("pdserve-ranks-*"))


async def test_ranks_that_exchange_as_gpus_do_say_the_same(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what ranks say that exchange over sockets: the order of sums is ours. They meet in a folder, which goes with
    them."""
    expected = await reference(model_path, exact=True, tensor=2)
    by_gloo(monkeypatch)
    before = rendezvous_folders()
    async with groups(model_path, (2, 2), (2, 1), exact=True, chunk_tokens=64) as workers:
        assert len(rendezvous_folders() - before) == 2
        assert_same(await answers(workers, together=True), expected, bitwise=True)
        await workers.assert_nothing_leaks()
    assert not rendezvous_folders() - before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_lost_rank_ends_a_group_that_exchanges_as_gpus_do(
    model_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    by_gloo(monkeypatch)
    async with groups(model_path, (2, 2), local=True, rank_timeout_s=4.0) as workers:
        pids = list((await workers.info(workers.decode_ref.address)).rank_pids)
        call = asyncio.ensure_future(workers.generate(request([5, 6, 7], max_tokens=1800)))
        while workers.decode._scheduler.totals.generated_tokens < 5:
            await asyncio.sleep(0.002)
        os.kill(pids[-1], number)
        with pytest.raises(RankLost):
            await call
        await until_lost(workers.decode, pids)


@pytest.mark.parametrize(
    ("decode", "prefill", "chunk_tokens"),
    [((2, 1), (2, 1), 16), ((1, 1), (1, 2), 64)],
    ids=str,
)
async def test_exact_mode_holds_at_every_degree(
    model_path: Path, decode: tuple[int, int], prefill: tuple[int, int] | None, chunk_tokens: int
) -> None:
    """Bitwise: in a batch, in chunks, over a hand-off, at any number of stages."""
    expected = await reference(model_path, exact=True, tensor=decode[0])
    assert_same(expected, await reference(model_path, exact=True), bitwise=False)
    local = prefill is None
    async with groups(model_path, decode, prefill, exact=True, local=local, chunk_tokens=chunk_tokens) as workers:
        assert_same(await answers(workers, together=True), expected, bitwise=True)
        await workers.assert_nothing_leaks()


async def test_prefix_hits_and_preemption_keep_the_bits(model_path: Path) -> None:
    expected = await reference(model_path, exact=True, tensor=2)
    async with groups(model_path, (2, 1), (2, 1), exact=True, prefix_cache=True) as workers:
        for _ in range(2):
            assert_same(await answers(workers, together=False), expected, bitwise=True)
        assert workers.decode._scheduler.totals.prefix_hits > 0
    # Less room than the three choices of the longest prompt take: they preempt each other, however late other prompts come.
    async with groups(model_path, (2, 1), exact=True, local=True, watermark_blocks=0, kv_pool_tokens=176) as workers:
        assert_same(await answers(workers, together=True), expected, bitwise=True)
        assert workers.decode._scheduler.totals.preemptions > 0, "the pool was large enough: nothing was tested"
        await workers.assert_nothing_leaks()


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2), (2, 2)], ids=str)
async def test_what_is_preempted_comes_back_on_every_rank(model_path: Path, degrees: tuple[int, int]) -> None:
    """Each rank has put out its own part of a block, and brings it back into another one. With one shard, to the bit."""
    expected = await reference(model_path, exact=True, tensor=degrees[0])
    async with groups(
        model_path, degrees, exact=True, local=True, watermark_blocks=0, kv_pool_tokens=176, preemption="swap"
    ) as workers:
        assert_same(await answers(workers, together=True), expected, bitwise=True)
        totals = workers.decode._scheduler.totals
        assert (totals.swapped_out > 0, totals.swapped_in > 0) == (True, True), "the pool was large enough"
        await workers.assert_nothing_leaks()


async def test_heads_read_the_rows_of_the_last_stage(model_path: Path, tmp_path: Path) -> None:
    """Whichever rank computes them, they are those of one process: up to the order of sums, and to bf16 on the way."""
    digest = resolve(str(model_path)).digest()
    path = make_tiny_heads(tmp_path / "heads", model_path)
    heads = load_heads(path, model_path, model_digest=digest, device=torch.device("cpu"), dtype=torch.float32)
    expected = await reference(model_path, exact=False)
    begun = []
    for decode, prefill in (((1, 1), None), ((1, 2), None), ((2, 2), (1, 2))):
        async with groups(model_path, decode, prefill, local=prefill is None) as workers:
            scheduler = workers.decode._scheduler
            headstrong = Headstrong(heads)
            install(scheduler, headstrong)
            assert_same(await answers(workers, together=True), expected, bitwise=False)
            assert scheduler.totals.drafted_tokens > 0
            begun.append(headstrong.begun)
    for rows in begun[1:]:
        for name, row in begun[0].items():
            size = float(row.values.std())
            torch.testing.assert_close(rows[name].values.float(), row.values.float(), rtol=0.02, atol=0.02 * size)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes between opening and reading
        return False
    return state != "Z"


async def until_gone(pids: list[int]) -> None:
    async with asyncio.timeout(120):
        while any(alive(pid) for pid in pids):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_lost_rank_ends_its_group(
    model_path: Path, number: signal.Signals, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker says that it failed, its requests end in RankLost, and no process is left, not even a stopped one."""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    degree = (2, 2) if busy and number is signal.SIGSTOP else (2, 1)
    patience_s = 4.0 if number is signal.SIGSTOP else 60.0  # a stopped rank is noticed by its silence alone
    async with groups(model_path, degree, local=True, rank_timeout_s=patience_s) as workers:
        pids = list((await workers.info(workers.decode_ref.address)).rank_pids)
        assert len(pids) == degree[0] * degree[1] - 1
        call = None
        if busy:
            call = asyncio.ensure_future(workers.generate(request([5, 6, 7], max_tokens=1800)))
            while workers.decode._scheduler.totals.generated_tokens < 5:
                await asyncio.sleep(0.002)
        os.kill(pids[-1], number)
        if call is not None:
            with pytest.raises(RankLost):
                await call
        async with asyncio.timeout(120):
            await workers.decode.wait_failed()
        await until_gone(pids)
        with pytest.raises(PdserveError) as caught:
            await workers.generate(request([5, 6, 7]))
        assert caught.value.http_status == 503


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("lost", [0, -1], ids=["in the middle", "at the end"])
async def test_a_rank_that_is_lost_while_two_steps_are_under_way_ends_its_group(
    model_path: Path, number: signal.Signals, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps follow each other without a gap when it happens."""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    patience_s = 4.0 if number is signal.SIGSTOP else 60.0
    async with groups(model_path, (1, 3), local=True, rank_timeout_s=patience_s) as workers:
        pids = list((await workers.info(workers.decode_ref.address)).rank_pids)
        calls = [asyncio.ensure_future(workers.generate(request([5, 6, first], max_tokens=1800))) for first in range(7, 11)]
        while workers.decode._scheduler.totals.steps_ahead < 10:
            await asyncio.sleep(0.002)
        os.kill(pids[lost], number)
        for call in calls:
            with pytest.raises(RankLost):
                await call
        await until_lost(workers.decode, pids)


@dataclass
class Held:
    """The first hand-off stops where its first chunk was pushed, until it may go on."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        push = GroupOutgoing.push_prompt

        async def push_and_wait(
            outgoing: GroupOutgoing, logical: range, blocks: Sequence[int], layers: tuple[int, int] | None = None
        ) -> None:
            await push(outgoing, logical, blocks, layers)
            self.begun.set()
            await self.go_on.wait()

        patch.setattr(GroupOutgoing, "push_prompt", push_and_wait)


async def until_lost(worker: PrefillWorker | DecodeWorker, pids: Sequence[int]) -> None:
    async with asyncio.timeout(120):
        assert "RankLost" in await worker.wait_failed()
    await until_gone(list(pids))


async def until_free(workers: Workers, ref: WorkerRef) -> None:
    """All blocks of the worker are, and nothing is leased."""
    async with asyncio.timeout(120):
        while True:
            info = await workers.info(ref.address)
            if info.blocks_free == info.blocks_total and not (
                info.blocks_in_transfer or info.leases_open or info.requests_running
            ):
                return
            await asyncio.sleep(0.02)


async def test_a_prefill_rank_that_is_killed_in_a_hand_off_fails_it_as_one(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request ends in a typed error, nothing is left of it, and the same request is served by another group."""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    held, item = Held(), work()[-1]
    expected = (await reference(model_path, exact=False))[-1]
    held.plant(monkeypatch)
    async with groups(model_path, (2, 1), (1, 2), chunk_tokens=16, num_prefill=2) as workers:
        pids = list((await workers.info(workers.prefill_refs[0].address)).rank_pids)
        call = asyncio.ensure_future(workers.generate(item, prefill=workers.prefill_refs[:1]))
        async with asyncio.timeout(120):
            await held.begun.wait()
        os.kill(pids[-1], signal.SIGKILL)
        await until_lost(workers.prefill[0], pids)
        held.go_on.set()
        with pytest.raises(PdserveError) as caught:
            await call
        assert isinstance(caught.value, RankLost | HandoffError)
        await until_free(workers, workers.decode_ref)
        again = await workers.generate(item, prefill=workers.prefill_refs[1:])
        assert again.token_ids == expected.token_ids
        await until_free(workers, workers.decode_ref)
        await until_free(workers, workers.prefill_refs[1])


async def test_a_decode_rank_that_is_killed_in_a_hand_off_fails_it_as_one(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill worker's ranks let go of everything, and its processes live on."""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    held = Held()
    held.plant(monkeypatch)
    async with groups(model_path, (1, 2), (2, 1), chunk_tokens=16, transport="tcp") as workers:
        pids = list((await workers.info(workers.decode_ref.address)).rank_pids)
        call = asyncio.ensure_future(workers.generate(work()[-1]))
        async with asyncio.timeout(120):
            await held.begun.wait()
        os.kill(pids[-1], signal.SIGKILL)
        await until_lost(workers.decode, pids)
        held.go_on.set()
        with pytest.raises(PdserveError) as caught:
            await call
        assert isinstance(caught.value, RankLost | HandoffError)
        await until_free(workers, workers.prefill_refs[0])
        assert all(alive(pid) for pid in (await workers.info(workers.prefill_refs[0].address)).rank_pids)


async def test_what_cannot_be_divided_is_refused_by_name(model_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        async with groups(model_path, (4, 1), local=True):
            pass
    assert caught.value.param == "tensor_parallel"


async def test_a_killed_worker_leaves_no_ranks(model_path: Path) -> None:
    """Not even one that is stopped and cannot see that a socket was closed."""
    root = Path(__file__).parents[2]
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "support.lone_worker",
        str(model_path),
        "3",
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
    )
    try:
        assert worker.stdout is not None
        async with asyncio.timeout(180):  # three processes that import torch
            line = await worker.stdout.readline()
        pids = [int(pid) for pid in line.split()]
        assert [alive(pid) for pid in pids] == [True, True]
        os.kill(pids[0], signal.SIGSTOP)
    finally:
        worker.kill()
        await worker.communicate()
    await until_gone(pids)
