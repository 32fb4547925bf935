"""Builds a rank's share: its weights, its pool, its model, its connections.

    ShareOrder (what rank 0 decided, the same for all but the rank)  +  memory, links  ->  StageShare

Every rank reads the model's files by itself and holds on to its share of each tensor only. Rank 0 decides once, for all, whether
the native kernels compute: sums of both kinds do not mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.config import EngineConfig, ParallelConfig
from common.engine.attention import create_attention
from common.engine.block_matrix import Weight
from common.engine.cores import OwnCores
from common.engine.exact import ExactNumerics
from common.engine.loader import load_architecture, load_stored_weights, load_weights
from common.engine.models import Model, create_model
from common.engine.native.library import Library
from common.engine.native.model import NativeModel, NativeStage
from common.engine.native.panels import PANEL, ModelPanels
from common.engine.numerics import FastNumerics, Numerics
from common.engine.parallel.links import Link
from common.engine.parallel.share import Held, shares_of
from common.engine.parallel.stage import Pipeline, StageShare
from common.engine.parallel.sums import SharedNumerics, SocketSum
from common.engine.pool_memory import BlockMemory, create_pool
from common.engine.quantisation import WeightFormat, rounded_weights
from common.errors import EngineFailure
from common.types import KVLayout


@dataclass(frozen=True, slots=True)
class ShareOrder:
    rank: int
    model_path: str
    engine: EngineConfig
    parallel: ParallelConfig
    threads: int
    layout: KVLayout  # of the whole
    num_blocks: int
    max_model_tokens: int
    library: str  # of native kernels; "" = torch computes

    def for_rank(self, rank: int) -> ShareOrder:
        return replace(self, rank=rank)

    def encode(self) -> dict[str, Any]:
        """For JSON."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {
            "engine": self.engine.model_dump(),
            "parallel": self.parallel.model_dump(include=set(ParallelConfig.model_fields)),
            "layout": asdict(self.layout),
        }

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> ShareOrder:
        return cls(
            **{
                **fields,
                "engine": EngineConfig.model_validate(fields["engine"]),
                "parallel": ParallelConfig.model_validate(fields["parallel"]),
                "layout": KVLayout(**fields["layout"]),
            }
        )


@dataclass(frozen=True, slots=True)
class ShareLinks:
    """A rank's connections but for those to rank 0."""

    shards: Mapping[int, Link]  # of its stage, by shard, without its own
    previous: Link | None
    following: Link | None


def build_share(order: ShareOrder, memory: BlockMemory | None, links: ShareLinks) -> StageShare:
    """Blocking. `memory` is for the rank's pool, if it is given. Raises a StartupError."""
    torch.set_num_threads(order.threads)
    path = Path(order.model_path)
    whole = load_architecture(path)
    share = shares_of(whole, order.parallel)[order.rank]
    dtype: torch.dtype = getattr(torch, order.layout.values_dtype)
    base: Numerics = ExactNumerics(order.engine.exact_tile_rows) if order.engine.exact else FastNumerics()
    others = [links.shards[shard] for shard in sorted(links.shards)]
    add_up = SocketSum(share.shard, others) if others else None
    weight_format = WeightFormat.of(order.engine.weights, "cpu", order.engine.kernels)
    pool, device_memory = create_pool(share.layout(order.layout), order.num_blocks, torch.device("cpu"), memory)
    architecture = share.architecture(whole)
    model: Model
    if order.library:
        library = _library(order.library)

        def keep(name: str, tensor: Held) -> Mapping[str, Held]:
            return share.keep(whole, name, tensor)

        held: Mapping[str, Weight]
        if weight_format is WeightFormat.FILE:
            _, held = load_stored_weights(path, dtype, keep=keep)
        else:
            _, held = load_weights(path, dtype, keep=keep)
        panels = ModelPanels.of(architecture, held, weight_format, dtype)
        stage = NativeStage(len(share.vocab), add_up)
        model = NativeModel(library, architecture, panels, pool, order.max_model_tokens, OwnCores(order.threads), stage)
        row_width, row_dtype = -(-whole.hidden_size // PANEL) * PANEL, torch.float32
        numerics = base
    else:

        def keep_rounded(name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
            # Rounded before it is divided: the same weights whatever the degree.
            return share.keep(whole, name, rounded_weights({name: tensor}, weight_format)[name])

        _, weights = load_weights(path, dtype, keep=keep_rounded)
        numerics = SharedNumerics(base, add_up) if add_up is not None else base
        model = create_model(architecture, weights, numerics, order.max_model_tokens)
        row_width, row_dtype = whole.hidden_size, dtype
    pipeline = Pipeline(
        num_stages=order.parallel.pipeline_parallel,
        least_tokens=order.parallel.micro_batch_tokens,
        previous=links.previous,
        following=links.following,
        row_width=row_width,
        row_dtype=row_dtype,
    )
    attention = create_attention(numerics.operations.attention, pool, len(share.heads))
    return StageShare(share, model, pool, attention, pipeline, device_memory)


def _library(path: str) -> Library:
    try:
        return Library(Path(path))
    except EngineFailure as error:
        raise EngineFailure("the native kernels of rank 0 cannot be loaded here") from error
