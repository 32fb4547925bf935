"""The console before a real cluster: Ray, manager, router, workers, and a browser."""

from __future__ import annotations

import os
import signal

import pytest

from support.browser import Page, browser
from support.cluster import WORKER_START_S, RunningCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

READY = "[...document.querySelectorAll('.node')].every((node) => node.dataset.state === 'ready')"


async def test_a_person_watches_chats_kills_and_scales(disaggregated: RunningCluster) -> None:
    with browser() as chromium:
        async with chromium.page(f"{disaggregated.base_url}/#playground") as page:
            await watch(page, disaggregated)


async def watch(page: Page, cluster: RunningCluster) -> None:
    await page.until("document.querySelector('#pg-model')?.options.length")
    await page.evaluate("document.querySelector('#pg-max').value = '24'")
    await page.evaluate("document.querySelector('#pg-prompt').focus()")
    await page.type("tell me of the word that they had for it and of all the other words as well")
    await page.press("Enter", code=13, text="\r")
    await page.until("document.querySelector('.timing .waterfall')")
    assert "tiny/prefill/0 → tiny/decode/0" in await page.text(".timing")
    assert await page.evaluate("document.querySelectorAll('.mark-token').length") > 1

    await page.evaluate("location.hash = 'requests'")
    await page.until("document.querySelector('.requests .chip[data-is=ok]')")

    await page.evaluate("location.hash = 'cluster'")
    await page.until(f"document.querySelectorAll('.node').length === 2 && {READY}")
    await page.until("document.querySelector('.tie[data-linked=true]')")
    (worker,) = cluster.workers("decode")
    os.kill(worker["pid"], signal.SIGKILL)
    await page.until(f"!({READY})")
    await page.until(
        f"{READY} && document.querySelector('.pool-decode .node').innerText.includes('#{worker['incarnation'] + 1}')",
        WORKER_START_S,
    )
    await page.until("[...document.querySelectorAll('.events .kind')].some((kind) => kind.dataset.kind === 'bad')")

    await page.click("[data-action=scale]")
    await page.until("document.querySelector('#scale-prefill')")
    await page.evaluate("document.querySelector('#scale-prefill').value = '2'")
    await page.click("dialog .primary")
    await page.until("!document.querySelector('dialog')")
    await page.until(f"document.querySelectorAll('.pool-prefill .node').length === 2 && {READY}", WORKER_START_S)
    assert len(cluster.workers("prefill")) == 2
    back = cluster.cli("scale", "tiny", "--prefill", "1", "--cluster", cluster.name)
    assert back.returncode == 0, back.stderr
    assert page.complaints == []
