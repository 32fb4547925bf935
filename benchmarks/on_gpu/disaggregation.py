"""Prefill and decode as two processes on one GPU, against two whole engines there: the same memory, the same requests.

D1, goodput: the highest rate at which 90 % of all requests meet both limits. Time to the first token: five times that of their
prompt alone plus 50 ms; time per token after it: one and a half times that of a step alone. Arrivals are a Poisson process,
lengths are drawn around a conversation's (mean prompt 750 tokens, mean answer 21), seed fixed: all layouts see the same requests.
The highest rate is searched by halves, so a layout is measured at three rates.

D3, the tail: sixteen answers are under way when a prompt of 32k tokens comes; the 99th percentile of the gaps between their
tokens until that prompt's first token.

How the two share the GPU is one of the ways of `sharing`; without the word for one, all that can be had here are measured, and
held against whole engines that take turns or, with MPS, are joined as well: against the better of both.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.report import Figure, Report
from benchmarks.on_gpu.serving import Job, News, Ready, decode_process, prefill_process, shared_process, whole_process
from benchmarks.on_gpu.settings import DecodeSettings, PrefillSettings, Settings
from benchmarks.on_gpu.sharing import Role, Sharing, environment, environment_of, mps_server, obstacle_of
from common.errors import EngineFailure, PdserveError

START_S = 240.0
LAST_LAYOUT_S = 450.0
"""After so long no other layout is begun: the block ends within ten minutes."""
ATTAINMENT = 0.9


@dataclass(frozen=True)
class Scale:
    model: str
    share: float | None  # of the device, for each of two processes
    prompt_tokens: int  # mean
    answer_tokens: int
    longest_prompt: int
    rates: tuple[float, ...]
    seconds: float  # of each rate
    chunk: int
    streams: int
    stream_context: int
    stream_tokens: int
    long_prompt: int


ON_GPU = Scale("random:llama-3-8b", 0.46, 750, 21, 8192, (4, 8, 12, 16, 24, 32, 48), 12.0, 1024, 16, 1024, 1500, 32_768)
TOY = Scale("random:toy", None, 24, 6, 96, (8,), 1.0, 32, 4, 16, 400, 256)


@dataclass
class Answer:
    job: Job
    sent_s: float
    came_s: list[float] = field(default_factory=list)  # one for each token
    failed: bool = False

    @property
    def ttft_s(self) -> float:
        return self.came_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.came_s[-1] - self.came_s[0]) / max(1, len(self.came_s) - 1)


class Layout:
    """Processes that serve, and the pipes to those that take jobs, in turn."""

    def __init__(self, doors: Sequence[Connection], notes: Sequence[str]) -> None:
        self.doors = doors
        self.notes = notes
        self._next = 0

    def send(self, job: Job) -> Answer:
        door = self.doors[self._next % len(self.doors)]
        self._next += 1
        answer = Answer(job, time.monotonic())
        door.send(job)
        return answer

    def run(self, jobs: Sequence[tuple[float, Job]], patience_s: float = 120.0) -> list[Answer]:
        """Sends each job at its time, in seconds from now; returns when all have ended, or nobody says anything any more."""
        answers: dict[str, Answer] = {}
        waiting = list(jobs)
        started_s = heard_s = time.monotonic()
        open_jobs = 0
        while waiting or open_jobs:
            now_s = time.monotonic()
            while waiting and started_s + waiting[0][0] <= now_s:
                _, job = waiting.pop(0)
                answers[job.name] = self.send(job)
                open_jobs += 1
            wait_s = max(0.0, started_s + waiting[0][0] - now_s) if waiting else 1.0
            said = multiprocessing.connection.wait(list(self.doors), min(wait_s, 1.0))
            for door in self.doors:
                if door not in said:
                    continue
                heard_s = time.monotonic()
                news: News = door.recv()
                for name, count in news.tokens:
                    answers[name].came_s.extend([news.at_s] * count)
                for name in news.failed:
                    answers[name].failed = True
                open_jobs -= len(news.ended) + len(news.failed)
            if time.monotonic() - heard_s > patience_s:
                raise TimeoutError(f"{open_jobs} jobs are open and nothing has come for {patience_s:.0f} s")
        return list(answers.values())


@dataclass(frozen=True)
class Arrangement:
    """Whose processes are there, and what they are told of the GPU."""

    sharing: Sharing
    apart: bool

    @property
    def name(self) -> str:
        joined = " (mps)" if self.sharing is Sharing.MPS else ""
        return f"apart ({self.sharing.value})" if self.apart else f"two whole engines{joined}"


class _Starting:
    """Processes and pipes of a layout while it is there."""

    def __init__(self, report: Report, scale: Scale, arrangement: Arrangement, pipes: Path | None) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._report, self._scale, self._arrangement, self._pipes = report, scale, arrangement, pipes
        self.limits = DecodeSettings(step_tokens=scale.chunk, local_prefill="never" if arrangement.apart else "always")
        self.started: list[SpawnProcess] = []
        self.ours: list[Connection] = []

    def settings(self, captured_rows: int) -> Settings:
        scale = self._scale
        longest = max(scale.long_prompt, scale.longest_prompt) + 2048
        if self._report.device == "cuda":
            return Settings("cuda", device_memory_share=scale.share, captured_rows=captured_rows, max_model_tokens=longest)
        return Settings("cpu", dtype="float32", kernels="torch", kv_pool_tokens=4096, max_model_tokens=1024)

    def door(self) -> tuple[Connection, Connection]:
        ours, theirs = self._context.Pipe()
        self.ours.append(ours)
        return ours, theirs

    def start(self, role: Role, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Ends of pipes among the arguments are the process's from then on."""
        process = self._context.Process(target=target, args=arguments, daemon=True)
        with environment(environment_of(role, self._pipes)):
            process.start()
        self.started.append(process)

    def whole(self) -> Layout:
        doors: list[Connection] = []
        notes: list[str] = []
        for _ in range(2):
            ours, theirs = self.door()
            self.start(Role.WHOLE, whole_process, (theirs, self._scale.model, self.settings(256), self.limits))
            theirs.close()
            doors.append(ours)
            notes += ready(ours).notes  # one after the other: each takes its share of what is free
        return Layout(doors, notes)

    def apart(self) -> Layout:
        (to_decode, decode_end), (to_prefill, prefill_end) = self.door(), self.door()
        one, other = self._context.Pipe()
        prefill = partial(
            prefill_process, prefill_end, one, self._scale.model, self.settings(0), PrefillSettings(self._scale.chunk)
        )
        decode = partial(decode_process, decode_end, other, self._scale.model, self.settings(256), self.limits)
        theirs = [decode_end, prefill_end, one, other]
        notes: list[str] = []
        if self._arrangement.sharing.in_one_process:
            to_both, both_end = self.door()
            arguments = (self._arrangement.sharing, self._report.device, decode, prefill, both_end)
            self.start(Role.WHOLE, shared_process, arguments)
            both_end.close()
            notes += ready(to_both).notes
        else:
            self.start(Role.PREFILL, prefill, ())
            self.start(Role.DECODE, decode, ())
        for end in theirs:
            end.close()
        for door in (to_decode, to_prefill):
            notes += ready(door).notes
        return Layout([to_decode], notes)

    def end(self) -> None:
        for door in self.ours:
            door.close()
        for process in self.started:
            process.join(15.0)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def processes(report: Report, scale: Scale, arrangement: Arrangement) -> Iterator[Layout]:
    """Raises StartupError if the GPU cannot be shared in that way, OSError or EOFError if an engine does not start or ends."""
    server: AbstractContextManager[Path | None] = mps_server() if arrangement.sharing is Sharing.MPS else nullcontext()
    with server as pipes:
        starting = _Starting(report, scale, arrangement, pipes)
        try:
            yield starting.apart() if arrangement.apart else starting.whole()
        finally:
            starting.end()


def ready(door: Connection) -> Ready:
    if not door.poll(START_S):
        raise TimeoutError("an engine did not start")
    message: Ready = door.recv()
    return message


@dataclass(frozen=True)
class Found:
    goodput: float  # requests a second
    tail_s: float


def run_disaggregation(report: Report, sharing: Sharing | None = None) -> None:
    """`sharing` None: every way that can be had here."""
    scale = ON_GPU if report.device == "cuda" else TOY
    until_s = time.monotonic() + LAST_LAYOUT_S
    limits: tuple[float, float] | None = None
    found: dict[Arrangement, Found] = {}
    for arrangement in arrangements(report, sharing):
        if time.monotonic() > until_s:
            report.note(f"{arrangement.name}: not measured, for there was no time left; ask for it by --sharing")
            continue
        try:
            with processes(report, scale, arrangement) as layout:
                for note in layout.notes:
                    report.note(f"{arrangement.name}: {note}")
                layout.run([(0.0, job) for job in conversation(scale, 6, seed=1)])  # warm up
                if limits is None:
                    limits = limits_of(layout, scale)
                    report.note(
                        f"limits: 5 x {limits[0] * 1e6:.1f} us a prompt token + 50 ms, and 1.5 x {limits[1] * 1e3:.2f} ms"
                    )
                found[arrangement] = measured(report, layout, scale, limits, arrangement.name)
        except (PdserveError, OSError, EOFError) as error:
            report.note(f"{arrangement.name}: not to be had: {error}")
    compare(report, found)


def arrangements(report: Report, sharing: Sharing | None) -> list[Arrangement]:
    """Whole engines first, for the limits are theirs."""
    wanted = list(Sharing) if sharing is None else [sharing]
    ways = []
    for way in wanted:
        obstacle = obstacle_of(way, report.device)
        if obstacle is None:
            ways.append(way)
        else:
            report.note(f"{way.value}: not to be had: {obstacle}")
    whole = [Arrangement(Sharing.TURNS, apart=False)]
    if Sharing.MPS in ways:
        whole.append(Arrangement(Sharing.MPS, apart=False))
    return [*whole[:1], *(Arrangement(way, apart=True) for way in ways), *whole[1:]]


def measured(report: Report, layout: Layout, scale: Scale, limits: tuple[float, float], name: str) -> Found:
    tail_s = tail_of(layout, scale)
    what = f"{name}: P99 gap between tokens while {scale.long_prompt} tokens are prefilled"
    report.add(Figure("D3", what, tail_s * 1e3, "ms"))
    return Found(goodput_of(report, layout, scale, limits, name), tail_s)


def compare(report: Report, found: dict[Arrangement, Found]) -> None:
    """Each way apart, and the best of them, against the best of the whole engines."""
    whole = [result for arrangement, result in found.items() if not arrangement.apart]
    apart = {arrangement: result for arrangement, result in found.items() if arrangement.apart}
    if not whole or not apart:
        report.note("there is nothing to compare")
        return
    goodput, tail_s = max(result.goodput for result in whole), min(result.tail_s for result in whole)

    def ratio(result: Found) -> float:
        return result.goodput / goodput if goodput else 0.0

    for arrangement, result in apart.items():
        report.add(
            Figure("D1", f"goodput, {arrangement.name} over whole", ratio(result), "x"),
            Figure("D3", f"P99 gap, {arrangement.name} over whole", result.tail_s / tail_s, "x", lower_is_better=True),
        )
    best, result = max(apart.items(), key=lambda item: (item[1].goodput, -item[1].tail_s))
    report.note(f"best: {best.name}")
    report.add(
        Figure("D1", "goodput, apart over whole", ratio(result), "x", target=1.3),
        Figure("D3", "P99 gap, apart over whole", result.tail_s / tail_s, "x", target=0.2, lower_is_better=True),
    )


def conversation(scale: Scale, count: int, seed: int) -> list[Job]:
    chance = random.Random(seed)
    jobs = []
    for index in range(count):
        prompt = min(scale.longest_prompt, max(8, int(chance.lognormvariate(0.0, 0.8) / 1.377 * scale.prompt_tokens)))
        answer = max(2, min(8 * scale.answer_tokens, int(chance.expovariate(1 / scale.answer_tokens)) + 2))
        jobs.append(Job(f"{seed}/{index}", tuple(chance.randrange(10, 500) for _ in range(prompt)), answer))
    return jobs


def limits_of(layout: Layout, scale: Scale) -> tuple[float, float]:
    """Seconds of a prompt token, and of a step, with nobody else there."""
    per_token, steps = [], []
    for index in range(3):
        job = Job(f"alone/{index}", tuple(10 + (index + place) % 400 for place in range(scale.prompt_tokens)), 24)
        answer = layout.run([(0.0, job)])[0]
        per_token.append(answer.ttft_s / scale.prompt_tokens)
        steps.append(answer.tpot_s)
    return statistics.median(per_token), statistics.median(steps)


def goodput_of(report: Report, layout: Layout, scale: Scale, limits: tuple[float, float], name: str) -> float:
    """By halves: a rate that is too high is not followed by higher ones."""
    good, low, high = 0.0, 0, len(scale.rates)
    while low < high:
        middle = (low + high) // 2
        if attainment(report, layout, scale, limits, scale.rates[middle], name) >= ATTAINMENT:
            good, low = scale.rates[middle], middle + 1
        else:
            high = middle
    report.add(Figure("D1", f"{name}: highest rate with {ATTAINMENT:.0%} within limits", good, "req/s"))
    return good


def attainment(report: Report, layout: Layout, scale: Scale, limits: tuple[float, float], rate: float, name: str) -> float:
    """Share of the requests that meet both limits."""
    chance = random.Random(int(rate * 1000))
    jobs, at_s = [], 0.0
    for job in conversation(scale, int(rate * scale.seconds), seed=int(rate * 10)):
        at_s += chance.expovariate(rate)
        jobs.append((at_s, job))
    answers = layout.run(jobs)
    met = sum(meets(answer, limits) for answer in answers) / len(answers)
    whole = [answer for answer in answers if len(answer.came_s) > 1]
    ttft_s = sorted(answer.ttft_s for answer in whole)
    tpot_s = sorted(answer.tpot_s for answer in whole)
    report.add(Figure("D1", f"{name}, {rate:g} requests/s: share that meets both limits", met, ""))
    if whole:
        report.add(
            Figure("D1", f"{name}, {rate:g} requests/s: P50 time to the first token", ttft_s[len(ttft_s) // 2] * 1e3, "ms"),
            Figure("D1", f"{name}, {rate:g} requests/s: P90 time per token", tpot_s[int(0.9 * len(tpot_s))] * 1e3, "ms"),
        )
    return met


def meets(answer: Answer, limits: tuple[float, float]) -> bool:
    if answer.failed or len(answer.came_s) < 2:
        return False
    prompt_s, step_s = limits
    return answer.ttft_s <= 5 * prompt_s * len(answer.job.prompt) + 0.05 and answer.tpot_s <= 1.5 * step_s


def tail_of(layout: Layout, scale: Scale) -> float:
    chance = random.Random(3)

    def job(name: str, prompt: int, tokens: int) -> Job:
        return Job(name, tuple(chance.randrange(10, 500) for _ in range(prompt)), tokens)

    streams = [(0.0, job(f"stream/{index}", scale.stream_context, scale.stream_tokens)) for index in range(scale.streams)]
    long_at_s = 3.0 if scale.long_prompt > 1000 else 0.2
    answers = layout.run([*streams, (long_at_s, job("long", scale.long_prompt, 2))])
    long = answers[-1]
    gaps = [
        later - earlier
        for answer in answers[:-1]
        for earlier, later in zip(answer.came_s, answer.came_s[1:], strict=False)
        if later >= long.sent_s and earlier <= long.came_s[0]
    ]
    if not gaps:
        raise EngineFailure("the answers were over before the long prompt came")
    gaps.sort()
    return gaps[int(0.99 * len(gaps))]
