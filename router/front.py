"""What the HTTP and the gRPC face share: one validator, one dispatcher, one account of what is in flight, one door to close.

Made once by `router.server`. A face turns its own messages into a schema body, asks `admit` whether the router still takes work,
and writes the deltas of `generation` in its own format.
"""

from __future__ import annotations

import uuid

from common.clock import Clock
from common.config import RouterConfig
from common.metrics import RouterMetrics
from common.types import Role
from router.dispatch import Dispatcher
from router.generation import Generation, InFlight
from router.keys import KeyRing
from router.registry import Registry
from router.validate import Validator, ValidCall

MAX_REQUEST_ID_CHARS = 128


class Front:
    def __init__(
        self, config: RouterConfig, *, registry: Registry, dispatcher: Dispatcher, metrics: RouterMetrics, clock: Clock
    ) -> None:
        self.config = config
        self.registry = registry
        self.metrics = metrics
        self.clock = clock
        self.keys = KeyRing(config.api_keys)
        self.validator = Validator(config, registry)
        self.in_flight = InFlight()
        self._dispatcher = dispatcher
        metrics.read_inflight_from(lambda: dict(self.in_flight.by_model))

    @property
    def draining(self) -> bool:
        return self.in_flight.closed

    def admit(self) -> None:
        """Raises NoWorkerAvailable once the router is being drained: asked before work is put into a request."""
        self.in_flight.check_open()

    def generation(self, call: ValidCall, received_s: float) -> Generation:
        return Generation(
            call,
            received_s=received_s,
            dispatcher=self._dispatcher,
            in_flight=self.in_flight,
            metrics=self.metrics,
            clock=self.clock,
        )

    def ready_models(self) -> tuple[str, ...]:
        """Models with at least one ready decode worker; none while draining."""
        view = self.registry.view
        return () if self.draining else tuple(name for name in view.models if view.ready(name, Role.DECODE))


def request_id_or_new(given: str) -> str:
    """A client's request id if it is short and printable, else one of our own: it goes into headers and logs."""
    if 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable() and given == given.strip():
        return given
    return uuid.uuid4().hex
