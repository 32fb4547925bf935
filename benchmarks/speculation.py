"""What speculation does to decoding: the same requests with it and without, in one process, in turns.

    python -m benchmarks.speculation [--model smollm2-135m] [--batches 1,8] [--blocks 3] [--tasks chat,copy] [--threads 1]
        [--max-tokens 160] [--temperature 0] [--shared-tokens 16384] [--draft-model NAME | --method medusa [--heads FILE]]
        [--json out.json]

chat   plain questions: nothing to copy, speculation must not cost anything
copy   texts to repeat and code to edit: most of the answer stands in the prompt

The engine and the decode scheduler of a worker run without network; prompts are prefilled before the clock starts, no prefix
is cached, and answers end where the model ends them. A group of so many requests as the batch takes turns (off on on off); every
turn is a tenant of its own, so that no answer is guessed from its own earlier turn. Tokens must be equal, or the run fails. Given
are tokens per second, the ratio over all groups and the median ratio of groups with its bootstrap interval; the same in the time
that the computing thread was on a core, which is the figure to look at, for one thread, where others compute; and what became of
drafts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.clock import SystemClock
from common.config import DecodeConfig, EngineConfig, SpeculationConfig
from common.engine.engine import Engine, build_engine
from common.errors import EngineFailure
from common.model_store import pull
from common.tokenizer import Tokenizer
from common.types import Request, SamplingParams
from decode_worker.events import Failed, Output
from decode_worker.scheduler import DecodeScheduler
from decode_worker.speculation.choice import GuessedModel, create_speculator
from decode_worker.speculation.speculator import Speculator

BOOTSTRAPS = 2000

_QUESTIONS = (
    "Why is the sky blue?",
    "Give me three ideas for a rainy Sunday.",
    "What should I look at when I buy a used bicycle?",
    "Explain to a child how a seed becomes a tree.",
    "Write a short letter in which I turn down an invitation to a wedding.",
    "How does a refrigerator keep food cold?",
    "Tell me a story about a lighthouse keeper and a lost dog.",
    "What are the good and the bad sides of living in a big city?",
    "How can I learn to sleep better?",
    "Which questions should I ask in a job interview?",
    "Describe how bread is made.",
    "What is the difference between weather and climate?",
)
_TEXTS = (
    "The harbour lay still under a thin fog. Two boats had come in before dawn, and their crews were carrying boxes of "
    "mackerel up the stone steps. An old man counted them aloud, one after the other, and wrote each number into a small "
    "red book. When the last box stood on the quay he closed the book, put it into his coat, and said that it would do "
    "for today.",
    "To reset the device, hold the power button for ten seconds until the green light turns amber. Release the button, "
    "wait for three short beeps, and connect the cable to the port marked B. The device now starts with its factory "
    "settings. If the light stays red, remove the battery, wait one minute, and begin again with the first step.",
    "Minutes of the meeting on Tuesday: Anna reported that the new pump arrived in March and was tested twice. Boris "
    "asked for a second test under full load. Clara will order the missing seals from the supplier in Lyon. The budget of"
    " 4,200 was approved without changes. The next meeting takes place on the second Tuesday of May at nine o'clock in "
    "room 12.",
    "The recipe needs 300 grams of flour, 150 grams of butter, 90 grams of sugar, two eggs and a pinch of salt. Mix the "
    "flour with the salt and the sugar, cut the butter into small pieces and rub it in with cold hands. Add the eggs, "
    "knead the dough for one minute only, wrap it in paper and let it rest in a cool place for half an hour before you "
    "roll it out.",
)
_CODE = """def read_table(path, separator=","):
    rows = []
    with open(path) as lines:
        for line in lines:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            rows.append([part.strip() for part in line.split(separator)])
    return rows


def column(rows, name):
    header = rows[0]
    position = header.index(name)
    return [row[position] for row in rows[1:]]
"""
_COPIES = (
    *(f"Repeat the following text word for word, and say nothing else:\n\n{text}" for text in _TEXTS),
    f"Rename the function `column` to `values_of` and give me the whole file again:\n\n{_CODE}",
    f"Add a docstring to each function and return the complete code:\n\n{_CODE}",
    f"Copy this code exactly as it is:\n\n{_CODE}",
    f"Correct the spelling, if it has to be, and print the whole text:\n\n{_TEXTS[1].replace('seconds', 'secnods')}",
)
TASKS = {"chat": _QUESTIONS, "copy": _COPIES}


@dataclass
class Turn:
    """One group, once."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    num_tokens: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Cell:
    """One task at one batch."""

    task: str
    batch: int
    off_tokens_per_s: float
    on_tokens_per_s: float
    ratio: float  # over all groups
    median_ratio: float
    low: float
    high: float
    cpu_ratio: float
    drafted_tokens: int
    accepted_tokens: int
    by_author: dict[str, tuple[int, int]]  # drafted and accepted tokens
    tokens_per_step: float  # of a sequence that had drafts
    num_groups: int


class Bench:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.serial = itertools.count()
        self.speculator = create_speculator(
            SpeculationConfig(
                method="draft" if options.draft_model else options.method,
                draft_model=options.draft_model,
                heads=options.heads,
                shared_tokens=options.shared_tokens,
            ),
            SystemClock(),
            GuessedModel(options.model, engine, engine_config(options), options.threads),
        )

    def request(self, text: str, index: int, salt: str) -> Request:
        template = self.tokenizer.chat_template
        if template is not None:
            text = template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        prompt = self.tokenizer.encode(text, add_special_tokens=template is None)
        sampling = SamplingParams(
            max_tokens=self.options.max_tokens,
            seed=index,
            temperature=self.options.temperature,
            stop_token_ids=tuple(self.tokenizer.eos_token_ids),
        )
        return Request(f"{index}#{next(self.serial)}", "m", tuple(prompt), sampling, cache_salt=salt)

    def turn(self, texts: Sequence[tuple[int, str]], speculator: Speculator | None, totals: Totals) -> Turn:
        config = DecodeConfig(local_prefill="always", max_running=len(texts))
        scheduler = DecodeScheduler(config, self.engine.layout, self.engine.blocks, SystemClock(), speculator)
        salt = f"turn {next(self.serial)}"
        for index, text in texts:
            scheduler.submit(self.request(text, index, salt), ())
        turn, started = Turn(), 0
        started_s = cpu_started_s = 0.0
        while not scheduler.is_idle:
            plan = scheduler.schedule()
            scheduler.complete(plan, self.engine.runner.execute(plan.batch))
            for event in scheduler.take_events():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Output):
                    said = [token_id for chunk in event.chunks for token_id in chunk.token_ids]
                    turn.answers.setdefault(event.request_id.partition("#")[0], []).extend(said)
                    turn.num_tokens += len(said) if started == len(texts) else 0
                    if event.started is not None:
                        started += 1
                        if started == len(texts):
                            started_s, cpu_started_s = time.perf_counter(), time.thread_time()
        turn.seconds, turn.cpu_s = time.perf_counter() - started_s, time.thread_time() - cpu_started_s
        if speculator is not None:
            totals.add(scheduler)
        return turn

    def cell(self, task: str, batch: int) -> Cell:
        texts = list(enumerate(TASKS[task]))
        groups = [texts[start : start + batch] for start in range(0, len(texts), batch)]
        groups = [group + texts[: batch - len(group)] for group in groups]
        totals = Totals()
        self.turn(groups[0], None, Totals())
        self.turn(groups[0], self.speculator, Totals())
        off: list[list[Turn]] = []
        on: list[list[Turn]] = []
        for _ in range(self.options.blocks):
            for group in groups:
                turns = [self.turn(group, speculator, totals) for speculator in (None, self.speculator, self.speculator, None)]
                if any(turn.answers != turns[0].answers for turn in turns):
                    raise EngineFailure(f"speculation changed an answer of {task}")
                off.append([turns[0], turns[3]])
                on.append([turns[1], turns[2]])
        ratios = [
            sum(turn.seconds for turn in without) / sum(turn.seconds for turn in having)
            for without, having in zip(off, on, strict=True)
        ]
        flat_off, flat_on = [turn for turns in off for turn in turns], [turn for turns in on for turn in turns]
        low, high = interval(ratios)
        off_s, on_s = (sum(turn.seconds for turn in turns) for turns in (flat_off, flat_on))
        return Cell(
            task=task,
            batch=batch,
            off_tokens_per_s=sum(turn.num_tokens for turn in flat_off) / off_s,
            on_tokens_per_s=sum(turn.num_tokens for turn in flat_on) / on_s,
            ratio=off_s / on_s,
            median_ratio=statistics.median(ratios),
            low=low,
            high=high,
            cpu_ratio=sum(turn.cpu_s for turn in flat_off) / sum(turn.cpu_s for turn in flat_on),
            drafted_tokens=totals.drafted,
            accepted_tokens=totals.accepted,
            by_author=totals.by_author,
            tokens_per_step=1 + totals.accepted / max(1, totals.steps),
            num_groups=len(groups),
        )


class Totals:
    """What became of drafts."""

    def __init__(self) -> None:
        self.drafted = self.accepted = self.steps = 0
        self.by_author: dict[str, tuple[int, int]] = {}

    def add(self, scheduler: DecodeScheduler) -> None:
        for author, (drafted, accepted) in scheduler.totals.guesses_by_author.items():
            before = self.by_author.get(author, (0, 0))
            self.by_author[author] = before[0] + drafted, before[1] + accepted
        self.drafted += scheduler.totals.drafted_tokens
        self.accepted += scheduler.totals.accepted_tokens
        self.steps += sum(scheduler.totals.steps_by_accepted)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAPS))
    return medians[int(0.025 * BOOTSTRAPS)], medians[int(0.975 * BOOTSTRAPS)]


def show(cell: Cell) -> None:
    print(
        f"{cell.task:5} batch {cell.batch:2d}   off {cell.off_tokens_per_s:6.1f} tok/s   on {cell.on_tokens_per_s:6.1f} tok/s"
        f"   ratio {cell.ratio:5.2f}   median {cell.median_ratio:5.2f} ({cell.low:.2f} to {cell.high:.2f})"
        f"   cpu {cell.cpu_ratio:5.2f}"
        f"   accepted {', '.join(f'{name} {right} of {made}' for name, (made, right) in sorted(cell.by_author.items()))}"
        f"; {cell.tokens_per_step:.2f} tokens per step with drafts",
        flush=True,
    )


def engine_config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        device="cpu",
        dtype=options.dtype,
        kernels=options.kernels,
        prefix_cache=False,
        kv_pool_tokens=1024 * max(options.batches),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--kernels", default="auto", choices=["auto", "torch", "native"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument("--blocks", type=int, default=3, help="how often every group takes its four turns")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--shared-tokens", type=int, default=SpeculationConfig().shared_tokens)
    parser.add_argument("--draft-model", default="", help="guess with this model instead of from text")
    parser.add_argument("--method", default="ngram", choices=["ngram", "medusa"])
    parser.add_argument(
        "--heads", default="", help="with --method medusa: the file, if neither what train-heads made nor what comes with pdserve"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = Path(options.model) if Path(options.model).exists() else pull(options.model).path
    tokenizer = Tokenizer.load(path)
    engine = build_engine(
        path,
        engine_config(options),
        threads=options.threads,
        model_digest="m",
        tokenizer_digest=tokenizer.digest,
    )
    bench = Bench(engine, tokenizer, options)
    load_before = os.getloadavg()[0]
    cells = []
    for task in options.tasks:
        for batch in options.batches:
            cells.append(bench.cell(task, batch))
            show(cells[-1])
    load_after = os.getloadavg()[0]
    print(f"threads {options.threads}, {engine.layout.dtype}; load average {load_before:.2f} before, {load_after:.2f} after")
    if options.json is not None:
        result = {
            "model": options.model,
            "dtype": engine.layout.dtype,
            "threads": options.threads,
            "temperature": options.temperature,
            "load_average": [load_before, load_after],
            "cells": [asdict(cell) for cell in cells],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
