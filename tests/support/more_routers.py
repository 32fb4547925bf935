"""Routers beside the one that `pdserve up` starts, and clients that know several, as a load balancer does."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from deploy.cluster_state import read_state
from support.cluster import RunningCluster
from support.steady_load import Question, ask

_STOP_TIMEOUT_S = 45.0


@dataclass(frozen=True)
class MoreRouter:
    process: subprocess.Popen[bytes]
    base_url: str

    def drain(self) -> int:
        """Its exit code: asked to stop, it serves what it has begun."""
        self.process.terminate()
        return self.process.wait(_STOP_TIMEOUT_S)


@contextmanager
def another_router(cluster: RunningCluster) -> Iterator[MoreRouter]:
    """Started by hand, as the manual says; ready."""
    state = read_state(Path(cluster.environment["PDSERVE_HOME"]), cluster.name)
    assert state is not None
    known = {router["http_address"] for router in cluster.status()["routers"]}
    process = subprocess.Popen(
        [sys.executable, "-m", "router", "--config", state.config_path, "--manager", state.manager_address],
        env={**cluster.environment, "PDSERVE_CLUSTER_TOKEN": state.token},
        stderr=subprocess.DEVNULL,
    )
    try:
        found: list[str] = []

        def listed() -> bool:
            found[:] = [router["http_address"] for router in cluster.status()["routers"] if router["http_address"] not in known]
            return bool(found) and httpx.get(f"http://{found[0]}/ready", trust_env=False).status_code == 200

        cluster.wait_for("another router", listed)
        yield MoreRouter(process, f"http://{found[0]}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(_STOP_TIMEOUT_S)


@dataclass
class Balanced:
    """Clients that ask routers in turn. One that refuses a connection or says that it is stopping is passed over, and a request
    that it did not take goes to the next; an answer that has begun has to end, with the known text."""

    known: list[tuple[Question, str]]
    urls: list[str]
    model: str
    served: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def asking(self, *, clients: int) -> Iterator[None]:
        stop = threading.Event()
        threads = [threading.Thread(target=self._client, args=(seed, stop), daemon=True) for seed in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(_STOP_TIMEOUT_S)

    def _client(self, seed: int, stop: threading.Event) -> None:
        number = seed
        while not stop.is_set():
            number += 1
            question, expected = self.known[number % len(self.known)]
            url = self.urls[number % len(self.urls)]
            with httpx.Client(trust_env=False, timeout=_STOP_TIMEOUT_S) as client:  # one connection each: none is found closed
                reply = ask(client, url, self.model, question)
            if reply.failure.startswith(("ConnectError", "503")) and not reply.text:
                continue
            with self._lock:
                self.served[url] = self.served.get(url, 0) + 1
                if reply.failure or reply.text != expected:
                    self.wrong.append(f"{url}: {reply.failure or reply.text!r}")
