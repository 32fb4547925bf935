"""The waist: the few types that everything passes through. Each field says who writes it.

They are values: frozen, comparable, free of behaviour beyond derived figures. Requests come into being in the router's
validator and are never changed after it; a worker that needs to remember something about a request keeps it beside the
request, not in it. Nothing here knows tensors, sockets or protobuf (`common.codec` does the latter).
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass


class Role(enum.StrEnum):
    """What a worker is for. Written by the pool manager."""

    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(enum.StrEnum):
    """The life of a worker: STARTING -> READY -> DRAINING -> STOPPED, and FAILED from anywhere. Written by the manager."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerRef:
    """Who a worker is and where its gRPC server listens. A restarted worker keeps its id and gets a new incarnation."""

    worker_id: str  # pool manager, e.g. "smollm2-135m/prefill/0"
    incarnation: int  # pool manager; grows with every start of this worker id
    address: str  # worker, "host:port" of its gRPC server


class PrefillChoice(enum.Enum):
    """Where a prompt is to be computed. Written by the router's placement."""

    WORKER = "worker"  # no forecast: the decode worker decides by its own rules
    HERE = "here"  # by the decode worker itself
    THERE = "there"  # by a prefill worker


BANNING_BIAS, FORCING_BIAS = -100.0, 100.0  # of SamplingParams.logit_bias


class FinishReason(enum.StrEnum):
    """Why a choice ended well. A choice that ends badly ends in an error, not in a finish reason."""

    STOP = "stop"
    LENGTH = "length"


class GrammarKind(enum.StrEnum):
    """In which language a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"  # a JSON list of strings, one of which is the answer
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of an answer must look like. Written by the router's validator, which has seen it compile."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens. Written by the router's validator; every default there is explicit here."""

    max_tokens: int
    seed: int  # always set: the router draws one when the client gave none, so that a retry elsewhere is the same request
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    min_tokens: int = 0  # stop tokens cannot be sampled before so many tokens
    stop_token_ids: tuple[int, ...] = ()  # validator: the model's end-of-turn ids, unless ignore_eos, plus the client's
    logprobs: int | None = None  # how many alternatives to report beside the chosen token; None = no logprobs
    prompt_logprobs: int | None = None  # the same for each prompt token (echo)
    presence_penalty: float = 0.0  # taken off the logit of every token that was generated
    frequency_penalty: float = 0.0  # the same, times how often it was generated
    repetition_penalty: float = 1.0  # 1 = off; divides (multiplies, below 0) the logits of tokens of prompt and answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, value), ids ascending; -100 = never, 100 = nothing but these
    allowed_token_ids: tuple[int, ...] = ()  # empty = all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the answer must not contain
    grammar: Grammar | None = None  # the answer's text is one of its sentences, or the beginning of one where it is cut

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def banned_by_bias(self) -> tuple[int, ...]:
        return tuple(token_id for token_id, value in self.logit_bias if value <= BANNING_BIAS)

    def leaves_a_token(self, vocab_size: int) -> bool:
        """Whether, at every place of the answer, some token is left that may be drawn. Errs on the side of no."""
        away = {*self.banned_by_bias, *(word[-1] for word in self.bad_words), *(self.stop_token_ids if self.min_tokens else ())}
        if self.allowed_token_ids:
            return not away.issuperset(token_id for token_id in self.allowed_token_ids if token_id < vocab_size)
        return sum(token_id < vocab_size for token_id in away) < vocab_size


LOWEST_PRIORITY = 7
"""Of `Request.priority`; routers have three bands."""


@dataclass(frozen=True, slots=True)
class Request:
    """One validated unit of work: one prompt, `num_choices` continuations. Written once, by the router's validator.

    An answer that goes on after its worker was lost is a request as well, made by the router's dispatcher: for one choice, whose
    tokens so far stand at the end of the prompt."""

    request_id: str
    model: str  # the served name, resolved from aliases
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1
    cache_salt: str = ""  # tenant partition of every cache; derived from the API key, never from the body
    timeout_s: float = 600.0  # budget left when the message was sent; each process counts it down on its own clock
    first_choice: int = 0  # index of the first choice; with the seed it is the key of its randomness
    num_resumed_tokens: int = 0  # so many tokens at the end of the prompt are the beginning of the answer
    dispatch_id: int = 0  # router's dispatcher: names one try, so that load reports can say which tries they count; 0 = none
    priority: int = 0  # rank of its band, 0 = the most urgent; written by the router's gate, decides about order alone

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability under the model, and the best alternatives, best first (natural log, before filters)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the sampler returns for one row. `logprob` is None unless the request asked for logprobs."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of one choice, in order. Written by the decode worker; exactly one chunk per choice has a finish reason."""

    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token id, or empty
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # which stop token ended it; that token is not in token_ids


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Where the time to the first token went, in seconds. Written by the decode worker from its own stamps and the
    prefill worker's account; the stages add up to `total_s` (router time comes on top, `common.lifecycle.Waterfall`)."""

    decode_queue_s: float = 0.0  # arrival at the decode worker until blocks were reserved
    prefill_queue_s: float = 0.0  # waiting for the (remote or local) prefill to start
    prefill_s: float = 0.0  # first chunk started until last chunk computed
    transfer_exposed_s: float = 0.0  # after the last chunk was computed: until all KV was verified here
    rpc_s: float = 0.0  # what is left of the remote call: connection, serialisation, scheduling of event loops
    activate_s: float = 0.0  # verified until the first token left for the router
    transfer_hidden_s: float = 0.0  # transfer work done while prefill still computed; not part of the sum
    prefill_worker: str = ""  # worker id; "" = prefilled locally
    transport: str = ""  # "" = no transfer
    transfer_bytes: int = 0
    transfer_blocks: int = 0

    @property
    def total_s(self) -> float:
        return (
            self.decode_queue_s + self.prefill_queue_s + self.prefill_s + self.transfer_exposed_s + self.rpc_s + self.activate_s
        )


@dataclass(frozen=True, slots=True)
class Started:
    """First event of every decode stream; comes with, or just before, the first tokens. Written by the decode worker."""

    timings: StageTimings
    cached_tokens: int  # prompt tokens whose KV was computed by nobody for this request (prefix hits on either side)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # one per prompt token, the first is None; empty if not asked


@dataclass(frozen=True, slots=True)
class WorkAccount:
    """What an answer took of the workers' steps: their seconds, shared by rows, and tokens. Comes with the last tokens. Written
    by the decode worker, with what the prefill worker told; what was computed for a hand-off that failed is not in there."""

    prefill_s: float = 0.0  # for rows of prompt tokens, on either side, and of tokens that were computed again
    decode_s: float = 0.0  # for rows of tokens that came
    wasted_s: float = 0.0  # for rows of guesses of tokens that did not come
    transfer_s: float = 0.0  # as StageTimings.transfer_exposed_s
    prefill_tokens: int = 0
    decode_tokens: int = 0
    wasted_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, computed by nobody


ROUNDED = "int8-"
"""Begins the dtype of KV in 8 bits."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What a block of KV memory holds: `[layer][kv_head][K,V][token][row]`, contiguous. Written by the engine.

    A row is the `head_dim` values of a token in a head; rounded to 8 bits, padding to four bytes and their scale (fp32) follow.

    Two workers may exchange blocks only if their fingerprints are equal: same weights, same tokenizer, same shape.
    """

    model_digest: str  # hex sha256 over the weights' identity
    tokenizer_digest: str  # hex sha256 over the tokenizer
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str  # "float32", "bfloat16", "float16"; "int8-bfloat16": rounded from that
    exact: bool  # exact and fast numerics differ in the last bits; they must not be mixed in one sequence

    @property
    def dtype_bytes(self) -> int:
        return 1 if self.is_rounded else {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def is_rounded(self) -> bool:
        return self.dtype.startswith(ROUNDED)

    @property
    def values_dtype(self) -> str:
        """Of what rows hold once they were read: that of the engine."""
        return self.dtype.removeprefix(ROUNDED)

    @property
    def row_bytes(self) -> int:
        if self.is_rounded:
            return -(-self.head_dim // 4) * 4 + 4
        return self.head_dim * self.dtype_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.num_kv_heads * 2 * self.block_tokens * self.row_bytes

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that differ whenever any field differs."""
        fields = (f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return hashlib.sha256("\0".join(("kvlayout-v1", *fields)).encode()).digest()


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to write one request's prompt KV into certain blocks of one incarnation of one decode worker.

    Minted and authenticated by that decode worker (`kvtransfer.ticket`), read by one prefill worker, opaque to others.
    Block `blocks[i]` takes the prompt's logical block `first_block + i`. Addresses never travel.
    """

    nonce: bytes  # 16 random bytes; unique per attempt, names the transfer on the data plane
    request_id: str
    attempt: int
    decode_worker_id: str
    decode_incarnation: int
    prefill_worker_id: str  # the only worker that may use it
    prefill_incarnation: int
    first_block: int
    blocks: tuple[int, ...]
    num_tokens: int  # length of the prompt; the seal must state the same
    layout_fingerprint: bytes
    ttl_s: float  # from minting; each side counts on its own clock
    part: tuple[int, ...] = ()  # of each block only these layers: first, number, first, number ...; () = all of them
    mac: bytes = b""
