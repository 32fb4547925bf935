"""Steps of whole models: decode captured and not, prompts in chunks, how long the device idles, and whether tokens are right.

The steps are those that a scheduler would ask for, through `ModelRunner.execute`: inputs from the host, tokens back on it.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.on_gpu.calibration import fit_steps
from benchmarks.on_gpu.report import Figure, Report
from benchmarks.on_gpu.settings import Settings, engine_of
from benchmarks.on_gpu.timing import seconds_of, wall_seconds_of
from common.blocks import num_blocks
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.device_steps import weights_bytes
from common.engine.engine import Engine
from common.engine.quantisation import WeightFormat
from common.engine.sampler import sample
from common.engine.token_rules import Bias, Penalties, RowRules

CHECKED_TOKENS = 48
CHECKED_PROMPT = 40
FEWEST_POINTS = 12


def run_engine(report: Report, *, model_path: Path | None) -> None:
    large, small = models_of(report)
    tokens_agree(report, str(model_path) if model_path is not None else small)
    free()
    draws_agree(report, str(model_path) if model_path is not None else small)
    free()
    decode(report, small, (1,), 1024, idle_target=0.15, ratio_target=4.0)
    free()
    decode(report, large, (1, 32, 256), 1024, idle_target=0.05, ratio_target=1.3)
    if report.device == "cuda":
        free()
        decode(report, "random:qwen3-30b-a3b", (1, 64), 1024, idle_target=None, ratio_target=None)
    free()
    prefill(report, large)
    free()
    price_of_exactness(report, large)


def run_grid(report: Report) -> None:
    step_grid(report, models_of(report)[0])


def models_of(report: Report) -> tuple[str, str]:
    """A large one and a small one."""
    if report.device == "cuda":
        return "random:llama-3-8b", "random:smollm2-135m"
    return "random:toy", "random:toy-mixture"


def settings_of(report: Report, *, captured: bool, share: float = 0.9) -> Settings:
    if report.device == "cuda":
        # Set aside for a few buckets only: these benchmarks ask for no others.
        return Settings("cuda", device_memory_share=share, captured_rows=256 if captured else 0, max_model_tokens=32_768)
    return Settings("cpu", kernels="torch", dtype="float32", kv_pool_tokens=8192, max_model_tokens=1024)


def tokens_agree(report: Report, source: str) -> None:
    """Greedy tokens of the device, captured and not, against those of the CPU in fp32, the first token that differs ending it."""
    announced: list[str] = []
    settings = Settings("cpu", dtype="float32", kernels="torch", kv_pool_tokens=2048, max_model_tokens=1024)
    on_cpu = engine_of(source, settings, announced)
    prompt = [(7 * index * index + 11) % on_cpu.architecture.vocab_size for index in range(CHECKED_PROMPT)]
    expected = greedy(on_cpu, prompt)
    for dtype, captured in itertools.product(("float32", "bfloat16"), (0, 8)):
        if report.device == "cpu" and (dtype != "float32" or captured):
            continue
        other = Settings(
            report.device,
            dtype=dtype,
            kernels="auto" if report.device == "cuda" else "torch",
            kv_pool_tokens=2048,
            captured_rows=captured,
            max_model_tokens=1024,
        )
        engine = engine_of(source, other, announced)
        got = greedy(engine, prompt)
        same = next((place for place, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), len(expected))
        what = f"greedy tokens as on the CPU in fp32, {dtype}, {'captured' if captured else 'not captured'}"
        report.add(Figure("Q1", what, same, "tokens", same / len(expected), "all", 1.0 if dtype == "float32" else None))
        free()
    for text in announced:
        report.note(text)


def draws_agree(report: Report, source: str) -> None:
    """Tokens that a step has drawn, with temperatures, filters and rules, against what the host draws from the same logits."""
    device = report.device
    settings = Settings(
        device,
        dtype="float32",
        kernels="auto" if device == "cuda" else "torch",
        kv_pool_tokens=2048,
        captured_rows=4 if device == "cuda" else 0,
        max_model_tokens=1024,
    )
    announced: list[str] = []
    engine = engine_of(source, settings, announced)
    same = 0
    for position in range(1, CHECKED_TOKENS + 1):
        specs = drawn_in_many_ways(position, engine.architecture.vocab_size)
        slices = [
            SequenceSlice(
                [position * (row + 1) % 400], position - 1, [1 + 4 * row, 2 + 4 * row, 3 + 4 * row, 4 + 4 * row], (spec,)
            )
            for row, spec in enumerate(specs)
        ]
        batch = ScheduledBatch(tuple(slices))
        drawn = [item.tokens[0].token_id for item in engine.runner.execute(batch).slices]
        expected = sample(engine.runner.compute_logits(batch).cpu(), specs, range(len(specs)))
        same += sum(token_id == token.token_id for token_id, token in zip(drawn, expected, strict=True))
    count = CHECKED_TOKENS * len(specs)
    what = "drawn tokens as the host draws them, float32, captured"
    report.add(Figure("Q2", what, same, "tokens", same / count, "all", 1.0))
    steps = engine.runner.steps
    if steps is not None and steps.drawn_behind:
        report.note(f"drawn behind steps: {dict((reason.name, number) for reason, number in steps.drawn_behind.items())}")
    for text in announced:
        report.note(text)


def drawn_in_many_ways(position: int, vocab_size: int) -> list[SampleSpec]:
    rules = RowRules(
        Bias(np.array([7, 30]), np.array([2.0, 1.0], dtype=np.float32)),
        Penalties(np.arange(40, 90), np.arange(50, dtype=np.float32) % 3, 1.3, 0.2, 0.1),
        banned_token_ids=np.arange(0, vocab_size, 3),
    )
    return [
        replace(sample_at(position), rules=rules),
        SampleSpec(position, 2**64 - 3, 0, 0.8, 0, 0.9, 0.0, None),
        SampleSpec(position, 5, 1, 1.2, 40, 0.95, 0.01, None, rules),
        SampleSpec(position, 6, 0, 1.0, 0, 1.0, 0.0, None),
    ]


def greedy(engine: Engine, prompt: Sequence[int]) -> list[int]:
    """Tokens one by one, as a decode worker asks for them."""
    known = list(prompt)
    blocks = engine.blocks.allocate(num_blocks(len(prompt) + CHECKED_TOKENS, engine.layout.block_tokens))
    start = 0
    while len(known) < len(prompt) + CHECKED_TOKENS:
        item = SequenceSlice(known[start:], start, blocks, (sample_at(len(known)),))
        start = len(known)
        known.append(engine.runner.execute(ScheduledBatch((item,))).slices[0].tokens[0].token_id)
    engine.blocks.release(blocks)
    return known[len(prompt) :]


def sample_at(position: int) -> SampleSpec:
    return SampleSpec(position, 0, 0, 0.0, 0, 1.0, 0.0, None)


def decode(
    report: Report,
    source: str,
    batches: Sequence[int],
    context: int,
    *,
    idle_target: float | None,
    ratio_target: float | None,
) -> None:
    on_gpu = report.device == "cuda"
    targets_ms = {("random:llama-3-8b", 1): 4.8, ("random:llama-3-8b", 32): 6.0, ("random:llama-3-8b", 256): 17.0}
    context = context if on_gpu else 48
    announced: list[str] = []
    engine = engine_of(source, settings_of(report, captured=True), announced)
    eager = engine.runner.without_steps()
    for batch in batches:
        batch = batch if on_gpu else min(batch, 4)
        step = decode_batch(engine, batch, context)
        repeats = 100 if on_gpu else 3
        captured_s = wall_seconds_of(lambda step=step: engine.runner.execute(step), report.device, repeats)  # type: ignore[misc]
        eager_s = wall_seconds_of(lambda step=step: eager.execute(step), report.device, max(3, repeats // 5))  # type: ignore[misc]
        least = least_bytes(engine, batch, context)
        floor_s = least / report.roof.copy_bytes_per_s
        what = f"{source} decode, {batch} x {context}"
        target_ms = targets_ms.get((source, batch))
        report.add(
            Figure("E1", what, captured_s * 1e3, "ms", target=target_ms, lower_is_better=True),
            Figure("E1", f"{what}: bytes at the measured copy", floor_s * 1e3, "ms", floor_s / captured_s, "the step"),
            Figure(
                "E4",
                f"{what}: not captured over captured",
                eager_s / captured_s,
                "x",
                target=ratio_target if batch == 1 else None,
            ),
        )
        if on_gpu:
            busy_s = device_seconds(engine, step)
            ahead_s = ahead_seconds(engine, step, repeats)
            idle = max(0.0, 1.0 - busy_s / captured_s)
            drawn_s = drawing_seconds(engine, step, repeats)
            report.add(
                Figure("E1", f"{what}: drawn with temperature and top-p over greedy", drawn_s / captured_s, "x"),
            )
            report.add(
                Figure("E3", f"{what}: idle between steps", idle, "", target=idle_target, lower_is_better=True),
                Figure("E3", f"{what}: idle, one step ahead", max(0.0, 1.0 - busy_s / ahead_s), "", lower_is_better=True),
                Figure("E4", f"{what}: one step after the other over one ahead", captured_s / ahead_s, "x"),
            )
    for text in announced:
        report.note(text)


def device_seconds(engine: Engine, step: ScheduledBatch) -> float:
    """Of a step's program alone, its inputs being there."""
    steps = engine.runner.steps
    bucket = None if steps is None else steps.bucket_of(step)
    if steps is None or bucket is None:
        return seconds_of(lambda: engine.runner.execute(step), "cuda")
    program = steps.program(bucket)
    with torch.inference_mode():
        return seconds_of(program.run, "cuda")


def drawing_seconds(engine: Engine, step: ScheduledBatch, repeats: int) -> float:
    """Of the same step, when every row has a temperature and a top-p."""
    slices = [
        replace(item, samples=tuple(replace(spec, temperature=0.8, top_p=0.95) for spec in item.samples)) for item in step.slices
    ]
    drawn = ScheduledBatch(tuple(slices))
    return wall_seconds_of(lambda: engine.runner.execute(drawn), "cuda", repeats)


def ahead_seconds(engine: Engine, step: ScheduledBatch, repeats: int) -> float:
    """Of a step that is launched, with placeholders for its tokens, before the one before is read."""
    steps = engine.runner.steps
    bucket = None if steps is None else steps.bucket_of(step)
    if steps is None or bucket is None:
        return wall_seconds_of(lambda: engine.runner.execute(step), "cuda", repeats)
    following = ScheduledBatch(
        tuple(SequenceSlice([-1 - row], item.start, item.block_table, item.samples) for row, item in enumerate(step.slices))
    )
    pending = steps.launch(step, bucket)

    def next_one() -> None:
        nonlocal pending
        before, pending = pending, steps.launch(following, bucket)
        before.token_ids()

    seconds = wall_seconds_of(next_one, "cuda", repeats)
    pending.token_ids()
    return seconds


def prefill(report: Report, source: str) -> None:
    on_gpu = report.device == "cuda"
    prompt, chunk = (4096, 2048) if on_gpu else (64, 32)
    announced: list[str] = []
    engine = engine_of(source, settings_of(report, captured=False), announced)
    seconds = prompt_seconds(engine, prompt, chunk, report.device)
    shapes = engine.architecture.tensor_shapes()
    linear = sum(shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name)
    architecture = engine.architecture
    flops = 2 * linear * prompt + 2 * architecture.num_layers * prompt**2 * architecture.num_heads * architecture.head_dim
    what = f"{source} prompt of {prompt} in chunks of {chunk}"
    report.add(
        Figure("E2", what, prompt / seconds, "tok/s", target=36_000),
        Figure("E2", what, flops / seconds / 1e12, "TFLOP/s", flops / seconds / report.roof.flops_per_s, "the measured product"),
    )


def prompt_seconds(engine: Engine, prompt: int, chunk: int, device: str) -> float:
    """Of a prompt alone, chunk after chunk, its first token included."""
    table = list(range(1, 1 + num_blocks(prompt, engine.layout.block_tokens)))
    token_ids = [(31 * index) % 400 for index in range(prompt)]
    parts = [
        ScheduledBatch(
            (
                SequenceSlice(
                    token_ids[start : start + chunk], start, table, (sample_at(prompt),) if start + chunk == prompt else ()
                ),
            )
        )
        for start in range(0, prompt, chunk)
    ]
    return wall_seconds_of(lambda: [engine.runner.execute(part) for part in parts], device, 10 if device == "cuda" else 2)


def price_of_exactness(report: Report, source: str) -> None:
    """What one order of summation costs: the same steps in exact mode and without, neither of them captured."""
    fast = uncaptured_seconds(report, source, exact=False)
    free()
    for what, exact_s in uncaptured_seconds(report, source, exact=True).items():
        report.add(Figure("X1", f"{source}, exact mode over fast, {what}", exact_s / fast[what], "x", lower_is_better=True))


def uncaptured_seconds(report: Report, source: str, *, exact: bool) -> dict[str, float]:
    on_gpu = report.device == "cuda"
    context, prompt, chunk = (1024, 4096, 2048) if on_gpu else (48, 64, 32)
    announced: list[str] = []
    engine = engine_of(source, replace(settings_of(report, captured=False), exact=exact), announced)
    for text in announced:
        report.note(text)
    seconds = {f"prompt of {prompt}": prompt_seconds(engine, prompt, chunk, report.device)}
    for batch in (1, 32) if on_gpu else (1, 4):
        step = decode_batch(engine, batch, context)
        work = partial(engine.runner.execute, step)
        seconds[f"decode, {batch} x {context}"] = wall_seconds_of(work, report.device, 10 if on_gpu else 2)
    return seconds


def step_grid(report: Report, source: str) -> None:
    """Seconds of steps over what decides them: sequences that decode, their context, and a prompt's chunk beside them."""
    on_gpu = report.device == "cuda"
    batches = (0, 1, 2, 4, 8, 16, 32, 64, 128, 192, 256) if on_gpu else (0, 1, 2)
    contexts = (64, 256, 1024, 2048, 4096, 8192) if on_gpu else (16, 32)
    chunks = (0, 64, 256, 512, 1024, 2048) if on_gpu else (0, 8, 16)
    announced: list[str] = []
    engine = engine_of(source, settings_of(report, captured=True), announced)
    block_tokens = engine.layout.block_tokens
    for batch, context, chunk in itertools.product(batches, contexts, chunks):
        needed = batch * num_blocks(context + 1, block_tokens) + num_blocks(context + chunk, block_tokens)
        if not (batch or chunk) or needed > engine.blocks.num_total:
            continue
        slices = list(decode_batch(engine, batch, context).slices)
        if chunk:
            first = 1 + batch * num_blocks(context + 1, block_tokens)
            table = list(range(first, first + num_blocks(context + chunk, block_tokens)))
            slices.append(SequenceSlice([index % 400 for index in range(chunk)], context, table))
        step = ScheduledBatch(tuple(slices))
        seconds = wall_seconds_of(lambda step=step: engine.runner.execute(step), report.device, 8 if on_gpu else 1)  # type: ignore[misc]
        report.grid.append(
            {
                "batch": batch,
                "context": context,
                "chunk": chunk,
                "tokens": step.num_tokens,
                "pairs": step.num_pairs,
                "seconds": seconds,
            }
        )
    report.note(f"{len(report.grid)} step times over batch, context and chunk are in the file")
    kinds = {
        "every step": report.grid,
        "steps of decoding": [point for point in report.grid if not point["chunk"]],
        "steps with a prompt's chunk": [point for point in report.grid if point["chunk"]],
    }
    for kind, points in kinds.items():
        if len(points) < FEWEST_POINTS:
            continue
        fit = fit_steps(points)
        report.note(f"{kind}: {fit.a:.4g} s + {fit.b:.4g} s a token + {fit.c:.4g} s a pair, P90 error {fit.p90_error:.1%}")
        report.add(Figure("M1", f"{source}, {kind}: median error of the law that placement predicts by", fit.median_error, ""))


def decode_batch(engine: Engine, batch: int, context: int) -> ScheduledBatch:
    """`batch` sequences of `context` tokens that take one more."""
    blocks = num_blocks(context + 1, engine.layout.block_tokens)
    tables = [list(range(1 + row * blocks, 1 + (row + 1) * blocks)) for row in range(batch)]
    return ScheduledBatch(
        tuple(SequenceSlice([17 + row], context, table, (sample_at(context + 1),)) for row, table in enumerate(tables))
    )


def least_bytes(engine: Engine, batch: int, context: int) -> float:
    """What a step has to read: weights, of experts those that so many rows choose on average, and KV."""
    architecture = engine.architecture
    weights = float(weights_bytes(architecture, engine.layout.dtype_bytes, WeightFormat.MODEL))
    if not architecture.tie_embeddings:
        weights -= architecture.vocab_size * architecture.hidden_size * engine.layout.dtype_bytes
    if architecture.num_experts is not None and architecture.experts_per_token is not None:
        one = 3 * architecture.ffn_size * architecture.hidden_size * architecture.num_layers * engine.layout.dtype_bytes
        share = 1.0 - (1.0 - architecture.experts_per_token / architecture.num_experts) ** batch
        weights -= one * architecture.num_experts * (1.0 - share)
    return weights + batch * context * engine.layout.block_bytes / engine.layout.block_tokens


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
