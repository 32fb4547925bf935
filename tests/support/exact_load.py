"""Clients that never stop asking, and check every answer against the one that the same request got when nothing else was going
on."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    max_tokens: int

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0.8,
            "seed": len(self.prompt),
            "logprobs": 1,
            "ignore_eos": True,
        }


def asks(count: int, *, prompt_tokens: int, max_tokens: int, seed: int) -> list[Ask]:
    draw = random.Random(seed)
    return [
        Ask(tuple(draw.randrange(3, 370) for _ in range(draw.randint(prompt_tokens // 2, prompt_tokens))), max_tokens)
        for _ in range(count)
    ]


@dataclass
class ExactLoad:
    """In exact mode an answer does not depend on who computes it, so `expect` once is enough for all that comes."""

    base_url: str
    model: str
    answers: dict[Ask, object] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    served: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, wanted: Sequence[Ask]) -> None:
        with httpx.Client(trust_env=False, timeout=_TIMEOUT_S) as client:
            for ask in wanted:
                answer = self._ask(client, ask)
                assert isinstance(answer, tuple), answer
                self.answers[ask] = answer

    @contextmanager
    def asking(self, wanted: Sequence[Ask], *, clients: int) -> Iterator[None]:
        """While the body runs, so many clients ask; every answer that was begun is waited for."""
        stop = threading.Event()
        threads = [threading.Thread(target=self._client, args=(wanted, seed, stop), daemon=True) for seed in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(_TIMEOUT_S)

    def _client(self, wanted: Sequence[Ask], seed: int, stop: threading.Event) -> None:
        draw = random.Random(seed)
        with httpx.Client(trust_env=False, timeout=_TIMEOUT_S) as client:
            while not stop.is_set():
                ask = draw.choice(wanted)
                answer = self._ask(client, ask)
                with self._lock:
                    self.served += 1
                    if answer != self.answers[ask]:
                        self.wrong.append(f"{len(ask.prompt)} tokens: {answer!r}"[:300])

    def _ask(self, client: httpx.Client, ask: Ask) -> object:
        """Tokens and their log-probabilities, or what went wrong."""
        try:
            reply = client.post(f"{self.base_url}/v1/completions", json=ask.body(self.model))
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        if reply.status_code != 200:
            return f"{reply.status_code}: {reply.text}"
        (choice,) = reply.json()["choices"]
        return tuple(choice["logprobs"]["tokens"]), tuple(choice["logprobs"]["token_logprobs"])
