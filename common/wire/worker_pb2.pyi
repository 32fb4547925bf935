from common.wire import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillChoice(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PREFILL_CHOICE_UNSPECIFIED: _ClassVar[PrefillChoice]
    PREFILL_CHOICE_HERE: _ClassVar[PrefillChoice]
    PREFILL_CHOICE_THERE: _ClassVar[PrefillChoice]
PREFILL_CHOICE_UNSPECIFIED: PrefillChoice
PREFILL_CHOICE_HERE: PrefillChoice
PREFILL_CHOICE_THERE: PrefillChoice

class ProbeLinksRequest(_message.Message):
    __slots__ = ("prefill",)
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    prefill: _containers.RepeatedCompositeFieldContainer[_types_pb2.WorkerRef]
    def __init__(self, prefill: _Optional[_Iterable[_Union[_types_pb2.WorkerRef, _Mapping]]] = ...) -> None: ...

class ProbeLinksReply(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[PeerReport]
    def __init__(self, peers: _Optional[_Iterable[_Union[PeerReport, _Mapping]]] = ...) -> None: ...

class PeerReport(_message.Message):
    __slots__ = ("prefill_worker_id", "transport", "refused", "links")
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    prefill_worker_id: str
    transport: str
    refused: _types_pb2.ErrorDetail
    links: _containers.RepeatedCompositeFieldContainer[LinkReport]
    def __init__(self, prefill_worker_id: _Optional[str] = ..., transport: _Optional[str] = ..., refused: _Optional[_Union[_types_pb2.ErrorDetail, _Mapping]] = ..., links: _Optional[_Iterable[_Union[LinkReport, _Mapping]]] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("kind", "configured", "error", "latency_s", "bytes_per_s")
    KIND_FIELD_NUMBER: _ClassVar[int]
    CONFIGURED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    kind: str
    configured: bool
    error: _types_pb2.ErrorDetail
    latency_s: float
    bytes_per_s: float
    def __init__(self, kind: _Optional[str] = ..., configured: _Optional[bool] = ..., error: _Optional[_Union[_types_pb2.ErrorDetail, _Mapping]] = ..., latency_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request", "prefill", "choice", "feed", "lane")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FEED_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    request: _types_pb2.Request
    prefill: _containers.RepeatedCompositeFieldContainer[_types_pb2.WorkerRef]
    choice: PrefillChoice
    feed: int
    lane: int
    def __init__(self, request: _Optional[_Union[_types_pb2.Request, _Mapping]] = ..., prefill: _Optional[_Iterable[_Union[_types_pb2.WorkerRef, _Mapping]]] = ..., choice: _Optional[_Union[PrefillChoice, str]] = ..., feed: _Optional[int] = ..., lane: _Optional[int] = ...) -> None: ...

class OpenFeedRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenFeedReply(_message.Message):
    __slots__ = ("address", "feed", "ticket")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FEED_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    address: str
    feed: int
    ticket: bytes
    def __init__(self, address: _Optional[str] = ..., feed: _Optional[int] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class Deltas(_message.Message):
    __slots__ = ("events", "lanes", "token_ids")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[LaneEvent]
    lanes: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, events: _Optional[_Iterable[_Union[LaneEvent, _Mapping]]] = ..., lanes: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class LaneEvent(_message.Message):
    __slots__ = ("lane", "event")
    LANE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    lane: int
    event: GenerateEvent
    def __init__(self, lane: _Optional[int] = ..., event: _Optional[_Union[GenerateEvent, _Mapping]] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("started", "chunks", "account", "given")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    GIVEN_FIELD_NUMBER: _ClassVar[int]
    started: _types_pb2.Started
    chunks: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenChunk]
    account: _types_pb2.WorkAccount
    given: int
    def __init__(self, started: _Optional[_Union[_types_pb2.Started, _Mapping]] = ..., chunks: _Optional[_Iterable[_Union[_types_pb2.TokenChunk, _Mapping]]] = ..., account: _Optional[_Union[_types_pb2.WorkAccount, _Mapping]] = ..., given: _Optional[int] = ...) -> None: ...

class PushProbeRequest(_message.Message):
    __slots__ = ("decode_worker_id", "decode_incarnation", "offer", "pool_blocks", "layout", "tickets")
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    POOL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    decode_worker_id: str
    decode_incarnation: int
    offer: TransportOffer
    pool_blocks: int
    layout: _types_pb2.KVLayout
    tickets: _containers.RepeatedCompositeFieldContainer[_types_pb2.Ticket]
    def __init__(self, decode_worker_id: _Optional[str] = ..., decode_incarnation: _Optional[int] = ..., offer: _Optional[_Union[TransportOffer, _Mapping]] = ..., pool_blocks: _Optional[int] = ..., layout: _Optional[_Union[_types_pb2.KVLayout, _Mapping]] = ..., tickets: _Optional[_Iterable[_Union[_types_pb2.Ticket, _Mapping]]] = ...) -> None: ...

class PushProbeReply(_message.Message):
    __slots__ = ("accounts",)
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    accounts: _containers.RepeatedCompositeFieldContainer[PrefillReply]
    def __init__(self, accounts: _Optional[_Iterable[_Union[PrefillReply, _Mapping]]] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("kind", "address")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    address: str
    def __init__(self, kind: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class HandshakeRequest(_message.Message):
    __slots__ = ("protocol_version", "decode_worker_id", "decode_incarnation", "layout", "offers", "pool_blocks", "tensor_parallel", "pipeline_parallel", "ranks")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    POOL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    decode_worker_id: str
    decode_incarnation: int
    layout: _types_pb2.KVLayout
    offers: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    pool_blocks: int
    tensor_parallel: int
    pipeline_parallel: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankOffers]
    def __init__(self, protocol_version: _Optional[int] = ..., decode_worker_id: _Optional[str] = ..., decode_incarnation: _Optional[int] = ..., layout: _Optional[_Union[_types_pb2.KVLayout, _Mapping]] = ..., offers: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., pool_blocks: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankOffers, _Mapping]]] = ...) -> None: ...

class RankOffers(_message.Message):
    __slots__ = ("offers",)
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    offers: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    def __init__(self, offers: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ...) -> None: ...

class HandshakeReply(_message.Message):
    __slots__ = ("prefill_worker_id", "prefill_incarnation", "transport", "tensor_parallel", "pipeline_parallel")
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    prefill_worker_id: str
    prefill_incarnation: int
    transport: str
    tensor_parallel: int
    pipeline_parallel: int
    def __init__(self, prefill_worker_id: _Optional[str] = ..., prefill_incarnation: _Optional[int] = ..., transport: _Optional[str] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request", "ticket", "wants_row", "rank_tickets")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    WANTS_ROW_FIELD_NUMBER: _ClassVar[int]
    RANK_TICKETS_FIELD_NUMBER: _ClassVar[int]
    request: _types_pb2.Request
    ticket: _types_pb2.Ticket
    wants_row: bool
    rank_tickets: _containers.RepeatedCompositeFieldContainer[_types_pb2.Ticket]
    def __init__(self, request: _Optional[_Union[_types_pb2.Request, _Mapping]] = ..., ticket: _Optional[_Union[_types_pb2.Ticket, _Mapping]] = ..., wants_row: _Optional[bool] = ..., rank_tickets: _Optional[_Iterable[_Union[_types_pb2.Ticket, _Mapping]]] = ...) -> None: ...

class BlockDigest(_message.Message):
    __slots__ = ("logical_block", "digest")
    LOGICAL_BLOCK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    logical_block: int
    digest: bytes
    def __init__(self, logical_block: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class PrefillReply(_message.Message):
    __slots__ = ("nonce", "num_tokens", "digests", "first_tokens", "prompt_logprobs", "cached_tokens", "queue_s", "prefill_s", "tail_s", "transfer_s", "work_s", "row", "rank_seals")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TAIL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    WORK_S_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    RANK_SEALS_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    num_tokens: int
    digests: _containers.RepeatedCompositeFieldContainer[BlockDigest]
    first_tokens: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprob]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprob]
    cached_tokens: int
    queue_s: float
    prefill_s: float
    tail_s: float
    transfer_s: float
    work_s: float
    row: bytes
    rank_seals: _containers.RepeatedCompositeFieldContainer[RankSeal]
    def __init__(self, nonce: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., digests: _Optional[_Iterable[_Union[BlockDigest, _Mapping]]] = ..., first_tokens: _Optional[_Iterable[_Union[_types_pb2.TokenLogprob, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprob, _Mapping]]] = ..., cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., tail_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., work_s: _Optional[float] = ..., row: _Optional[bytes] = ..., rank_seals: _Optional[_Iterable[_Union[RankSeal, _Mapping]]] = ...) -> None: ...

class RankSeal(_message.Message):
    __slots__ = ("nonce", "digests")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    digests: _containers.RepeatedCompositeFieldContainer[BlockDigest]
    def __init__(self, nonce: _Optional[bytes] = ..., digests: _Optional[_Iterable[_Union[BlockDigest, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("nonces",)
    NONCES_FIELD_NUMBER: _ClassVar[int]
    nonces: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, nonces: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("router_id", "interval_s")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    interval_s: float
    def __init__(self, router_id: _Optional[str] = ..., interval_s: _Optional[float] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("sequence", "shape", "running", "waiting", "queued_tokens", "queued_pairs", "decoding", "kv_tokens", "blocks_free", "dispatches", "registered", "evicted", "steps")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    DISPATCHES_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    shape: WorkerShape
    running: int
    waiting: int
    queued_tokens: int
    queued_pairs: float
    decoding: int
    kv_tokens: int
    blocks_free: int
    dispatches: _containers.RepeatedScalarFieldContainer[int]
    registered: _containers.RepeatedScalarFieldContainer[int]
    evicted: _containers.RepeatedScalarFieldContainer[int]
    steps: _containers.RepeatedCompositeFieldContainer[StepSample]
    def __init__(self, sequence: _Optional[int] = ..., shape: _Optional[_Union[WorkerShape, _Mapping]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., queued_pairs: _Optional[float] = ..., decoding: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., blocks_free: _Optional[int] = ..., dispatches: _Optional[_Iterable[int]] = ..., registered: _Optional[_Iterable[int]] = ..., evicted: _Optional[_Iterable[int]] = ..., steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ...) -> None: ...

class WorkerShape(_message.Message):
    __slots__ = ("block_tokens", "layout_fingerprint", "blocks_total", "step_tokens", "local_prefill", "prefix_cache")
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    block_tokens: int
    layout_fingerprint: bytes
    blocks_total: int
    step_tokens: int
    local_prefill: str
    prefix_cache: bool
    def __init__(self, block_tokens: _Optional[int] = ..., layout_fingerprint: _Optional[bytes] = ..., blocks_total: _Optional[int] = ..., step_tokens: _Optional[int] = ..., local_prefill: _Optional[str] = ..., prefix_cache: _Optional[bool] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("tokens", "pairs", "seconds")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    pairs: float
    seconds: float
    def __init__(self, tokens: _Optional[int] = ..., pairs: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "model", "pid", "state", "address", "metrics_address", "blocks_total", "blocks_free", "blocks_in_transfer", "leases_open", "requests_running", "requests_waiting", "max_model_tokens", "requests_served", "device", "dtype", "exact", "failure", "layout_fingerprint", "pace", "started_s", "blocks_cached", "blocks_arriving", "preemptions", "prefix_queries", "prefix_hits", "drafted_tokens", "accepted_tokens", "links", "tensor_parallel", "pipeline_parallel", "block_tokens", "rank_pids")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    LEASES_OPEN_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_SERVED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PACE_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_ARRIVING_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RANK_PIDS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    role: _types_pb2.Role
    model: str
    pid: int
    state: str
    address: str
    metrics_address: str
    blocks_total: int
    blocks_free: int
    blocks_in_transfer: int
    leases_open: int
    requests_running: int
    requests_waiting: int
    max_model_tokens: int
    requests_served: int
    device: str
    dtype: str
    exact: bool
    failure: str
    layout_fingerprint: str
    pace: WorkerPace
    started_s: float
    blocks_cached: int
    blocks_arriving: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    drafted_tokens: int
    accepted_tokens: int
    links: _containers.RepeatedCompositeFieldContainer[LinkUse]
    tensor_parallel: int
    pipeline_parallel: int
    block_tokens: int
    rank_pids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[_Union[_types_pb2.Role, str]] = ..., model: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_in_transfer: _Optional[int] = ..., leases_open: _Optional[int] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., max_model_tokens: _Optional[int] = ..., requests_served: _Optional[int] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., exact: _Optional[bool] = ..., failure: _Optional[str] = ..., layout_fingerprint: _Optional[str] = ..., pace: _Optional[_Union[WorkerPace, _Mapping]] = ..., started_s: _Optional[float] = ..., blocks_cached: _Optional[int] = ..., blocks_arriving: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., drafted_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkUse, _Mapping]]] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., block_tokens: _Optional[int] = ..., rank_pids: _Optional[_Iterable[int]] = ...) -> None: ...

class LinkUse(_message.Message):
    __slots__ = ("prefill_worker_id", "prefill_incarnation", "transport", "transfers", "failures", "bytes")
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    prefill_worker_id: str
    prefill_incarnation: int
    transport: str
    transfers: int
    failures: int
    bytes: int
    def __init__(self, prefill_worker_id: _Optional[str] = ..., prefill_incarnation: _Optional[int] = ..., transport: _Optional[str] = ..., transfers: _Optional[int] = ..., failures: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class WorkerPace(_message.Message):
    __slots__ = ("queue_age_s", "queued_tokens", "decoding", "computed_tokens", "generated_tokens", "step_s", "sequence_step_s")
    QUEUE_AGE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    queue_age_s: float
    queued_tokens: int
    decoding: int
    computed_tokens: int
    generated_tokens: int
    step_s: float
    sequence_step_s: float
    def __init__(self, queue_age_s: _Optional[float] = ..., queued_tokens: _Optional[int] = ..., decoding: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., step_s: _Optional[float] = ..., sequence_step_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    def __init__(self, drained: _Optional[bool] = ...) -> None: ...
