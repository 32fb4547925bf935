"""Sends one request to an OpenAI-compatible server and notes when its tokens came.

The generator shares its machine with the server, so a token has to cost little here: asyncio streams, the C parser of httptools,
one reading of the clock per packet, and JSON of chunks only. A connection is reused if it was idle for less than a second:
servers close idle ones after some seconds, and a request that met such a close would look like a failure. Nothing is sent twice.

What counts as a token: the `token_ids` of a chunk if the server sends them, else a chunk with text counts as one token, and the
usage at the end gives the true total. A chunk without text (the role, the finish reason) is no token. Comments are skipped.

Nothing is raised for what a server does wrong: it is noted in the outcome, by kind.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

_READ_BYTES = 65_536
_REUSE_WITHIN_S = 1.0


@dataclass(slots=True)
class Outcome:
    """What came of one request. Times are readings of the client's clock; written by the client alone."""

    index: int
    intended_s: float  # when the plan wanted it sent: latencies count from here
    asked_tokens: int
    sent_s: float = 0.0
    end_s: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)  # per chunk with tokens: when, how many
    usage_prompt_tokens: int | None = None
    usage_completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # a kind, to be counted
    error_detail: str = ""

    def fail(self, kind: str, detail: str = "") -> None:
        """The first failure stands: what follows it is its consequence."""
        if self.error is None:
            self.error, self.error_detail = kind, detail

    @property
    def counted_tokens(self) -> int:
        return sum(count for _, count in self.events)

    @property
    def output_tokens(self) -> int:
        return self.counted_tokens if self.usage_completion_tokens is None else self.usage_completion_tokens


class Disconnected(ConnectionError):
    """The server closed the connection before its answer was complete."""


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since_s: float = 0.0


class _Answer:
    """Receives httptools' callbacks. They must not raise, so they only collect."""

    def __init__(self) -> None:
        self.body: list[bytes] = []
        self.complete = False
        self.ends_with_connection = False  # neither a length nor chunks: only the end of the connection ends it
        self._has_length = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self.ends_with_connection = not self._has_length

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        self.complete = True


class HttpConnections:
    """Keep-alive connections to one server. `exchange` may be called by many tasks at once."""

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http:// or https:// address: {base_url!r}")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in {"Host": parts.netloc, **headers}.items())
        self._idle: list[_Connection] = []

    async def exchange(self, method: str, path: str, body: bytes, sink: Callable[[bytes], None]) -> int:
        """Sends, gives the body to `sink` piece by piece as it comes, returns the status. Raises OSError, HttpParserError."""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n"
        message = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
        connection = self._idle_connection()
        if connection is None:
            connection = _Connection(*await asyncio.open_connection(self._host, self._port, ssl=self._tls))
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        reusable = False
        try:
            connection.writer.write(message)
            await connection.writer.drain()
            while not answer.complete:
                data = await connection.reader.read(_READ_BYTES)
                if not data:
                    if answer.ends_with_connection:
                        break
                    raise Disconnected("the connection ended within the answer")
                parser.feed_data(data)
                for piece in answer.body:
                    sink(piece)
                answer.body.clear()
            reusable = answer.complete and parser.should_keep_alive()
            return parser.get_status_code()
        finally:
            if reusable:
                connection.idle_since_s = asyncio.get_running_loop().time()
                self._idle.append(connection)
            else:
                connection.writer.transport.abort()

    def _idle_connection(self) -> _Connection | None:
        """The one used last, if it is fresh; the others are older still, and are let go."""
        if self._idle:
            connection = self._idle.pop()
            age_s = asyncio.get_running_loop().time() - connection.idle_since_s
            if age_s < _REUSE_WITHIN_S and not connection.reader.at_eof():
                return connection
            for stale in (connection, *self._idle):
                stale.writer.transport.abort()
            self._idle.clear()
        return None

    async def close(self) -> None:
        while self._idle:
            writer = self._idle.pop().writer
            writer.close()
            await writer.wait_closed()


class EventCutter:
    """Cuts a byte stream into the payloads of server-sent events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data.clear()


class StreamReading:
    """Reads one streamed answer into an outcome."""

    def __init__(self, outcome: Outcome, now: Callable[[], float]) -> None:
        self._outcome = outcome
        self._now = now
        self._events = EventCutter()
        self.raw = b""  # the first bytes, for the account of a refusal
        self.done = False

    def feed(self, piece: bytes) -> None:
        now_s = self._now()
        if len(self.raw) < 2_048:
            self.raw += piece
        for payload in self._events.feed(piece):
            if payload == b"[DONE]":
                self.done = True
                continue
            try:
                self._read(orjson.loads(payload), now_s)
            except (orjson.JSONDecodeError, AttributeError, TypeError) as error:
                self._outcome.fail("malformed event", str(error))

    def _read(self, chunk: dict[str, Any], now_s: float) -> None:
        outcome = self._outcome
        if "error" in chunk:
            kind, detail = _error_of(chunk)
            outcome.fail(f"error event: {kind}", detail)
            return
        if usage := chunk.get("usage"):
            outcome.usage_prompt_tokens = usage.get("prompt_tokens")
            outcome.usage_completion_tokens = usage.get("completion_tokens")
            outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        count = 0
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            has_text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            count += len(choice.get("token_ids") or ()) or bool(has_text)
            outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
        if count:
            outcome.events.append((now_s, count))


class OpenAIClient:
    """One server, one model. `send` never raises for what the server or the link does."""

    def __init__(self, connections: HttpConnections, *, timeout_s: float, now: Callable[[], float]) -> None:
        self._connections = connections
        self._timeout_s = timeout_s
        self._now = now

    async def first_model(self) -> str:
        """The first of /v1/models. Raises OSError or ValueError."""
        body = bytearray()
        async with asyncio.timeout(self._timeout_s):
            status = await self._connections.exchange("GET", "/v1/models", b"", body.extend)
        if status != 200:
            raise ValueError(f"/v1/models answered {status}")
        models = orjson.loads(body).get("data") or ()
        if not models:
            raise ValueError("/v1/models names no model")
        return str(models[0]["id"])

    async def send(self, path: str, body: bytes, outcome: Outcome) -> None:
        """Fills in the outcome of a streamed request; returns when it is complete, has failed, or has timed out."""
        reading = StreamReading(outcome, self._now)
        outcome.sent_s = self._now()
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await self._connections.exchange("POST", path, body, reading.feed)
        except TimeoutError:
            outcome.fail("timeout")
        except Disconnected as error:
            if not reading.done:
                outcome.fail("disconnected", str(error))
        except OSError as error:
            outcome.fail(f"connection: {type(error).__name__}", error.strerror or str(error))
        except httptools.HttpParserError as error:
            outcome.fail("malformed HTTP", str(error))
        else:
            if status != 200:
                kind, detail = _error_of_body(reading.raw)
                outcome.fail(f"HTTP {status}: {kind}" if kind else f"HTTP {status}", detail)
            elif not reading.done:
                outcome.fail("ended without [DONE]")
            elif not outcome.events:
                outcome.fail("no tokens")
        outcome.end_s = self._now()


def _error_of(body: dict[str, Any]) -> tuple[str, str]:
    error = body["error"]
    if not isinstance(error, dict):
        return "", str(error)
    return str(error.get("type") or error.get("code") or ""), str(error.get("message", ""))


def _error_of_body(raw: bytes) -> tuple[str, str]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return "", raw[:200].decode(errors="replace")
    return _error_of(body) if isinstance(body, dict) and "error" in body else ("", raw[:200].decode(errors="replace"))
