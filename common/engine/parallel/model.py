"""Builds a rank's share: its weights, its pool, its model, its connections.

    ShareOrder (what rank 0 decided, the same for all but the rank)  +  memory, links  ->  StageShare

Every rank reads the model's files by itself and holds on to its share of each tensor only. Rank 0 decides once, for all, whether
kernels compute, and which: sums of several kinds do not mix. A rank on a GPU has that of its number, of those that are visible.
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
from common.engine.engine_plan import numerics_of
from common.engine.loader import load_architecture, load_stored_weights, load_weights
from common.engine.models import Model, create_model
from common.engine.native.library import Library
from common.engine.native.model import NativeModel, NativeStage
from common.engine.native.panels import PANEL, ModelPanels
from common.engine.numerics import Numerics
from common.engine.parallel.connections import Connections, SocketConnections
from common.engine.parallel.links import LINK_TIMEOUT_S, Link
from common.engine.parallel.share import Held, Share, shares_of
from common.engine.parallel.stage import Pipeline, StageShare
from common.engine.parallel.sums import SharedNumerics, SocketSum
from common.engine.pool_memory import BlockMemory, create_pool
from common.engine.quantisation import WeightFormat, rounded_weights
from common.engine.triton_kernels.choice import choose_operations
from common.errors import EngineFailure
from common.logs import get_logger
from common.types import KVLayout

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ShareOrder:
    rank: int
    model_path: str
    engine: EngineConfig
    weight_format: WeightFormat
    parallel: ParallelConfig
    threads: int
    layout: KVLayout  # of the whole
    num_blocks: int
    max_model_tokens: int
    library: str  # of native kernels; "" = they do not compute
    device: str = "cpu"  # "cuda": each rank has a GPU
    kernels: str = "torch"  # "triton": they compute what is not a matrix product
    backend: str = ""  # of torch.distributed, which carries sums and rows; "" = sockets do
    rendezvous: str = ""  # the file by which ranks find each other then

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
                "weight_format": WeightFormat(fields["weight_format"]),
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
    device = torch.device("cuda", order.rank) if order.device == "cuda" else torch.device(order.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    path = Path(order.model_path)
    whole = load_architecture(path)
    share = shares_of(whole, order.parallel)[order.rank]
    dtype: torch.dtype = getattr(torch, order.layout.values_dtype)
    connections = _connections(order, share, links, device)
    add_up = connections.add_up
    weight_format = order.weight_format
    architecture, layout = share.architecture(whole), share.layout(order.layout)
    operations = choose_operations(
        order.engine.model_copy(update={"kernels": order.kernels}), architecture, layout, device, _log.warning
    )
    base = numerics_of(order.engine, operations, weight_format)
    pool, device_memory = create_pool(layout, order.num_blocks, device, memory)
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
        numerics: Numerics = base
    else:

        def keep_rounded(name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
            # Rounded before it is divided: the same weights whatever the degree.
            return share.keep(whole, name, rounded_weights({name: tensor}, weight_format)[name])

        _, weights = load_weights(path, dtype, keep=keep_rounded)
        weights = {name: weights.pop(name).to(device) for name in list(weights)}  # not to be held twice
        numerics = SharedNumerics(base, add_up) if add_up is not None else base
        model = create_model(architecture, weights, numerics, order.max_model_tokens)
        row_width, row_dtype = whole.hidden_size, dtype
    pipeline = Pipeline(
        num_stages=order.parallel.pipeline_parallel,
        least_tokens=order.parallel.micro_batch_tokens,
        connections=connections,
        row_width=row_width,
        row_dtype=row_dtype,
    )
    attention = create_attention(numerics.operations.attention, pool, len(share.heads))
    return StageShare(share, model, pool, attention, pipeline, device_memory)


def _connections(order: ShareOrder, share: Share, links: ShareLinks, device: torch.device) -> Connections:
    if not order.backend:
        others = [links.shards[shard] for shard in sorted(links.shards)]
        add_up = SocketSum(share.shard, others) if others else None
        return SocketConnections(add_up, links.previous, links.following)
    from common.engine.parallel.collective import CollectiveConnections

    timeout_s = max(LINK_TIMEOUT_S, order.engine.rank_timeout_s)
    return CollectiveConnections(share, order.parallel, order.backend, order.rendezvous, timeout_s, device)


def _library(path: str) -> Library:
    try:
        return Library(Path(path))
    except EngineFailure as error:
        raise EngineFailure("the native kernels of rank 0 cannot be loaded here") from error
