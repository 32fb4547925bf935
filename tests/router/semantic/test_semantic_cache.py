"""The semantic cache by itself: who is served what, what labels do, and what is forgotten."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import InvalidRequest
from common.rpc import cancel_and_wait
from support.semantic import SemanticBench, question

ASKED = "How do I learn to play the piano at home?"
SAME = "How can I learn to play piano at home?"
ALSO = "How could I learn to play the piano at home?"
THIRD = "How should I learn to play the piano at home?"


async def test_a_paraphrase_is_answered_and_a_negation_is_not() -> None:
    bench = SemanticBench()
    assert await bench.ask(ASKED) is None
    hit = await bench.ask(SAME)
    assert hit is not None
    assert hit.key == question(ASKED).key
    assert 0.0 < hit.score <= 1.0
    assert await bench.ask("How do I not learn to play the piano at home?") is None
    assert await bench.ask("How do I learn to play the violin at home?") is None
    assert await bench.ask("How do I learn to play the piano at home in 3 days?") is None


async def test_scopes_do_not_see_each_other() -> None:
    bench = SemanticBench()
    for scope in (b"one", b"two"):
        assert await bench.ask(ASKED, scope=scope) is None
    assert (await bench.ask(SAME, scope=b"one")).key == question(ASKED, scope=b"one").key
    assert await bench.ask(SAME, scope=b"three") is None


async def test_without_evidence_hits_are_few_and_verified() -> None:
    bench = SemanticBench(proven=False, max_wrong_hits=0.5)
    await bench.ask(ASKED)
    hits = [await bench.ask(f"{SAME[:-1]}, please{'!' * place}") for place in range(19)]
    served = [hit for hit in hits if hit is not None]
    assert len(served) == 1
    assert served[0].verify


async def test_an_answer_that_was_found_wrong_is_not_given_to_that_question_again() -> None:
    bench = SemanticBench(shadow=1.0)
    await bench.ask(ASKED, "Practise every day with a good book.")
    first = await bench.ask(SAME, "The treaty was signed by both kings.")  # verified in the background: something else
    assert first is not None
    assert first.verify
    assert bench.labels()["shadow", "wrong"] == 1
    bench.clock.advance(100.0)
    second = await bench.cache.find(question(SAME))
    assert second is None or second.key != first.key
    other = await bench.cache.find(question(ALSO))
    assert other is not None  # one question's trouble is not another's


async def test_two_complaints_remove_an_answer() -> None:
    bench = SemanticBench()
    await bench.ask(ASKED)
    hits = [await bench.ask(text) for text in (SAME, ALSO)]
    assert all(hit is not None for hit in hits)
    assert [await bench.cache.feedback(hit.hit_id, ok=False, tenant="t") for hit in hits if hit] == [False, True]
    assert await bench.cache.find(question(THIRD)) is None
    assert bench.labels()["feedback", "wrong"] == 2


async def test_praise_removes_nothing() -> None:
    bench = SemanticBench()
    await bench.ask(ASKED)
    for text in (SAME, ALSO):
        hit = await bench.ask(text)
        assert hit is not None
        assert not await bench.cache.feedback(hit.hit_id, ok=True, tenant="t")
    assert await bench.cache.find(question(THIRD)) is not None


async def test_only_the_tenant_of_a_hit_may_speak_of_it_and_once() -> None:
    bench = SemanticBench()
    await bench.ask(ASKED)
    hit = await bench.ask(SAME)
    assert hit is not None
    for hit_id, tenant in ((hit.hit_id, "other"), ("0" * 32, "t")):
        with pytest.raises(InvalidRequest) as raised:
            await bench.cache.feedback(hit_id, ok=False, tenant=tenant)
        assert raised.value.param == "id"
    await bench.cache.feedback(hit.hit_id, ok=False, tenant="t")
    with pytest.raises(InvalidRequest):
        await bench.cache.feedback(hit.hit_id, ok=False, tenant="t")


async def test_who_asks_again_at_once_gets_a_fresh_answer() -> None:
    bench = SemanticBench()
    await bench.ask(ASKED)
    assert await bench.ask(SAME) is not None
    bench.clock.advance(5.0)
    assert await bench.ask(SAME) is None
    assert bench.labels()["repeat", "wrong"] == 1
    assert bench.labels()["shadow", "right"] == 1  # the fresh answer was the same: the hit was right after all


async def test_a_miss_labels_its_best_candidate() -> None:
    bench = SemanticBench(proven=False, max_wrong_hits=0.0001)
    await bench.ask(ASKED)
    await bench.ask(SAME)
    assert bench.labels() == {("fresh", "right"): 1}


async def test_a_hit_that_could_not_be_used_is_forgotten() -> None:
    bench = SemanticBench()
    await bench.ask(ASKED)
    hit = await bench.cache.find(question(SAME))
    assert hit is not None
    bench.cache.unusable(question(SAME), hit)
    assert await bench.cache.find(question(ALSO)) is None
    with pytest.raises(InvalidRequest):
        await bench.cache.feedback(hit.hit_id, ok=False, tenant="t")


async def test_questions_expire_and_the_oldest_make_room() -> None:
    bench = SemanticBench(max_entries=2)
    await bench.ask(ASKED)
    bench.clock.advance(499.0)
    assert await bench.cache.find(question(SAME)) is not None
    bench.clock.advance(2.0)
    assert await bench.cache.find(question(ALSO)) is None
    for text in ("How are wooden boats built?", "Why do cats purr so often?", "Which bread needs no yeast?"):
        await bench.ask(text)
    assert await bench.cache.find(question("How are the wooden boats built?")) is None
    assert await bench.cache.find(question("Why do the cats purr so often?")) is not None


async def test_invalidation_and_deletion_reach_the_index() -> None:
    bench = SemanticBench()
    assert bench.store is not None
    await bench.ask(ASKED)
    await bench.store.invalidate(["tenant:t"])
    assert await bench.cache.find(question(SAME)) is None
    await bench.ask(ASKED)
    assert await bench.cache.find(question(ALSO)) is not None
    bench.store.put(question(ASKED).key, b"the answer", ttl_s=100.0, epochs=await bench.epochs())
    await bench.store.delete([question(ASKED).key])
    assert await bench.cache.find(question(THIRD)) is None


async def test_another_router_learns_of_it_through_the_store() -> None:
    one = SemanticBench()
    other = SemanticBench(store=one.store, clock=one.clock)
    task = asyncio.create_task(other.cache.run())
    await one.ask(ASKED)
    async with asyncio.timeout(120):
        while (hit := await other.cache.find(question(SAME))) is None:
            await asyncio.sleep(0)
    assert hit.key == question(ASKED).key
    await cancel_and_wait(task)


async def test_a_class_that_is_found_wrong_is_switched_off_and_comes_back() -> None:
    bench = SemanticBench(shadow=1.0)
    state = lambda: bench.decider.view()[0].state  # noqa: E731
    assert state() == "proven"
    for place in range(14):
        await bench.ask(
            f"How do I build kite number nineteen of kind {'abcdefghijklmn'[place]}{place}x?", "Use paper and a stick."
        )
        await bench.ask(
            f"How can I build kite number nineteen of kind {'abcdefghijklmn'[place]}{place}x?", "The treaty was signed."
        )
    assert state() == "off"
    from support.semantic import MODEL, prove

    prove(bench.decider, MODEL, count=3000)
    assert state() == "proven"
    await bench.cache.close()
