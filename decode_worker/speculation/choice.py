"""Which speculator a worker has: what the configuration says, built around what it needs.

A draft model is an engine of its own beside the worker's: weights, KV pool, kernels. It must have the vocabulary of the model
that it guesses for, token by token, which the digests of both tokenizers say.
"""

from __future__ import annotations

from common.clock import Clock
from common.config import EngineConfig, SpeculationConfig, pdserve_home
from common.engine.engine import Engine, build_engine
from common.errors import ConfigError
from common.model_store import resolve
from common.tokenizer import Tokenizer
from decode_worker.speculation.draft_model import DraftModelProposer
from decode_worker.speculation.ngram import NgramProposer
from decode_worker.speculation.speculator import AdaptiveSpeculator, Speculator


def create_speculator(
    config: SpeculationConfig, clock: Clock, *, engine: EngineConfig, threads: int, tokenizer_digest: str
) -> Speculator | None:
    """None if nobody is to guess. Blocking where a model is loaded. `engine`, `threads` and `tokenizer_digest` are those of the
    model that is guessed for. Raises a StartupError."""
    match config.method:
        case "off":
            return None
        case "ngram":
            ngram = NgramProposer(gram_tokens=config.min_match_tokens, shared_tokens=config.shared_tokens)
            return AdaptiveSpeculator(ngram, config.max_draft_tokens, clock)
        case "draft":
            small = _draft_engine(config, engine, threads, tokenizer_digest)
            model = DraftModelProposer(small.runner, small.blocks, small.max_model_tokens)
            return AdaptiveSpeculator(model, config.max_draft_tokens, clock)


def _draft_engine(config: SpeculationConfig, engine: EngineConfig, threads: int, tokenizer_digest: str) -> Engine:
    files = resolve(config.draft_model, home=pdserve_home())
    if Tokenizer.load(files.path).digest != tokenizer_digest:
        raise ConfigError("the draft model has another tokenizer than the model it guesses for", param="speculation.draft_model")
    # Only a GGUF file holds weights in blocks; another draft is computed as it came.
    weights = "model" if engine.weights == "file" and not files.path.is_file() else engine.weights
    settings = engine.model_copy(
        update={"kv_pool_tokens": config.draft_kv_pool_tokens, "max_model_tokens": None, "weights": weights}
    )
    return build_engine(files.path, settings, threads=threads, model_digest=files.digest(), tokenizer_digest=tokenizer_digest)
