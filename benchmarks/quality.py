"""What rounding costs: perplexity and greedy agreement of an engine's settings against fp32, on the same text.

    python -m benchmarks.quality [--model smollm2-135m] [--text FILE ...] [--tokens 1024] [--settings NAME ...] [--json out.json]

All settings but "file", which is for GGUF files, are for any model; the native kernels compute. Without --text the docstrings of
modules of Python's standard library are read: text that no setting was tuned on. Each text is
one sequence of at most so many tokens. Per setting: perplexity, its ratio to fp32's with a 95 % interval over texts (bootstrap),
and how often the most probable token is fp32's. Time does not matter here, and a busy machine changes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.config import EngineConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.model_store import pull
from common.tokenizer import Tokenizer

MODULES = (
    "argparse", "asyncio.events", "collections", "datetime", "decimal", "difflib", "email.message", "fractions", "functools",
    "http.client", "inspect", "logging", "pathlib", "random", "statistics", "string", "subprocess", "textwrap", "zipfile",
)  # fmt: skip
BASE = "fp32"
SETTINGS = {
    BASE: {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16", "weights": "model"},
    "int8, bf16 KV": {"dtype": "bfloat16", "weights": "int8"},
    "int8, fp32 KV": {"dtype": "float32", "weights": "int8"},
    "int4, bf16 KV": {"dtype": "bfloat16", "weights": "int4"},
    "int4, fp32 KV": {"dtype": "float32", "weights": "int4"},
    "file, bf16 KV": {"dtype": "bfloat16", "weights": "file"},
    "file, fp32 KV": {"dtype": "float32", "weights": "file"},
    "fp32, int8 KV": {"dtype": "float32", "kv_dtype": "int8"},
    "bf16, int8 KV": {"dtype": "bfloat16", "weights": "model", "kv_dtype": "int8"},
    "file, int8 KV": {"dtype": "bfloat16", "weights": "file", "kv_dtype": "int8"},
}


@dataclass(frozen=True)
class Quality:
    setting: str
    perplexity: float
    ratio: float  # to fp32's
    ratio_low: float
    ratio_high: float
    agreement: float


def main() -> None:
    options = parser().parse_args()
    path = Path(options.model) if Path(options.model).exists() else pull(options.model).path
    tokenizer = Tokenizer.load(path)
    texts = [Path(name).read_text(encoding="utf-8") for name in options.text] or [docstrings(name) for name in MODULES]
    sequences = [ids for text in texts if len(ids := tokenizer.encode(text)[: options.tokens]) > 1]
    losses: dict[str, list[float]] = {}
    best: dict[str, list[torch.Tensor]] = {}
    chosen = list(dict.fromkeys([BASE, *(options.settings or SETTINGS)]))
    for setting in chosen:
        config = EngineConfig.model_validate(
            {"device": "cpu", "kernels": "native", "kv_pool_tokens": options.tokens + 64, **SETTINGS[setting]}
        )
        engine = build_engine(path, config, threads=options.threads, model_digest="m", tokenizer_digest="t")
        found = [judge(engine, ids) for ids in sequences]
        losses[setting] = [loss for loss, _ in found]
        best[setting] = [tokens for _, tokens in found]
    counts = [len(ids) - 1 for ids in sequences]
    results = []
    for setting in chosen:
        low, high = interval(losses[setting], losses[BASE], counts)
        same = sum(int((mine == theirs).sum()) for mine, theirs in zip(best[setting], best[BASE], strict=True))
        results.append(
            Quality(
                setting,
                math.exp(sum(losses[setting]) / sum(counts)),
                math.exp((sum(losses[setting]) - sum(losses[BASE])) / sum(counts)),
                low,
                high,
                same / sum(counts),
            )
        )
        print(
            f"{setting:14s}  perplexity {results[-1].perplexity:8.3f}   ratio to fp32 {results[-1].ratio:.4f}"
            f" [{low:.4f}, {high:.4f}]   same best token {100 * results[-1].agreement:5.1f} %"
        )
    print(f"{len(sequences)} texts, {sum(counts)} tokens")
    if options.json:
        options.json.write_text(
            json.dumps({"tokens": sum(counts), "settings": [asdict(one) for one in results]}, indent=2) + "\n"
        )


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default="smollm2-135m")
    result.add_argument("--text", nargs="*", default=[])
    result.add_argument("--tokens", type=int, default=1024)
    result.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=[])
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--json", type=Path)
    return result


def docstrings(module_name: str) -> str:
    module = importlib.import_module(module_name)
    found = [getattr(module, name).__doc__ for name in sorted(vars(module))]
    return "\n\n".join(text for text in (module.__doc__, *found) if isinstance(text, str))


def judge(engine: Engine, token_ids: list[int]) -> tuple[float, torch.Tensor]:
    """The summed loss of the text, and the most probable token after each."""
    num_blocks = -(-len(token_ids) // engine.layout.block_tokens)
    logits = engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(token_ids, 0, range(1, 1 + num_blocks)),)))
    following = torch.tensor(token_ids[1:])[:, None]
    return -float(logits[:-1].log_softmax(-1).gather(1, following).double().sum()), logits[:-1].argmax(-1)


def interval(losses: list[float], base: list[float], counts: list[int]) -> tuple[float, float]:
    """Of the ratio of perplexities, over texts drawn with replacement."""
    draw = random.Random(0)
    ratios = []
    for _ in range(2000):
        picked = draw.choices(range(len(losses)), k=len(losses))
        ratios.append(math.exp(sum(losses[i] - base[i] for i in picked) / sum(counts[i] for i in picked)))
    ratios.sort()
    return ratios[50], ratios[-50]


if __name__ == "__main__":
    main()
