"""The default model, natively and by torch: the same greedy answers in fp32, and KV that either can continue."""

from __future__ import annotations

import pytest
import torch

from common.config import EngineConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Water boils at a temperature of 100 degrees Celsius. The reason",
)
NUM_TOKENS = 48


def build(files: ModelFiles, kernels: str) -> Engine:
    config = EngineConfig(device="cpu", dtype="float32", kernels=kernels, kv_pool_tokens=2048)
    return build_engine(files.path, config, threads=1, model_digest="m", tokenizer_digest="t")


def prefill(engine: Engine, prompts: list[list[int]], tables: list[list[int]]) -> list[int]:
    batch = ScheduledBatch(tuple(SequenceSlice(tokens, 0, table) for tokens, table in zip(prompts, tables, strict=True)))
    return [int(token) for token in engine.runner.compute_logits(batch).argmax(-1)]


def decode(engine: Engine, prompts: list[list[int]], tables: list[list[int]], latest: list[int]) -> list[list[int]]:
    """All prompts in one batch."""
    answers = [[token] for token in latest]
    for _ in range(NUM_TOKENS - 1):
        batch = ScheduledBatch(
            tuple(
                SequenceSlice(answer[-1:], len(prompt) + len(answer) - 1, table)
                for prompt, answer, table in zip(prompts, answers, tables, strict=True)
            )
        )
        for answer, token in zip(answers, engine.runner.compute_logits(batch).argmax(-1).tolist(), strict=True):
            answer.append(token)
    return answers


@pytest.mark.model
def test_greedy_answers_do_not_tell_the_kernels_apart(smollm2: ModelFiles) -> None:
    tokenizer = Tokenizer.load(smollm2.path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    engines = {kind: build(smollm2, kind) for kind in ("torch", "native")}
    tables = [list(range(1 + 8 * i, 9 + 8 * i)) for i in range(len(prompts))]
    first = {kind: prefill(engine, prompts, tables) for kind, engine in engines.items()}
    prompt_kv = engines["torch"].pool.tensor.clone()
    torch.testing.assert_close(engines["native"].pool.tensor, prompt_kv, rtol=1e-3, atol=1e-3)
    answers = {kind: decode(engine, prompts, tables, first[kind]) for kind, engine in engines.items()}
    assert answers["native"] == answers["torch"]
    # What torch computed of a prompt, as a prefill worker without native kernels would hand it over, is continued alike.
    engines["native"].pool.tensor.copy_(prompt_kv)
    assert decode(engines["native"], prompts, tables, first["torch"]) == answers["torch"]
