"""What this router knows of the cluster: a client of the pool manager's `Registry/Watch`.

    connect -> snapshot, snapshot, ... -> broken -> back-off -> connect ...

Each snapshot replaces the one before; while the manager is away the last one stays in force, because serving does not need the
manager. Between snapshots the dispatcher may learn earlier than the manager that a worker is dead: a suspected worker is avoided
until a snapshot shows a newer incarnation of it (which is another `WorkerRef`) or a short time has passed.

A model may sleep: the manager has taken its workers away because nobody used it, and says so. `wake` tells the manager that
somebody does. One that lost its last worker awaits a successor, as long as the manager is about to start one.

The registry also loads the tokenizer of each model, in a thread, as soon as the model is first seen. It opens no connection to a
worker and chooses none.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from common.clock import Clock
from common.codec import role_from_wire
from common.config import Config
from common.errors import InvalidRequest, ModelNotFound, NoWorkerAvailable, PdserveError
from common.logs import get_logger
from common.rpc import cancel_and_wait, connect, error_from_rpc
from common.tokenizer import Tokenizer
from common.types import Role, WorkerRef, WorkerState
from common.wire import registry_pb2, worker_pb2
from common.wire.registry_pb2_grpc import RegistryStub
from router.observe.targets import scrape_targets
from router.placement.membership import WorkerView
from router.validate import ServedModel

log = get_logger(__name__)

_FIRST_SNAPSHOT_S = 5.0  # a manager that accepts a connection and says nothing is as good as away
_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.1, 2.0
_SUSPECT_S = 3.0
_TOKENIZER_WAIT_S = 10.0
_DEMAND_S = 5.0


@dataclass(frozen=True, slots=True)
class ModelView:
    name: str
    path: str
    context_tokens: int
    created_s: int
    fingerprint: str
    wakes: bool = False  # it has no worker, and gets some when somebody asks for it
    awaits: bool = False  # it lost the workers that it needs, and gets others by itself


@dataclass(frozen=True, slots=True)
class ClusterView:
    """One snapshot, decoded."""

    version: int = 0
    models: Mapping[str, ModelView] = field(default_factory=dict)
    workers: tuple[WorkerView, ...] = ()
    scrape_targets: tuple[dict[str, Any], ...] = ()  # as Prometheus reads them

    def ready(self, model: str, role: Role) -> tuple[WorkerView, ...]:
        return tuple(view for view in self.workers if (view.model, view.role, view.state) == (model, role, WorkerState.READY))

    def refs(self) -> frozenset[WorkerRef]:
        return frozenset(view.ref for view in self.workers)


class Registry:
    """`run` is the one task that writes; everything else reads. `close` ends the loading of tokenizers."""

    def __init__(self, config: Config, *, manager_address: str, cluster_token: str, clock: Clock) -> None:
        self._manager_address = manager_address
        self._cluster_token = cluster_token
        self._clock = clock
        self._canonical = {alias: model.name for model in config.models for alias in (model.name, *model.aliases)}
        self._handing_off = {model.name for model in config.models if model.decode.hands_off}
        self._tokenizers: dict[str, asyncio.Task[Tokenizer]] = {}  # by path
        self._waking: dict[str, asyncio.Task[None]] = {}  # by model
        self._suspects: dict[WorkerRef, float] = {}  # until when
        self._changed = asyncio.Event()
        self.view = ClusterView()
        self.snapshot = registry_pb2.ClusterSnapshot()  # as the manager drew it, for those who show it
        self.connected = False
        self.away_since_s = clock.monotonic_s()  # while not connected

    async def run(self, announcement: registry_pb2.WatchRequest) -> None:
        """Watches for ever; ends only by cancellation."""
        backoff_s = _BACKOFF_FIRST_S
        reported = False
        while True:
            seen = self.view
            try:
                await self._watch(announcement)
                reason = "the manager ended the stream"
            except TimeoutError:
                reason = "no snapshot in time"
            except grpc.aio.AioRpcError as error:
                reason = error_from_rpc(error).code
            if self.view is not seen:
                backoff_s, reported = _BACKOFF_FIRST_S, False
            if not reported:
                log.warning("pool manager away, keeping the last snapshot", reason=reason, version=self.view.version)
            if self.connected:
                self.away_since_s = self._clock.monotonic_s()
            self.connected, reported = False, True
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _BACKOFF_LAST_S)

    async def close(self) -> None:
        for task in (*self._tokenizers.values(), *self._waking.values()):
            await cancel_and_wait(task)
        self._tokenizers.clear()
        self._waking.clear()

    async def _watch(self, announcement: registry_pb2.WatchRequest) -> None:
        channel = connect(self._manager_address, self._cluster_token)
        try:
            call = RegistryStub(channel).Watch(announcement)
            snapshots = aiter(call)
            async with asyncio.timeout(_FIRST_SNAPSHOT_S):
                snapshot = await anext(snapshots, None)
            while snapshot is not None:
                self.connected = True
                self.apply(snapshot)
                snapshot = await anext(snapshots, None)
        finally:
            await channel.close(None)

    def apply(self, snapshot: registry_pb2.ClusterSnapshot) -> None:
        """Takes over a snapshot. Called by `run`."""
        models = {
            model.name: ModelView(
                model.name,
                model.path,
                model.context_tokens,
                model.created_s,
                model.layout_fingerprint,
                model.wakes_on_demand,
                model.awaits_successor,
            )
            for model in snapshot.models
        }
        workers = tuple(_worker_views(snapshot.workers))
        if self.view.workers != workers:
            log.info(
                "cluster changed",
                version=snapshot.version,
                workers={f"{view.ref.worker_id}#{view.ref.incarnation}": str(view.state) for view in workers},
            )
        self.view = ClusterView(snapshot.version, models, workers, scrape_targets(snapshot))
        self.snapshot = snapshot
        self._load_tokenizers({model.path for model in models.values() if model.path})
        present = self.view.refs()
        self._suspects = {ref: until_s for ref, until_s in self._suspects.items() if ref in present}
        self.stir()

    async def wait_changed(self, timeout_s: float) -> None:
        """Returns at the next snapshot, when it is to look again, or when the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def stir(self) -> None:
        """Ends the waiting of all in `wait_changed`: they are to look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def wake(self, name: str) -> bool:
        """Whether the model has no worker but will have one because it is asked for; the manager is told, again and again while
        it does not hear."""
        model = self.view.models.get(name)
        if model is None or not model.wakes:
            return False
        task = self._waking.get(name)
        if task is None or task.done():
            self._waking[name] = asyncio.create_task(self._demand(name), name=f"wake {name}")
        return True

    async def _demand(self, name: str) -> None:
        channel = connect(self._manager_address, self._cluster_token)
        try:
            await RegistryStub(channel).Demand(registry_pb2.DemandRequest(model=name), timeout=_DEMAND_S)
        except grpc.aio.AioRpcError as error:
            log.warning("the manager was not told that a model is wanted", model=name, error=error_from_rpc(error).code)
        finally:
            await channel.close(None)

    def awaits(self, name: str) -> bool:
        """Whether workers that the model needs were lost, and the manager starts their successors."""
        model = self.view.models.get(name)
        return model is not None and model.awaits

    def suspect(self, ref: WorkerRef) -> None:
        """This incarnation did not answer; avoid it for a while."""
        self._suspects[ref] = self._clock.monotonic_s() + _SUSPECT_S

    def suspects(self) -> frozenset[WorkerRef]:
        now_s = self._clock.monotonic_s()
        self._suspects = {ref: until_s for ref, until_s in self._suspects.items() if until_s > now_s}
        return frozenset(self._suspects)

    def serves(self, name: str) -> bool:
        """Whether a request for this model would find the workers that it takes, or wake them."""
        model = self.view.models.get(name)
        needed = tuple(Role) if name in self._handing_off else (Role.DECODE,)
        return model is not None and (model.wakes or all(self.view.ready(name, role) for role in needed))

    def places(self, name: str) -> int:
        """How many decode workers take requests of the model: those that are ready or, while there are none, those awaited."""
        states = [view.state for view in self.view.workers if (view.model, view.role) == (name, Role.DECODE)]
        ready = states.count(WorkerState.READY)
        return ready or (states.count(WorkerState.STARTING) if self.awaits(name) else 0)

    def names(self) -> tuple[tuple[str, ModelView], ...]:
        """Every name that can be asked for, aliases included, with its model."""
        models = self.view.models
        aliases = [(alias, models[name]) for alias, name in self._canonical.items() if alias != name and name in models]
        return (*((name, model) for name, model in models.items()), *aliases)

    def max_model_tokens(self, model: ModelView) -> int:
        """What every ready decode worker can hold; the model's context while none has told. 0 = not known."""
        reported = [view.max_model_tokens for view in self.view.ready(model.name, Role.DECODE) if view.max_model_tokens]
        return min(reported, default=model.context_tokens)

    async def model(self, name: str) -> ServedModel:
        """For `router.validate`. Raises ModelNotFound, or NoWorkerAvailable while a model of the configuration is not up."""
        if not name and len(self.view.models) == 1:
            name = next(iter(self.view.models))
        canonical = self._canonical.get(name, name)
        model = self.view.models.get(canonical)
        if model is None:
            if canonical in self._canonical:
                raise NoWorkerAvailable(f"{canonical} is not up yet", retry_after_s=1.0)
            raise ModelNotFound(f"The model {name[:256]!r} does not exist.", param="model")
        tokenizer = await self._tokenizer(model)
        limit = self.max_model_tokens(model) or tokenizer.context_tokens or 0
        if not limit:
            raise NoWorkerAvailable(f"the context length of {canonical} is not known yet", retry_after_s=1.0)
        return ServedModel(canonical, tokenizer, limit, model.created_s, model.fingerprint)

    async def _tokenizer(self, model: ModelView) -> Tokenizer:
        task = self._tokenizers.get(model.path)
        if task is not None and not task.done():
            await asyncio.wait({task}, timeout=_TOKENIZER_WAIT_S)
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            raise NoWorkerAvailable(f"the tokenizer of {model.name} is not loaded", retry_after_s=2.0)
        return task.result()

    def _load_tokenizers(self, paths: set[str]) -> None:
        for path in paths:
            task = self._tokenizers.get(path)
            failed = task is not None and task.done() and (task.cancelled() or task.exception() is not None)
            if task is None or failed:  # a model that was broken may have been repaired: each snapshot is a new try
                self._tokenizers[path] = asyncio.create_task(_load(path), name="load tokenizer")
                self._tokenizers[path].add_done_callback(_report_failure)
        for path in [path for path, task in self._tokenizers.items() if path not in paths and task.done()]:
            del self._tokenizers[path]


async def _load(path: str) -> Tokenizer:
    return await asyncio.to_thread(Tokenizer.load, Path(path))


def _report_failure(task: asyncio.Task[Tokenizer]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        reason = error.message if isinstance(error, PdserveError) else repr(error)
        log.error("tokenizer cannot be loaded", reason=reason)


def _worker_views(infos: Iterable[worker_pb2.InfoReply]) -> Iterable[WorkerView]:
    known_states = {str(state): state for state in WorkerState}
    for info in infos:
        try:
            role = role_from_wire(info.role)
        except InvalidRequest:
            log.warning("worker with an unknown role ignored", worker=info.worker_id)
            continue
        yield WorkerView(
            ref=WorkerRef(info.worker_id, info.incarnation, info.address),
            role=role,
            model=info.model,
            # A state of a newer manager is not READY: that is all that placement has to know.
            state=known_states.get(info.state, WorkerState.FAILED),
            max_model_tokens=info.max_model_tokens,
        )
