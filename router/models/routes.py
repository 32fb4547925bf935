"""From a call's model name to the served model that answers it, and those that answer if it cannot.

    plain name or alias of one model     that model, nothing else
    a name of `routing.aliases`          rules, first match -> its policy -> its fallbacks, each filtered by: a decode worker
                                         is ready, and the validator says that this very call can be served by it

The validator is the filter: context, chat template, tools and formats are judged by the code that would refuse the call, not by a
second opinion. A model is asked only when its turn comes. `explain` decides as `route` does and changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from common.config import RouteAlias, RouteRule, RoutingConfig
from common.errors import InvalidRequest, NoWorkerAvailable, PdserveError
from router.models.decision import Candidate, Decision, Refused
from router.models.facts import Facts
from router.models.policy import candidates_of, error_of, relative_costs
from router.models.share import ShareController
from router.validate import ValidCall

if TYPE_CHECKING:
    from router.models.predicting import Predicting

_REMEMBERED = 4096  # conversations

Validate = Callable[[str], Awaitable[ValidCall]]
"""Validates the call as one for the named model. Raises a PdserveError."""


class ModelRouter:
    """One per router. `is_ready` tells whether a model has the workers that a call takes, `is_awaited` whether it lost
    some of them and gets others."""

    def __init__(
        self, config: RoutingConfig, *, is_ready: Callable[[str], bool], is_awaited: Callable[[str], bool] = lambda model: False
    ) -> None:
        self._config = config
        self._is_ready = is_ready
        self._is_awaited = is_awaited
        self._costs = {
            name: relative_costs(alias.candidates, config.prices) for name, alias in config.aliases.items() if alias.candidates
        }
        self._controllers = {name: ShareController() for name, alias in config.aliases.items() if alias.policy == "predicted"}
        self._predicting = _make_predicting(config)
        self._remembered: OrderedDict[str, str] = OrderedDict()  # conversation -> model, of predicted choices

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """The names that stand for several models, with these."""
        return {name: alias.models for name, alias in self._config.aliases.items()}

    async def close(self) -> None:
        """Waits for what is being predicted."""
        if self._predicting is not None:
            await self._predicting.close()

    def stand_in(self, name: str) -> str:
        """Of a name's models the one that is meant where there is no call to decide about, such as a text to tokenise: the first
        that serves; before those that are dear the cheap, before those with little weight the heavy."""
        alias = self._config.aliases.get(name)
        if alias is None:
            return name
        order = sorted(alias.weights, key=lambda model: -alias.weights[model]) or list(alias.candidates)
        if alias.policy != "first":
            order.sort(key=lambda model: self._costs[name][model])
        order += alias.fallback
        return next((model for model in order if self._is_ready(model)), order[0])

    async def route(self, facts: Facts, validate: Validate) -> Route:
        """Raises what the validator says of a plain name; of a routed one, if nobody can serve it, what its first model says."""
        alias = self._config.aliases.get(facts.asked)
        if alias is None:
            call = await validate(facts.asked)
            return Route(Decision(facts.asked, (Candidate(call.model.name, "asked by name"),)), call, self._is_ready, validate)
        decision = await self._decide(facts, alias, validate)
        route = await Route.first(decision, self._is_ready, self._is_awaited, validate)
        self._learn(facts, alias, route)
        return route

    async def explain(self, facts: Facts, validate: Validate) -> Decision:
        """Every candidate is held against the call, not only the first that can serve it. Raises nothing of theirs."""
        alias = self._config.aliases.get(facts.asked)
        if alias is None:
            decision = Decision(facts.asked, (Candidate((await validate(facts.asked)).model.name, "asked by name"),))
        else:
            decision = await self._decide(facts, alias, validate)
        fit, refused = [], list(decision.refused)
        for candidate in decision.candidates:
            found = await _examine(candidate.model, self._is_ready, validate)
            if isinstance(found, Refused):
                refused.append(found)
            else:
                fit.append(candidate)
        return replace(decision, candidates=tuple(fit), refused=tuple(refused))

    async def _decide(self, facts: Facts, alias: RouteAlias, validate: Validate) -> Decision:
        refused: list[Refused] = []
        chosen: list[Candidate] = []
        for number, rule in enumerate(self._config.rules, 1):
            reason = await self._why(rule, facts, validate, refused)
            if reason is not None:
                chosen.append(Candidate(rule.use, f"rule {number}: {reason}"))
                break
        predicted: Mapping[str, float] = {}
        predicted_by = ""
        if alias.policy == "predicted" and self._predicting is not None:
            kept = self._remembered.get(_conversation(facts))
            # Where the model stays, nothing hangs on the prediction: the embedder is spared.
            prediction = self._predicting.by_words(facts.text) if kept is not None else await self._predicting.of(facts.text)
            predicted, predicted_by = prediction.probabilities, prediction.by
            if kept is not None:
                chosen.append(Candidate(kept, "as before in this conversation"))
        controller = self._controllers.get(facts.asked)
        bar = controller.bar if controller is not None else 0.0
        chosen += candidates_of(alias, facts, self._costs.get(facts.asked, {}), predicted, bar, predicted_by)
        chosen += [Candidate(model, f"fallback {place}") for place, model in enumerate(alias.fallback, 1)]
        first: dict[str, Candidate] = {}
        for candidate in chosen:
            first.setdefault(candidate.model, candidate)
        shown = tuple((model, predicted[model]) for model in alias.candidates if model in predicted)
        return Decision(facts.asked, tuple(first.values()), tuple(refused), shown, predicted_by)

    async def _why(self, rule: RouteRule, facts: Facts, validate: Validate, refused: list[Refused]) -> str | None:
        """Why a rule holds; None if it does not. Tokens are counted as the model counts them that the rule would use."""
        reasons = []
        for name, value in rule.when.header.items():
            if facts.header(name.lower()) != value:
                return None
            reasons.append(f"header {name.lower()}")
        if rule.when.tenant is not None:
            if facts.tenant != rule.when.tenant:
                return None
            reasons.append(f"tenant {facts.tenant}")
        if rule.when.tokens_over is not None:
            found = await _examine(rule.use, self._is_ready, validate)
            if isinstance(found, Refused):
                refused.append(found)
                return None
            longest = max(request.num_prompt_tokens for request in found.requests)
            if longest <= rule.when.tokens_over:
                return None
            reasons.append(f"{longest} tokens are more than {rule.when.tokens_over}")
        return ", ".join(reasons)

    def _learn(self, facts: Facts, alias: RouteAlias, route: Route) -> None:
        chosen = route.chosen
        predicted = dict(route.decision.predicted)
        if chosen.model not in predicted or not chosen.reason.startswith("predicted"):
            return
        error = error_of(alias, chosen.model, self._costs[facts.asked], predicted)
        if error is not None:
            self._controllers[facts.asked].saw(error)
        self._remembered[_conversation(facts)] = chosen.model
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)


class Route:
    """A decision on its way: the call as its current model would serve it. `next` moves on; belongs to one call."""

    def __init__(
        self, decision: Decision, call: ValidCall, is_ready: Callable[[str], bool], validate: Validate, position: int = 0
    ) -> None:
        self.decision = decision
        self.call = call
        self._is_ready = is_ready
        self._validate = validate
        self._position = position
        self._after = ""

    @classmethod
    async def first(
        cls, decision: Decision, is_ready: Callable[[str], bool], is_awaited: Callable[[str], bool], validate: Validate
    ) -> Route:
        """At the first candidate that can serve the call, or else at the first that will be able to, when its workers are back.
        Raises the error of the first that said why it cannot."""
        serves = is_ready if any(is_ready(candidate.model) for candidate in decision.candidates) else is_awaited
        refused = list(decision.refused)
        for position, candidate in enumerate(decision.candidates):
            found = await _examine(candidate.model, serves, validate)
            if not isinstance(found, Refused):
                return cls(replace(decision, refused=tuple(refused)), found, is_ready, validate, position)
            refused.append(found)
        errors = [one.error for one in refused if one.error is not None]
        # What the client can mend comes first; that nobody is up is only worth saying if it is all there is to say.
        raise next((error for error in errors if isinstance(error, InvalidRequest)), errors[0])

    @property
    def chosen(self) -> Candidate:
        return self.decision.candidates[self._position]

    @property
    def has_other(self) -> bool:
        """Whether there may be another model for the call, if this one cannot serve it."""
        return any(self._is_ready(candidate.model) for candidate in self.decision.candidates[self._position + 1 :])

    @property
    def is_routed(self) -> bool:
        return self.decision.asked != self.chosen.model and self.chosen.reason != "asked by name"

    @property
    def headers(self) -> dict[str, str]:
        """For the answer: which model gives it, and why. Nothing if the client named the model itself."""
        if not self.is_routed:
            return {}
        passed_over = [f"{refused.model}: {refused.reason}" for refused in self.decision.refused]
        reason = "; ".join([self.chosen.reason, *([self._after] if self._after else []), *passed_over])
        return {"x-route-model": self.chosen.model, "x-route-reason": reason.encode("ascii", "replace").decode()[:512]}

    async def next(self, failure: PdserveError) -> bool:
        """Whether there is another model for the call, which is then the current one."""
        failed = self.chosen.model
        for position in range(self._position + 1, len(self.decision.candidates)):
            found = await _examine(self.decision.candidates[position].model, self._is_ready, self._validate)
            if not isinstance(found, Refused):
                self.call, self._position = found, position
                self._after = f"after {failure.code} of {failed}"
                return True
        return False


async def _examine(model: str, is_ready: Callable[[str], bool], validate: Validate) -> ValidCall | Refused:
    if not is_ready(model):
        error = NoWorkerAvailable(f"no worker of {model} is ready", retry_after_s=1.0)
        return Refused(model, "its workers are not ready", error)
    try:
        return await validate(model)
    except PdserveError as error:
        return Refused(model, f"{error.code}{f' ({error.param})' if error.param else ''}", error)


def _conversation(facts: Facts) -> str:
    return f"{facts.asked}\0{facts.conversation}"


def _make_predicting(config: RoutingConfig) -> Predicting | None:
    """Raises ConfigError and ModelLoadError. Without a predictor nothing is imported."""
    if config.predictor is None:
        return None
    from router.models.predicting import make_predicting

    return make_predicting(config)
