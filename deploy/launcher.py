"""`pdserve up`: one process that brings a cluster up, stays with it, and takes it down.

    models fetched -> janitor -> Ray -> pool manager, its state file -> router -> every worker ready -> "how to call it"
    -> (a signal, or the manager's end) -> router drained -> workers stopped -> Ray ended -> files removed

The launcher owns the processes, not the work: requests never pass through it. A router or a janitor that dies is started
again; a pool manager that dies ends the cluster. If the launcher itself is killed, the janitor does what it cannot do any more.

On a Ray of several hosts (`ray up`) it runs on the head, and so do manager, router and what `deploy.head_services` starts.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.config import Config, ModelConfig, RouterConfig, pdserve_home
from common.errors import ClusterError, PdserveError
from common.logs import configure_logging, get_logger
from common.model_store import pull
from common.wire.registry_pb2 import ClusterSnapshot
from deploy.cluster_state import ClusterState, cluster_lock, started_at, state_path, write_state
from deploy.diagnosis.finding import Severity
from deploy.diagnosis.ports import check_ports
from deploy.head_services import HeadService, head_services
from deploy.janitor_process import JanitorProcess
from deploy.kernels_ahead import compile_kernels_ahead
from deploy.logs.runs import begin_run
from deploy.manager_actor import ACTOR_NAME, ManagerActor
from deploy.manager_spec import HealthPolicy, ManagerSpec, ModelToServe
from deploy.ray_environment import actor_environment, namespace_of
from deploy.ray_host import answer
from deploy.ray_start import LOOPBACK, join_ray, start_private_ray
from deploy.remains import clear_remains
from deploy.router_address import RouterAddress
from deploy.scraping import TARGETS_FILE, TOKEN_FILE, prepare, scraping_folder, update
from deploy.worker_host import build_worker

log = get_logger(__name__)

Say = Callable[[str], None]

_MANAGER_START_TIMEOUT_S = 120.0
_READY_TIMEOUT_S = 900.0  # beyond the time that a worker may wait for room
_ROUTER, _JANITOR = "router", "janitor"
_ROUTER_GRACE_S = 5.0
_SHUTDOWN_TIMEOUT_S = 30.0
_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.2, 10.0


@dataclass(frozen=True)
class Launch:
    """What the command line asked for."""

    config_path: Path
    overrides: tuple[str, ...]
    config: Config
    token: str = field(repr=False)
    cluster_id: str  # stands in our environment already, for children to inherit
    announce: int | None = None  # a pipe on which a word is said once `pdserve status` can be asked


def launch(asked: Launch, say: Say) -> int:
    """Runs a cluster until it is told to stop; returns the exit status. Blocking, on the main thread."""
    home = pdserve_home()
    name = asked.config.cluster
    with cluster_lock(home, name) as lock:
        clear_remains(home, name)
        asked = _with_log_folder(asked, home)
        configure_logging(asked.config.logging, process="launcher")
        log.info("cluster starting", cluster=name, version=distribution_version("pdserve"), config=str(asked.config_path))
        try:
            _check_ports(asked.config.router)
            if asked.config.ray.address is None:
                compile_kernels_ahead([model.engine for model in asked.config.models], home / "kernels")
            models = [_model_to_serve(model, asked.config, home, say) for model in asked.config.models]
            return _launch(asked, models, home, lock, say)
        except PdserveError as error:
            log.error("the cluster ends", error=error.code, reason=error.message)
            raise


def _launch(asked: Launch, models: Sequence[ModelToServe], home: Path, lock: int, say: Say) -> int:
    name = asked.config.cluster
    # Short, because names of unix sockets are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp"))
    scraping = scraping_folder(home, name)
    going = [folder, state_path(home, name), scraping / TARGETS_FILE, scraping / TOKEN_FILE]
    janitor = JanitorProcess(asked.cluster_id, going, lock)
    janitor.start()
    try:
        services = head_services(asked.config, run_folder=folder, scraping=scraping)
        say(f"starting cluster {name!r}: Ray, pool manager, router, {_count_workers(asked.config)} workers")
        # Before the loop and on this thread: the kernel ends Ray's processes together with the thread that started them.
        if asked.config.ray.address is None:
            start_private_ray(folder)
            host = LOOPBACK
        else:
            host = join_ray(asked.config.ray.address, trusted_network=asked.config.network.trusted)
        try:
            cluster = _Cluster(asked, models, services, home, host, folder, janitor, say)
            return asyncio.run(cluster.run())
        finally:
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in going[2:]:
            path.unlink(missing_ok=True)
        janitor.let_go(_SHUTDOWN_TIMEOUT_S)


class _Cluster:
    def __init__(
        self,
        asked: Launch,
        models: Sequence[ModelToServe],
        services: Sequence[HeadService],
        home: Path,
        host: str,
        folder: Path,
        janitor: JanitorProcess,
        say: Say,
    ) -> None:
        self._asked = asked
        self._models = tuple(models)
        self._services = tuple(services)
        self._host = host
        self._folder = folder
        self._scraping = scraping_folder(home, asked.config.cluster)
        self._cluster_id = asked.cluster_id
        self._home = home
        self._janitor = janitor
        self._state: ClusterState | None = None
        self._say = say
        self._token = asked.token
        self._stop = asyncio.Event()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._manager: Any = None
        self._manager_is_gone = False
        self._router_address = RouterAddress(asked.config.router)

    async def run(self) -> int:
        self._listen_to_signals()
        prepare(self._scraping, self._token)
        manager_address = await self._start_manager()
        serving = asyncio.ensure_future(self._announce(manager_address))
        lasting = {
            asyncio.ensure_future(self._watch_manager()),
            asyncio.ensure_future(
                self._keep(_ROUTER, lambda: self._start_router(manager_address), differs=self._router_address.forget)
            ),
            asyncio.ensure_future(self._keep_janitor()),
            asyncio.ensure_future(self._follow_membership()),
            asyncio.ensure_future(self._wait_for_signal()),
            *(asyncio.ensure_future(self._keep(one.name, functools.partial(_start, one.command))) for one in self._services),
        }
        why = ""
        try:
            done, _ = await asyncio.wait({serving, *lasting}, return_when=asyncio.FIRST_COMPLETED)
            if done == {serving} and serving.exception() is None:
                done, _ = await asyncio.wait(lasting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            return 0
        except PdserveError as error:
            why = f": {error.message}"
            raise
        finally:
            self._say(f"stopping{why}; Ctrl-C again to force")
            log.info("cluster stopping", asked=self._stop.is_set())
            for task in (serving, *lasting):
                task.cancel()
            await asyncio.wait({serving, *lasting})
            await self._take_down()
            self._say("stopped")
            log.info("cluster stopped")

    # -- up ------------------------------------------------------------------------------------------------------------

    async def _start_manager(self) -> str:
        config = self._asked.config
        spec = ManagerSpec(
            cluster=config.cluster,
            models=self._models,
            transfer=config.transfer,
            logging=config.logging,
            tracing=config.tracing,
            cluster_token=self._token,
            host=self._host,
            port=config.network.manager_port,
            trusted_network=self._host != LOOPBACK,
            health=HealthPolicy(**config.health.model_dump()),
            cores_file=str(self._folder / "cores") if config.ray.address is None else "",
        )
        here = ray.get_runtime_context().get_node_id()
        options = {
            "name": ACTOR_NAME,
            "namespace": namespace_of(config.cluster),
            "lifetime": "detached",
            "num_cpus": 0,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),  # where routers and operators look for it
            "runtime_env": actor_environment(self._cluster_id, threads=None),
        }
        actor = ray.remote(ManagerActor).options(**options)
        self._manager = actor.remote(spec, self._cluster_id, config.ray, build_worker)
        try:
            async with asyncio.timeout(_MANAGER_START_TIMEOUT_S):
                return await answer(cast(Awaitable[str], self._manager.start.remote()))
        except TimeoutError as error:
            raise ClusterError("the pool manager did not start in time") from error

    async def _keep_janitor(self) -> None:
        """Without it a launcher that is killed would leave everything behind."""
        first = self._janitor.process

        def start() -> subprocess.Popen[bytes]:
            nonlocal first
            if first is not None:
                started, first = first, None
                return started
            started = self._janitor.start()
            self._tell_state()
            return started

        await self._keep(_JANITOR, start)

    async def _keep(
        self, name: str, start: Callable[[], subprocess.Popen[bytes]], *, differs: Callable[[], bool] = lambda: False
    ) -> None:
        """Starts a process, and again whenever it ends. One that ends at once, over and over, ends the cluster; so does one that
        cannot do what it was asked to, unless it is asked for something else the next time (`differs`)."""
        backoff_s = _BACKOFF_FIRST_S
        while True:
            started_s = time.monotonic()
            child = self._children[name] = start()
            status = await _exit_status(child)
            if time.monotonic() - started_s > 60.0:
                backoff_s = _BACKOFF_FIRST_S
            if backoff_s > _BACKOFF_LAST_S or (status == 1 and not differs()):
                hint = "; its last words: pdserve logs router" if name == _ROUTER else ""
                raise ClusterError(f"the {name} ended with status {status}{hint}")
            log.warning("a process ended; starting it again", name=name, status=status)
            await asyncio.sleep(backoff_s)
            backoff_s *= 2

    def _start_router(self, manager_address: str) -> subprocess.Popen[bytes]:
        settings = [setting for service in self._services for setting in service.router_settings]
        settings += self._router_address.settings()
        return _start_router(self._asked, settings, manager_address, self._token)

    async def _follow_membership(self) -> None:
        """Tells Prometheus of every change, and learns where the router listens."""
        version = -1
        while True:
            snapshot = await self._snapshot_after(version)
            version = snapshot.version
            update(self._scraping, snapshot)
            if _ROUTER in self._children:
                self._router_address.note(snapshot, self._children[_ROUTER].pid)

    async def _announce(self, manager_address: str) -> None:
        """Waits until everything serves, tells about it, and leaves the state file."""
        pid = os.getpid()
        self._state = ClusterState(
            cluster=self._asked.config.cluster,
            cluster_id=self._cluster_id,
            launcher_pid=pid,
            launcher_started=started_at(pid) or 0,
            manager_address=manager_address,
            token=self._token,
            config_path=str(self._asked.config_path),
            files=tuple(map(str, self._janitor.files)),
        )
        self._tell_state()
        if self._asked.announce is not None:
            os.write(self._asked.announce, b"up\n")
            os.close(self._asked.announce)
        timeout_s = _READY_TIMEOUT_S + self._asked.config.ray.room_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                snapshot = await self._until_ready()
        except TimeoutError as error:
            raise ClusterError(f"not ready within {timeout_s:g} s") from error
        _tell_how_to_call(snapshot, self._asked.config, self._say)

    def _tell_state(self) -> None:
        if self._state is not None:
            pid, started = self._janitor.identity
            write_state(self._home, replace(self._state, janitor_pid=pid, janitor_started=started))

    async def _until_ready(self) -> ClusterSnapshot:
        version = -1
        told: dict[str, str] = {}
        while True:
            snapshot = await self._snapshot_after(version)
            version = snapshot.version
            for worker in snapshot.workers:
                if told.get(worker.worker_id) != worker.state:
                    told[worker.worker_id] = worker.state
                    self._say(f"  {worker.worker_id}: {worker.state}" + (f" ({worker.failure})" if worker.failure else ""))
                if worker.state == "failed":
                    raise ClusterError(f"{worker.worker_id} cannot start: {worker.failure}")
            ready = sum(worker.state == "ready" for worker in snapshot.workers)
            if snapshot.routers and ready >= _count_workers(self._asked.config):
                return snapshot

    async def _snapshot_after(self, version: int) -> ClusterSnapshot:
        try:
            return ClusterSnapshot.FromString(await answer(cast(Awaitable[bytes], self._manager.snapshot_after.remote(version))))
        except PdserveError as error:
            self._manager_is_gone = True
            raise ClusterError(f"the pool manager is gone: {error.message}") from error

    async def _watch_manager(self) -> None:
        """Returns when somebody asked the manager to shut the cluster down; raises when it broke."""
        try:
            await answer(cast(Awaitable[None], self._manager.wait_ended.remote()))
        except PdserveError as error:
            self._manager_is_gone = True
            raise ClusterError(f"the pool manager is gone: {error.message}") from error

    async def _wait_for_signal(self) -> None:
        await self._stop.wait()

    # -- down ----------------------------------------------------------------------------------------------------------

    def _listen_to_signals(self) -> None:
        def on_signal() -> None:
            if self._stop.is_set():
                os._exit(130)  # the janitor cleans up
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    async def _take_down(self) -> None:
        for name in (_ROUTER, *(service.name for service in self._services)):
            if name in self._children:
                await _end(self._children[name])
        if not self._manager_is_gone:  # else Ray has ended its workers with it
            try:
                async with asyncio.timeout(_SHUTDOWN_TIMEOUT_S):
                    await answer(cast(Awaitable[None], self._manager.shut_down.remote()))
            except (TimeoutError, PdserveError) as error:
                log.warning("the workers did not stop in time", error=str(error))
        if self._asked.config.ray.address is not None:
            ray.kill(self._manager)
        state_path(self._home, self._asked.config.cluster).unlink(missing_ok=True)


def _check_ports(router: RouterConfig) -> None:
    """Before anything is started: the router would find out only when Ray and the manager are up."""
    for finding in check_ports(router, ours=frozenset()):
        if finding.severity is Severity.FAILURE:
            raise ClusterError(f"{finding.what}: {finding.found}; {finding.advice}", param=f"router.{finding.what.lower()}_port")


def _with_log_folder(asked: Launch, home: Path) -> Launch:
    """Every process of the cluster is told where this run's logs are; the router, which reads the file itself, by an override."""
    logging = asked.config.logging
    if logging.folder is not None or logging.max_file_bytes == 0:
        return asked
    folder = str(begin_run(home, asked.config.cluster, asked.cluster_id, keep=logging.keep_runs))
    config = asked.config.model_copy(update={"logging": logging.model_copy(update={"folder": folder})})
    return replace(asked, config=config, overrides=(*asked.overrides, f"logging.folder={json.dumps(folder)}"))


def _model_to_serve(model: ModelConfig, config: Config, home: Path, say: Say) -> ModelToServe:
    files = pull(model.source, home=home, progress=say)
    threads = model.engine.threads or max(1, (os.cpu_count() or 1) // max(1, _count_ranks(config)))
    if not files.path.resolve().is_relative_to((home / "models").resolve()):
        model = model.model_copy(update={"source": str(files.path)})  # workers have other working directories
    return ModelToServe(config=model, path=str(files.path), created_s=int(time.time()), threads=threads)


def _count_ranks(config: Config) -> int:
    return sum(pool.replicas * pool.num_ranks for model in config.models for pool in (model.prefill, model.decode))


def _count_workers(config: Config) -> int:
    return sum(model.prefill.replicas + model.decode.replicas for model in config.models)


def _start_router(asked: Launch, settings: Sequence[str], manager_address: str, token: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "router", "--config", str(asked.config_path), "--manager", manager_address]
    command += ["--drain-grace-s", str(_ROUTER_GRACE_S)]
    for override in (*asked.overrides, *settings):
        command += ["--set", override]
    return _start(command, PDSERVE_CLUSTER_TOKEN=token)


def _start(command: Sequence[str], **variables: str) -> subprocess.Popen[bytes]:
    # A session of its own: at Ctrl-C the launcher ends it.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **variables}, start_new_session=True)


async def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_ROUTER_GRACE_S + 1.0):
            await _exit_status(process)
    except TimeoutError:
        process.kill()
        process.wait(_ROUTER_GRACE_S)


async def _exit_status(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end of a child without a thread."""
    if process.poll() is None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        descriptor = os.pidfd_open(process.pid)
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    return process.wait()


def _tell_how_to_call(snapshot: ClusterSnapshot, config: Config, say: Say) -> None:
    router = snapshot.routers[0]
    model = config.models[0].name
    body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
    console = f"  console      http://{router.http_address}/\n" if config.router.console.enabled else ""
    say(
        f"""
ready: {len(snapshot.workers)} workers

{console}  OpenAI HTTP  http://{router.http_address}/v1
  gRPC         {router.grpc_address}

  curl -N http://{router.http_address}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{body}'
  pdserve chat --stats
  pdserve status

Ctrl-C stops all of it."""
    )
