"""Whether a candidate's answer is given: a pooled model of its chance to be right, and per class of questions a threshold.

    features ──prior──> row ──coefficients──> chance ──threshold of the class──> serve, serve and verify, or not
                                   ^                          ^
    labels (a window) ──every so many──> refit ───────────────┘

Of a class:

    UNPROVEN ──shown──> PROVEN <──shown again / not any more──> OFF
        └──────── enough hits, and not shown ─────────────────> OFF
                        PROVEN <──calm / doubt──> DOUBTED ────> OFF

    UNPROVEN    the prior's threshold with so wide a margin that under a narrow bound there is none, a cap on hits, and each hit
                is verified
    PROVEN      the lowest threshold of which the labels in the window show, at 95 % confidence, that at most `max_wrong_hits` of
                what it lets through is wrong, and with what was given before at most `max_wrong_requests` of what is asked
                (`reckoning.py`); to get here takes 99 %, and the first hits are all verified, for who gives nothing looks again
                after every refit, until luck shows it something
    DOUBTED     no hits for a while: labels go against what was thought, and what would have been a hit is a label now
    OFF         no hits; labels of answers that are computed anyway go on coming, and may show the bound again

The scores that a threshold is chosen by come from models that have not seen the label they score. Between two refits a class
whose served labels alone contradict the bound goes OFF at once. So does one whose answers have changed (`change.py`), and labels
from before are forgotten then, for they would outvote those that come. Labels of hits are too few to notice a change; those of
what is computed anyway notice it, and as doubt grows more hits are verified. What is given until then may be wrong more often
than the bound says.

Plain data, no clock, no lock: one loop. `refit` is the only slow part and may run elsewhere, on a copy (`Evidence`).
"""

from __future__ import annotations

import enum
import math
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.metrics import SemanticClass
from router.semantic.bound import BEGINNING_Z, CONFIDENCE_Z, Standing, lower_bound, lowest_threshold
from router.semantic.change import Calibration, Surprise, calibrated
from router.semantic.logistic import fit, sigmoid
from router.semantic.prior import Prior
from router.semantic.reckoning import Candidates, represented, thresholds_with_room

Floats = NDArray[np.float64]

_WINDOW = 12_000  # labels
_REFIT_EVERY = 200  # labels
_REFIT_AFTER = 1_000  # candidates, where most are served and few have labels
_FIRST_REFIT = 100
_NEVER = 1.1  # a threshold that no chance reaches
_UNPROVEN_HITS = 0.05  # of the questions of an unproven class
_SOON = 2_000  # questions; as a cache fills more of them find an answer, so that older ones say too little of those that come
_PRIOR_MARGIN = 1 / 6  # of the bound: what the prior had shown to be 2.5 % was 8 to 15 % of another stream's hits
_FOLDS = 3
_PULL = 2.0  # towards the prior's coefficients; without a prior towards none
_PULL_ODDS = 20.0
_VERIFIED_SHARE = 0.25  # while the labels of what is served are few
_VERIFIED_IN_DOUBT = 0.25  # where one doubts; the less the doubt, the fewer
_ENOUGH_FOR = 8.0  # divided by the bound: so many labels at or above the threshold are enough, and so many of first hits
_FEW_WRONG = 5  # served answers: fewer contradict no bound
_CONTRADICTED_Z = 2.33  # one-sided 99 %: it is asked after every label
_WORST_SINGLE = 4.0  # times the bound: no single answer is served whose chance to be wrong is thought to be higher


class ClassState(enum.Enum):
    UNPROVEN = "unproven"
    PROVEN = "proven"
    DOUBTED = "doubted"
    OFF = "off"


_GIVING = frozenset({ClassState.PROVEN, ClassState.DOUBTED})


class Verdict(enum.Enum):
    SERVE = "serve"
    SERVE_AND_VERIFY = "serve-and-verify"  # and compute the answer all the same, for a label
    WITHHOLD = "withhold"


class LabelSource(enum.StrEnum):
    FRESH = "fresh"  # the request was computed anyway
    SHADOW = "shadow"
    FEEDBACK = "feedback"
    REPEAT = "repeat"  # asked again soon after a hit


@dataclass(slots=True)
class Seen:
    """A question with its best candidate, and whether that was right, if anybody found out."""

    kind: str  # the class of questions
    row: Floats
    fold: int
    served: bool
    number: int  # counts up
    chance: float | None  # that it is right, as was thought; None: not to be held against its label
    asked: int  # its number among all questions of the class, those without a candidate too
    right: bool | None = None


@dataclass
class _Class:
    state: ClassState = ClassState.UNPROVEN
    threshold: float = _NEVER
    standing: Standing | None = None
    num_labels: int = 0
    num_questions: int = 0
    num_hits: int = 0
    served_labels: deque[bool] = field(default_factory=lambda: deque(maxlen=400))
    calibration: Calibration | None = None
    surprise: Surprise = field(default_factory=Surprise)
    last_calm: int = 0  # the number of what was seen when there was no doubt
    refit_is_late: bool = False  # the class went off after the refit began
    num_verified: int = 0  # hits since it last became proven


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a refit needs, fixed when it begins."""

    kinds: tuple[str, ...]
    rows: Floats
    right: Floats  # 1, 0, or not a number where nobody knows
    folds: NDArray[np.int64]
    served: NDArray[np.bool_]
    start: Floats
    giving: frozenset[str]  # classes that give answers for evidence
    asked: NDArray[np.int64]  # by row: its number among all questions of its class
    num_asked: dict[str, int]  # questions of each class, so far


@dataclass(frozen=True, slots=True)
class Fitted:
    coefficients: Floats
    standings: dict[str, Standing | None]
    calibrations: dict[str, Calibration]  # of classes with labels
    served_sizes: dict[str, int]  # labels of answers that were served


class Decider:
    def __init__(
        self,
        prior: Prior,
        *,
        max_wrong_hits: float,
        max_wrong_requests: float | None = None,
        shadow_share: float,
        dice: random.Random,
    ) -> None:
        self._prior = prior
        self._max_wrong = max_wrong_hits
        self._max_wrong_requests = 1.0 if max_wrong_requests is None else max_wrong_requests
        self._unproven_hits = min(_UNPROVEN_HITS, self._max_wrong_requests)  # then the bound holds whatever the prior is worth
        self._least_chance = max(0.5, 1.0 - _WORST_SINGLE * max_wrong_hits)
        self._shadow_share = shadow_share
        self._dice = dice
        self._classes: dict[str, _Class] = {}
        self._window: deque[Seen] = deque(maxlen=_WINDOW)
        self._since_refit = 0
        self._num_seen = self._num_seen_at_refit = 0
        self._coefficients: Floats | None = None

    def chances(self, rows: Floats) -> Floats:
        """That each candidate's answer is right."""
        if self._coefficients is None:
            return self._prior.chances(rows)
        return sigmoid(rows @ self._coefficients)

    def decide(self, kind: str, row: Floats | None, chance: float) -> tuple[Verdict, Seen | None]:
        """For one question and its best candidate, if it has one. A label for what was seen goes to `learn`."""
        this = self._class(kind)
        this.num_questions += 1
        if row is None:
            return Verdict.WITHHOLD, None
        verdict = self._verdict(this, chance)
        self._num_seen += 1
        seen = Seen(
            kind,
            row,
            self._dice.randrange(_FOLDS),
            served=verdict is not Verdict.WITHHOLD,
            number=self._num_seen,
            chance=_to_be_told(this, verdict, chance),
            asked=this.num_questions,
        )
        self._window.append(seen)
        return verdict, seen

    def learn(self, seen: Seen, *, right: bool) -> bool:
        """Takes a label; True once it is time for a refit. The last label of several counts."""
        this = self._class(seen.kind)
        if seen.right is None:
            this.num_labels += 1
            self._since_refit += 1
            self._check_change(this, seen, right=right)
        seen.right = right
        if seen.served:
            this.num_verified += 1
            this.served_labels.append(right)
            self._check_served(this)
        if self._coefficients is None:
            due = self._since_refit >= _FIRST_REFIT
        else:
            due = self._since_refit >= _REFIT_EVERY or self._num_seen - self._num_seen_at_refit >= _REFIT_AFTER
        return due and len(self._window) > 0  # labels that come late may tell of a change after which nothing was asked

    def evidence(self) -> Evidence:
        """Begins a refit: `take(refit(evidence()))`."""
        self._since_refit, self._num_seen_at_refit = 0, self._num_seen
        for this in self._classes.values():
            this.refit_is_late = False
        window = tuple(self._window)
        width = len(window[0].row)
        towards = np.zeros(width)
        towards[0] = 1.0 if self._prior.informed else 0.0
        return Evidence(
            kinds=tuple(seen.kind for seen in window),
            rows=np.array([seen.row for seen in window]),
            right=np.array([math.nan if seen.right is None else float(seen.right) for seen in window]),
            folds=np.array([seen.fold for seen in window]),
            served=np.array([seen.served for seen in window]),
            start=towards,
            giving=frozenset(kind for kind, this in self._classes.items() if this.state in _GIVING),
            asked=np.array([seen.asked for seen in window]),
            num_asked={kind: this.num_questions for kind, this in self._classes.items()},
        )

    def refit(self, evidence: Evidence) -> Fitted:
        """Pure: reads the evidence and this object's settings alone."""
        rows, right = evidence.rows, evidence.right
        pull = np.full(rows.shape[1], _PULL)
        pull[0] = _PULL_ODDS
        labelled = ~np.isnan(right)
        whole = _fit(rows[labelled], right[labelled], evidence.start, pull, evidence.start)
        scores = sigmoid(rows @ whole)
        for fold in range(_FOLDS):
            others = labelled & (evidence.folds != fold)
            mine = labelled & (evidence.folds == fold)
            scores[mine] = sigmoid(rows[mine] @ _fit(rows[others], right[others], evidence.start, pull, whole))
        kinds = np.array(evidence.kinds)
        fitted = Fitted(whole, {}, {}, {})
        for kind in set(evidence.kinds):
            mine = kinds == kind
            seen = Candidates(scores[mine], right[mine], evidence.served[mine], evidence.asked[mine])
            self._judge(fitted, kind, seen, evidence)
        return fitted

    def _judge(self, fitted: Fitted, kind: str, seen: Candidates, evidence: Evidence) -> None:
        """Of one class: what its labels show."""
        told = ~np.isnan(seen.right)
        room = thresholds_with_room(seen, evidence.num_asked[kind], _SOON, self._max_wrong_requests)
        fitted.served_sizes[kind] = int((told & seen.given).sum())
        fitted.standings[kind] = lowest_threshold(
            seen.scores[told],
            1.0 - seen.right[told],
            represented(seen.scores, told),
            self._max_wrong,
            CONFIDENCE_Z if kind in evidence.giving else BEGINNING_Z,
            among=room,
        )
        if told.any():
            fitted.calibrations[kind] = calibrated(seen.scores[told], seen.right[told])

    def take(self, fitted: Fitted) -> list[tuple[str, ClassState, ClassState]]:
        """Ends a refit; says which classes changed their state, from what, to what."""
        self._coefficients = fitted.coefficients
        changes = []
        for kind, standing in fitted.standings.items():
            this = self._class(kind)
            if this.refit_is_late:
                continue
            before = this.state
            this.standing = standing
            this.calibration = fitted.calibrations.get(kind)
            if standing is not None:
                if this.state not in _GIVING:
                    this.num_verified = 0
                this.state = ClassState.DOUBTED if this.surprise.doubted else ClassState.PROVEN
                this.threshold = max(standing.threshold, self._least_chance)
            elif this.state is not ClassState.UNPROVEN or fitted.served_sizes.get(kind, 0) >= _ENOUGH_FOR / self._max_wrong:
                this.state, this.threshold = ClassState.OFF, _NEVER
            if this.state is not before:
                changes.append((kind, before, this.state))
        return changes

    def view(self) -> list[SemanticClass]:
        """For metrics."""
        return [
            SemanticClass(
                name=kind,
                state=this.state.value,
                threshold=this.threshold,
                wrong_ratio=this.standing.wrong_ratio if this.standing else 0.0,
                upper_bound=this.standing.upper_bound if this.standing else 1.0,
            )
            for kind, this in self._classes.items()
        ]

    def _class(self, kind: str) -> _Class:
        this = self._classes.get(kind)
        if this is None:
            threshold = self._prior.threshold(self._max_wrong * _PRIOR_MARGIN)
            this = _Class() if threshold is None else _Class(threshold=max(threshold, self._least_chance))
            self._classes[kind] = this
        return this

    def _verified_share(self, this: _Class) -> float:
        """All of an unproven class, and at first of a proven one; many while what is served has few labels, or doubt grows; else
        the configured share."""
        if this.state is ClassState.UNPROVEN or this.num_verified * self._max_wrong < _ENOUGH_FOR:
            return 1.0
        size = 0.0 if this.standing is None else this.standing.effective_size
        missing = 1.0 - min(1.0, size * self._max_wrong / _ENOUGH_FOR)
        return max(self._shadow_share, _VERIFIED_SHARE * missing, _VERIFIED_IN_DOUBT * this.surprise.degree)

    def _verdict(self, this: _Class, chance: float) -> Verdict:
        if this.state in (ClassState.OFF, ClassState.DOUBTED) or chance < this.threshold:
            return Verdict.WITHHOLD
        if this.state is ClassState.UNPROVEN and this.num_hits + 1 > self._unproven_hits * max(20, this.num_questions):
            return Verdict.WITHHOLD
        this.num_hits += 1
        return Verdict.SERVE_AND_VERIFY if self._dice.random() < self._verified_share(this) else Verdict.SERVE

    def _check_served(self, this: _Class) -> None:
        labels = this.served_labels
        wrong = labels.count(False)
        if this.state is ClassState.OFF or wrong < _FEW_WRONG:
            return
        if lower_bound(wrong / len(labels), len(labels), _CONTRADICTED_Z) > self._max_wrong:
            self._go_off(this)

    def _check_change(self, this: _Class, seen: Seen, *, right: bool) -> None:
        if seen.chance is None or this.calibration is None:
            return
        this.surprise.take(seen.chance, right=right)
        if this.surprise.doubt == 0.0:
            this.last_calm = max(this.last_calm, seen.number)
        if this.surprise.changed:
            kept = (one for one in self._window if one.kind != seen.kind or one.number > this.last_calm)
            self._window = deque(kept, maxlen=_WINDOW)
            self._go_off(this)
        elif this.state is ClassState.PROVEN and this.surprise.doubted:
            this.state = ClassState.DOUBTED
        elif this.state is ClassState.DOUBTED and not this.surprise.doubted:
            this.state = ClassState.PROVEN

    def _go_off(self, this: _Class) -> None:
        """What it was thought to be is void: chances are held against labels again after the next refit."""
        this.state, this.threshold = ClassState.OFF, _NEVER
        this.served_labels.clear()
        this.calibration, this.surprise, this.last_calm = None, Surprise(), self._num_seen
        this.refit_is_late = True


def _to_be_told(this: _Class, verdict: Verdict, chance: float) -> float | None:
    """Not of an answer that only a complaint would tell of: those who complain are not a sample."""
    if this.calibration is None or verdict is Verdict.SERVE:
        return None
    return this.calibration.chance(chance)


def _fit(rows: Floats, right: Floats, towards: Floats, pull: Floats, start: Floats) -> Floats:
    return fit(rows, right, np.ones(len(right)), towards=towards, pull=pull, start=start)
