"""Whether a grammar compiles, found out where it can do no harm: in processes that may be killed.

    examine(wanted) ── known? ── else a free process ──line──> common.grammar.examiner ──line──> Grammar | InvalidRequest
                                        └─ no answer in time: killed, a new one is started when it is needed

At most `_PROCESSES` run, each on one grammar at a time, at low priority. Verdicts of both kinds are remembered. One `Examination`
per router; `close` ends its processes. A process starts with the first grammar and stays.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import OrderedDict
from contextlib import suppress

from common.errors import InvalidRequest, Overloaded
from common.logs import get_logger
from common.types import Grammar, GrammarKind
from router.structured.wanted import Wanted

log = get_logger(__name__)

_PROCESSES = 2
_MAX_WAITING = 64
_MAX_KNOWN = 256
_START_S = 20.0
_MAX_ANSWER_BYTES = 4 * 1024 * 1024
_NICENESS = 5
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL")


class _Examiner:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> _Examiner:
        # `-P` keeps the working directory off the path; credentials in the environment are none of its business.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "common.grammar.examiner",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_MAX_ANSWER_BYTES,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )  # fmt: skip
        examiner = cls(process)
        try:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
            async with asyncio.timeout(_START_S):
                await examiner._line()
        except BaseException:
            await examiner.end()
            raise
        return examiner

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ask(self, kind: str, text: str) -> dict[str, str]:
        stdin = self._process.stdin
        if stdin is None:
            raise EOFError
        stdin.write(json.dumps({"kind": kind, "text": text}).encode() + b"\n")
        await stdin.drain()
        answer: dict[str, str] = json.loads(await self._line())
        return answer

    async def end(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _line(self) -> bytes:
        if self._process.stdout is None:
            raise EOFError
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line


class Examination:
    """`timeout_s` is what one grammar may take, once a process has it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._known: OrderedDict[tuple[str, str], Grammar | InvalidRequest] = OrderedDict()
        self._idle: list[_Examiner] = []
        self._free = asyncio.Semaphore(_PROCESSES)
        self._num_waiting = 0
        self._closed = False

    async def examine(self, wanted: Wanted) -> Grammar:
        """The grammar as workers are to compile it. Raises InvalidRequest naming the field, or Overloaded."""
        key = (wanted.kind, wanted.text)
        verdict = self._known.get(key)
        if verdict is None:
            verdict = await self._in_turn(wanted)
            self._known[key] = verdict
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        if isinstance(verdict, InvalidRequest):
            raise InvalidRequest(verdict.message, param=wanted.param)
        return verdict

    async def close(self) -> None:
        self._closed = True
        idle, self._idle = self._idle, []
        for examiner in idle:
            await examiner.end()

    async def _in_turn(self, wanted: Wanted) -> Grammar | InvalidRequest:
        if self._num_waiting >= _MAX_WAITING:
            raise Overloaded("too many grammars wait to be examined", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            async with self._free:
                return await self._ask(wanted)
        finally:
            self._num_waiting -= 1

    async def _take(self) -> _Examiner:
        while self._idle:
            examiner = self._idle.pop()
            if examiner.alive:
                return examiner
            await examiner.end()  # by something else than a grammar
        return await _Examiner.start()

    async def _ask(self, wanted: Wanted) -> Grammar | InvalidRequest:
        try:
            examiner = await self._take()
        except (OSError, EOFError, TimeoutError) as error:
            log.error("no process to examine grammars", reason=repr(error))
            raise Overloaded("grammars cannot be examined now", retry_after_s=1.0) from error
        usable = False
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await examiner.ask(wanted.kind, wanted.text)
            usable = True
        except TimeoutError:
            return InvalidRequest(f"the grammar takes more than {self._timeout_s:g} s to compile")
        except (OSError, EOFError, ValueError):
            return InvalidRequest("the grammar takes the compiler down")
        finally:
            # Also when the client left: what the process is busy with is nobody's any more.
            if usable and not self._closed:
                self._idle.append(examiner)
            else:
                await examiner.end()
        if "error" in answer:
            return InvalidRequest(answer["error"])
        kind = GrammarKind(wanted.kind) if wanted.kind in list(GrammarKind) else GrammarKind.LARK
        return Grammar(kind, answer["text"])
