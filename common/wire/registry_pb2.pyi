from common.wire import types_pb2 as _types_pb2
from common.wire import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AutoscalerMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AUTOSCALER_MODE_UNSPECIFIED: _ClassVar[AutoscalerMode]
    AUTOSCALER_MODE_OFF: _ClassVar[AutoscalerMode]
    AUTOSCALER_MODE_DRY_RUN: _ClassVar[AutoscalerMode]
    AUTOSCALER_MODE_ON: _ClassVar[AutoscalerMode]
AUTOSCALER_MODE_UNSPECIFIED: AutoscalerMode
AUTOSCALER_MODE_OFF: AutoscalerMode
AUTOSCALER_MODE_DRY_RUN: AutoscalerMode
AUTOSCALER_MODE_ON: AutoscalerMode

class DemandRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class DemandReply(_message.Message):
    __slots__ = ("waking",)
    WAKING_FIELD_NUMBER: _ClassVar[int]
    waking: bool
    def __init__(self, waking: _Optional[bool] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("router_id", "http_address", "grpc_address", "pid")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    http_address: str
    grpc_address: str
    pid: int
    def __init__(self, router_id: _Optional[str] = ..., http_address: _Optional[str] = ..., grpc_address: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "path", "context_tokens", "created_s", "desired_prefill", "desired_decode", "layout_fingerprint", "wakes_on_demand", "awaits_successor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    DESIRED_PREFILL_FIELD_NUMBER: _ClassVar[int]
    DESIRED_DECODE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WAKES_ON_DEMAND_FIELD_NUMBER: _ClassVar[int]
    AWAITS_SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    context_tokens: int
    created_s: int
    desired_prefill: int
    desired_decode: int
    layout_fingerprint: str
    wakes_on_demand: bool
    awaits_successor: bool
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., context_tokens: _Optional[int] = ..., created_s: _Optional[int] = ..., desired_prefill: _Optional[int] = ..., desired_decode: _Optional[int] = ..., layout_fingerprint: _Optional[str] = ..., wakes_on_demand: _Optional[bool] = ..., awaits_successor: _Optional[bool] = ...) -> None: ...

class RouterInfo(_message.Message):
    __slots__ = ("router_id", "http_address", "grpc_address", "pid")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    http_address: str
    grpc_address: str
    pid: int
    def __init__(self, router_id: _Optional[str] = ..., http_address: _Optional[str] = ..., grpc_address: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class ClusterSnapshot(_message.Message):
    __slots__ = ("version", "cluster", "models", "workers", "routers", "manager_metrics_address", "events")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    MANAGER_METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    cluster: str
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    workers: _containers.RepeatedCompositeFieldContainer[_worker_pb2.InfoReply]
    routers: _containers.RepeatedCompositeFieldContainer[RouterInfo]
    manager_metrics_address: str
    events: _containers.RepeatedCompositeFieldContainer[ClusterEvent]
    def __init__(self, version: _Optional[int] = ..., cluster: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[_worker_pb2.InfoReply, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[RouterInfo, _Mapping]]] = ..., manager_metrics_address: _Optional[str] = ..., events: _Optional[_Iterable[_Union[ClusterEvent, _Mapping]]] = ...) -> None: ...

class ClusterEvent(_message.Message):
    __slots__ = ("sequence", "at_s", "kind", "worker_id", "model", "text")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    at_s: float
    kind: str
    worker_id: str
    model: str
    text: str
    def __init__(self, sequence: _Optional[int] = ..., at_s: _Optional[float] = ..., kind: _Optional[str] = ..., worker_id: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("refresh",)
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    refresh: bool
    def __init__(self, refresh: _Optional[bool] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("model", "prefill", "decode", "wait_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    prefill: int
    decode: int
    wait_s: float
    def __init__(self, model: _Optional[str] = ..., prefill: _Optional[int] = ..., decode: _Optional[int] = ..., wait_s: _Optional[float] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "wait_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    wait_s: float
    def __init__(self, worker_id: _Optional[str] = ..., wait_s: _Optional[float] = ...) -> None: ...

class FlipRequest(_message.Message):
    __slots__ = ("worker_id", "role", "wait_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _types_pb2.Role
    wait_s: float
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_types_pb2.Role, str]] = ..., wait_s: _Optional[float] = ...) -> None: ...

class RollRequest(_message.Message):
    __slots__ = ("model", "role", "wait_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    role: _types_pb2.Role
    wait_s: float
    def __init__(self, model: _Optional[str] = ..., role: _Optional[_Union[_types_pb2.Role, str]] = ..., wait_s: _Optional[float] = ...) -> None: ...

class AutoscalerRequest(_message.Message):
    __slots__ = ("model", "mode")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    model: str
    mode: AutoscalerMode
    def __init__(self, model: _Optional[str] = ..., mode: _Optional[_Union[AutoscalerMode, str]] = ...) -> None: ...

class AutoscalerReport(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelAutoscaling]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelAutoscaling, _Mapping]]] = ...) -> None: ...

class ModelAutoscaling(_message.Message):
    __slots__ = ("model", "mode", "prefill", "decode", "idle_s", "decisions")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    mode: AutoscalerMode
    prefill: PoolAutoscaling
    decode: PoolAutoscaling
    idle_s: float
    decisions: _containers.RepeatedCompositeFieldContainer[AutoscalerDecision]
    def __init__(self, model: _Optional[str] = ..., mode: _Optional[_Union[AutoscalerMode, str]] = ..., prefill: _Optional[_Union[PoolAutoscaling, _Mapping]] = ..., decode: _Optional[_Union[PoolAutoscaling, _Mapping]] = ..., idle_s: _Optional[float] = ..., decisions: _Optional[_Iterable[_Union[AutoscalerDecision, _Mapping]]] = ...) -> None: ...

class PoolAutoscaling(_message.Message):
    __slots__ = ("min_replicas", "max_replicas", "desired", "ready", "pressure", "signal")
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    PRESSURE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    min_replicas: int
    max_replicas: int
    desired: int
    ready: int
    pressure: float
    signal: str
    def __init__(self, min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ..., desired: _Optional[int] = ..., ready: _Optional[int] = ..., pressure: _Optional[float] = ..., signal: _Optional[str] = ...) -> None: ...

class AutoscalerDecision(_message.Message):
    __slots__ = ("at_s", "action", "text", "reason", "performed", "prefill_before", "decode_before", "prefill_after", "decode_after")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PERFORMED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BEFORE_FIELD_NUMBER: _ClassVar[int]
    DECODE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_AFTER_FIELD_NUMBER: _ClassVar[int]
    DECODE_AFTER_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    action: str
    text: str
    reason: str
    performed: bool
    prefill_before: int
    decode_before: int
    prefill_after: int
    decode_after: int
    def __init__(self, at_s: _Optional[float] = ..., action: _Optional[str] = ..., text: _Optional[str] = ..., reason: _Optional[str] = ..., performed: _Optional[bool] = ..., prefill_before: _Optional[int] = ..., decode_before: _Optional[int] = ..., prefill_after: _Optional[int] = ..., decode_after: _Optional[int] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
