"""The one tree of errors, and its single mapping to HTTP and gRPC.

    PdserveError
    ├── RequestError                  the caller can mend it; never retried
    │   ├── InvalidRequest            400  a field is wrong; `param` names it
    │   │   └── ContextLengthExceeded 400  the prompt does not fit; the message names the limit
    │   ├── AuthenticationFailed      401
    │   ├── PermissionDenied          403  the key is good, but not for this
    │   ├── ModelNotFound             404
    │   ├── RequestNotFound           404  it ended too long ago to be known, or never was
    │   └── PayloadTooLarge           413
    ├── CapacityError                 nothing is wrong with the request; come back later
    │   ├── Overloaded                429  shed on purpose
    │   │   └── RateLimited           429  the caller has used up what it may
    │   ├── NoWorkerAvailable         503  nobody can serve this model now
    │   ├── ManagerUnavailable        503  the pool manager cannot be reached; only what operates the cluster says so
    │   └── StoreUnavailable          503  the store of the caches cannot be reached; only its administration says so
    ├── RequestEnded                  the request was ended from outside
    │   ├── RequestCancelled          499
    │   └── DeadlineExceeded          504
    ├── HandoffError                  KV did not arrive as promised; the tokens were never computed from it
    │   ├── HandshakeRefused               the two workers must not exchange KV; `param` names the field that differs
    │   ├── TicketRefused                  stale, forged or out-of-range permission to write
    │   ├── TransferTimeout
    │   ├── TransferBroken                 the link went away
    │   ├── DigestMismatch                 a block's bytes are not what was sent
    │   └── SealMismatch                   the transfer's account does not add up
    ├── AnswerNotCached               504  only the cache was to be asked, and it has no answer
    ├── WorkerLost                    503  a worker's process or link died
    │   └── RankLost                  503  one of the processes that compute as one worker died or hangs; all of them end
    ├── EngineFailure                 500  the engine raised; a bug or a broken machine
    └── StartupError                  never reaches a client
        ├── ConfigError                    `param` names the key
        ├── ModelLoadError
        └── ClusterError                   a process of the cluster did not come up, or is not there

A request ends in its tokens or in exactly one of these. `IllegalTransition` stands outside the tree: it is our own bug.

This module does not know FastAPI or grpc: it names HTTP statuses as ints and gRPC codes by their names; `common.rpc` and the
router's front ends apply them.
"""

from __future__ import annotations

from typing import ClassVar


class PdserveError(Exception):
    """Root. `message` is safe to show to a client: no paths, addresses or prompts."""

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    openai_type: ClassVar[str] = "InternalServerError"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def code(self) -> str:
        """The stable name of the error on every wire: its class name."""
        return type(self).__name__


class RequestError(PdserveError):
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    openai_type = "BadRequestError"


class InvalidRequest(RequestError):
    pass


class ContextLengthExceeded(InvalidRequest):
    pass


class AuthenticationFailed(RequestError):
    http_status = 401
    grpc_code = "UNAUTHENTICATED"
    openai_type = "AuthenticationError"


class PermissionDenied(RequestError):
    http_status = 403
    grpc_code = "PERMISSION_DENIED"
    openai_type = "PermissionDeniedError"


class ModelNotFound(RequestError):
    http_status = 404
    grpc_code = "NOT_FOUND"
    openai_type = "NotFoundError"


class RequestNotFound(RequestError):
    http_status = 404
    grpc_code = "NOT_FOUND"
    openai_type = "NotFoundError"


class PayloadTooLarge(RequestError):
    http_status = 413
    grpc_code = "INVALID_ARGUMENT"
    openai_type = "PayloadTooLargeError"


class CapacityError(PdserveError):
    http_status = 503
    grpc_code = "UNAVAILABLE"
    openai_type = "ServiceUnavailableError"
    retryable = True


class Overloaded(CapacityError):
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    openai_type = "RateLimitError"


class RateLimited(Overloaded):
    pass


class NoWorkerAvailable(CapacityError):
    pass


class ManagerUnavailable(CapacityError):
    pass


class StoreUnavailable(CapacityError):
    pass


class RequestEnded(PdserveError):
    pass


class RequestCancelled(RequestEnded):
    http_status = 499
    grpc_code = "CANCELLED"
    openai_type = "RequestCancelled"


class DeadlineExceeded(RequestEnded):
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    openai_type = "DeadlineExceeded"


class HandoffError(PdserveError):
    http_status = 503
    grpc_code = "ABORTED"
    openai_type = "ServiceUnavailableError"
    retryable = True


class HandshakeRefused(HandoffError):
    grpc_code = "FAILED_PRECONDITION"


class TicketRefused(HandoffError):
    pass


class TransferTimeout(HandoffError):
    pass


class TransferBroken(HandoffError):
    pass


class DigestMismatch(HandoffError):
    pass


class SealMismatch(HandoffError):
    pass


class AnswerNotCached(PdserveError):
    http_status = 504  # what HTTP says of only-if-cached
    grpc_code = "FAILED_PRECONDITION"
    openai_type = "AnswerNotCachedError"


class WorkerLost(PdserveError):
    http_status = 503
    grpc_code = "UNAVAILABLE"
    openai_type = "ServiceUnavailableError"
    retryable = True


class RankLost(WorkerLost):
    pass


class EngineFailure(PdserveError):
    pass


class StartupError(PdserveError):
    pass


class ConfigError(StartupError):
    pass


class ModelLoadError(StartupError):
    pass


class ClusterError(StartupError):
    pass


class IllegalTransition(RuntimeError):
    """A state machine of ours was asked for a move that its table does not hold."""


def _tree(root: type[PdserveError]) -> dict[str, type[PdserveError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


ERRORS_BY_CODE = _tree(PdserveError)


def error_from_code(code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> PdserveError:
    """Rebuilds an error that came over a wire. An unknown code (a newer peer) becomes an EngineFailure that says so."""
    kind = ERRORS_BY_CODE.get(code)
    if kind is None:
        return EngineFailure(f"{code}: {message}", param=param, retry_after_s=retry_after_s)
    return kind(message, param=param, retry_after_s=retry_after_s)
