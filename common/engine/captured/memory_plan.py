"""How the memory of a device is shared out: a worker's stated share, less weights, steps and a reserve, is the KV pool.

    share of the device   | weights | captured steps and activations | reserve |  KV pool: as many blocks as fit  |

Two engines on one device each state their share; what others hold already is left to them. Numbers in, numbers out.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import ConfigError

RESERVE_SHARE = 0.02  # of the engine's share: fragments of the allocator, libraries' workspaces


@dataclass(frozen=True, slots=True)
class StepShape:
    """What bounds the memory of a step."""

    most_rows: int  # of a prompt chunk or a decode batch
    logit_rows: int  # rows of it that need logits
    hidden_size: int
    widest: int  # outputs of the widest matrix of a layer, for each row
    vocab_size: int
    element_bytes: int

    @property
    def bytes(self) -> int:
        """Hidden states, what a layer makes of them (in its type and once in fp32), and logits: as the head gives them, in fp32,
        and those that persist, with what draws need beside them."""
        layer = self.most_rows * (4 * self.hidden_size + 2 * self.widest) * (self.element_bytes + 4)
        return layer + 3 * 4 * self.logit_rows * self.vocab_size


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    weights_bytes: int
    steps_bytes: int
    reserve_bytes: int
    num_blocks: int
    block_bytes: int

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def plan_memory(
    *, total_bytes: int, free_bytes: int, share: float, weights_bytes: int, steps_bytes: int, block_bytes: int, fewest_blocks: int
) -> MemoryPlan:
    """`free_bytes` is what is free before anything of this engine is there. Raises ConfigError if the pool would have fewer than
    `fewest_blocks` blocks."""
    own_bytes = int(total_bytes * share)
    usable_bytes = min(own_bytes, free_bytes)
    reserve_bytes = int(own_bytes * RESERVE_SHARE)
    left_bytes = usable_bytes - weights_bytes - steps_bytes - reserve_bytes
    num_blocks = max(0, left_bytes) // block_bytes
    if num_blocks < fewest_blocks:
        raise ConfigError(
            f"{share:.0%} of the device is {own_bytes} bytes, of which {free_bytes} are free; weights take {weights_bytes}, steps"
            f" {steps_bytes}, and what is left holds {num_blocks} blocks of KV, fewer than {fewest_blocks}",
            param="engine.device_memory_share",
        )
    return MemoryPlan(weights_bytes, steps_bytes, reserve_bytes, num_blocks, block_bytes)
