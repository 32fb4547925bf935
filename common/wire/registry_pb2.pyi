from common.wire import types_pb2 as _types_pb2
from common.wire import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    __slots__ = ("name", "path", "context_tokens", "created_s", "desired_prefill", "desired_decode", "layout_fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    DESIRED_PREFILL_FIELD_NUMBER: _ClassVar[int]
    DESIRED_DECODE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    context_tokens: int
    created_s: int
    desired_prefill: int
    desired_decode: int
    layout_fingerprint: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., context_tokens: _Optional[int] = ..., created_s: _Optional[int] = ..., desired_prefill: _Optional[int] = ..., desired_decode: _Optional[int] = ..., layout_fingerprint: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("version", "cluster", "models", "workers", "routers", "manager_metrics_address")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    MANAGER_METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    version: int
    cluster: str
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    workers: _containers.RepeatedCompositeFieldContainer[_worker_pb2.InfoReply]
    routers: _containers.RepeatedCompositeFieldContainer[RouterInfo]
    manager_metrics_address: str
    def __init__(self, version: _Optional[int] = ..., cluster: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[_worker_pb2.InfoReply, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[RouterInfo, _Mapping]]] = ..., manager_metrics_address: _Optional[str] = ...) -> None: ...

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

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
