"""What an administrator does to the cluster: a JSON body becomes one call of the pool manager's `Control`, its error an HTTP one.

    scale, drain, flip, roll        change what is desired; the manager brings it about, and the page sees it happen
    autoscaler                      how it is to work from now on; what it decided, and why, can be asked for at any time

A channel lives as long as one call: they are rare, and the manager may have moved. This router decides nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

import grpc.aio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.codec import role_to_wire
from common.errors import InvalidRequest, ManagerUnavailable, PdserveError, WorkerLost
from common.logs import get_logger
from common.rpc import connect, error_from_rpc
from common.types import Role
from common.wire.registry_pb2 import (
    AUTOSCALER_MODE_DRY_RUN,
    AUTOSCALER_MODE_OFF,
    AUTOSCALER_MODE_ON,
    AutoscalerDecision,
    AutoscalerMode,
    AutoscalerReport,
    AutoscalerRequest,
    DrainWorkerRequest,
    FlipRequest,
    ModelAutoscaling,
    PoolAutoscaling,
    RollRequest,
    ScaleRequest,
)
from common.wire.registry_pb2_grpc import ControlStub
from router.admission.tenants import Identity

log = get_logger(__name__)

Json = dict[str, Any]

_ANSWER_S = 10.0  # beyond what the caller is willing to wait for the cluster
_MODES: Mapping[str, AutoscalerMode] = {
    "off": AUTOSCALER_MODE_OFF,
    "dry_run": AUTOSCALER_MODE_DRY_RUN,
    "on": AUTOSCALER_MODE_ON,
}
_MODE_NAMES = {mode: name for name, mode in _MODES.items()}

RoleName = Literal["prefill", "decode"]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _Patient(_Body):
    wait_s: float = Field(0.0, ge=0, le=600)  # 0 = return as soon as it is wanted


class ScaleBody(_Patient):
    model: str = Field(min_length=1, max_length=256)
    prefill: int | None = Field(None, ge=0, le=1024)
    decode: int | None = Field(None, ge=0, le=1024)


class DrainBody(_Patient):
    worker_id: str = Field(min_length=1, max_length=512)


class FlipBody(_Patient):
    worker_id: str = Field(min_length=1, max_length=512)
    role: RoleName


class RollBody(_Patient):
    model: str = Field(min_length=1, max_length=256)
    role: RoleName | None = None


class AutoscalerBody(_Body):
    model: str = Field(min_length=1, max_length=256)
    mode: Literal["off", "dry_run", "on"]


class Actions:
    """Each returns what the page is to say. All raise InvalidRequest, ManagerUnavailable, and what the manager says."""

    def __init__(self, *, manager_address: str, cluster_token: str) -> None:
        self._manager_address = manager_address
        self._cluster_token = cluster_token
        self._by_name: dict[str, Callable[[object], Awaitable[Json]]] = {
            "scale": self._scale,
            "drain": self._drain,
            "flip": self._flip,
            "roll": self._roll,
            "autoscaler": self._autoscaler,
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    async def perform(self, name: str, data: object, identity: Identity) -> Json:
        """`data` is the body as it was sent."""
        asked = data if isinstance(data, Mapping) else {}
        try:
            said = await self._by_name[name](data)
        except PdserveError as error:
            log.warning("action refused", action=name, key=identity.key_id, error=error.code, message=error.message)
            raise
        log.info("action", action=name, key=identity.key_id, **{key: str(asked[key])[:256] for key in _LOGGED if key in asked})
        return said

    async def _scale(self, data: object) -> Json:
        body = _parse(ScaleBody, data)
        if body.prefill is None and body.decode is None:
            raise InvalidRequest("give prefill, decode or both", param="prefill")
        request = ScaleRequest(model=body.model, prefill=body.prefill, decode=body.decode, wait_s=body.wait_s)
        await self._call(lambda stub: stub.Scale(request, timeout=body.wait_s + _ANSWER_S))
        return {"done": "scale"}

    async def _drain(self, data: object) -> Json:
        body = _parse(DrainBody, data)
        request = DrainWorkerRequest(worker_id=body.worker_id, wait_s=body.wait_s)
        await self._call(lambda stub: stub.Drain(request, timeout=body.wait_s + _ANSWER_S))
        return {"done": "drain"}

    async def _flip(self, data: object) -> Json:
        body = _parse(FlipBody, data)
        request = FlipRequest(worker_id=body.worker_id, role=role_to_wire(Role(body.role)), wait_s=body.wait_s)
        await self._call(lambda stub: stub.Flip(request, timeout=body.wait_s + _ANSWER_S))
        return {"done": "flip"}

    async def _roll(self, data: object) -> Json:
        body = _parse(RollBody, data)
        role = role_to_wire(Role(body.role)) if body.role is not None else None
        request = RollRequest(model=body.model, role=role, wait_s=body.wait_s)
        await self._call(lambda stub: stub.Roll(request, timeout=body.wait_s + _ANSWER_S))
        return {"done": "roll"}

    async def _autoscaler(self, data: object) -> Json:
        body = _parse(AutoscalerBody, data)
        request = AutoscalerRequest(model=body.model, mode=_MODES[body.mode])
        await self._call(lambda stub: stub.Autoscaler(request, timeout=_ANSWER_S))
        return {"done": "autoscaler"}

    async def autoscaler_report(self) -> Json:
        """What it sees and decided, of every model."""
        report: AutoscalerReport = await self._call(lambda stub: stub.Autoscaler(AutoscalerRequest(), timeout=_ANSWER_S))
        return {"models": {model.model: _model(model) for model in report.models}}

    async def _call(self, call: Callable[[ControlStub], Awaitable[Any]]) -> Any:
        channel = connect(self._manager_address, self._cluster_token)
        try:
            return await call(ControlStub(channel))
        except grpc.aio.AioRpcError as error:
            found = error_from_rpc(error)
            if isinstance(found, WorkerLost):  # what an unreachable peer is taken for
                raise ManagerUnavailable("the pool manager cannot be reached", retry_after_s=2.0) from None
            raise found from None
        finally:
            await channel.close(None)


_BodyT = TypeVar("_BodyT", bound=_Body)


def _parse(kind: type[_BodyT], data: object) -> _BodyT:
    """A field that is not known is an error here: what it was meant to say would be left undone."""
    if not isinstance(data, Mapping):
        raise InvalidRequest("the body must be a JSON object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidRequest(str(first["msg"]), param=".".join(map(str, first["loc"])) or None) from None


_LOGGED = ("model", "worker_id", "role", "prefill", "decode", "mode")


def _model(model: ModelAutoscaling) -> Json:
    return {
        "mode": _MODE_NAMES.get(model.mode, "off"),
        "idle_s": round(model.idle_s, 1),
        "pools": {"prefill": _pool(model.prefill), "decode": _pool(model.decode)},
        "decisions": [_decision(decision) for decision in model.decisions],
    }


def _pool(pool: PoolAutoscaling) -> Json:
    return {
        "min": pool.min_replicas,
        "max": pool.max_replicas,
        "desired": pool.desired,
        "ready": pool.ready,
        "pressure": round(pool.pressure, 3),
        "signal": pool.signal,
    }


def _decision(decision: AutoscalerDecision) -> Json:
    return {
        "at_s": round(decision.at_s, 3),
        "action": decision.action,
        "text": decision.text,
        "reason": decision.reason,
        "performed": decision.performed,
        "before": [decision.prefill_before, decision.decode_before],
        "after": [decision.prefill_after, decision.decode_after],
    }
