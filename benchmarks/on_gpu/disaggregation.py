"""Prefill and decode as two processes on one GPU, against two whole engines there: the same memory, the same requests.

D1, goodput: the highest rate at which 90 % of all requests meet both limits. Time to the first token: five times that of their
prompt alone plus 50 ms; time per token after it: one and a half times that of a step alone. Arrivals are a Poisson process,
lengths
are drawn around a conversation's (mean prompt 750 tokens, mean answer 21), seed fixed: both layouts see the same requests.

D3, the tail: sixteen answers are under way when a prompt of 32k tokens comes; the 99th percentile of the gaps between their
tokens until that prompt's first token.

Two processes take turns on a GPU unless a server of NVIDIA's (MPS) is there to mix them; none is started here and no setting of
the card is changed, so what is measured is turns. The report says whether one is there.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from benchmarks.on_gpu.report import Figure, Report
from benchmarks.on_gpu.serving import Job, News, Ready, decode_process, prefill_process, whole_process
from benchmarks.on_gpu.settings import DecodeSettings, PrefillSettings, Settings

START_S = 240.0
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


ON_GPU = Scale("random:llama-3-8b", 0.46, 750, 21, 8192, (4, 8, 12, 16, 24, 32), 15.0, 1024, 16, 1024, 1500, 32_768)
TOY = Scale("random:toy", None, 24, 6, 96, (8, 16), 1.0, 32, 4, 16, 400, 256)


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


@contextmanager
def processes(report: Report, scale: Scale, *, apart: bool) -> Iterator[Layout]:
    context = multiprocessing.get_context("spawn")
    on_gpu = report.device == "cuda"
    longest = max(scale.long_prompt, scale.longest_prompt) + 2048

    def settings(captured_rows: int) -> Settings:
        if on_gpu:
            return Settings("cuda", device_memory_share=scale.share, captured_rows=captured_rows, max_model_tokens=longest)
        return Settings("cpu", dtype="float32", kernels="torch", kv_pool_tokens=4096, max_model_tokens=1024)

    started: list[SpawnProcess] = []
    doors: list[Connection] = []
    others: list[Connection] = []
    limits = DecodeSettings(step_tokens=scale.chunk, local_prefill="never" if apart else "always")
    try:
        if apart:
            to_decode, decode_end = context.Pipe()
            to_prefill, prefill_end = context.Pipe()
            one, other = context.Pipe()
            arguments: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
                (prefill_process, (prefill_end, one, scale.model, settings(0), PrefillSettings(scale.chunk))),
                (decode_process, (decode_end, other, scale.model, settings(256), limits)),
            ]
            doors, others = [to_decode], [to_prefill]
            theirs = [decode_end, prefill_end, one, other]
        else:
            pairs = [context.Pipe() for _ in range(2)]
            arguments = [(whole_process, (end, scale.model, settings(256), limits)) for _, end in pairs]
            doors, theirs = [door for door, _ in pairs], [end for _, end in pairs]
        notes: list[str] = []
        for target, given in arguments:
            process = context.Process(target=target, args=given, daemon=True)
            process.start()
            started.append(process)
            if not apart:
                notes += ready(doors[len(started) - 1]).notes  # one after the other: each takes its share of what is free
        for end in theirs:
            end.close()
        if apart:
            for door in (*doors, *others):
                notes += ready(door).notes
        yield Layout(doors, notes)
    finally:
        for door in (*doors, *others):
            door.close()
        for process in started:
            process.join(15.0)
            if process.is_alive():
                process.kill()
                process.join()


def ready(door: Connection) -> Ready:
    if not door.poll(START_S):
        raise TimeoutError("an engine did not start")
    message: Ready = door.recv()
    return message


def run_disaggregation(report: Report) -> None:
    scale = ON_GPU if report.device == "cuda" else TOY
    mixed = os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    report.note(f"a server that mixes processes on the GPU (MPS) is {'there' if mixed else 'not there: processes take turns'}")
    goodput: dict[bool, float] = {}
    tails: dict[bool, float] = {}
    limits: tuple[float, float] | None = None
    for apart in (False, True):
        name = "prefill and decode apart" if apart else "two whole engines"
        with processes(report, scale, apart=apart) as layout:
            for note in layout.notes:
                report.note(f"{name}: {note}")
            layout.run([(0.0, job) for job in conversation(scale, 6, seed=1)])  # warm up
            if limits is None:
                limits = limits_of(layout, scale)
                report.note(f"limits: 5 x {limits[0] * 1e6:.1f} us a prompt token + 50 ms, and 1.5 x {limits[1] * 1e3:.2f} ms")
            goodput[apart] = goodput_of(report, layout, scale, limits, name)
            tails[apart] = tail_of(layout, scale)
            report.add(
                Figure(
                    "D3",
                    f"{name}: P99 gap between tokens while {scale.long_prompt} tokens are prefilled",
                    tails[apart] * 1e3,
                    "ms",
                )
            )
    report.add(
        Figure("D1", "goodput, apart over whole", goodput[True] / goodput[False] if goodput[False] else 0.0, "x", target=1.3),
        Figure("D3", "P99 gap, apart over whole", tails[True] / tails[False], "x", target=0.2, lower_is_better=True),
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
    best = 0.0
    for rate in scale.rates:
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
        report.add(
            Figure("D1", f"{name}, {rate:g} requests/s: share that meets both limits", met, ""),
            Figure("D1", f"{name}, {rate:g} requests/s: P50 time to the first token", ttft_s[len(ttft_s) // 2] * 1e3, "ms"),
            Figure("D1", f"{name}, {rate:g} requests/s: P90 time per token", tpot_s[int(0.9 * len(tpot_s))] * 1e3, "ms"),
        )
        if met >= ATTAINMENT:
            best = rate
        elif met < 0.5:
            break  # higher rates are no better
    report.add(Figure("D1", f"{name}: highest rate with {ATTAINMENT:.0%} within limits", best, "req/s"))
    return best


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
        raise AssertionError("the answers were over before the long prompt came")
    gaps.sort()
    return gaps[int(0.99 * len(gaps))]
