"""What the HTTP and the gRPC face share: a validator, a cache, a gate before the dispatcher, an account of what is in flight.

Made once by `router.server`. A face turns its own messages into a schema body, asks `admit` whether the router takes its work,
and writes the deltas of `generation` in its own format.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from common.clock import Clock
from common.config import Config
from common.errors import InvalidRequest, RateLimited
from common.metrics import RouterMetrics
from common.tracing.tracer import Tracer
from common.types import Request
from router.admission.bands import Band
from router.admission.forecast import Forecast, PoolRoom
from router.admission.gate import Admitted, Gate
from router.admission.shared_limits import Limits
from router.admission.tenants import Identity, Standing, standing_of
from router.cache.answers import AnswerCache
from router.cache.control import CacheControl
from router.cache.invalidation import invalidate
from router.cache.semantic_port import SemanticLookup
from router.dispatch import Dispatcher
from router.generation import Generation, InFlight
from router.keys import KeyRing
from router.models.decision import Decision
from router.models.facts import Header, facts_of
from router.models.routes import ModelRouter, Route, Validate
from router.observe.observatory import Observatory
from router.registry import ModelView, Registry
from router.schemas import ChatBody, CompletionBody, DetokenizeBody, FeedbackBody, InvalidateBody, TokenizeBody
from router.structured.examination import Examination
from router.validate import Caller, TokenizedText, Validator, ValidCall

MAX_REQUEST_ID_CHARS = 128


class Front:
    def __init__(
        self,
        config: Config,
        *,
        registry: Registry,
        dispatcher: Dispatcher,
        cache: AnswerCache,
        semantics: SemanticLookup,
        in_flight: InFlight,
        limits: Limits,
        metrics: RouterMetrics,
        tracer: Tracer,
        clock: Clock,
    ) -> None:
        self.config = config.router
        self.registry = registry
        self.metrics = metrics
        self.clock = clock
        self.keys = KeyRing(config.router, clock)
        self.examination = Examination(config.router.grammar_timeout_s)
        self.validator = Validator(config.router, registry, self.examination)
        self.models = ModelRouter(config.routing, is_ready=registry.serves, is_awaited=registry.awaits)
        self.in_flight = in_flight
        self._cache = cache
        self._semantics = semantics
        self.limits = limits
        self.gate = Gate(
            config.router.admission,
            dispatch=dispatcher,
            forecast=_forecast(config, registry, dispatcher.placer.predicted_ttft_s),
            limits=limits,
            metrics=metrics.admission,
            clock=clock,
        )
        self.observatory = Observatory(
            config.router,
            lines=self.gate.lines,
            ledgers=dispatcher.ledgers,
            tracer=tracer,
            clock=clock,
            metrics=metrics.observe,
        )
        metrics.read_inflight_from(lambda: dict(self.in_flight.by_model))

    @property
    def draining(self) -> bool:
        return self.in_flight.closed

    async def admit(self, identity: Identity) -> None:
        """At the door, before work is put into a request: counts it. Raises RateLimited, and NoWorkerAvailable once the router is
        being drained."""
        self.in_flight.check_open()
        reached = await self.limits.ask(identity)
        if reached is not None:
            self.metrics.admission.rejected_total.labels(reached.limit, "").inc()
            whose = "this key" if reached.of_key else "this tenant"
            raise RateLimited(
                f"{whose} has reached its {reached.limit}", param=reached.limit, retry_after_s=max(1.0, reached.retry_after_s)
            )

    async def route(self, body: ChatBody | CompletionBody, caller: Caller, header: Header, tenant: str) -> Route:
        """The call, validated for the model that is to answer it. Raises what that model's validation says."""
        return await self.models.route(
            facts_of(body, header, tenant=tenant, scope=caller.cache_salt), self._validation(body, caller)
        )

    async def explain(self, body: ChatBody | CompletionBody, caller: Caller, header: Header, tenant: str) -> Decision:
        return await self.models.explain(
            facts_of(body, header, tenant=tenant, scope=caller.cache_salt), self._validation(body, caller)
        )

    def names(self) -> tuple[tuple[str, ModelView], ...]:
        """Every name that can be asked for, with its model: a name of several models with the first that is there."""
        known = self.registry.view.models
        routed = [(name, [known[model] for model in models if model in known]) for name, models in self.models.names.items()]
        return (*self.registry.names(), *((name, views[0]) for name, views in routed if views))

    def tokenizing_model(self, name: str) -> str:
        """Whose tokens are meant by a name."""
        return self.models.stand_in(name)

    async def tokenize(self, body: TokenizeBody) -> TokenizedText:
        return await self.validator.tokenize(body.model_copy(update={"model": self.tokenizing_model(body.model)}))

    async def detokenize(self, body: DetokenizeBody) -> str:
        return await self.validator.detokenize(body.model_copy(update={"model": self.tokenizing_model(body.model)}))

    def _validation(self, body: ChatBody | CompletionBody, caller: Caller) -> Validate:
        async def validate(model: str) -> ValidCall:
            asked = body if body.model == model else body.model_copy(update={"model": model})
            if isinstance(asked, ChatBody):
                return await self.validator.chat(asked, caller)
            return await self.validator.completion(asked, caller)

        return validate

    def require_admin(self, identity: Identity) -> None:
        """Before what administrates this router. Raises PermissionDenied."""
        identity.require_admin()

    def standing(self, identity: Identity, *priorities: str | None) -> Standing:
        """`priorities` are what the call says in several places; they must agree. Raises InvalidRequest, PermissionDenied."""
        given = {one for one in priorities if one is not None}
        if len(given) > 1:
            raise InvalidRequest("the header x-priority and the field priority differ", param="priority")
        if given - set(Band):
            raise InvalidRequest(f"priority must be one of {', '.join(Band)}", param="priority")
        return standing_of(identity, Band(given.pop()) if given else None)

    def generation(
        self, call: ValidCall, received_s: float, standing: Standing, cache_control: CacheControl, *, waits: bool
    ) -> Generation:
        """`waits`: for the successors of lost workers, as no other model can take over."""
        return Generation(
            call,
            received_s=received_s,
            source=Admitted(self.gate, standing, waits=waits),
            cache=self._cache,
            cache_control=cache_control,
            in_flight=self.in_flight,
            metrics=self.metrics,
            clock=self.clock,
        )

    async def invalidate(self, body: InvalidateBody, identity: Identity) -> dict[str, Any]:
        """Raises a retryable error if the answers may still be given somewhere."""
        return await invalidate(body, self._cache, identity=identity, models=self.registry.names())

    async def feedback(self, body: FeedbackBody, identity: Identity) -> dict[str, Any]:
        """Raises InvalidRequest for what is no hit of this tenant's, and a retryable error if a wrong answer may still come."""
        removed = await self._semantics.feedback(body.id, ok=body.ok, tenant=identity.tenant.cache_salt)
        return {"object": "cache.feedback", "id": body.id, "ok": body.ok, "removed": removed}

    def ready_models(self) -> tuple[str, ...]:
        """Models whose workers are ready, or that wake when they are asked for; none while draining."""
        names = self.registry.view.models
        return () if self.draining else tuple(name for name in names if self.registry.serves(name))


def _forecast(config: Config, registry: Registry, predict: Callable[[Request], float | None]) -> Forecast:
    models = {model.name: model for model in config.models}
    return PoolRoom(config.router.admission, models, registry.places, predict)


def request_id_or_new(given: str) -> str:
    """A client's request id if it is short and printable, else one of our own: it goes into headers and logs."""
    if 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable() and given == given.strip():
        return given
    return uuid.uuid4().hex
