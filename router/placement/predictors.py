"""How long things take, learnt while they happen: recursive least squares over a few features, robust against outliers.

    step of an engine        seconds = a + b * tokens + c * pairs          pairs: (token, token it attends to)
    a prompt of n new tokens, total in all:  a * steps + b * n + c * n * (total - n/2)
    a decode step of m sequences:            a + b * m + c * tokens in KV
    a hand-off               seconds = a + b * tokens that travel

One model of steps serves prompts and decoding alike, because both are tokens that attend to tokens. Every row is divided by the
prediction, so that a fit is good in per cent; a row that is far off moves the fit no more than one that is a little off.
Coefficients are never negative. A sample makes others fade in what it tells anew, and in nothing else: after a thousand steps
that decode it is still known what prompts cost, while other work on the host, which makes steps slower, shows within a few.
"""

from __future__ import annotations

from collections.abc import Sequence

_FORGETTING = 0.8  # what is left of all that was known along a sample's features
_NOISE = 0.05  # relative, of one sample
_OUTLIER = 3.0  # of the typical residual: beyond this a sample counts as this far off
_SURPRISE = 10.0  # the same for what is typical: many surprises in a row are the new truth
_FLOOR_S = 1e-5
_LEAST_UNCERTAIN = 1e-9  # relative, squared: nothing is known better
_SPREAD = 3.0  # a coefficient may well be so many times what is known of it, or thought of it beforehand
_DOUBT_OF_PAIRS_S = 1e-7


class LeastSquares:
    """`prior` has one coefficient per feature, `doubt` how great each may be as well, by default the same. Features are handed in
    as they are; scaling is done here."""

    def __init__(self, prior: Sequence[float], doubt: Sequence[float] | None = None) -> None:
        self.coefficients = list(prior)
        self.num_samples = 0
        self._doubt = tuple(prior if doubt is None else doubt)
        self._covariance = [
            [(_SPREAD * value) ** 2 if i == j else 0.0 for j in range(len(prior))] for i, value in enumerate(self._doubt)
        ]
        self._residual = 0.5  # typical, relative

    def predict(self, features: Sequence[float]) -> float:
        return sum(coefficient * feature for coefficient, feature in zip(self.coefficients, features, strict=True))

    @property
    def typical_error(self) -> float:
        """Relative, of late."""
        return self._residual

    def learn(self, features: Sequence[float], seconds: float) -> None:
        scale = max(self.predict(features), _FLOOR_S)
        error = (seconds - scale) / scale
        limit = _OUTLIER * self._residual
        clipped = min(max(error, -limit), limit)
        self._residual = max(0.02, 0.95 * self._residual + 0.05 * min(abs(error), _SURPRISE * self._residual))
        row = [feature / scale for feature in features]
        size = range(len(row))
        covariance = self._covariance
        towards = [sum(covariance[i][j] * row[j] for j in size) for i in size]
        uncertain = max(sum(row[i] * towards[i] for i in size), _LEAST_UNCERTAIN)
        gain_base = _FORGETTING * _NOISE + uncertain
        for i in size:
            self.coefficients[i] = max(0.0, self.coefficients[i] + towards[i] / gain_base * clipped)
        faded = (1.0 / _FORGETTING - 1.0) / uncertain
        known = 0.0 if clipped != error else 1.0 / (_FORGETTING * gain_base)  # a surprise makes nothing more certain
        for i in size:
            for j in size:
                covariance[i][j] += towards[i] * towards[j] * (faded - known)
        for i in size:
            most = (_SPREAD * max(self._doubt[i], self.coefficients[i])) ** 2
            if covariance[i][i] > most:  # nothing new was seen along this feature: stay near what is known
                shrink = (most / covariance[i][i]) ** 0.5
                for j in size:
                    covariance[i][j] *= shrink
                    covariance[j][i] *= shrink
        self.num_samples += 1

    def start_from(self, other: LeastSquares) -> None:
        """Takes a sibling's coefficients for a prior."""
        self.coefficients = list(other.coefficients)


class StepModel:
    """Of one worker. `a`, `b`, `c` are read on the path of every decision."""

    __slots__ = ("_fit", "a", "b", "c")

    def __init__(self, a: float = 3e-3, b: float = 1e-4, c: float = 1e-9) -> None:
        # Between a GPU and a small model on a CPU a pair differs by a factor of a million.
        self._fit = LeastSquares((a, b, c), (a, b, max(c, _DOUBT_OF_PAIRS_S)))
        self.a, self.b, self.c = a, b, c

    @property
    def num_samples(self) -> int:
        return self._fit.num_samples

    @property
    def typical_error(self) -> float:
        return self._fit.typical_error

    def learn(self, tokens: int, pairs: float, seconds: float) -> None:
        if tokens > 0 and seconds > 0:
            self._fit.learn((1.0, float(tokens), pairs), seconds)
            self.a, self.b, self.c = self._fit.coefficients

    def start_from(self, sibling: StepModel) -> None:
        self._fit.start_from(sibling._fit)
        self.a, self.b, self.c = self._fit.coefficients

    def seconds(self, tokens: float, pairs: float, steps: float) -> float:
        return self.a * steps + self.b * tokens + self.c * pairs


class HandoffModel:
    """Of all pairs of one model: what a remote prefill takes beyond waiting and computing."""

    def __init__(self, fixed: float = 5e-3, per_token: float = 1e-6) -> None:
        self._fit = LeastSquares((fixed, per_token))

    @property
    def num_samples(self) -> int:
        return self._fit.num_samples

    def learn(self, tokens: int, seconds: float) -> None:
        if seconds > 0:
            self._fit.learn((1.0, float(tokens)), seconds)

    def seconds(self, tokens: float) -> float:
        fixed, per_token = self._fit.coefficients
        return fixed + per_token * tokens
