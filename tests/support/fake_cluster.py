"""A cluster without engines, for tests of the router: manager and decode workers are real gRPC servers with scripted answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx

from common.codec import chunk_to_wire, request_from_wire, started_to_wire, token_logprob_to_wire, work_to_wire
from common.config import Config
from common.errors import PdserveError
from common.rpc import RpcServer, abort_with, start_server
from common.tokenizer import Tokenizer
from common.types import FinishReason, Request, StageTimings, Started, TokenChunk, TokenLogprob, WorkAccount
from common.wire import registry_pb2, registry_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from router.server import run
from support.plain_http import NO_CERTIFICATES
from support.tiny_models import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, make_tiny_tokenizer

TOKEN = "cluster-secret"
MODEL = "tiny"
CONTEXT = 512
EOS = 2


def make_tokenizer_folder(path: Path) -> Path:
    """What the router needs of a model: everything but the weights."""
    path.mkdir(parents=True, exist_ok=True)
    make_tiny_tokenizer().save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"eos_token_id": EOS, "max_position_embeddings": CONTEXT}))
    described = {"bos_token": END_OF_TEXT, "eos_token": TURN_END, "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(described))
    return path


class FakeControl(registry_pb2_grpc.ControlServicer):
    """Remembers what it was asked to do."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.refuse: PdserveError | None = None
        self.report = registry_pb2.AutoscalerReport()

    async def _take(self, message: Any, context: Any) -> registry_pb2.ClusterSnapshot:
        self.asked.append(message)
        if self.refuse is not None:
            await abort_with(context, self.refuse)
        return registry_pb2.ClusterSnapshot()

    Scale = Drain = Flip = Roll = _take

    async def Autoscaler(self, message: Any, context: Any) -> registry_pb2.AutoscalerReport:
        await self._take(message, context)
        return self.report


class FakeManager(registry_pb2_grpc.RegistryServicer):
    """`Registry/Watch` for any number of routers, and a `Control` that does nothing."""

    def __init__(self, token: str = TOKEN) -> None:
        self._token = token
        self.control = FakeControl()
        self.snapshot = registry_pb2.ClusterSnapshot()
        self.announced: list[registry_pb2.WatchRequest] = []
        self.demanded: asyncio.Queue[str] = asyncio.Queue()  # models that routers want woken
        self._changed = asyncio.Event()
        self._rpc: RpcServer | None = None

    async def start(self, port: int = 0) -> str:
        def register(server: grpc.aio.Server) -> None:
            registry_pb2_grpc.add_RegistryServicer_to_server(self, server)
            registry_pb2_grpc.add_ControlServicer_to_server(self.control, server)

        services = ("pdserve.v1.Registry", "pdserve.v1.Control")
        self._rpc = await start_server(register, host="127.0.0.1", port=port, token=self._token, services=services)
        return self._rpc.address

    async def stop(self) -> None:
        if self._rpc is not None:
            await self._rpc.stop(0)
            self._rpc = None

    def publish(self, snapshot: registry_pb2.ClusterSnapshot) -> None:
        snapshot.version = self.snapshot.version + 1
        self.snapshot = snapshot
        self._changed.set()
        self._changed = asyncio.Event()

    async def Demand(self, request: registry_pb2.DemandRequest, context: Any) -> registry_pb2.DemandReply:
        self.demanded.put_nowait(request.model)
        return registry_pb2.DemandReply(waking=True)

    async def Watch(self, request: registry_pb2.WatchRequest, context: Any) -> None:
        self.announced.append(request)
        while True:
            changed = self._changed
            await context.write(self.snapshot)
            await changed.wait()


@dataclass
class FakeDecodeWorker(worker_pb2_grpc.DecodeServicer):
    """Answers every request with `answer`, one token per event, then the end token. The knobs below make it misbehave."""

    worker_id: str
    tokenizer: Tokenizer
    answer: str = "hello there"
    model: str = MODEL
    tokens_per_event: int = 1
    refuse: PdserveError | None = None  # before the first token
    fail_after: int | None = None  # tokens; then `failure`
    failure: PdserveError | None = None  # None: the link breaks
    hold_after: int | None = None  # tokens; then silence until `released`
    transform: Callable[[worker_pb2.GenerateEvent], worker_pb2.GenerateEvent] | None = None
    incarnation: int = 1
    max_model_tokens: int = CONTEXT
    cached_tokens: int = 3
    account: WorkAccount | None = None  # told with the last tokens

    requests: list[Request] = field(default_factory=list)
    prefill_candidates: list[tuple[str, ...]] = field(default_factory=list)
    traceparents: list[str] = field(default_factory=list)
    served: int = 0
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        self._rpc = await start_server(
            lambda server: worker_pb2_grpc.add_DecodeServicer_to_server(self, server),
            host="127.0.0.1",
            token=TOKEN,
            services=("pdserve.v1.Decode",),
        )
        self.address = self._rpc.address

    async def stop(self) -> None:
        await self._rpc.stop(0)

    def info(self, state: str = "ready") -> worker_pb2.InfoReply:
        return worker_pb2.InfoReply(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=types_pb2.ROLE_DECODE,
            model=self.model,
            state=state,
            address=self.address,
            max_model_tokens=self.max_model_tokens,
        )

    async def Generate(self, message: worker_pb2.GenerateRequest, context: Any) -> None:
        try:
            await self._generate(message, context)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _generate(self, message: worker_pb2.GenerateRequest, context: Any) -> None:
        request = request_from_wire(message.request)
        self.requests.append(request)
        self.prefill_candidates.append(tuple(ref.worker_id for ref in message.prefill))
        self.traceparents.append(dict(context.invocation_metadata()).get("traceparent", ""))
        if self.refuse is not None:
            await abort_with(context, self.refuse)
        sent = 0
        for event in self.events(request):
            if self.fail_after is not None and sent >= self.fail_after:
                if self.failure is not None:
                    await abort_with(context, self.failure)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken pipe")
            if self.hold_after is not None and sent >= self.hold_after:
                self.holding.set()
                await self.released.wait()
            await context.write(event if self.transform is None else self.transform(event))
            sent += sum(len(chunk.token_ids) for chunk in event.chunks)
        self.served += 1

    def events(self, request: Request) -> list[worker_pb2.GenerateEvent]:
        ids = self.tokenizer.encode(self.answer, add_special_tokens=False)[request.num_resumed_tokens :]
        limit = request.sampling.max_tokens - request.num_resumed_tokens
        ends = EOS in request.sampling.stop_token_ids and len(ids) < limit
        ids = ids[:limit]
        groups = [ids[start : start + self.tokens_per_event] for start in range(0, len(ids), self.tokens_per_event)] or [[]]
        events = []
        for index, group in enumerate(groups):
            last = index == len(groups) - 1
            event = worker_pb2.GenerateEvent()
            if index == 0:
                event.started.CopyFrom(started_to_wire(self._started(request)))
            for choice in range(request.num_choices):
                chunk = TokenChunk(
                    request.first_choice + choice,
                    tuple(group),
                    tuple(self.logprob(token, request.sampling.logprobs) for token in group)
                    if request.sampling.logprobs is not None
                    else (),
                    (FinishReason.STOP if ends else FinishReason.LENGTH) if last else None,
                    EOS if last and ends else None,
                )
                event.chunks.append(chunk_to_wire(chunk))
            if last and self.account is not None:
                event.account.CopyFrom(work_to_wire(self.account))
            events.append(event)
        return events

    @staticmethod
    def logprob(token_id: int, alternatives: int) -> TokenLogprob:
        """A made-up distribution: the token itself is the best, its successors follow."""
        top = tuple((token_id + step, -0.25 - step) for step in range(alternatives))
        return TokenLogprob(token_id, -0.25, top)

    def _started(self, request: Request) -> Started:
        timings = StageTimings(
            decode_queue_s=1e-6, prefill_s=2e-6, prefill_worker="tiny/prefill/0", transport="shm", transfer_bytes=4096
        )
        asked = request.sampling.prompt_logprobs
        if asked is None:
            return Started(timings, self.cached_tokens)
        reported = (None, *(self.logprob(token, asked) for token in request.prompt_token_ids[1:]))
        return Started(timings, self.cached_tokens, reported)


def without_started(event: worker_pb2.GenerateEvent) -> worker_pb2.GenerateEvent:
    event.ClearField("started")
    return event


def prompt_logprob_message(token_id: int) -> types_pb2.TokenLogprob:
    return token_logprob_to_wire(FakeDecodeWorker.logprob(token_id, 1))


@dataclass
class FakeCluster:
    """One manager, its decode workers, and a real router on real sockets."""

    tokenizer: Tokenizer
    model_path: Path
    manager: FakeManager
    workers: list[FakeDecodeWorker]
    fingerprint: str = "f1"
    awaits_successor: bool = False  # what the manager says of its models
    manager_address: str = ""
    http_url: str = ""
    grpc_address: str = ""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def worker(self) -> FakeDecodeWorker:
        return self.workers[0]

    def snapshot(self, states: dict[str, str] | None = None, prefill: tuple[str, ...] = ()) -> registry_pb2.ClusterSnapshot:
        states = states or {}
        prefill_infos = [
            worker_pb2.InfoReply(
                worker_id=name, incarnation=1, role=types_pb2.ROLE_PREFILL, model=MODEL, state="ready", address="127.0.0.1:9"
            )
            for name in prefill
        ]
        return registry_pb2.ClusterSnapshot(
            cluster="test",
            models=[
                registry_pb2.ModelInfo(
                    name=model,
                    path=str(self.model_path),
                    context_tokens=CONTEXT,
                    created_s=1_700_000_000,
                    layout_fingerprint=self.fingerprint,
                    awaits_successor=self.awaits_successor,
                )
                for model in sorted({MODEL, *(worker.model for worker in self.workers)})
            ],
            workers=[worker.info(states.get(worker.worker_id, "ready")) for worker in self.workers] + prefill_infos,
        )

    def publish(self, **states: str) -> None:
        self.manager.publish(self.snapshot({name.replace("_", "/"): state for name, state in states.items()}))

    async def until_seen(self) -> None:
        """Returns when the router has taken over the manager's snapshot, as a client can tell."""
        infos = [info for info in self.manager.snapshot.workers if info.role == types_pb2.ROLE_DECODE]
        ready = sorted({info.model for info in infos if info.state == "ready"})
        client = httpx.AsyncClient(base_url=self.http_url, trust_env=False, verify=NO_CERTIFICATES)
        async with client, asyncio.timeout(120):
            while (await client.get("/ready")).json()["models"] != ready:
                await asyncio.sleep(0.005)

    def serving(self) -> FakeDecodeWorker:
        """The one worker that holds a request now."""
        (found,) = [worker for worker in self.workers if worker.holding.is_set()]
        return found


def router_config(
    *,
    cache: dict[str, Any] | None = None,
    models: tuple[str, ...] = (),
    routing: dict[str, Any] | None = None,
    tracing: dict[str, Any] | None = None,
    **router: Any,
) -> Config:
    """`models` are others than the one that is always there. Without `cache` equal requests are not taken together: most tests
    count what reaches the workers."""
    named = [{"name": MODEL, "source": "tiny", "aliases": ("small",)}, {"name": "absent", "source": "absent"}]
    return Config.model_validate(
        {
            "cache": {"exact": {"enabled": False}} if cache is None else cache,
            "models": [*named, *({"name": model, "source": model} for model in models)],
            "routing": routing or {},
            "tracing": tracing or {},
            "router": {"http_port": 0, "grpc_port": 0, "request_timeout_s": 20.0, **router},
        }
    )


@asynccontextmanager
async def fake_cluster(
    tokenizer: Tokenizer,
    model_path: Path,
    *,
    num_workers: int = 1,
    make_worker: Callable[[str, Tokenizer], FakeDecodeWorker] = FakeDecodeWorker,
    models: tuple[str, ...] = (),
    drain_grace_s: float = 5.0,
    **router: Any,
) -> AsyncIterator[FakeCluster]:
    """Everything up and, if there are workers, ready; everything down afterwards."""
    manager = FakeManager()
    workers = [make_worker(f"tiny/decode/{index}", tokenizer) for index in range(num_workers)]
    workers += [FakeDecodeWorker(f"{model}/decode/0", tokenizer, f"I am {model}", model) for model in models]
    for worker in workers:
        await worker.start()
    cluster = FakeCluster(tokenizer, model_path, manager, workers)
    cluster.manager_address = await manager.start()
    manager.publish(cluster.snapshot())
    addresses: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    cluster.task = asyncio.create_task(
        run(
            router_config(models=models, **router),
            manager_address=cluster.manager_address,
            cluster_token=TOKEN,
            stop=cluster.stop,
            on_ready=lambda http, grpc: addresses.set_result((http, grpc)),
            drain_grace_s=drain_grace_s,
        )
    )
    try:
        await asyncio.wait({addresses, cluster.task}, return_when=asyncio.FIRST_COMPLETED)
        if cluster.task.done():
            cluster.task.result()
        http, cluster.grpc_address = addresses.result()
        cluster.http_url = f"http://{http}"
        await cluster.until_seen()
        yield cluster
    finally:
        cluster.stop.set()
        await asyncio.wait({cluster.task})
        for worker in workers:
            await worker.stop()
        await cluster.manager.stop()
    cluster.task.result()
