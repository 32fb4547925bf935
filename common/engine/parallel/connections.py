"""How a rank is connected to the others of its group: who adds up sums with it, and where hidden rows come from and go to.

    sockets       ranks on CPUs: inherited pairs of sockets (`links`)
    collective    ranks on GPUs: torch.distributed (`collective`), which has to be connected once all ranks are there

A share asks for its sums and rows and knows nothing of this.
"""

from __future__ import annotations

from typing import Protocol

import torch

from common.engine.parallel.links import Link
from common.engine.parallel.sums import Sum, as_bytes


class Rows(Protocol):
    """Hidden rows between two stages, in order."""

    def send(self, rows: torch.Tensor) -> None: ...

    def receive(self, rows: torch.Tensor) -> None:
        """Fills `rows`."""
        ...


class Connections(Protocol):
    @property
    def add_up(self) -> Sum | None:
        """None: there is one shard."""
        ...

    @property
    def previous(self) -> Rows | None: ...

    @property
    def following(self) -> Rows | None: ...

    def connect(self) -> None:
        """Once all ranks have built their shares; all of them call it. Blocking. Raises RankLost."""
        ...

    def abort(self) -> None:
        """The group is lost: whoever waits within is woken. From any thread."""
        ...

    def close(self) -> None:
        """Nothing is computed any more."""
        ...


class SocketRows:
    def __init__(self, link: Link) -> None:
        self._link = link

    def send(self, rows: torch.Tensor) -> None:
        self._link.send(as_bytes(rows.contiguous()))

    def receive(self, rows: torch.Tensor) -> None:
        self._link.receive_into(as_bytes(rows))


class SocketConnections:
    """There since before the processes were; whoever starts the ranks closes and shuts down the sockets."""

    def __init__(self, add_up: Sum | None, previous: Link | None, following: Link | None) -> None:
        self.add_up = add_up
        self.previous = None if previous is None else SocketRows(previous)
        self.following = None if following is None else SocketRows(following)

    def connect(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """The sockets are shut down by whom they belong to."""

    def close(self) -> None:
        """Likewise."""
