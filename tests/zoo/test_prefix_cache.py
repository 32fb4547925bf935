"""Reused KV: what is found in a cache is what would have been computed, and belongs to the tenant that asks."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.blocks
from common.blocks import next_hash, root_hash
from common.codec import request_from_wire
from common.errors import DigestMismatch
from common.types import Request
from decode_worker.beginnings import Beginnings
from decode_worker.generation import Choice
from decode_worker.scheduler import DecodeScheduler
from support.planted_links import Plants, Spoiler
from support.workers import request, running_workers
from support.zoo import AUTO, BLOCK, ENGINE, REMOTE, UNCACHED, Oracle, audit_cache, ending, prompt_of, until, until_free

SIDES = {"decode": (ENGINE, UNCACHED), "prefill": (UNCACHED, ENGINE), "both": (ENGINE, ENGINE)}


@pytest.mark.parametrize("side", SIDES)
async def test_z02_a_prompt_that_is_cached_as_a_whole(model_path: Path, oracle: Oracle, side: str) -> None:
    """Z02, vllm#52617. There: a full remote hit was reported and the output differed at token 0 (N tokens loaded, not N-1).
    Ours: a full hit gives the tokens of a run alone, at every length around a block border, on either side and on both; the last
    token is computed, never loaded."""
    decode, prefill = SIDES[side]
    async with running_workers(model_path, engine=decode, prefill_engine=prefill, decode=REMOTE) as workers:
        for length in (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK, 5 * BLOCK):
            work = request(prompt_of(length, 5), max_tokens=6)
            for cached_tokens in (0, (length - 1) // BLOCK * BLOCK):
                answer = await workers.generate(work)
                assert oracle.agrees(work, answer), (length, cached_tokens)
                assert answer.started is not None
                assert answer.started.cached_tokens == cached_tokens, length
        await workers.assert_nothing_leaks()


# -- failed loads ------------------------------------------------------------------------------------------------------

SHARED = prompt_of(4 * BLOCK, 6)


def sharers() -> list[Request]:
    return [request([*SHARED, *prompt_of(20, 7 + index)], request_id=f"s{index}", max_tokens=6) for index in range(3)]


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without the guard"])
async def test_z04_a_failed_load_leaves_nothing_to_be_found(
    model_path: Path, oracle: Oracle, plants: Plants, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Z04, vllm#26813. There: blocks of a failed load could stay findable.
    Ours: the prefix cache never holds a block of a load that was not verified."""
    if not guarded:

        def keep(scheduler: DecodeScheduler, choice: Choice) -> None:
            choice.sequence.advance(choice.sequence.remaining, scheduler._blocks)
            scheduler._blocks.release(choice.sequence.detach())

        monkeypatch.setattr(DecodeScheduler, "_quarantine", keep)
        monkeypatch.setattr(DecodeScheduler, "drained", lambda scheduler, blocks: None)
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE, transports=("shm",)) as workers:
        work = sharers()[0]
        spoiler = Spoiler(plants, work.request_id, 1)
        assert isinstance(await ending(workers, work), DigestMismatch)
        assert spoiler.spoiled
        plants.arriving = None
        await until_free(workers, workers.decode_ref)
        assert (workers.decode._host.engine.blocks.num_cached == 0) is guarded
        answer = await workers.generate(work)
        assert oracle.agrees(work, answer) is guarded
        await workers.assert_nothing_leaks()


@pytest.mark.parametrize("block", [0, 2, 4])
@pytest.mark.parametrize("policy", [REMOTE, AUTO], ids=["fails", "is computed again"])
@pytest.mark.parametrize("together", [True, False], ids=["", "two wait for the first"])
async def test_z04_one_of_three_sharers_fails(
    model_path: Path,
    oracle: Oracle,
    plants: Plants,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    policy: Any,
    together: bool,
) -> None:
    """Z04, vllm#26813. There: only the first of the requests that shared a failed block was rolled back.
    Ours: three requests with one prefix are on their way together and one load fails, or the one that the others wait for; each
    of the others is right, the failed one is computed again or ends in a typed error, and every block that can be found later has
    the bytes that its name says."""
    if together:
        monkeypatch.setattr(Beginnings, "is_worth_waiting", lambda beginnings, choice: False)
    failing = 1 if together else 0
    local = running_workers(model_path, engine=ENGINE, decode=AUTO, num_prefill=0)
    async with running_workers(model_path, engine=ENGINE, decode=policy) as workers, local as honest:
        work = sharers()
        spoiler = Spoiler(plants, f"s{failing}", block)
        endings = [asyncio.ensure_future(ending(workers, work[0]))]
        if not together:
            await until(lambda: bool(plants.nonces_of("s0")), "the first is on its way")
        endings += [asyncio.ensure_future(ending(workers, item)) for item in work[1:]]
        ends = await asyncio.gather(*endings)
        if policy is AUTO:
            assert all(map(oracle.agrees, work, ends))  # type: ignore[arg-type]
        else:
            assert isinstance(ends[failing], DigestMismatch)
            for number in {0, 1, 2} - {failing}:
                assert oracle.agrees(work[number], ends[number])  # type: ignore[arg-type]
        assert spoiler.spoiled
        plants.arriving = None
        await workers.assert_nothing_leaks()
        await audit_cache(workers, honest, work)
        for item in work:
            answer = await workers.generate(item)
            assert oracle.agrees(item, answer)
        await workers.assert_nothing_leaks()


# -- tenants -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without the guard"])
@pytest.mark.parametrize("side", SIDES)
async def test_z12_z13_a_salt_parts_every_tier(
    model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, side: str, guarded: bool
) -> None:
    """Z12 and Z13, vllm#44701, #51640. There: a name equal to a salt gave a hit, and an outer tier forgot the salt altogether.
    Ours: what tenant A has warmed, on the decode side or on the prefill side, nobody with another salt, or with none, finds."""
    if not guarded:
        for user in ("decode_worker.server", "prefill_worker.runs"):
            monkeypatch.setattr(f"{user}.request_from_wire", lambda message: replace(request_from_wire(message), cache_salt=""))
    decode, prefill = SIDES[side]
    async with running_workers(model_path, engine=decode, prefill_engine=prefill, decode=REMOTE) as workers:
        work = request(prompt_of(5 * BLOCK + 3, 11), max_tokens=4)
        a = replace(work, cache_salt="A")
        assert oracle.agrees(work, await workers.generate(a))
        fingerprint = workers.decode._host.engine.layout.fingerprint
        salts = ["B", "", "a", "A ", "A\0", "AA", fingerprint.hex(), root_hash(fingerprint, "A").hex()]
        for salt in salts:
            answer = await workers.generate(replace(work, cache_salt=salt))
            assert oracle.agrees(work, answer)
            assert answer.started is not None
            assert (answer.started.cached_tokens == 0) is guarded, salt
        again = await workers.generate(a)
        assert oracle.agrees(work, again)
        assert again.started is not None
        assert again.started.cached_tokens == 5 * BLOCK
        await workers.assert_nothing_leaks()


_Keys = st.one_of(
    st.tuples(st.just("root"), st.binary(max_size=40), st.text(max_size=20)),
    st.tuples(st.just("next"), st.binary(min_size=32, max_size=32), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6)),
)


def _hashed(key: Any) -> bytes:
    """What goes into the hash for a root (fingerprint, salt) or for a block (parent, tokens)."""
    taken: list[bytes] = []
    real = hashlib.sha256

    def recording(data: bytes) -> Any:
        taken.append(data)
        return real(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.blocks.hashlib, "sha256", recording)
        (root_hash if key[0] == "root" else next_hash)(*key[1:])
    (data,) = taken
    return data


@given(_Keys, _Keys)
def test_z12_the_salt_is_not_mistaken_for_other_key_material(one: Any, other: Any) -> None:
    """Z12, vllm#44701. There: an adapter named like a salt had the same cache key.
    Ours: what is hashed tells salt, layout, parent and tokens apart: different keys, different bytes before the hash."""
    assert (_hashed(one) == _hashed(other)) == (one == other)


@given(st.binary(max_size=12), st.text(max_size=12), st.integers(0, 12))
def test_z12_moving_the_border_between_layout_and_salt_changes_the_key(fingerprint: bytes, salt: str, cut: int) -> None:
    """Z12, vllm#44701. The same bytes, split elsewhere: the draws above rarely hit on that."""
    whole = fingerprint + salt.encode()
    try:
        moved = (whole[:cut], whole[cut:].decode())
    except UnicodeDecodeError:
        return
    if moved != (fingerprint, salt):
        assert _hashed(("root", *moved)) != _hashed(("root", fingerprint, salt))
