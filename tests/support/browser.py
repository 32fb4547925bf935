"""A headless Chromium, driven over the DevTools protocol: opens a page, evaluates in it, presses keys, hears its complaints.

    with browser() as chromium:
        async with chromium.page(url) as page:
            await page.until("document.title === 'x'")

What a page logs as an error, throws, or is refused by its Content-Security-Policy is in `page.complaints`; so is every request
to another origin than its own.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect

_START_S, _ANSWER_S = 60.0, 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser() -> Iterator[Browser]:
    """Skips the test where there is none."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--no-proxy-server",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-extensions",
                "--hide-scrollbars",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Browser(_port(Path(profile) / "DevToolsActivePort", process))
        finally:
            process.kill()
            process.wait()


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline_s = time.monotonic() + _START_S
    while not (file.exists() and "\n" in file.read_text()):
        assert process.poll() is None, "Chromium ended"
        assert time.monotonic() < deadline_s, "Chromium does not start"
        time.sleep(0.02)
    return int(file.read_text().splitlines()[0])


class Browser:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    @asynccontextmanager
    async def page(
        self, url: str, *, width: int = 1440, height: int = 900, mobile: bool = False, dark: bool = False
    ) -> AsyncIterator[Page]:
        """A fresh tab. Its complaints are collected from before the first byte is loaded."""
        async with httpx.AsyncClient(trust_env=False, timeout=_ANSWER_S) as http:
            tab = (await http.put(f"{self._url}/json/new?about:blank")).json()
            async with connect(tab["webSocketDebuggerUrl"], max_size=64 * 1024 * 1024, proxy=None) as link:
                page = Page(link, origin=urlsplit(url).netloc)
                listening = asyncio.create_task(page.listen())
                try:
                    for domain in ("Page", "Runtime", "Log", "Network"):
                        await page.send(f"{domain}.enable")
                    await page.send(
                        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
                    )
                    await page.send(
                        "Emulation.setEmulatedMedia",
                        features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
                    )
                    await page.send("Page.navigate", url=url)
                    yield page
                finally:
                    listening.cancel()
                    await asyncio.wait([listening])
            await http.get(f"{self._url}/json/close/{tab['id']}")


class Page:
    def __init__(self, link: ClientConnection, *, origin: str) -> None:
        self._link = link
        self._origin = origin
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []

    async def listen(self) -> None:
        async for text in self._link:
            message = json.loads(text)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            else:
                self._heard(message["method"], message["params"])

    def _heard(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(str(details.get("exception", {}).get("description") or details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.complaints.append(" ".join(str(part.get("value", part.get("description"))) for part in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            where = urlsplit(params["request"]["url"])
            if where.scheme not in ("about", "data", "blob") and where.netloc != self._origin:
                self.complaints.append(f"asked another origin: {params['request']['url']}")

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._link.send(json.dumps({"id": number, "method": method, "params": params}))
        async with asyncio.timeout(_ANSWER_S):
            message = await answer
        assert "error" not in message, (method, message["error"])
        result: dict[str, Any] = message["result"]
        return result

    async def evaluate(self, expression: str) -> Any:
        result = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, condition: str, timeout_s: float = 60.0) -> None:
        """Returns when an expression is true in the page; one that throws is not."""
        tried = f"(() => {{ try {{ return Boolean({condition}); }} catch {{ return false; }} }})()"
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.evaluate(tried):
                    await asyncio.sleep(0.03)
        except TimeoutError:
            seen = await self.evaluate("document.body.innerText.slice(0, 3000)")
            raise AssertionError(f"not within {timeout_s} s: {condition}\n{self.complaints}\n{seen}") from None

    async def text(self, selector: str) -> str:
        found: str = await self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        return found

    async def click(self, selector: str) -> None:
        """As a pointer would: at the element's middle, wherever that has been scrolled to."""
        await self.until(f"document.querySelector({json.dumps(selector)})")
        place = await self.evaluate(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)});"
            " element.scrollIntoView({block: 'center'}); const box = element.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, *, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    async def screenshot(self) -> bytes:
        """PNG of what is in view."""
        taken = await self.send("Page.captureScreenshot", format="png")
        return base64.b64decode(taken["data"])
