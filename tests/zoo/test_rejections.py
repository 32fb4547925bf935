"""KV that is refused: what happens to the request, to the blocks on both sides, and to those who come after."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from common.codec import ticket_from_wire, ticket_to_wire
from common.config import DecodeConfig, PrefillConfig, TransferConfig
from common.errors import (
    DeadlineExceeded,
    DigestMismatch,
    EngineFailure,
    HandoffError,
    HandshakeRefused,
    InvalidRequest,
    ModelNotFound,
    NoWorkerAvailable,
    PdserveError,
    RequestCancelled,
    SealMismatch,
    TicketRefused,
    TransferBroken,
    TransferTimeout,
    WorkerLost,
)
from common.rpc import error_from_rpc
from common.wire import worker_pb2
from kvtransfer.digest import piece_digest
from kvtransfer.state import Arrival, IncomingTransfer
from kvtransfer.ticket import derive_secret, mint
from kvtransfer.transports.base import Piece, SenderLink, Written
from support.planted_links import Place, Plants, Spoiler
from support.tiny_models import make_tiny_model
from support.workers import TOKEN, Workers, request, running_workers
from support.zoo import (
    AUTO,
    BLOCK,
    ENGINE,
    REMOTE,
    UNCACHED,
    Oracle,
    Stall,
    another_decode,
    another_prefill,
    assert_no_ghosts,
    audit_cache,
    ending,
    for_ever,
    is_free,
    prompt_of,
    until,
    until_free,
    within,
)

# -- the answer after a rejected load ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_groups", [1, 2])
@pytest.mark.parametrize("num_prefill", [1, 2], ids=["computed here", "computed by another"])
async def test_z03_each_block_in_turn_is_rejected_and_the_prompt_computed_again(
    model_path: Path, oracle: Oracle, plants: Plants, num_prefill: int, layer_groups: int
) -> None:
    """Z03, vllm#49250. There: after a rejected load the recomputation read stale positions and the text was wrong.
    Ours: whichever block is rejected, with or without overlap, the request starts over from nothing, in blocks that no failed
    writer owns, and gives the tokens of a run alone; what is cached afterwards is what its name says."""
    prefill = PrefillConfig(chunk_tokens=32, layer_groups=layer_groups)
    local = running_workers(model_path, engine=ENGINE, decode=AUTO, num_prefill=0)
    settings: dict[str, Any] = {"engine": ENGINE, "decode": AUTO, "prefill": prefill, "num_prefill": num_prefill}
    async with running_workers(model_path, **settings) as workers, local as honest:
        work = [request(prompt_of(5 * BLOCK + 7, 20 + block), request_id=f"k{block}", max_tokens=6) for block in range(6)]
        for block, item in enumerate(work):
            spoiler = Spoiler(plants, item.request_id, block)
            answer = await workers.generate(item)
            assert spoiler.spoiled, block
            assert oracle.agrees(item, answer), block
            assert answer.started is not None
            assert answer.started.timings.prefill_worker == ("" if num_prefill == 1 else "tiny/prefill/1")
            assert len(plants.nonces_of(item.request_id)) == num_prefill
        plants.arriving = None
        await workers.assert_nothing_leaks()
        await audit_cache(workers, honest, work)
        for item in work:
            assert oracle.agrees(item, await workers.generate(item))
        await workers.assert_nothing_leaks()


async def test_z03_without_digests_the_answer_is_wrong(
    model_path: Path, oracle: Oracle, plants: Plants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Z03, without the guard: the same spoiled block is believed, and the test above would see it."""
    arrived = IncomingTransfer.piece_arrived
    monkeypatch.setattr(
        IncomingTransfer, "piece_arrived", lambda transfer, name, digest, ok: arrived(transfer, name, digest, True)
    )
    async with running_workers(model_path, engine=ENGINE, decode=AUTO) as workers:
        work = request(prompt_of(5 * BLOCK + 7, 20), max_tokens=6)
        Spoiler(plants, work.request_id, 2)
        assert not oracle.agrees(work, await workers.generate(work))


# -- unequal workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decode", "prefill"),
    [({"tensor_parallel": 2}, {"tensor_parallel": 2}), ({"pipeline_parallel": 2}, {})],
    ids=["tensor", "pipeline"],
)
async def test_z23_a_rejected_hand_off_takes_no_rank_down(
    model_path: Path, oracle: Oracle, plants: Plants, decode: dict[str, int], prefill: dict[str, int]
) -> None:
    """Z23, sglang#16903. There: each rank polled its transfers, one failed poll cascaded over all ranks, and the decode worker
    had to be restarted. Ours: one process of a worker knows of transfers, so a rejected one is one request's error; the ranks go
    on, the same prompt is right when it is asked for again, and so is another."""
    pools = {"decode": REMOTE.model_copy(update=decode), "prefill": PrefillConfig(**prefill)}
    async with running_workers(model_path, engine=ENGINE, **pools) as workers:
        before = [list((await workers.info(ref.address)).rank_pids) for ref in (workers.decode_ref, *workers.prefill_refs)]
        assert [len(pids) for pids in before] == [1, len(prefill)]
        work = request(prompt_of(5 * BLOCK + 7, 40), request_id="spoiled", max_tokens=6)
        spoiler = Spoiler(plants, work.request_id, 2)
        assert isinstance(await ending(workers, work, workers.prefill_refs), DigestMismatch)
        assert spoiler.spoiled
        plants.arriving = None
        for number in (40, 41):
            item = request(prompt_of(5 * BLOCK + 7, number), max_tokens=6)
            assert oracle.agrees(item, await workers.generate(item))
        await workers.assert_nothing_leaks()
        after = [list((await workers.info(ref.address)).rank_pids) for ref in (workers.decode_ref, *workers.prefill_refs)]
        assert after == before


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=6)


UNEQUAL = {
    "block_tokens": {"block_tokens": 24},  # exact attention walks over them in other tiles; 8 would be cut anew
    "dtype": {"dtype": "bfloat16"},
    "exact": {"exact": False},
    "model_digest": {},
}


@pytest.mark.parametrize("field", UNEQUAL)
async def test_z06_unequal_workers_are_refused_by_name(model_path: Path, other_model: Path, oracle: Oracle, field: str) -> None:
    """Z06, vllm#23587. There: a prefill and a decode worker with different attention backends crashed the server.
    Ours: the handshake refuses and names the field; both go on, the prompt is computed elsewhere, or here, and is right."""
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE) as workers:
        spec = workers.prefill[0]._spec
        model = spec.model.model_copy(update={"engine": ENGINE.model_copy(update=UNEQUAL[field])})
        path = str(other_model if field == "model_digest" else model_path)
        async with another_prefill(workers, worker_id="tiny/prefill/1", model=model, model_path=path) as (_, other):
            work = request(prompt_of(70, 30), max_tokens=6)
            refused = await ending(workers, work, [other])
            assert isinstance(refused, HandshakeRefused)
            assert field in refused.message
            answer = await workers.generate(work, prefill=[other, *workers.prefill_refs])
            assert oracle.agrees(work, answer)
            assert answer.started is not None
            assert answer.started.timings.prefill_worker == "tiny/prefill/0"
            assert (await workers.info(other.address)).state == "ready"
            assert await is_free(workers, other)
            workers.decode._scheduler._config = AUTO
            alone = request(prompt_of(70, 31), max_tokens=6)
            answer = await workers.generate(alone, prefill=[other])
            assert oracle.agrees(alone, answer)
            assert answer.started is not None
            assert answer.started.timings.prefill_worker == ""
        await workers.assert_nothing_leaks()


# -- every way to reject frees the prefill worker ----------------------------------------------------------------------

LONG = 50 * BLOCK
SMALL_CHUNKS = PrefillConfig(chunk_tokens=BLOCK, layer_groups=1)
Reject = Callable[[Workers, Plants, Any], None]


def spoiled(workers: Workers, plants: Plants, call: Any) -> None:
    Spoiler(plants, "r", 4)


def lying_table(workers: Workers, plants: Plants, call: Any) -> None:
    plants.arriving = lambda nonce, written, place: [item._replace(digest=bytes(16)) for item in written]


def foreign_block(workers: Workers, plants: Plants, call: Any) -> None:
    plants.arriving = lambda nonce, written, place: [item._replace(name=item.name._replace(logical_block=99)) for item in written]


def two_contents(workers: Workers, plants: Plants, call: Any) -> None:
    """The first block is announced again, with other bytes."""
    seen: list[Written] = []

    def again(nonce: bytes, written: Sequence[Written], place: Place) -> Sequence[Written]:
        seen.extend(written)
        return [*written, seen[0]._replace(digest=bytes(16))]

    plants.arriving = again


def link_breaks(workers: Workers, plants: Plants, call: Any) -> None:
    async def breaks(link: SenderLink, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        link.drop(TransferBroken("planted"))
        return await link.write(nonce, pieces, stop)

    plants.write = breaks


def client_leaves(workers: Workers, plants: Plants, call: Any) -> None:
    call.cancel()


def decode_stops(workers: Workers, plants: Plants, call: Any) -> None:
    asyncio.get_running_loop().create_task(workers.decode.stop(0.0))


def decode_engine_fails(workers: Workers, plants: Plants, call: Any) -> None:
    def broken() -> None:
        raise RuntimeError("planted")

    workers.decode._loop.post(broken)


MIDWAY: dict[str, tuple[Reject, tuple[type[BaseException], ...]]] = {
    "a block is not what was sent": (spoiled, (DigestMismatch,)),
    "a piece's digest is wrong": (lying_table, (DigestMismatch,)),
    "a block is not in the ticket": (foreign_block, (TicketRefused,)),
    "a block comes twice, differently": (two_contents, (DigestMismatch,)),
    "the link breaks": (link_breaks, (TransferBroken,)),
    "the client leaves": (client_leaves, (asyncio.CancelledError,)),
    "the decode worker stops": (decode_stops, (WorkerLost, RequestCancelled, asyncio.CancelledError)),
    "the decode engine fails": (decode_engine_fails, (EngineFailure,)),
}


@pytest.mark.parametrize("reason", MIDWAY)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_z07_a_rejection_in_the_middle_frees_the_prefill_worker(
    model_path: Path, plants: Plants, monkeypatch: pytest.MonkeyPatch, transport: str, reason: str
) -> None:
    """Z07, vllm#41269. There: the decode side rejected a request before admission, and the prefill side kept them for 480 s.
    Ours: whatever makes the decode side give up, it says so; with leases and tickets that do not end, the prefill worker, whose
    engine would hold the prompt for ever, is empty within moments."""
    reject, expected = MIDWAY[reason]
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    settings: dict[str, Any] = {"engine": UNCACHED, "decode": REMOTE, "prefill": SMALL_CHUNKS, "transfer": for_ever(transport)}
    async with running_workers(model_path, **settings) as first, another_decode(first, "tiny/decode/1") as workers:
        stall = Stall(workers.prefill[0], after_steps=4)
        call = workers.open(request(prompt_of(LONG, 40)))
        reading = asyncio.ensure_future(call.read())
        await until(lambda: stall.stalled, "four chunks are computed")
        await until(lambda: workers.decode._handoff.leases().open == 1, "the transfer is open")
        reject(workers, plants, call)
        stall.steps_left = 2  # something more arrives
        workers.prefill[0]._loop.post(lambda: None)
        await until_free(first, first.prefill_refs[0])
        with pytest.raises((PdserveError, *expected)) as ended:
            await within(typed(reading))
        assert isinstance(ended.value, expected)
        assert workers.prefill[0]._scheduler.totals.computed_tokens <= 6 * BLOCK
        stall.release()
        plants.arriving = plants.write = None
        await within(first.generate(request(prompt_of(70, 41))))
        await first.assert_nothing_leaks()
        await assert_no_ghosts(first)


async def typed(reading: asyncio.Future[Any]) -> Any:
    try:
        return await reading
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def test_z07_untold_it_holds_on(model_path: Path, plants: Plants) -> None:
    """Z07, without the guard: when nothing of the rejection reaches the prefill worker, it keeps its blocks, as the test above
    would see."""
    tasks = []

    async def deaf(call: Any, message: Any, timeout_s: float) -> Any:
        tasks.append(asyncio.ensure_future(call(message, timeout_s)))
        return await asyncio.shield(tasks[0])

    async def lost(call: Any, message: Any, timeout_s: float) -> Any:
        raise WorkerLost("planted")

    plants.run, plants.release = deaf, lost
    async with running_workers(
        model_path, engine=UNCACHED, decode=REMOTE, prefill=SMALL_CHUNKS, transfer=for_ever("tcp")
    ) as workers:
        stall = Stall(workers.prefill[0], after_steps=4)
        Spoiler(plants, "r", 0)
        assert isinstance(await ending(workers, request(prompt_of(LONG, 40))), DigestMismatch)
        await until_free(workers, workers.decode_ref)
        await asyncio.sleep(0.5)
        assert not await is_free(workers, workers.prefill_refs[0])
        tasks[0].cancel()
        await until_free(workers, workers.prefill_refs[0])
        stall.release()


Account = worker_pb2.PrefillReply


def _flip(account: Account) -> None:
    account.digests[1].digest = bytes(16)


def _forget(account: Account) -> None:
    del account.digests[2]


def _add(account: Account) -> None:
    account.digests.add(logical_block=99, digest=bytes(16))


def _rename(account: Account) -> None:
    account.nonce = bytes(16)


def _shorten(account: Account) -> None:
    account.num_tokens -= 1


def _no_token(account: Account) -> None:
    del account.first_tokens[:]


def _two_tokens(account: Account) -> None:
    account.first_tokens.extend(account.first_tokens[:1])


def _logprobs(account: Account) -> None:
    account.prompt_logprobs.add()


ACCOUNTS: dict[str, Callable[[Account], None]] = {
    "another digest": _flip,
    "a block less": _forget,
    "a block more": _add,
    "of another transfer": _rename,
    "of a shorter prompt": _shorten,
    "no first token": _no_token,
    "two first tokens": _two_tokens,
    "log-probabilities that nobody asked for": _logprobs,
}


async def test_z07_every_wrong_account_is_rejected_and_frees_both_sides(model_path: Path, oracle: Oracle, plants: Plants) -> None:
    """Z07 (vllm#41269) and Z20 (sglang#30233). There: what one side rejected stayed with the other; KV of another length was used
    Ours: an account that differs in anything from what was asked for is a SealMismatch, and both pools are whole again."""
    change: list[Callable[[Account], None]] = []

    async def altered(call: Any, message: Any, timeout_s: float) -> Any:
        account = await call(message, timeout_s)
        change[0](account)
        return account

    plants.run = altered
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE, transfer=for_ever()) as workers:
        work = request(prompt_of(70, 42), max_tokens=6)
        for name, one in ACCOUNTS.items():
            change[:] = [one]
            assert isinstance(await ending(workers, work), SealMismatch), name
            for ref in (workers.decode_ref, *workers.prefill_refs):
                await until_free(workers, ref)
            assert workers.decode._host.engine.blocks.num_cached == 0, name
        plants.run = None
        assert oracle.agrees(work, await workers.generate(work))
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)


async def test_z07_what_is_refused_at_the_door_is_never_heard_of_by_a_prefill_worker(model_path: Path, plants: Plants) -> None:
    """Z07, vllm#41269. There: a request was prefilled first and rejected by the decode side afterwards.
    Ours: the decode worker is asked first; what it does not admit, no prefill worker is told of."""
    never = DecodeConfig(local_prefill="never", max_waiting=0)
    async with running_workers(model_path, engine=ENGINE, decode=never) as workers:
        prompt = prompt_of(70, 43)
        refused: list[tuple[type[PdserveError], dict[str, Any]]] = [
            (ModelNotFound, {"model": "other"}),
            (InvalidRequest, {"max_tokens": 5000}),
            (InvalidRequest, {"logit_bias": ((100_000, 1.0),)}),
            (PdserveError, {}),
        ]
        for kind, change in refused:
            assert isinstance(await ending(workers, request(prompt, **change)), kind)
        workers.decode._scheduler._config = REMOTE
        assert isinstance(await ending(workers, request(prompt), []), NoWorkerAvailable)
        assert await workers.decode._host.drain(1.0)
        assert isinstance(await ending(workers, request(prompt)), NoWorkerAvailable)
        assert not plants.runs
        assert workers.prefill[0]._scheduler.totals.computed_tokens == 0
        await workers.assert_nothing_leaks()


# -- completion is a set -----------------------------------------------------------------------------------------------


async def _piece_missing(link: SenderLink, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
    """The account holds a block that was never posted."""
    digests = await link.write(nonce, [*pieces[:2], *pieces[3:]], stop)
    return [*digests[:2], piece_digest(pieces[2].source, nonce, *pieces[2].name), *digests[2:]]


async def _piece_doubled(link: SenderLink, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
    """As many as there should be, but one of them twice and one not at all."""
    digests = await link.write(nonce, [*pieces[:2], pieces[1], *pieces[3:]], stop)
    return [*digests[:2], piece_digest(pieces[2].source, nonce, *pieces[2].name), *digests[3:]]


async def _write_fails(link: SenderLink, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
    await link.write(nonce, pieces[:2], stop)
    raise TransferBroken("planted: this one cannot be posted")


async def _write_hangs(link: SenderLink, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
    digests = await link.write(nonce, pieces[:2], stop)
    while not stop():
        await asyncio.sleep(0.01)
    return digests


INCOMPLETE = {
    "never posted": (_piece_missing, HandoffError),
    "another one twice": (_piece_doubled, HandoffError),
    "fails": (_write_fails, TransferBroken),
    "hangs": (_write_hangs, (TransferTimeout, DeadlineExceeded)),
}
WHOLE = PrefillConfig(layer_groups=1)


@pytest.mark.parametrize("way", INCOMPLETE)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_z10_one_of_n_writes_is_missing(model_path: Path, oracle: Oracle, plants: Plants, transport: str, way: str) -> None:
    """Z10, vllm#50754. There: one write could not be posted, and the decode side waited for a count that was never reached.
    Ours: complete is the set of the ticket's blocks, each verified, and the ticket has a deadline: one that is missing is a typed
    error, however many others came, and the next request is served."""
    write, expected = INCOMPLETE[way]
    config = TransferConfig(transports=(transport,), ticket_ttl_s=4.0 if way == "hangs" else 300.0)
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE, prefill=WHOLE, transfer=config) as workers:
        work = request(prompt_of(5 * BLOCK, 44), max_tokens=6)
        plants.write = write
        assert isinstance(await ending(workers, work), expected)
        plants.write = None
        await workers.assert_nothing_leaks()
        assert oracle.agrees(work, await workers.generate(work))
        await workers.assert_nothing_leaks()


async def test_z10_counting_would_not_do(
    model_path: Path, oracle: Oracle, plants: Plants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Z10, without the guard: completion by number takes the doubled block for the missing one, and the answer is wrong."""
    count: Counter[bytes] = Counter()
    arrived = IncomingTransfer.piece_arrived

    def counting(transfer: IncomingTransfer, name: Any, digest: bytes, ok: bool) -> Arrival:
        count[transfer.ticket.nonce] += 1
        return arrived(transfer, name, digest, ok)

    monkeypatch.setattr(IncomingTransfer, "piece_arrived", counting)
    monkeypatch.setattr(IncomingTransfer, "pieces_arrived", lambda *_: False)  # each is counted
    monkeypatch.setattr(
        IncomingTransfer, "complete", property(lambda transfer: count[transfer.ticket.nonce] >= len(transfer.expected))
    )
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE, prefill=WHOLE) as workers:
        plants.write = _piece_doubled
        work = request(prompt_of(5 * BLOCK, 44), max_tokens=6)
        assert not oracle.agrees(work, await workers.generate(work))


# -- the length of what was computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [REMOTE, AUTO], ids=["fails", "is computed here"])
async def test_z20_a_prefill_worker_with_a_lower_limit(model_path: Path, oracle: Oracle, policy: DecodeConfig) -> None:
    """Z20, sglang#30233. There: the prefill side found the prompt too long and sent the KV of one token; the rest was garbage.
    Ours: it refuses with a typed error before it computes; nothing is decoded from anything less than the whole prompt."""
    short = ENGINE.model_copy(update={"max_model_tokens": 64})
    async with running_workers(model_path, engine=ENGINE, prefill_engine=short, decode=policy) as workers:
        work = request(prompt_of(100, 45), max_tokens=6)
        found = await ending(workers, work)
        if policy is AUTO:
            assert oracle.agrees(work, found)  # type: ignore[arg-type]
        else:
            assert isinstance(found, InvalidRequest)
            assert "64" in found.message
        assert workers.prefill[0]._scheduler.totals.computed_tokens == 0
        await workers.assert_nothing_leaks()


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without the guard"])
async def test_z20_the_kv_of_one_token(
    model_path: Path, oracle: Oracle, plants: Plants, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Z20, sglang#30233. There: the KV of one token was taken for that of the prompt.
    Ours: a prefill worker that honestly computes, sends and seals one token under this nonce is rejected by the seal's length."""

    async def one_token(call: Any, message: Any, timeout_s: float) -> Any:
        ticket = ticket_from_wire(message.ticket)
        layout = workers.decode._host.engine.layout
        short = mint(
            secret=derive_secret(TOKEN),
            layout=layout,
            request_id=ticket.request_id,
            attempt=ticket.attempt,
            decode_worker_id=ticket.decode_worker_id,
            decode_incarnation=ticket.decode_incarnation,
            prefill=workers.prefill_refs[0],
            first_block=0,
            blocks=ticket.blocks[:1],
            num_tokens=1,
            ttl_s=ticket.ttl_s,
            draw_nonce=lambda size: ticket.nonce,
        )
        asked = worker_pb2.PrefillRequest(request=message.request, ticket=ticket_to_wire(short))
        del asked.request.prompt_token_ids[1:]
        return await call(asked, timeout_s)

    plants.run = one_token
    if not guarded:
        monkeypatch.setattr(IncomingTransfer, "_complaint_about", lambda transfer, seal: None)
        monkeypatch.setattr(IncomingTransfer, "complete", property(lambda transfer: bool(transfer.verified)))
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE) as workers:
        work = request(prompt_of(5 * BLOCK, 46), max_tokens=6)
        found = await ending(workers, work)
        if guarded:
            assert isinstance(found, HandoffError)
        else:
            assert not oracle.agrees(work, found)  # type: ignore[arg-type]
        await workers.assert_nothing_leaks()


async def test_z20_a_prompt_that_was_cut_on_the_way(model_path: Path, plants: Plants) -> None:
    """Z20, sglang#30233. Ours: a request that does not have the length of its ticket is refused by the prefill worker itself."""

    async def cut(call: Any, message: Any, timeout_s: float) -> Any:
        del message.request.prompt_token_ids[1:]
        return await call(message, timeout_s)

    plants.run = cut
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE) as workers:
        assert isinstance(await ending(workers, replace(request(prompt_of(80, 47)))), TicketRefused)
        assert workers.prefill[0]._scheduler.totals.computed_tokens == 0
        await workers.assert_nothing_leaks()
