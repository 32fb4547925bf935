"""Telling of layers whose keys and values are in the pool: on a CPU as they are computed, on a GPU when it is through with them.

The host is far ahead of a GPU. So there an event is queued behind each layer, and when all layers are queued the events are
waited for, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.engine.models import LayerDone


@contextmanager
def told_when_computed(layer_done: LayerDone | None, device: torch.device) -> Iterator[LayerDone | None]:
    """Gives what is to be called where a layer was computed or queued; `layer_done` has been called for all when it ends."""
    if layer_done is None or device.type != "cuda":
        yield layer_done
        return
    marks: list[tuple[int, torch.cuda.Event]] = []

    def mark(num_layers: int) -> None:
        event = torch.cuda.Event()
        event.record()
        marks.append((num_layers, event))

    yield mark
    for num_layers, event in marks:
        event.synchronize()
        layer_done(num_layers)
