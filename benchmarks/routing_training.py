"""How a predictor of model routing is made of recorded outcomes: a ridge on words, and one on similar questions.

Words: a ridge on each model's outcomes (0 or 1), over TF-IDF of the runs of words that at least two prompts have and facts of the
text. Similar questions: a ridge with `router/models/likeness.py` for a kernel. Both by conjugate gradients, deterministic. How
strong the first is, and how much the facts count there, four folds of the prompts decide: by the order that both together
foresee, for a share of the prompts goes to the better model, who gains most first. Either counts alike, by how far what it says
of them spreads: weights that fit some folds best were worse than that on others. How loud both are together is the least squares
of what they say of these folds and of four more: of folds that keep similar prompts together, for questions of a new kind will
come.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from router.models.likeness import Form, likeness
from router.models.predictor import Neighbours, Predictor, Words
from router.models.text_features import NUM_FACTS, facts, runs, words_of

RIDGES = (3.0, 10.0)
FACTS = (0.0, 0.1)  # weight of the facts beside the words, which together have length 1
KERNEL_RIDGE = 3.0
SHARPNESS = 5.0
LEAST_PROMPTS = 2  # that have a run of words
FOLDS = 4
KINDS = 40  # of similar prompts
STEPS = 20
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Folds = Sequence[tuple[list[int], list[int]]]  # rows that are foreseen, and those that this is learnt from


@dataclass(frozen=True)
class Texts:
    """Runs of words and facts of many texts, counted once. Sparse and flat: one entry per text and run."""

    rows: Rows
    columns: Rows
    counts: Floats
    facts: Floats
    numbers: npt.NDArray[np.uint32]  # of the columns

    @classmethod
    def of(cls, prompts: Sequence[str]) -> Texts:
        read = [words_of(prompt) for prompt in prompts]
        found = [runs(words) for words in read]
        lengths = [len(one) for one in found]
        flat = np.fromiter((number for one in found for number in one), np.uint32, sum(lengths))
        counts = np.fromiter((count for one in found for count in one.values()), np.float64, sum(lengths))
        numbers, columns = np.unique(flat, return_inverse=True)
        known = np.array([facts(prompt, words) for prompt, words in zip(prompts, read, strict=True)])
        return cls(np.repeat(np.arange(len(prompts)), lengths), columns, counts, known.reshape(len(prompts), NUM_FACTS), numbers)

    def part(self, rows: Sequence[int]) -> Texts:
        place = np.full(len(self.facts), -1)
        place[list(rows)] = np.arange(len(rows))
        kept = place[self.rows] >= 0
        return Texts(place[self.rows[kept]], self.columns[kept], self.counts[kept], self.facts[list(rows)], self.numbers)


class Scaled:
    """Rows of length 1 over the runs that enough of the texts have; facts beside them, centred and scaled."""

    def __init__(self, texts: Texts, facts_weight: float) -> None:
        width = len(texts.numbers)
        seen = np.bincount(texts.columns, minlength=width)
        self.kept = np.flatnonzero(seen >= LEAST_PROMPTS)
        self.idf = np.log((1.0 + len(texts.facts)) / (1.0 + seen[self.kept])) + 1.0
        self.centre, self.scale = texts.facts.mean(axis=0), texts.facts.std(axis=0) + 1e-9
        place = np.full(width, -1)
        place[self.kept] = np.arange(len(self.kept))
        known = place[texts.columns] >= 0
        self.rows, self.columns = texts.rows[known], place[texts.columns[known]]
        values = texts.counts[known] * self.idf[self.columns]
        lengths = np.sqrt(np.bincount(self.rows, values * values, minlength=len(texts.facts)))
        self.values = values / lengths[self.rows]
        self.facts = (texts.facts - self.centre) / self.scale * facts_weight

    def forward(self, weights: Floats) -> Floats:
        """Columns are models, of the weights and of what comes out."""
        count = len(self.facts)
        sums = [np.bincount(self.rows, self.values * column[self.columns], minlength=count) for column in weights.T]
        return np.asarray(np.stack(sums, axis=1) + self.facts @ weights[len(self.kept) :])

    def back(self, errors: Floats) -> Floats:
        width = len(self.kept)
        sums = [np.bincount(self.columns, self.values * column[self.rows], minlength=width) for column in errors.T]
        return np.concatenate((np.stack(sums, axis=1), self.facts.T @ errors))

    def ridge(self, outcomes: Floats, strength: float) -> Floats:
        """Weights, by way of the dual."""
        return self.back(solve(lambda way: self.forward(self.back(way)), outcomes, strength))


def solve(kernel: Callable[[Floats], Floats], outcomes: Floats, strength: float) -> Floats:
    """alpha of (K + strength) alpha = outcomes, column by column, all at once."""
    alpha, rest = np.zeros_like(outcomes), outcomes.copy()
    way, size = rest.copy(), np.square(rest).sum(axis=0)
    for _ in range(STEPS):
        bent = kernel(way) + strength * way
        step = size / np.maximum((way * bent).sum(axis=0), 1e-30)
        alpha, rest = alpha + step * way, rest - step * bent
        before, size = size, np.square(rest).sum(axis=0)
        way = rest + size / np.maximum(before, 1e-30) * way
    return alpha


def fit_words(texts: Texts, outcomes: Floats, strength: float, facts_weight: float) -> Words:
    """`outcomes` [text][model]."""
    scaled = Scaled(texts, facts_weight)
    means = outcomes.mean(axis=0)
    weights = scaled.ridge(outcomes - means, strength)
    of_facts = weights[len(scaled.kept) :] * facts_weight / scaled.scale[:, None]
    return Words(
        texts.numbers[scaled.kept].astype(np.uint32),
        scaled.idf.astype(np.float32),
        weights[: len(scaled.kept)].astype(np.float32),
        of_facts.astype(np.float32),
        (means - scaled.centre @ of_facts).astype(np.float32),
    )


def scores_of(words: Words, texts: Texts) -> Floats:
    """What `words.scores` says of each text, all at once."""
    places = np.minimum(np.searchsorted(words.numbers, texts.numbers), len(words.numbers) - 1)
    is_known = words.numbers[places] == texts.numbers
    known = is_known[texts.columns]
    rows, columns = texts.rows[known], places[texts.columns[known]]
    values = texts.counts[known] * words.idf[columns]
    count = len(texts.facts)
    lengths = np.sqrt(np.bincount(rows, values * values, minlength=count))
    values = values / np.where(lengths == 0.0, 1.0, lengths)[rows]
    sums = [np.bincount(rows, values * of_model[columns], minlength=count) for of_model in words.of_runs.T]
    return np.asarray(np.stack(sums, axis=1) + texts.facts @ words.of_facts + words.bias)


def fit_pull(vectors: Vectors, forms: Vectors, outcomes: Floats) -> Vectors:
    kernel = likeness(vectors @ vectors.T, forms, forms, SHARPNESS)
    centred = (outcomes - outcomes.mean(axis=0)).astype(np.float32)
    return solve(lambda way: kernel @ way, centred, KERNEL_RIDGE).astype(np.float32)


def foreseen(texts: Texts, outcomes: Floats, strength: float, facts_weight: float, folds: Folds | None = None) -> Floats:
    """What words say of each text, learnt from the other folds; without any, these are random."""
    found = np.zeros_like(outcomes)
    for out, rest in random_folds(len(outcomes)) if folds is None else folds:
        words = fit_words(texts.part(rest), outcomes[rest], strength, facts_weight)
        found[out] = scores_of(words, texts.part(out))
    return found


def shifts(vectors: Vectors, forms: Vectors, outcomes: Floats, folds: Folds) -> Floats:
    """What similar questions say of each, learnt from the other folds."""
    found = np.zeros_like(outcomes)
    for out, rest in folds:
        pull = fit_pull(vectors[rest], forms[rest], outcomes[rest])
        found[out] = likeness(vectors[out] @ vectors[rest].T, forms[out], forms[rest], SHARPNESS) @ pull
    return found


def train(models: Sequence[str], texts: Texts, outcomes: Floats, vectors: Vectors | None = None, embedder: str = "") -> Predictor:
    """`vectors` of the texts, if there are any, and the revision of the embedder that made them."""
    mean = outcomes.mean(axis=0)
    truth = differences(outcomes - mean)
    tried = {way: differences(foreseen(texts, outcomes, *way) - mean) for way in itertools.product(RIDGES, FACTS)}
    if vectors is None:
        best = max(tried, key=lambda way: order_agreement(tried[way], truth))
        return Predictor(models, _softer(fit_words(texts, outcomes, *best), _loudness([tried[best]], truth), mean))
    form = Form.of(texts.facts)
    forms = form(texts.facts)
    pulled = differences(shifts(vectors, forms, outcomes, random_folds(len(outcomes))))

    def beside(said: Floats) -> float:
        return float(said.std() / max(float(pulled.std()), 1e-12))

    # What is best alone is not best beside the other: what both say alike counts once.
    best = max(tried, key=lambda way: order_agreement(tried[way] + beside(tried[way]) * pulled, truth))
    balance, apart = beside(tried[best]), folds_apart(vectors)
    far = differences(foreseen(texts, outcomes, *best, apart) - mean)
    far += balance * differences(shifts(vectors, forms, outcomes, apart))
    # What is learnt from few prompts is said too loudly of others; how much, the folds tell.
    alone, together = _loudness([tried[best]], truth), _loudness([tried[best] + balance * pulled, far], truth)
    pull = (fit_pull(vectors, forms, outcomes) * (balance * together)).astype(np.float32)
    words = _softer(fit_words(texts, outcomes, *best), alone, mean)
    of_words = together / alone if alone > 0.0 else 0.0
    return Predictor(
        models, words, Neighbours(embedder, vectors, form, forms, pull, SHARPNESS, of_words, mean.astype(np.float32))
    )


def _loudness(said: Sequence[Floats], truth: Floats) -> float:
    """The factor that brings what is said nearest to the truth, in squares; not below 0."""
    whole = sum(float(np.square(one).sum()) for one in said)
    return max(0.0, sum(float((one * truth).sum()) for one in said) / max(whole, 1e-12))


def differences(outcomes: Floats) -> Floats:
    """What a choice is made by: outcomes less their mean over the models."""
    return np.asarray(outcomes - outcomes.mean(axis=1, keepdims=True))


def order_agreement(said: Floats, truth: Floats) -> float:
    """How well the order in which texts are put for each model goes with the truth; how loud something is said is mended later.

    Of two models it is, but for a factor, by how much the area under the gain that is kept over the share exceeds one half.
    """
    places = said.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable") - (len(said) - 1) / 2
    return float((places * truth).sum() / max(float(np.linalg.norm(places) * np.linalg.norm(truth)), 1e-12))


def _softer(words: Words, factor: float, mean: Floats) -> Words:
    """The same, with departures from the mean by a factor."""
    single, centre = np.float32(factor), mean.astype(np.float32)
    return replace(
        words,
        of_runs=words.of_runs * single,
        of_facts=words.of_facts * single,
        bias=centre + (words.bias - centre) * single,
    )


def random_folds(count: int) -> Folds:
    order = list(range(count))
    random.Random(0).shuffle(order)
    return [(sorted(order[fold::FOLDS]), sorted(set(order) - set(order[fold::FOLDS]))) for fold in range(FOLDS)]


def folds_apart(vectors: Vectors) -> Folds:
    """Each prompt goes with the nearest of some that were drawn, and all that go with the same one are in one fold."""
    centres = random.Random(1).sample(range(len(vectors)), min(KINDS, len(vectors)))
    fold_of = np.argmax(vectors @ vectors[centres].T, axis=1) % FOLDS
    found = [(np.flatnonzero(fold_of == fold).tolist(), np.flatnonzero(fold_of != fold).tolist()) for fold in range(FOLDS)]
    return [(out, rest) for out, rest in found if out and rest]
