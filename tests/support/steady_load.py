"""Clients that ask a cluster the same questions over and over, streaming, and hold each answer against the known one."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

_TIMEOUT_S = 120.0
_HEADERS = {"x-cache": "bypass", "x-pdserve-timings": "1"}


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    seed: int
    temperature: float
    max_tokens: int

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": self.prompt,
            "seed": self.seed,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True)
class Reply:
    text: str
    timings: dict[str, Any]
    failure: str = ""
    took_s: float = 0.0


def ask(client: httpx.Client, url: str, model: str, question: Question) -> Reply:
    started_s = time.monotonic()
    text, timings, done = "", {}, False
    try:
        with client.stream("POST", f"{url}/v1/completions", json=question.body(model), headers=_HEADERS) as response:
            if response.status_code != 200:
                return Reply("", {}, f"{response.status_code}: {response.read().decode()[:300]}")
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return Reply(text, timings, str(event["error"])[:300])
                    timings = event.get("timings", timings)
                    text += "".join(choice.get("text") or "" for choice in event["choices"])
    except httpx.HTTPError as error:
        return Reply(text, timings, repr(error)[:300])
    return Reply(text, timings, "" if done else "the stream ended early", time.monotonic() - started_s)


@dataclass
class Tally:
    """What came of the requests that ended in one phase."""

    answered: int = 0
    failures: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    transports: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0


class SteadyLoad:
    """`start` on a thread whose sockets are those of the router's host; `phase` ends one tally and begins the next."""

    def __init__(self, url: str, model: str, known: list[tuple[Question, str]], *, clients: int) -> None:
        self._url, self._model, self._known = url, model, known
        self._clients = clients
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._tally = Tally()

    def start(self) -> None:
        for index in range(self._clients):
            thread = threading.Thread(target=self._work, args=(index,), name=f"client {index}")
            thread.start()
            self._threads.append(thread)

    def phase(self) -> Tally:
        with self._lock:
            ended, self._tally = self._tally, Tally()
        return ended

    def stop(self) -> Tally:
        self._stop.set()
        for thread in self._threads:
            thread.join(_TIMEOUT_S)
        return self.phase()

    def _work(self, index: int) -> None:
        draw = random.Random(index)
        with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
            for count in itertools.count():
                if self._stop.is_set():
                    return
                question, expected = draw.choice(self._known)
                reply = ask(client, self._url, self._model, question)
                with self._lock:
                    self._tally.slowest_s = max(self._tally.slowest_s, reply.took_s)
                    if reply.failure:
                        self._tally.failures.append(f"client {index}, request {count}: {reply.failure}")
                    elif reply.text != expected:
                        self._tally.inexact.append(f"client {index}, request {count}: {reply.text!r}, not {expected!r}")
                    else:
                        self._tally.answered += 1
                        self._tally.transports[reply.timings.get("transport") or "prefilled locally"] += 1
