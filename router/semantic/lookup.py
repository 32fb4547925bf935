"""The semantic cache: answers to similar questions, while the share of wrong ones is shown to stay under the configured bound.

    find     eligible? ─> read ─> embed ─> nearest in scope ─> vetoes ─> chance ─> threshold ─> hit | hit to be verified | None
    learn    the fresh answer against the best candidate's: a label. Then the question is known, with its answer
    feedback a client's word on a hit: a label

Where labels come from: requests that were computed anyway, hits that are computed all the same to be verified (a share, in the
background), clients, and clients who ask again right after a hit. A pair of question and answer that was found wrong is
never served again; an answer that was served and found wrong for two questions is removed.

Known questions live in this process and are told to the store as records, from which other routers, and this one after a restart,
fill theirs. What is replayed lies in the store alone; here is an answer's text, up to a limit, to hold others against. While a
router does not know all of them, it asks the index that routers share (`wider_index`) for what it does not find.

Life: `run` is a task of the router; `close` after it. One loop; refits run on a thread, on a copy.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from common.clock import Clock
from common.config import SemanticCacheConfig
from common.errors import InvalidRequest
from common.logs import get_logger
from common.metrics import SemanticMetrics
from common.types import FinishReason
from router.cache.semantic_port import FreshAnswer, Question, SemanticHit
from router.sampling_class import SamplingClass
from router.semantic.decider import Decider, LabelSource, Seen, Verdict
from router.semantic.eligibility import ineligible, ineligible_at_once
from router.semantic.embedder import Embedder, Vector
from router.semantic.embedding import Embedding
from router.semantic.judge import Judge
from router.semantic.library import Library
from router.semantic.matching import Known, Match, Matcher, Matches
from router.semantic.off_loop import finished, until_done
from router.semantic.reading import Reading, read
from router.semantic.wider_index import WiderIndex
from router.store.base import Change, Deleted, Inserted, Invalidated, Reset, Store

log = get_logger(__name__)

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_RECORD = b"semantic:"  # before the answer's key
_MAX_OPEN = 4_096  # questions whose answer may still come
_MAX_ISSUED = 50_000  # hits that clients may speak of
_MAX_REFUSED = 256  # per answer
_MAX_RECORDS = 10_000  # that wait to be read
_REPEAT_S = 60.0
_RECORD_S = 5.0  # for embedding a record
_FETCHED = 4  # records of the shared index that one question may have read
_ANSWER_CHARS = 4_000
_FEW_WRONG = 2  # served to so many questions that it was wrong for, an answer goes


@dataclass(frozen=True, slots=True)
class _Read:
    """A question, as far as it was worked out."""

    digest: bytes
    reading: Reading
    vector: Future[Vector] | None


@dataclass(slots=True)
class _Open:
    """A question that was asked, and what it was held against."""

    read: _Read
    scope: bytes
    match: Match | None
    seen: Seen | None
    served: bool
    asked_s: float


@dataclass(slots=True)
class _Issued:
    """A hit that a client got."""

    open: _Open
    tenant: str


class _Record(BaseModel):
    """A known question in the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    scope: str
    key: str
    text: str
    answer: str
    expires_s: float  # wall clock
    family: str = ""  # of known questions with the same answer


class SemanticCache:
    """`covers`, `find`, `learn`, `unusable` and `feedback` are the port of `router.cache.semantic_port`."""

    def __init__(
        self,
        config: SemanticCacheConfig,
        *,
        store: Store,
        embedder: Embedder,
        matcher: Matcher,
        decider: Decider,
        judge: Judge,
        wider: WiderIndex,
        clock: Clock,
        metrics: SemanticMetrics,
    ) -> None:
        self._config = config
        self._store = store
        self._matcher = matcher
        self._decider = decider
        self._judge = judge
        self._wider = wider
        self._clock = clock
        self._metrics = metrics
        self._revision = embedder.revision.encode()
        self._embedding = Embedding(embedder, budget_s=config.budget_s)
        self._library = Library(dimensions=embedder.dimensions, max_entries=config.max_entries)
        self._open: OrderedDict[bytes, _Open] = OrderedDict()  # by the question's key
        self._issued: OrderedDict[str, _Issued] = OrderedDict()
        self._records: asyncio.Queue[tuple[bytes, tuple[str, ...]]] = asyncio.Queue(_MAX_RECORDS)
        self._records_lost = False
        self._refits: set[asyncio.Task[None]] = set()
        store.subscribe(self._changed)
        metrics.read_from(lambda: (decider.view(), len(self._library)), promised_ratio=config.max_wrong_hits)

    # -- the port ------------------------------------------------------------------------------------------------------

    def covers(self, sampling: SamplingClass) -> bool:
        return sampling is SamplingClass.GREEDY or (sampling is SamplingClass.UNSET and self._config.sampling != "greedy")

    async def find(self, question: Question) -> SemanticHit | None:
        self._library.expire(self._clock.monotonic_s())
        asked = self._read(question)
        if asked is None or asked.vector is None:
            return None
        vector = await self._embedding.vector(asked.vector)
        if vector is None:
            self._metrics.ineligible.labels("budget").inc()
            return None
        matches = self._match(question, asked, vector)
        if (matches is None or matches.best is None) and self._is_partial and await self._fetch(question, vector):
            matches = self._match(question, asked, vector)
        for reason in () if matches is None else matches.vetoed:
            self._metrics.vetoes.labels(str(reason)).inc()
        best = None if matches is None else matches.best
        repeated = self._repeated(question)
        if best is None or repeated:
            verdict, seen = Verdict.WITHHOLD, None
        else:
            verdict, seen = self._decider.decide(question.model, best.row, best.chance)
        if not repeated:
            served = verdict is not Verdict.WITHHOLD
            self._remember(question.key, _Open(asked, question.scope, best, seen, served, self._clock.monotonic_s()))
        if best is None or verdict is Verdict.WITHHOLD:
            return None
        hit_id = secrets.token_hex(16)
        _keep(self._issued, hit_id, _Issued(self._open[question.key], question.tenant), _MAX_ISSUED)
        return SemanticHit(best.known.key, best.chance, hit_id, verify=verdict is Verdict.SERVE_AND_VERIFY)

    def unusable(self, question: Question, hit: SemanticHit) -> None:
        """The hit's answer is gone from the store, or does not fit: it was not served."""
        self._library.remove(hit.key)
        issued = self._issued.pop(hit.hit_id, None)
        if issued is not None:
            issued.open.served = False
            if issued.open.seen is not None:
                issued.open.seen.served = False

    def learn(self, question: Question, answer: FreshAnswer) -> None:
        opened = self._open.pop(question.key, None)
        family = answer.key
        if opened is not None and opened.match is not None and opened.seen is not None:
            source = LabelSource.SHADOW if opened.served else LabelSource.FRESH
            same = self._judge.same(opened.match.known.answer, answer.text)
            self._label(opened, source, same)
            if same:
                family = opened.match.known.family
        asked = self._read(question) if opened is None else opened.read
        if asked is None or asked.vector is None or answer.finish_reason is not FinishReason.STOP:
            return
        vector = finished(asked.vector)
        if vector is None:
            return
        ttl_s = min(self._config.ttl_s, answer.ttl_s)
        known = Known(answer.key, asked.reading, answer.text[:_ANSWER_CHARS], family=family)
        self._library.add(question.scope, known, vector, names=answer.names, expires_s=self._clock.monotonic_s() + ttl_s)
        record = _Record(
            version=1,
            scope=question.scope.hex(),
            key=answer.key.hex(),
            text=question.text,
            answer=known.answer,
            expires_s=self._clock.wall_s() + ttl_s,
            family=family.hex(),
        )
        self._store.put(self._record_key(answer.key), orjson.dumps(record.model_dump()), ttl_s=ttl_s, epochs=answer.epochs)
        self._wider.add(question.scope, answer.key, vector, ttl_s=ttl_s)

    async def feedback(self, hit_id: str, *, ok: bool, tenant: str) -> bool:
        """What a client says of a hit of its own; whether that removed the answer. Raises InvalidRequest, StoreUnavailable."""
        issued = self._issued.get(hit_id)
        if issued is None or issued.tenant != tenant:
            raise InvalidRequest("no answer of the semantic cache has this id, or it was too long ago", param="id")
        del self._issued[hit_id]
        key = issued.open.match.known.key if issued.open.match else b""
        removed = self._label(issued.open, LabelSource.FEEDBACK, ok)
        if removed:
            self._wider.remove(issued.open.scope, [key])
            await self._store.delete([key, self._record_key(key)])
        return removed

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads the records of other routers, and of this one's earlier life. Ends only by cancellation."""
        while True:
            key, names = await self._records.get()
            reading = await self._store.get(key, names)
            if reading.value is not None:
                await self._take_record(reading.value, names)

    async def close(self) -> None:
        await asyncio.gather(*self._refits)
        await self._wider.close()
        await asyncio.to_thread(self._embedding.close)

    def _changed(self, change: Change) -> None:
        match change:
            case Inserted(key, names):
                if key.startswith(_RECORD + self._revision) and key[len(_RECORD + self._revision) :] not in self._library:
                    if self._records.full():
                        self._records.get_nowait()
                        self._records_lost = True
                    self._records.put_nowait((key, names))
            case Deleted(keys):
                for key in keys:
                    self._library.remove(key.removeprefix(_RECORD + self._revision))
            case Invalidated(names):
                self._library.invalidate(names)
            case Reset():
                self._library.clear()

    @property
    def _is_partial(self) -> bool:
        """Whether there may be questions that the library does not know."""
        return self._library.let_go or self._records_lost or not self._records.empty()

    def _match(self, question: Question, asked: _Read, vector: Vector) -> Matches | None:
        scope = self._library.scope(question.scope)
        return None if scope is None else self._matcher.match(scope, asked.digest, asked.reading, vector)

    async def _fetch(self, question: Question, vector: Vector) -> bool:
        """Takes the nearest questions of the shared index into the library; whether any came."""
        try:
            async with asyncio.timeout(self._config.budget_s):
                keys = [key for key in await self._wider.near(question.scope, vector) if key not in self._library][:_FETCHED]
                readings = await asyncio.gather(*(self._store.get(self._record_key(key), question.names) for key in keys))
        except TimeoutError:
            return False
        gone = [key for key, reading in zip(keys, readings, strict=True) if reading.value is None and reading.epochs is not None]
        if gone:
            self._wider.remove(question.scope, gone)
        for reading in reversed(readings):  # the nearest last: it stays if there is room for few
            if reading.value is not None:
                await self._take_record(reading.value, question.names)
        return any(key in self._library for key in keys)

    async def _take_record(self, value: bytes, names: tuple[str, ...]) -> None:
        try:
            record = _Record.model_validate_json(value)
            scope, key, family = (bytes.fromhex(field) for field in (record.scope, record.key, record.family))
        except (ValidationError, ValueError):
            return
        left_s = record.expires_s - self._clock.wall_s()
        if key in self._library or record.version != 1 or left_s <= 0:
            return
        reading = read(record.text)
        future = self._embedding.start(record.text, reading)
        if future is None:
            return
        await until_done(future, _RECORD_S)
        vector = finished(future)
        if vector is not None:
            known = Known(key, reading, record.answer, family=family)
            self._library.add(scope, known, vector, names=names, expires_s=self._clock.monotonic_s() + left_s)

    def _record_key(self, key: bytes) -> bytes:
        return _RECORD + self._revision + key

    # -- questions -----------------------------------------------------------------------------------------------------

    def _read(self, question: Question) -> _Read | None:
        reason = ineligible_at_once(question)
        if reason is None:
            reading = read(question.text)
            reason = ineligible(question, reading)
            if reason is None:
                digest = hashlib.blake2b(question.text.encode(), digest_size=16).digest()
                return _Read(digest, reading, self._embedding.start(question.text, reading))
        self._metrics.ineligible.labels(str(reason)).inc()
        return None

    def _remember(self, key: bytes, opened: _Open) -> None:
        self._open.pop(key, None)
        _keep(self._open, key, opened, _MAX_OPEN)

    def _repeated(self, question: Question) -> bool:
        """Asked again soon after a hit: the client did not like it, so this time the answer is made afresh, which also tells
        whether the hit was right."""
        before = self._open.get(question.key)
        if before is None or not before.served or self._clock.monotonic_s() - before.asked_s > _REPEAT_S:
            return False
        self._label(before, LabelSource.REPEAT, False, confirmed=False)
        return True

    # -- labels --------------------------------------------------------------------------------------------------------

    def _label(self, opened: _Open, source: LabelSource, right: bool | None, *, confirmed: bool = True) -> bool:
        """Whether it removed the answer."""
        word = "unclear" if right is None else "right" if right else "wrong"
        self._metrics.labels.labels(str(source), word).inc()
        if right is None or opened.match is None or opened.seen is None:
            return False
        known, digest = opened.match.known, opened.read.digest
        removed = False
        if confirmed:
            known.num_labels += 1
            known.num_right += right
            if not right:
                removed = self._refuse(known, digest, served=opened.served)
        if self._decider.learn(opened.seen, right=right) and not self._refits:
            task = asyncio.create_task(self._refit(), name="semantic refit")
            self._refits.add(task)
            task.add_done_callback(self._refits.discard)
        return removed

    def _refuse(self, known: Known, digest: bytes, *, served: bool) -> bool:
        if len(known.refused) >= _MAX_REFUSED:
            del known.refused[next(iter(known.refused))]
        known.refused[digest] = None
        if not served:
            return False
        known.wrong_for[digest] = None
        return len(known.wrong_for) >= _FEW_WRONG and self._library.remove(known.key)

    async def _refit(self) -> None:
        evidence = self._decider.evidence()
        fitted = await asyncio.to_thread(self._decider.refit, evidence)
        for model, before, after in self._decider.take(fitted):
            log.info("semantic cache", model=model, before=before.value, after=after.value)


def _keep(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value, limit: int) -> None:
    kept[key] = value
    if len(kept) > limit:
        kept.popitem(last=False)
