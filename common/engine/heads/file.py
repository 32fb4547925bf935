"""Heads as a file: a safetensors file whose header says, in JSON, whom the heads are for.

    header      {"pdserve.heads": "{format, model, num_guesses, hidden_size, vocab_size, width}"}
    tokens      int32 [words]                the tokens that heads can name, ids of the model's vocabulary
    norm        float32 [hidden]             what a hidden row is multiplied by, once its mean square is 1
    keep        float32 [hidden]             of the state before, in the state after a token
    bias        float32 [width]
    state, word, out    int8, and state.scale, word.scale, out.scale, float32, one for each row
                        [width, hidden], [width, hidden], [hidden, width]

Rows of the model's own head and embedding are not in it: they are taken from the model, which therefore has to be the one
that the heads were trained for. What does not fit, or is not of these types and shapes, is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import ConfigError

PARAM = "decode.speculation.heads"
_HEADER = "pdserve.heads"
_FORMAT = 1
_MATRICES = ("state", "word", "out")
_MOST_GUESSES = 64


@dataclass(frozen=True, slots=True)
class Description:
    model: str  # digest of the model's files
    num_guesses: int  # tokens that are guessed behind the one that was drawn
    hidden_size: int
    vocab_size: int
    width: int

    def shapes(self, num_words: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        hidden, width = self.hidden_size, self.width
        matrices = {"state": (width, hidden), "word": (width, hidden), "out": (hidden, width)}
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "tokens": (torch.int32, (num_words,)),
            "norm": (torch.float32, (hidden,)),
            "keep": (torch.float32, (hidden,)),
            "bias": (torch.float32, (width,)),
        }
        for name, shape in matrices.items():
            shapes[name] = (torch.int8, shape)
            shapes[f"{name}.scale"] = (torch.float32, shape[:1])
        return shapes


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """What was trained. fp32."""

    description: Description
    tokens: torch.Tensor  # int64 [words]
    norm: torch.Tensor
    keep: torch.Tensor
    bias: torch.Tensor
    state: torch.Tensor
    word: torch.Tensor
    out: torch.Tensor


def as_written(weights: HeadWeights) -> HeadWeights:
    """What a file leaves of them."""
    matrices = {name: _whole(*_rounded(getattr(weights, name))) for name in _MATRICES}
    return HeadWeights(weights.description, weights.tokens, weights.norm, weights.keep, weights.bias, **matrices)


def write_heads(path: Path, weights: HeadWeights) -> None:
    """Replaces the file at once, or leaves it as it was. Raises OSError."""
    tensors = {"tokens": weights.tokens.to(torch.int32), "norm": weights.norm, "keep": weights.keep, "bias": weights.bias}
    for name in _MATRICES:
        tensors[name], tensors[f"{name}.scale"] = _rounded(getattr(weights, name))
    header = {_HEADER: json.dumps({"format": _FORMAT, **asdict(weights.description)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, beside, header)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_heads(path: Path, *, model: str, hidden_size: int, vocab_size: int) -> HeadWeights:
    """Heads for the model of this digest and these sizes. Raises ConfigError."""
    try:
        with safe_open(path, framework="pt") as file:
            description = _description(path, file.metadata())
            if (description.model, description.hidden_size, description.vocab_size) != (model, hidden_size, vocab_size):
                raise _refused(path, f"belongs to another model, {description.model[:12]}, not to {model[:12]}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"cannot read the heads in {path}: {error}", param=PARAM) from error
    num_words = tensors["tokens"].numel() if "tokens" in tensors else 0
    shapes = description.shapes(num_words)
    if set(tensors) != set(shapes) or not num_words:
        raise _refused(path, "lacks tensors or holds unknown ones")
    for name, (dtype, shape) in shapes.items():
        if tensors[name].dtype != dtype or tuple(tensors[name].shape) != shape:
            raise _refused(path, f"tensor {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, not {dtype} {shape}")
        if tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all()):
            raise _refused(path, f"tensor {name} is not finite")
    tokens = tensors["tokens"].long()
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size or len(tokens.unique()) != num_words:
        raise _refused(path, "names tokens twice, or tokens that the model does not have")
    matrices = {name: _whole(tensors[name], tensors[f"{name}.scale"]) for name in _MATRICES}
    return HeadWeights(description, tokens, tensors["norm"], tensors["keep"], tensors["bias"], **matrices)


def _description(path: Path, header: Mapping[str, str] | None) -> Description:
    try:
        fields: Any = json.loads((header or {})[_HEADER])
        found = Description(**{name: fields[name] for name in Description.__slots__})
        is_known = fields["format"] == _FORMAT
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(path, "is no file of heads") from error
    numbers = (found.num_guesses, found.hidden_size, found.vocab_size, found.width)
    if not is_known or not isinstance(found.model, str) or not all(type(number) is int and number > 0 for number in numbers):
        raise _refused(path, "is of another version")
    if found.num_guesses > _MOST_GUESSES:
        raise _refused(path, f"guesses {found.num_guesses} tokens; at most {_MOST_GUESSES} make sense")
    return found


def _refused(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"the heads in {path}: the file {reason}", param=PARAM)


def _rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """To 8 bits, with a scale for each row."""
    scale = (matrix.detach().abs().amax(dim=1) / 127.0).clamp(min=1e-12)
    return (matrix.detach() / scale.unsqueeze(1)).round().to(torch.int8), scale


def _whole(rounded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return rounded.float() * scale.unsqueeze(1)
