"""Whether a model could guess for itself with its own first layers: how often the head, put behind layer L, names the next token.

    python -m benchmarks.early_exit [--model smollm2-135m] [--layers 5,10,15,20,25,28] [--max-tokens 160] [--json out.json]

The model answers the questions of `benchmarks.speculation` (greedy), its answers are computed once more with torch, and behind
each layer asked for the last norm and the head are put. Given are, per layer: its share of a step's bytes (layers, and the head
once), how often its best token is the one that the whole model says next, and what that is worth at best: tokens per second with
guesses of the best length over those without, if a row more cost nothing and a guess costs just its bytes. Above 1 building
it may pay; what `ngram` and heads give is measured by `benchmarks.speculation`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.speculation import TASKS
from common.blocks import num_blocks
from common.config import EngineConfig
from common.engine.attention import create_attention
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import build_engine
from common.engine.loader import ModelArchitecture, load_weights
from common.engine.models import create_model
from common.engine.numerics import FastNumerics
from common.engine.step_input import StepBuffers
from common.model_store import pull
from common.tokenizer import Tokenizer
from deploy.heads.answers import ask

LONGEST_GUESS = 8


@dataclass(frozen=True)
class Exit:
    layer: int
    cost: float  # of a step
    agreement: float
    best_speed: float
    best_length: int


def cost_of(architecture: ModelArchitecture, layer: int) -> float:
    shapes = architecture.tensor_shapes()
    head = shapes["model.embed_tokens.weight"][0] * architecture.hidden_size
    per_layer = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("model.layers.0."))
    return (layer * per_layer + head) / (architecture.num_layers * per_layer + head)


def best_speed(agreement: float, cost: float) -> tuple[float, int]:
    def speed(length: int) -> float:
        return sum(agreement**place for place in range(length + 1)) / (1.0 + length * cost)

    return max((speed(length), length) for length in range(1, LONGEST_GUESS + 1))


def keep(seen: dict[int, torch.Tensor], rows: torch.Tensor, first: int, layer: int) -> None:
    """The rows that an answer is drawn from, as a layer leaves them: layers change the rows that they are given."""
    seen[layer] = rows[first:-1].clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[5, 10, 15, 20, 25, 28])
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = Path(options.model) if Path(options.model).exists() else pull(options.model).path
    config = EngineConfig(device="cpu", kernels="torch", dtype="float32", prefix_cache=False, kv_pool_tokens=8192)
    engine = build_engine(path, config, threads=1, model_digest="m", tokenizer_digest="t")
    answers = ask(engine, Tokenizer.load(path), TASKS["chat"], at_once=4, max_tokens=options.max_tokens, temperatures=(0.0,))
    texts = [(answer.prompt, answer.tokens) for answer in answers]

    architecture, weights = load_weights(path, torch.float32)
    embedding = weights["model.embed_tokens.weight"]
    numerics = FastNumerics(None)
    model = create_model(architecture, weights, numerics, engine.max_model_tokens)
    attention = create_attention(numerics.operations.attention, engine.pool, architecture.num_heads)
    buffers = StepBuffers(engine.pool)
    right = dict.fromkeys(options.layers, 0)
    for prompt, said in texts:
        tokens = [*prompt, *said]
        blocks = engine.blocks.allocate(num_blocks(len(tokens), config.block_tokens))
        step = buffers.fill(ScheduledBatch((SequenceSlice(tokens, 0, blocks),)))
        seen: dict[int, torch.Tensor] = {}
        with torch.inference_mode():
            rows = F.embedding(step.tensors.token_ids, embedding)
            model.forward(step, engine.pool, attention, partial(keep, seen, rows, len(prompt) - 1), rows)
            for layer in options.layers:
                drawn = model.logits(seen[layer]).argmax(-1).tolist()
                right[layer] += sum(found == token for found, token in zip(drawn, said, strict=True))
        engine.blocks.release(blocks)
    total = sum(len(said) for _, said in texts)
    exits = []
    for layer in options.layers:
        cost, agreement = cost_of(architecture, layer), right[layer] / total
        exits.append(Exit(layer, cost, agreement, *best_speed(agreement, cost)))
        print(
            f"layer {layer:3d} of {architecture.num_layers}   cost {cost:.2f}   agreement {agreement:.3f}"
            f"   at best {exits[-1].best_speed:.2f} x, with {exits[-1].best_length} tokens"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"model": options.model, "tokens": total, "exits": [asdict(e) for e in exits]}) + "\n")


if __name__ == "__main__":
    main()
