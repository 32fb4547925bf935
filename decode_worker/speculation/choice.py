"""Which speculator a worker has: what the configuration says, built around what it needs.

A draft model is an engine of its own beside the worker's: weights, KV pool, kernels. It must have the vocabulary of the model
that it guesses for, token by token, which the digests of both tokenizers say. Heads are a small file, made for one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.clock import Clock
from common.config import EngineConfig, SpeculationConfig, pdserve_home
from common.engine.engine import Engine, build_engine
from common.engine.heads.heads import load_heads
from common.errors import ConfigError
from common.heads_store import find_heads
from common.model_store import resolve
from common.tokenizer import Tokenizer
from decode_worker.speculation.draft_model import DraftModelProposer
from decode_worker.speculation.medusa import MedusaProposer
from decode_worker.speculation.ngram import NgramProposer
from decode_worker.speculation.proposer import Proposer
from decode_worker.speculation.speculator import AdaptiveSpeculator, Speculator


@dataclass(frozen=True, slots=True)
class GuessedModel:
    """The model that is guessed for, as its worker loaded it."""

    source: str  # its files, as `common.model_store` finds them
    engine: Engine
    config: EngineConfig
    threads: int


def create_speculator(config: SpeculationConfig, clock: Clock, model: GuessedModel) -> Speculator | None:
    """None if nobody is to guess. Blocking where something is loaded. Raises a StartupError."""
    ngram = NgramProposer(gram_tokens=config.min_match_tokens, shared_tokens=config.shared_tokens)
    proposers: tuple[Proposer, ...]
    match config.method:
        case "off":
            return None
        case "ngram":
            proposers = (ngram,)
        case "draft":
            small = _draft_engine(config, model)
            proposers = (DraftModelProposer(small.runner, small.blocks, small.max_model_tokens),)
        case "medusa":
            proposers = (ngram, _heads(config, model))
    return AdaptiveSpeculator(proposers, config.max_draft_tokens, clock)


def _draft_engine(config: SpeculationConfig, model: GuessedModel) -> Engine:
    files = resolve(config.draft_model, home=pdserve_home())
    tokenizer_digest = model.engine.layout.tokenizer_digest
    if Tokenizer.load(files.path).digest != tokenizer_digest:
        raise ConfigError("the draft model has another tokenizer than the model it guesses for", param="speculation.draft_model")
    # Only a GGUF file holds weights in blocks; another draft is computed as it came.
    weights = "model" if model.config.weights == "file" and not files.path.is_file() else model.config.weights
    settings = model.config.model_copy(
        update={"kv_pool_tokens": config.draft_kv_pool_tokens, "max_model_tokens": None, "weights": weights}
    )
    return build_engine(
        files.path, settings, threads=model.threads, model_digest=files.digest(), tokenizer_digest=tokenizer_digest
    )


def _heads(config: SpeculationConfig, model: GuessedModel) -> MedusaProposer:
    files = resolve(model.source, home=pdserve_home())
    digest = files.digest()
    path = Path(config.heads) if config.heads else find_heads(pdserve_home(), digest)
    if path is None or not path.is_file():
        where = f"at {path}" if config.heads else f"for {model.source}"
        raise ConfigError(
            f"no heads {where}; make them with `pdserve train-heads {model.source}`", param="decode.speculation.heads"
        )
    engine = model.engine
    return MedusaProposer(load_heads(path, files.path, model_digest=digest, device=engine.device, dtype=engine.dtype))
