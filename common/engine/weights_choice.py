"""In which format an engine holds matrices: what `engine.weights` says, and what it means if it says `auto`.

    auto     the blocks of a GGUF file, where all matrices of its layers are in blocks that native kernels compute with: half the
             time of a token, and nothing is rounded a second time; else the model's own type

The workers of a model have to come to one answer, for formats refuse each other's KV. So only what they share has a say: the
file, the kind of device, which kernels may compute, exact mode; neither a pool's own dtype nor whether a compiler is there. That
the model's dtype is named, which asks for the model's own type as well, `common.config` settles.
"""

from __future__ import annotations

from pathlib import Path

from common.engine.loader import ModelArchitecture, holds_blocks
from common.engine.quantisation import WeightFormat
from common.engine.settings import EngineSettings


def choose_weights(config: EngineSettings, model_path: Path, architecture: ModelArchitecture, device: str) -> WeightFormat:
    """Reads the header of a GGUF file. Raises ModelLoadError."""
    if config.weights != "auto":
        return WeightFormat.of(config.weights, device, config.kernels)
    if device != "cpu" or config.kernels not in ("auto", "native") or config.exact:
        return WeightFormat.MODEL
    # Here, for an engine on a GPU needs nothing of it.
    from common.engine.native.choice import knows

    return WeightFormat.FILE if knows(architecture) and holds_blocks(model_path) else WeightFormat.MODEL
