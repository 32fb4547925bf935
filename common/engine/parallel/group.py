"""Rank 0's view of its group: starts the other ranks, and ends them all when one is lost.

    start -> ranks build their shares -> ready -> steps (`conductor`) ... -> close
                 \\________________________________\\____________________-> lost: all are killed, RankLost, once

A thread of its own (the keeper) starts the processes, for the kernel ties their lives to the thread that did; it sees a process
that ends and counts the seconds since each rank's last sign of life. Whoever waits for a rank meanwhile is woken by the end
of its sockets. There is no going on with fewer ranks, and none is replaced: the worker ends, and its next incarnation has others.

Beside its share each other rank may run something of the caller's, with a socket pair of its own to rank 0 (`beside`), and the
rank's pool. Does not know what is computed, nor what that does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from time import monotonic

import common
from common.config import ParallelConfig
from common.engine.parallel.conductor import Conductor
from common.engine.parallel.links import LINK_TIMEOUT_S, Link, socket_pair
from common.engine.parallel.messages import encode_stop
from common.engine.parallel.model import ShareLinks, ShareOrder, build_share
from common.engine.parallel.share import Share
from common.engine.parallel.stage import StageShare
from common.engine.pool_memory import BlockMemory
from common.errors import PdserveError, RankLost, StartupError, error_from_code
from common.logs import get_logger

PULSE_S = 0.5
_START_TIMEOUT_S = 900.0
_FIRST_SIGN_S = 60.0  # a process that starts says nothing while it loads its libraries
_STOP_PATIENCE_S = 5.0
_PROGRAM = "common.engine.parallel.rank_process"
_log = get_logger(__name__)


class RankGroup:
    """Made by `start`; ended by `close`, or by itself."""

    def __init__(self, parallel: ParallelConfig, timeout_s: float, program: str) -> None:
        self._parallel = parallel
        self._program = program
        self._timeout_s = timeout_s
        self._wiring = _Wiring(parallel)
        self._controls = {rank: Link(end, f"rank {rank}", LINK_TIMEOUT_S) for rank, end in self._wiring.controls.items()}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._error: PdserveError | None = None
        self._on_lost: Callable[[PdserveError], None] | None = None
        self._spawned = threading.Event()
        self._closing = threading.Event()
        self._news, self._wake = socket.socketpair()
        self._keeper: threading.Thread | None = None
        self._mine: StageShare | None = None
        self._conductor: Conductor | None = None
        self._folder = ""  # of the rendezvous, if there is one

    @classmethod
    def start(
        cls, order: ShareOrder, shares: Sequence[Share], memory: BlockMemory | None, *, name: str, program: str = ""
    ) -> RankGroup:
        """Returns when every rank has built its share. Blocking; raises the StartupError of whichever rank, or RankLost. `memory`
        is for the pool of rank 0, if it is given.
        `program` is a module that calls `rank_process.main` with what other ranks are to run beside their share; "" = nothing."""
        group = cls(order.parallel, order.engine.rank_timeout_s, program or _PROGRAM)
        if order.backend:
            group._folder = mkdtemp(prefix="pdserve-ranks-")  # only this user can enter it
            order = replace(order, rendezvous=str(Path(group._folder) / "rendezvous"))
        group._keeper = threading.Thread(target=group._keep, name="ranks", daemon=True)
        group._keeper.start()
        try:
            if not group._spawned.wait(_STOP_PATIENCE_S * 4):
                raise RankLost("the processes of the other ranks did not start")
            group._raise_if_lost()
            for rank, control in group._controls.items():
                control.send(json.dumps(group._wiring.setup(order.for_rank(rank), name)).encode())
            group._mine = build_share(order.for_rank(0), memory, group._wiring.links_of_rank_0())
            deadline_s = monotonic() + _START_TIMEOUT_S
            for control in group._controls.values():
                control.timeout_s = max(1.0, deadline_s - monotonic())
                group._take_reply(control)
                control.timeout_s = LINK_TIMEOUT_S
            group._connect()
        except PdserveError as error:
            lost = group._error
            group.close()
            if isinstance(error, RankLost):
                raise StartupError(f"a rank did not start: {(lost or error).message}") from error
            raise
        except BaseException:
            group.close()
            raise
        group._conductor = Conductor(order.parallel, group._mine, group._controls, shares, group._lose)
        _log.info("all ranks are ready", ranks=len(shares), pids=group.pids)
        return group

    def _take_reply(self, control: Link) -> None:
        reply = json.loads(control.receive())
        if reply:
            raise error_from_code(reply["error"], reply["message"], param=reply["param"])

    def _connect(self) -> None:
        """All are there."""
        for control in self._controls.values():
            control.send(b"")
        self.mine.connect()
        for control in self._controls.values():
            self._take_reply(control)

    @property
    def pids(self) -> list[int]:
        """Of the other ranks, in order."""
        return [self._processes[rank].pid for rank in sorted(self._processes)]

    @property
    def beside(self) -> list[socket.socket]:
        """Rank 0's ends of what runs beside the other ranks, in order. They stay the group's."""
        return [self._wiring.beside[rank] for rank in sorted(self._wiring.beside)]

    @property
    def parallel(self) -> ParallelConfig:
        return self._parallel

    @property
    def mine(self) -> StageShare:
        if self._mine is None:
            raise RankLost("the group has not started")
        return self._mine

    @property
    def conductor(self) -> Conductor:
        """Has them compute. It belongs to the engine's thread."""
        if self._conductor is None:
            raise RankLost("the group has not started")
        return self._conductor

    def watch(self, on_lost: Callable[[PdserveError], None]) -> None:
        """Has it called once, from another thread, when the group is lost; at once if it is."""
        with self._lock:
            error = self._error
            if error is None:
                self._on_lost = on_lost
        if error is not None:
            on_lost(error)

    def close(self) -> None:
        """Ends all ranks; returns when their processes are gone. Idempotent. Blocking."""
        if self._error is None and self._mine is not None and not self._closing.is_set():
            try:
                for control in self._controls.values():
                    control.send(encode_stop())
            except PdserveError as error:
                _log.warning("a rank could not be told to stop", reason=error.message)
        self._closing.set()
        self._wake_keeper()
        if self._keeper is not None:
            self._keeper.join(4 * _STOP_PATIENCE_S)
        for control in self._controls.values():
            control.close()
        self._wiring.close()
        self._news.close()
        self._wake.close()
        if self._mine is not None and self._error is None:
            self._mine.close()
        if self._folder:
            rmtree(self._folder, ignore_errors=True)

    def _raise_if_lost(self) -> None:
        if self._error is not None:
            raise self._error

    # -- the keeper ----------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        try:
            for rank in self._controls:
                self._processes[rank] = self._wiring.spawn(rank, self._program)
            self._wiring.close_theirs()
        except OSError as error:
            self._lose(RankLost(f"a rank cannot be started: {error.strerror}"))
        self._spawned.set()
        pidfds = {os.pidfd_open(process.pid): rank for rank, process in self._processes.items()}
        try:
            if self._error is None:
                self._watch_over(pidfds)
            self._end_processes()
        finally:
            for pidfd in pidfds:
                os.close(pidfd)

    def _watch_over(self, pidfds: dict[int, int]) -> None:
        """Until the group is closed or lost."""
        lives = {end.fileno(): rank for rank, end in self._wiring.lives.items()}
        poller = select.poll()
        for descriptor in (self._news.fileno(), *pidfds, *lives):
            poller.register(descriptor, select.POLLIN)
        silent_s = dict.fromkeys(self._processes, -_FIRST_SIGN_S)
        looked_s = monotonic()
        while not self._closing.is_set() and self._error is None:
            events = poller.poll(PULSE_S * 1000.0)
            # Where this process itself was kept from looking, nobody's silence is held against him.
            waited_s = min(monotonic() - looked_s, 2 * PULSE_S)
            looked_s = monotonic()
            for rank in silent_s:
                silent_s[rank] += waited_s
            for descriptor, _ in events:
                if descriptor in pidfds and not self._closing.is_set():
                    self._lose(RankLost(f"{self._name(pidfds[descriptor])} ended"))
                elif descriptor in lives:
                    silent_s[lives[descriptor]] = 0.0
                    if not self._wiring.lives[lives[descriptor]].recv(4096):
                        poller.unregister(descriptor)  # its process is at its end, which is seen by itself
            silent = [rank for rank, time_s in silent_s.items() if time_s > self._timeout_s]
            if silent:
                self._lose(RankLost(f"{self._name(silent[0])} gave no sign of life for {self._timeout_s:g} s"))

    def _end_processes(self) -> None:
        deadline_s = monotonic() + (_STOP_PATIENCE_S if self._error is None and self._mine is not None else 0.0)
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline_s - monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)  # also of a stopped one
                process.wait()

    def _lose(self, error: PdserveError) -> None:
        with self._lock:
            if self._error is not None or self._closing.is_set():
                return
            self._error = error
            on_lost, self._on_lost = self._on_lost, None
        _log.error("a group of ranks ends", reason=error.message)
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL)
        for link in (*self._controls.values(), *self._wiring.own_links):
            link.shut_down()
        self._wake_keeper()
        if on_lost is not None:
            on_lost(error)
        if self._mine is not None:
            self._mine.abort()

    def _wake_keeper(self) -> None:
        try:
            self._wake.send(b".")
        except OSError:
            return  # closed: the keeper is gone

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self._parallel.num_ranks}"


class _Wiring:
    """All sockets of a group, made before any process is; each end goes to one rank, and rank 0 closes those of the others."""

    def __init__(self, parallel: ParallelConfig) -> None:
        shards, stages = parallel.tensor_parallel, parallel.pipeline_parallel
        ranks = range(shards * stages)
        self.controls: dict[int, socket.socket] = {}
        self.lives: dict[int, socket.socket] = {}
        self.beside: dict[int, socket.socket] = {}
        self._ends: dict[int, dict[str, socket.socket]] = {rank: {} for rank in ranks}
        self._numbers: dict[int, dict[str, int]] = {}
        for rank in ranks[1:]:
            self.controls[rank], self._ends[rank]["control"] = socket_pair()
            self.lives[rank], self._ends[rank]["life"] = socket.socketpair()
            self.lives[rank].setblocking(False)
            self.beside[rank], self._ends[rank]["beside"] = socket.socketpair()
        for rank in ranks:
            for other in range(rank + 1, rank - rank % shards + shards):
                self._ends[rank][f"shard {other % shards}"], self._ends[other][f"shard {rank % shards}"] = socket_pair()
            if rank + shards in ranks:
                self._ends[rank]["following"], self._ends[rank + shards]["previous"] = socket_pair()
        self.own_links: list[Link] = []

    def links_of_rank_0(self) -> ShareLinks:
        mine = {name: Link(end, name, LINK_TIMEOUT_S) for name, end in self._ends[0].items()}
        self.own_links = list(mine.values())
        return ShareLinks(
            shards={int(name.split()[1]): link for name, link in mine.items() if name.startswith("shard ")},
            previous=mine.get("previous"),
            following=mine.get("following"),
        )

    def spawn(self, rank: int, program: str) -> subprocess.Popen[bytes]:
        ends = self._ends[rank]
        command = [sys.executable, "-m", program]
        command += ["--control", str(ends["control"].fileno()), "--parent", str(os.getpid())]
        ours = str(Path(common.__file__ or "").parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])}
        descriptors = [end.fileno() for end in ends.values()]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env=environment)

    def setup(self, order: ShareOrder, name: str) -> dict[str, object]:
        """What a rank is told first. Descriptors have the same numbers there as here."""
        ends = self._numbers[order.rank]
        return {
            "name": name,
            "order": order.encode(),
            "life": ends["life"],
            "beside": ends["beside"],
            "shards": {key.split()[1]: number for key, number in ends.items() if key.startswith("shard ")},
            "previous": ends.get("previous"),
            "following": ends.get("following"),
        }

    def close_theirs(self) -> None:
        """Once the others have them: an end that nobody holds any more is how the other one learns of an end."""
        self._numbers = {rank: {name: end.fileno() for name, end in ends.items()} for rank, ends in self._ends.items()}
        for rank, ends in self._ends.items():
            if rank:
                for end in ends.values():
                    end.close()

    def close(self) -> None:
        for end in (
            *self.controls.values(),
            *self.lives.values(),
            *self.beside.values(),
            *(end for ends in self._ends.values() for end in ends.values()),
        ):
            end.close()
