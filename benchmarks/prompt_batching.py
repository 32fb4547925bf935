"""What it brings a prefill worker to compute several short prompts in one step, and to compute a common beginning once.

    python -m benchmarks.prompt_batching [--model smollm2-135m] [--prompts 16] [--tokens 48] [--shared-tokens 0]
        [--step-tokens 128,512,1024] [--dtype auto] [--kernels auto] [--threads 1] [--blocks 6] [--json out.json]

The worker's own scheduler and engine, without what is around them. All prompts are there at once; what is measured is the time
until the last one is computed, and the mean over prompts of the time until theirs is. Variants take turns in ABBA order over one
engine, on new random prompts, the same for all variants of a block:

    alone       one prompt after the other
    128, ...    prompts share a step up to so many tokens, one variant for each of `--step-tokens`
    recomputed  as the last of them, but nothing is found by its name: a common beginning is computed for each (--shared-tokens)

Medians over blocks, and the median over blocks of the first variant's time over its own (`gain`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common.blocks import num_blocks
from common.clock import SystemClock
from common.config import EngineConfig, PrefillConfig
from common.engine.engine import Engine, build_engine
from common.model_store import pull
from common.types import Request, SamplingParams
from prefill_worker.scheduler import PrefillScheduler, PromptComputed


@dataclass(frozen=True)
class Round:
    last_ms: float
    mean_ms: float
    steps: int


@dataclass(frozen=True)
class Row:
    variant: str
    last_ms: float
    mean_ms: float
    steps: int
    gain_last: float
    gain_mean: float


def main() -> None:
    options = parser().parse_args()
    path = Path(options.model) if Path(options.model).exists() else pull(options.model).path
    longest = options.shared_tokens + options.tokens
    engine = build_engine(
        path,
        EngineConfig(
            device="cpu",
            dtype=options.dtype,
            kernels=options.kernels,
            kv_pool_tokens=options.prompts * 16 * num_blocks(longest, 16) + 1024,
        ),
        threads=options.threads,
        model_digest="m",
        tokenizer_digest="t",
        name="benchmark",
    )
    try:
        report(compare(engine, options), options)
    finally:
        engine.close()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default="smollm2-135m")
    result.add_argument("--prompts", type=int, default=16)
    result.add_argument("--tokens", type=int, default=48, help="of each prompt, beside what it shares")
    result.add_argument("--shared-tokens", type=int, default=0, help="at the beginning of all prompts")
    result.add_argument("--step-tokens", type=lambda text: [int(part) for part in text.split(",")], default=[128, 512, 1024])
    result.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    result.add_argument("--kernels", default="auto", choices=["auto", "torch", "native"])
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--blocks", type=int, default=6)
    result.add_argument("--json", type=Path)
    return result


def compare(engine: Engine, options: argparse.Namespace) -> dict[str, list[Round]]:
    longest = options.shared_tokens + options.tokens
    alone = PrefillConfig(chunk_tokens=longest, step_tokens=1, max_running=options.prompts)
    batched = [alone.model_copy(update={"step_tokens": step_tokens}) for step_tokens in options.step_tokens]
    variants = {"alone": (alone, True)} | {f"{config.step_tokens}": (config, True) for config in batched}
    if options.shared_tokens:
        variants["recomputed"] = (batched[-1], False)
    found: dict[str, list[Round]] = {name: [] for name in variants}
    for block in range(-1, options.blocks):  # the first is for first touches of memory
        names = list(variants) if block % 2 == 0 else list(reversed(variants))
        for name in names:
            config, by_name = variants[name]
            measured = compute_all(engine, config, prompts(options, seed=block), by_name=by_name)
            if block >= 0:
                found[name].append(measured)
    return found


def prompts(options: argparse.Namespace, *, seed: int) -> list[Request]:
    draw = random.Random(seed)
    shared = [draw.randrange(3, 1_000) for _ in range(options.shared_tokens)]
    return [
        Request(
            f"{index}",
            "m",
            (*shared, *(draw.randrange(3, 1_000) for _ in range(options.tokens))),
            SamplingParams(max_tokens=1, seed=1, temperature=0.0),
        )
        for index in range(options.prompts)
    ]


def compute_all(engine: Engine, config: PrefillConfig, work: list[Request], *, by_name: bool) -> Round:
    engine.blocks.drop_cache()
    engine.blocks.prefix_cache = by_name
    scheduler = PrefillScheduler(config, engine.layout, engine.blocks, SystemClock())
    for request in work:
        scheduler.submit(request)
    started_s = time.perf_counter()
    times_s: list[float] = []
    steps = 0
    while (plan := scheduler.schedule()).batch.slices:
        scheduler.complete(plan, engine.runner.execute(plan.batch))
        steps += 1
        done = sum(isinstance(event, PromptComputed) for event in scheduler.take_events())
        times_s += [time.perf_counter() - started_s] * done
    for request in work:
        scheduler.release(request.request_id)
    return Round(last_ms=1000 * times_s[-1], mean_ms=1000 * statistics.mean(times_s), steps=steps)


def report(found: dict[str, list[Round]], options: argparse.Namespace) -> None:
    first = next(iter(found.values()))
    rows = [
        Row(
            variant=name,
            last_ms=statistics.median(one.last_ms for one in rounds),
            mean_ms=statistics.median(one.mean_ms for one in rounds),
            steps=rounds[0].steps,
            gain_last=statistics.median(alone.last_ms / one.last_ms for alone, one in zip(first, rounds, strict=True)),
            gain_mean=statistics.median(alone.mean_ms / one.mean_ms for alone, one in zip(first, rounds, strict=True)),
        )
        for name, rounds in found.items()
    ]
    load = os.getloadavg()[0]
    print(f"{options.prompts} prompts of {options.shared_tokens} + {options.tokens} tokens; load {load:.2f}")
    for row in rows:
        print(
            f"{row.variant:11} {row.steps:3} steps   all after {row.last_ms:8.1f} ms, gain {row.gain_last:5.2f}"
            f"   mean {row.mean_ms:8.1f} ms, gain {row.gain_mean:5.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"load_average": load, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
