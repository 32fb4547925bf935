"""The page in a browser, before a router whose workers are scripted: what a person sees and can do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from common.errors import ModelNotFound
from common.wire import registry_pb2
from support.browser import Browser, Page, browser
from support.fake_cluster import MODEL, FakeCluster
from support.ports import quiet_port
from support.router_clients import http_client

ROWS = "document.querySelectorAll('.workers tbody tr').length"
LIVE = "document.querySelector('#connection').dataset.is === 'live' && document.querySelector('#foot').innerText"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@asynccontextmanager
async def opened(chromium: Browser, cluster: FakeCluster, view: str = "cluster", **settings: Any) -> AsyncIterator[Page]:
    """A page that is live; whatever it complains of fails the test."""
    async with chromium.page(f"{cluster.http_url}/#{view}", **settings) as page:
        await page.until(LIVE)
        yield page
        assert page.complaints == []


async def test_each_view_loads_without_a_complaint_and_fits_a_phone(chromium: Browser, cluster: FakeCluster) -> None:
    async with http_client(cluster) as http:
        for _ in range(3):
            await http.post("/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
    for width, dark in ((1440, False), (390, True), (320, False)):
        async with opened(chromium, cluster, width=width, height=844, mobile=width < 1000, dark=dark) as page:
            for view in ("cluster", "requests", "playground"):
                await page.evaluate(f"location.hash = '{view}'")
                await page.until(f"!document.querySelector('#view-{view}').hidden")
                await page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
                wide = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
                assert wide[0] <= wide[1] == width, (view, wide)
                assert await page.evaluate(NAMELESS) == [], view
                assert min(await contrasts(page)) >= 4.5, view
    async with opened(chromium, cluster) as page:
        await page.until("document.querySelectorAll('.chart .uplot').length === 6")
        assert "router.slo" in await page.text(".charts + .none"), "without promises there is no goodput to show"
    async with opened(chromium, cluster, "requests") as page:
        await page.until("document.querySelectorAll('.requests tbody:last-child tr').length === 3")
        await page.click(".requests tbody:last-child tr button")
        await page.until("document.querySelector('.detail .waterfall')")
        said = await page.evaluate("document.querySelector('.detail .waterfall').getAttribute('aria-label')")
        assert re.match(r"First token after .* prefill .* In all ", said)


# Whatever can be operated has a name that a screen reader can say.
NAMELESS = """
[...document.querySelectorAll("button, input, select, textarea, a")]
  .filter((one) => one.checkVisibility())
  .filter((one) => ![one.innerText, one.getAttribute("aria-label"), ...[...(one.labels ?? [])].map((label) => label.innerText)]
    .some((name) => name?.trim()))
  .map((one) => one.outerHTML)
"""


async def contrasts(page: Page) -> list[float]:
    """Of every colour that text has with every ground that it stands on, as WCAG 2 counts it."""
    names = ("text", "dim", "prefill", "transfer", "decode", "bad", "good")
    read = "getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    inks = await page.evaluate(f"{json.dumps(names)}.map((name) => {read})")
    grounds = await page.evaluate(f"['page', 'card'].map((name) => {read})")
    pairs = [(ink, ground) for ink in inks for ground in grounds]
    for soft in ("prefill", "transfer", "decode", "bad"):
        pairs.append((inks[names.index(soft)], await page.evaluate(f"((name) => {read})('{soft}-soft')")))
    found = []
    for ink, ground in pairs:
        lighter, darker = sorted((luminance(ink), luminance(ground)), reverse=True)
        found.append((lighter + 0.05) / (darker + 0.05))
    return found


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


async def test_what_changes_is_seen_and_what_comes_from_outside_is_only_text(chromium: Browser, cluster: FakeCluster) -> None:
    async with opened(chromium, cluster) as page:
        assert await page.text(".node-name") == "decode/0"
        snapshot = cluster.snapshot({"tiny/decode/0": "draining"}, prefill=("tiny/prefill/0", f"tiny/{HOSTILE}"))
        snapshot.workers[0].failure = HOSTILE
        snapshot.workers[0].tensor_parallel, snapshot.workers[0].pipeline_parallel = 2, 3
        snapshot.workers[0].rank_pids.extend([71, 72, 73, 74, 75])
        snapshot.events.add(sequence=1, at_s=1.0, kind="lost", worker_id=HOSTILE, text=HOSTILE)
        cluster.manager.publish(snapshot)
        await page.until(f"{ROWS} === 3 && document.querySelector('.state').innerText")
        await page.until("document.querySelector('.pool-decode .node').dataset.state === 'draining'")
        await page.until("document.querySelector('.events li')")
        assert HOSTILE in await page.text(".events li")
        assert HOSTILE in await page.text(".pool-prefill")
        for place in (".pool-decode .node-age", "tr[data-worker='tiny/decode/0'] .c-name"):
            assert "TP\u202f2 × PP\u202f3" in await page.text(place)
        assert "TP" not in await page.text(".pool-prefill"), "nothing is said of a single process"
        await page.click(".pool-decode .node")
        await page.until("document.querySelector('dialog[open]')")
        assert HOSTILE in await page.text("dialog")
        assert "71, 72, 73, 74, 75" in await page.text("dialog")
        assert await page.evaluate("[document.title, document.querySelectorAll('img').length]") == ["pdserve", 0]


async def test_an_action_is_confirmed_and_its_refusal_is_shown(chromium: Browser, cluster: FakeCluster) -> None:
    control = cluster.manager.control

    def asked() -> list[Any]:
        return [one for one in control.asked if not isinstance(one, registry_pb2.AutoscalerRequest)]  # those the page reads

    async with opened(chromium, cluster) as page:
        await page.click(".workers [data-action=drain]")
        await page.until("document.querySelector('dialog[open] .danger')")
        assert not asked()
        await page.press("Escape", code=27)
        await page.until("!document.querySelector('dialog')")
        assert not asked()
        await page.click(".workers [data-action=drain]")
        await page.click("dialog .danger")
        await page.until("!document.querySelector('dialog')")
        assert asked() == [registry_pb2.DrainWorkerRequest(worker_id="tiny/decode/0")]
        await page.click("[data-action=scale]")
        await page.evaluate("document.querySelector('#scale-decode').value = '4'")
        await page.click("dialog .primary")
        await page.until("!document.querySelector('dialog')")
        assert registry_pb2.ScaleRequest(model=MODEL, prefill=0, decode=4) in asked()
        control.refuse = ModelNotFound("there is no such model", param="model")
        await page.click("[data-action=roll]")
        await page.click("dialog .primary")
        await page.until("document.querySelector('dialog .bad')")
        assert "there is no such model (model)" in await page.text("dialog")
        control.refuse = None
        page.complaints.clear()  # the browser says of a refused call that it was refused


async def test_with_keys_the_page_asks_once_and_keeps_the_key_in_its_tab(chromium: Browser, start_cluster: Any) -> None:
    keys = {"tenants": {"ops": {"admin": True, "keys": ["root"]}, "acme": {"keys": ["plain"]}}, "slo": {"batch": {"ttft_s": 9.0}}}
    async with start_cluster(**keys) as cluster, chromium.page(cluster.http_url) as page:
        for given, outcome in (("plain", "not for administration"), ("root", "")):
            await page.until("document.querySelector('dialog #key-input')")
            assert await page.evaluate("document.querySelectorAll('.node').length") == 0
            await page.evaluate("document.querySelector('#key-input').select()")
            await page.type(given)
            await page.press("Enter", code=13, text="\r")
            await page.until("!document.querySelector('dialog')")
            if outcome:
                await page.until(f"document.querySelector('#notice').innerText.includes({json.dumps(outcome)})")
                await page.click("#key")
        await page.until(LIVE)
        await page.until("document.querySelectorAll('.chart .uplot').length === 8")
        await page.until("document.querySelector('.chart:nth-last-child(2) .figure').innerText === 'batch 0'")  # after two points
        assert await page.text(".chart:last-child .figure") == "batch –"
        assert await page.evaluate("[sessionStorage.length, Object.keys(localStorage), document.cookie]") == [1, [], ""]
        await page.send("Page.reload")
        await page.until(LIVE)
        assert all("401" in said or "403" in said for said in page.complaints), page.complaints


async def test_it_says_that_it_is_stale_and_finds_a_restarted_router(chromium: Browser, start_cluster: Any) -> None:
    port = quiet_port()
    async with start_cluster(http_port=port) as cluster, chromium.page(cluster.http_url) as page:
        await page.until(LIVE)
        cluster.stop.set()
        await page.until("document.body.classList.contains('stale')")
        await page.until("/router is stopping|connection lost/.test(document.querySelector('#notice').innerText)")
        assert cluster.task is not None
        await asyncio.wait({cluster.task})
        async with start_cluster(http_port=port, num_workers=2):
            await page.until(f"!document.body.classList.contains('stale') && {ROWS} === 2")
            assert await page.evaluate("document.querySelector('#notice').hidden")


async def ask(page: Page, text: str) -> None:
    await page.until("document.querySelector('#pg-model').options.length")
    await page.evaluate("document.querySelector('#pg-prompt').focus()")
    await page.type(text)
    await page.press("Enter", code=13, text="\r")


async def test_a_chat_streams_and_stop_reaches_the_worker(chromium: Browser, cluster: FakeCluster) -> None:
    cluster.worker.answer = "one two three four five"
    cluster.worker.hold_after = 3
    async with opened(chromium, cluster, "playground") as page:
        await page.evaluate("document.querySelector('#pg-seed').value = '7'")
        await ask(page, "count <b>up</b>")
        await cluster.worker.holding.wait()
        await page.until("document.querySelectorAll('.token').length > 1")
        assert "five" not in await page.text(".answer")
        assert await page.text(".said-by-user") == "count <b>up</b>"
        await page.click("#pg-stop")
        async with asyncio.timeout(120):
            await cluster.worker.cancelled.wait()
        await page.until("/^stopped/.test(document.querySelector('.note').innerText)")

        cluster.worker.hold_after = None
        await ask(page, "again")
        await page.until("document.querySelector('.timing .waterfall')")
        sent = cluster.worker.requests[-1]
        assert (sent.sampling.seed, sent.sampling.temperature, sent.sampling.max_tokens) == (7, 0.7, 256)
        assert await page.evaluate("[...document.querySelectorAll('.answer')].at(-1).innerText") == "one two three four five"
        marks = await page.evaluate("document.querySelectorAll('.mark-token').length")
        assert marks == len(cluster.tokenizer.encode("one two three four five", add_special_tokens=False))
        assert "tiny/prefill/0 → tiny/decode/0" in await page.text(".timing")

        await page.evaluate("document.querySelector('#pg-schema').value = 'no json'")
        await ask(page, "in vain")
        await page.until("document.querySelector('.note.bad')")
        assert cluster.worker.requests[-1] is sent
