"""An embedder that knows synonyms: a small sentence model (MiniLM, int8) with ONNX Runtime, on one thread. Needs
pdserve[embed].

It takes about ten milliseconds for a question, so it is called off the event loop and within a budget
(`router.semantic.embedding`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ModelLoadError
from common.model_store import embedder_folder
from router.semantic.embedder import Vector
from router.semantic.reading import Reading

REVISION = "minilm-1"
DIMENSIONS = 384
_MAX_TOKENS = 128


class OnnxEmbedder:
    """`folder` holds model.onnx and tokenizer.json. Raises ModelLoadError."""

    def __init__(self, folder: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ModelLoadError("the embedder needs onnxruntime; install pdserve[embed]") from error
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except (RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.NoSuchFile) as error:
            raise ModelLoadError(f"cannot load the embedder in {folder}: {error}") from error
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_MAX_TOKENS)

    @classmethod
    def stored(cls) -> OnnxEmbedder:
        return cls(embedder_folder("minilm"))

    @property
    def revision(self) -> str:
        return REVISION

    @property
    def dimensions(self) -> int:
        return DIMENSIONS

    @property
    def quick(self) -> bool:
        return False

    def embed(self, text: str, reading: Reading) -> Vector:
        tokens = np.array([self._tokenizer.encode(text).ids], np.int64)
        inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
        states = self._session.run(None, inputs)[0][0]
        mean = states.mean(axis=0, dtype=np.float32)
        length = float(np.sqrt(mean @ mean))
        return np.asarray(mean / np.float32(max(length, 1e-9)), np.float32)
