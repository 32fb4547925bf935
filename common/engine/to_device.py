"""Numbers of the host on their way to a device, without the host waiting for what the device does meanwhile.

On a GPU they go through page-locked memory, which torch keeps until the copy is over: from ordinary memory the driver may wait
for the queue first, or, where GPU and host share their page tables, may read after the array is gone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """On a CPU the tensor is over the same memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def on_the_stream_of_here(device: torch.device) -> Callable[[], None]:
    """Has another thread queue its work where this one does: so it runs in the order in which it was queued."""
    if device.type != "cuda":
        return lambda: None
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.set_stream(stream)
