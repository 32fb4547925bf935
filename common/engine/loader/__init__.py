"""Model files in, tensors out.

`load_weights` reads a GGUF file or a Hugging Face folder into the one form that models are written for: a `ModelArchitecture`
and a dictionary of tensors under Hugging Face names, in Hugging Face layout, checked for completeness and shape. A model never
learns which file format it came from.

    path -> architecture (refused early if no model here can run it) -> tensors one by one -> complete, or ModelLoadError

Does not know: devices (tensors are on the CPU), who holds which part of a model (`keep` says), tokenizers (`common.tokenizer`),
where files come from (`common.model_store`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from common.engine.block_matrix import Weight
from common.engine.loader.architecture import Keep, KeepStored, Llama3RopeScaling, ModelArchitecture, keep_all, keep_only
from common.engine.loader.random_model import is_random, make_weights
from common.engine.loader.random_model import read_architecture as read_random_architecture
from common.errors import ModelLoadError

__all__ = [
    "Keep",
    "KeepStored",
    "Llama3RopeScaling",
    "ModelArchitecture",
    "holds_blocks",
    "keep_all",
    "keep_only",
    "load_architecture",
    "load_stored_weights",
    "load_weights",
]


def load_architecture(model_path: Path) -> ModelArchitecture:
    """What the model is, without reading its tensors. Raises ModelLoadError."""
    if is_random(str(model_path)):
        return read_random_architecture(str(model_path))
    if _is_gguf(model_path):
        from common.engine.loader.gguf_file import read_architecture

        return read_architecture(model_path)
    from common.engine.loader.safetensors_folder import read_architecture as read_folder_architecture

    return read_folder_architecture(model_path)


def load_weights(
    model_path: Path, dtype: torch.dtype, device: torch.device | None = None, *, keep: Keep = keep_all
) -> tuple[ModelArchitecture, dict[str, torch.Tensor]]:
    """The model at `model_path` (a .gguf file, or a folder with config.json and *.safetensors) as CPU tensors of `dtype`.
    `random:NAME` makes one up, on `device` (`random_model`).

    The dictionary holds exactly `ModelArchitecture.tensor_shapes()`: with tied embeddings there is no `lm_head.weight`, the
    model uses `model.embed_tokens.weight` for both. `keep` says what is held of each tensor, as soon as it was read, for a
    process that needs only some. Blocking: seconds to minutes. Raises ModelLoadError.
    """
    if is_random(str(model_path)):
        architecture, made = make_weights(str(model_path), dtype, device or torch.device("cpu"))
        return architecture, {kept: part for name, tensor in made.items() for kept, part in keep(name, tensor).items()}
    if _is_gguf(model_path):
        from common.engine.loader.gguf_file import read_weights

        return read_weights(model_path, dtype, keep)
    from common.engine.loader.safetensors_folder import read_weights as read_folder_weights

    return read_folder_weights(model_path, dtype, keep)


def load_stored_weights(
    model_path: Path, dtype: torch.dtype, *, keep: KeepStored = keep_all
) -> tuple[ModelArchitecture, dict[str, Weight]]:
    """As `load_weights`, but that matrices which a GGUF file holds in blocks stay as they are, views of the mapped file.
    Raises ModelLoadError, also if the model is no GGUF file."""
    if is_random(str(model_path)) or not _is_gguf(model_path):
        raise ModelLoadError(f"{model_path} is no GGUF file: it holds no weights in blocks", param="engine.weights")
    from common.engine.loader.gguf_file import read_stored_weights

    return read_stored_weights(model_path, dtype, keep)


def holds_blocks(model_path: Path) -> bool:
    """Whether it is a GGUF file that has all matrices of its layers in blocks that we compute with. Raises ModelLoadError."""
    if is_random(str(model_path)) or not _is_gguf(model_path):
        return False
    from common.engine.loader.gguf_file import has_layers_in_blocks

    return has_layers_in_blocks(model_path)


def _is_gguf(model_path: Path) -> bool:
    if not model_path.exists():
        raise ModelLoadError(f"no model at {model_path}; run `pdserve pull` or check the path")
    return model_path.is_file()
