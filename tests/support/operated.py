"""A cluster as the command line sees it, without one: a state file, a manager's gRPC face, and processes that show metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from common.codec import error_to_wire
from common.errors import PdserveError
from common.metrics import LeaseReadings, MaskReadings, RouterMetrics, WorkerMetrics, WorkerReadings, start_metrics_server
from common.rpc import ERROR_TRAILER
from common.wire import registry_pb2, registry_pb2_grpc, types_pb2, worker_pb2
from deploy.cluster_state import ClusterState, started_at, state_path, write_state

TOKEN = "operator-secret"
MODEL = "tiny"


@dataclass
class FakeManager(registry_pb2_grpc.ControlServicer):
    """Answers with `snapshot`; remembers what was asked. `refuse` makes it fail."""

    snapshot: registry_pb2.ClusterSnapshot
    report: registry_pb2.AutoscalerReport | None = None
    refuse: PdserveError | None = None
    asked: list[Any] = field(default_factory=list)

    def Status(self, request: Any, context: Any) -> registry_pb2.ClusterSnapshot:
        return self._answer(request, context)

    def Scale(self, request: Any, context: Any) -> registry_pb2.ClusterSnapshot:
        return self._answer(request, context)

    def Drain(self, request: Any, context: Any) -> registry_pb2.ClusterSnapshot:
        return self._answer(request, context)

    def Flip(self, request: Any, context: Any) -> registry_pb2.ClusterSnapshot:
        return self._answer(request, context)

    def Roll(self, request: Any, context: Any) -> registry_pb2.ClusterSnapshot:
        return self._answer(request, context)

    def Autoscaler(self, request: Any, context: Any) -> registry_pb2.AutoscalerReport:
        self._answer(request, context)
        if self.report is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no autoscaler here")
        return self.report

    def _answer(self, request: Any, context: Any) -> registry_pb2.ClusterSnapshot:
        assert ("authorization", f"Bearer {TOKEN}") in context.invocation_metadata()
        self.asked.append(request)
        if self.refuse is not None:
            context.set_trailing_metadata(((ERROR_TRAILER, error_to_wire(self.refuse).SerializeToString()),))
            context.abort(grpc.StatusCode[self.refuse.grpc_code], self.refuse.message)
        return self.snapshot


class FakeProcess:
    """A router or worker, as far as its metrics go: real ones, on a real port, of which `metrics` is the handle."""

    def __init__(self, metrics: Callable[[CollectorRegistry], Any]) -> None:
        registry = CollectorRegistry()
        self.metrics = metrics(registry)
        self.address, self.stop = start_metrics_server(registry, "127.0.0.1", cluster_token=TOKEN)


@dataclass
class Operated:
    home: Path
    name: str
    manager: FakeManager
    router: FakeProcess
    workers: dict[str, FakeProcess]
    readings: dict[str, WorkerReadings]
    port: int  # of the manager

    def cli(self, *arguments: str, width: int | None = None) -> Any:
        """Runs a command in this process."""
        from deploy.app import app

        environment = {"PDSERVE_HOME": str(self.home), "COLUMNS": None if width is None else str(width)}
        return CliRunner().invoke(app, list(arguments), env=environment)


def readings(**change: int) -> WorkerReadings:
    """An idle worker's, but for `change`."""
    counts = dict.fromkeys((name for name, kind in WorkerReadings.__annotations__.items() if kind == "int"), 0)
    others: dict[str, Any] = {
        "leases": LeaseReadings(),
        "steps_by_accepted": (),
        "guesses_by_author": {},
        "work_s": {},
        "masks": MaskReadings(),
    }
    return WorkerReadings(**{**counts, **others, "blocks_total": 100, "blocks_free": 100, **change})


def worker_info(worker_id: str, state: str = "ready", **change: Any) -> worker_pb2.InfoReply:
    model, role, _ = worker_id.split("/")
    values: dict[str, Any] = {
        "incarnation": 1,
        "pid": os.getpid(),
        "address": "127.0.0.1:9",
        "blocks_total": 100,
        "blocks_free": 75,
        "requests_running": 2,
        "device": "cpu",
        "dtype": "float32",
        **change,
    }
    wire_role = types_pb2.ROLE_PREFILL if role == "prefill" else types_pb2.ROLE_DECODE
    return worker_pb2.InfoReply(worker_id=worker_id, model=model, role=wire_role, state=state, **values)


@contextmanager
def operated(
    home: Path, name: str = "local", *, workers: tuple[str, ...] = ("tiny/prefill/0", "tiny/decode/0")
) -> Iterator[Operated]:
    """`workers` are ids. The launcher of this cluster is the process that runs the test."""
    with ExitStack() as ending:
        state_of = {worker_id: readings() for worker_id in workers}

        def metrics_of(worker_id: str) -> Callable[[CollectorRegistry], WorkerMetrics]:
            model, role, _ = worker_id.split("/")
            return lambda registry: WorkerMetrics(registry, model=model, role=role, read=lambda: state_of[worker_id])

        router = FakeProcess(RouterMetrics)
        processes = {worker_id: FakeProcess(metrics_of(worker_id)) for worker_id in workers}
        for process in (router, *processes.values()):
            ending.callback(process.stop)
        snapshot = registry_pb2.ClusterSnapshot(
            version=3,
            cluster=name,
            models=[registry_pb2.ModelInfo(name=MODEL, context_tokens=2048, desired_prefill=1, desired_decode=1)],
            routers=[
                registry_pb2.RouterInfo(
                    router_id="r", http_address=router.address, grpc_address="127.0.0.1:50051", pid=os.getpid()
                )
            ],
            workers=[worker_info(one, metrics_address=process.address) for one, process in processes.items()],
            events=[
                registry_pb2.ClusterEvent(
                    sequence=1, at_s=time.time() - 5, kind="ready", worker_id="tiny/decode/0", model=MODEL, text="after 2 s"
                )
            ],
        )
        manager = FakeManager(snapshot)
        server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        registry_pb2_grpc.add_ControlServicer_to_server(manager, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        ending.callback(lambda: server.stop(0).wait())
        announce(home, name, f"127.0.0.1:{port}")
        ending.callback(lambda: state_path(home, name).unlink(missing_ok=True))
        yield Operated(home, name, manager, router, processes, state_of, port)


def announce(home: Path, name: str, manager_address: str) -> None:
    pid = os.getpid()
    write_state(
        home,
        ClusterState(
            cluster=name,
            cluster_id="0" * 32,
            launcher_pid=pid,
            launcher_started=started_at(pid) or 0,
            manager_address=manager_address,
            token=TOKEN,
        ),
    )
