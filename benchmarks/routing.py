"""How well the predictor of model routing spends a dear model, on recorded outcomes of a weak and a strong model.

    python -m benchmarks.routing --outcomes FILE [--json OUT]           figures, five-fold and with whole domains left out
    python -m benchmarks.routing --outcomes FILE --train OUT [--names small,large]      a file for `routing.predictor`

FILE is a CSV, perhaps gzipped, with the columns prompt, weak_ok, strong_ok, domain. A router gives each prompt a score; the
prompts with the highest scores go to the strong model.

    PGR(share)  = (accuracy - weak) / (strong - weak)         APGR = area under it over the share; random is 0.5
    CPT(x)      = least share that reaches PGR x

Baselines: random; length; hard-first (the same TF-IDF, ranked by how likely the weak model fails); and, when the questions
change, a threshold that was fixed on the training prompts, as routers with a calibrated threshold use it, against our controller.
What is learned is two logistics, one per model, on hashed TF-IDF and facts of the text; the score is the gain of the strong
model. Domains are used for nothing but the split. In-domain figures promise nothing for questions of another kind; left-out ones
say more.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.config import RouteAlias
from router.models.policy import error_of
from router.models.predictor import NUM_FACTS, Logistic, Predictor, facts, features
from router.models.share import ShareController

FOLDS = 5
BUCKETS = 32_768
EPOCHS = 12
TARGETS = (0.2, 0.5)
RESAMPLES = 200
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    prompts: list[str]
    weak: Floats
    strong: Floats
    domains: list[str]

    def part(self, rows: Sequence[int]) -> Outcomes:
        return Outcomes(
            [self.prompts[row] for row in rows], self.weak[rows], self.strong[rows], [self.domains[row] for row in rows]
        )


def read(path: Path) -> Outcomes:
    data = path.read_bytes()
    text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.DictReader(io.StringIO(text.decode("utf-8"))))
    weak, strong = (np.array([float(row[name]) for row in rows]) for name in ("weak_ok", "strong_ok"))
    return Outcomes([row["prompt"] for row in rows], weak, strong, [row["domain"] for row in rows])


class Matrix:
    """Rows of hashed TF-IDF, sparse, beside the facts of their texts."""

    def __init__(self, prompts: Sequence[str], idf: Floats | None = None) -> None:
        counted = [features(prompt, BUCKETS) for prompt in prompts]
        if idf is None:
            seen = np.bincount(np.concatenate([np.fromiter(row, np.int64, len(row)) for row in counted]), minlength=BUCKETS)
            idf = np.log((1.0 + len(prompts)) / (1.0 + seen)) + 1.0
        self.idf = idf
        self.columns = [np.fromiter(row.keys(), np.int64, len(row)) for row in counted]
        self.values = [
            np.fromiter(row.values(), np.float64, len(row)) * idf[cols] for row, cols in zip(counted, self.columns, strict=True)
        ]
        self.values = [row / (math.sqrt(float(row @ row)) or 1.0) for row in self.values]
        self.facts = np.array([facts(prompt) for prompt in prompts])
        self.starts = np.cumsum([0, *(len(row) for row in self.columns)])
        self.flat_columns, self.flat_values = np.concatenate(self.columns), np.concatenate(self.values)
        self.flat_rows = np.repeat(np.arange(len(prompts)), [len(row) for row in self.columns])

    def scores(self, model: Logistic) -> Floats:
        terms = self.flat_values * np.asarray(model.of_buckets)[self.flat_columns]
        sparse = np.bincount(self.flat_rows, terms, minlength=len(self.columns))
        return np.asarray(sparse + self.facts @ np.asarray(model.of_facts) + model.bias)


def fit(matrix: Matrix, labels: Floats, *, l2: float) -> Logistic:
    """Full-batch gradient descent with momentum (a quarter of the Hessian bounds the step); deterministic."""
    count = len(labels)
    weights, slope = np.zeros(BUCKETS), np.zeros(BUCKETS)
    centre = matrix.facts.mean(axis=0)
    dense, dense_slope = np.zeros(NUM_FACTS), np.zeros(NUM_FACTS)
    mean = float(labels.mean())
    bias = math.log((mean + 1e-6) / (1.0 - mean + 1e-6))
    for step in range(EPOCHS * 20):
        sparse = np.bincount(matrix.flat_rows, matrix.flat_values * weights[matrix.flat_columns], minlength=count)
        wrong = 1.0 / (1.0 + np.exp(-(sparse + (matrix.facts - centre) @ dense + bias))) - labels
        gradient = np.bincount(matrix.flat_columns, matrix.flat_values * wrong[matrix.flat_rows], minlength=BUCKETS)
        momentum = step / (step + 3.0)
        slope = momentum * slope - (gradient + l2 * weights) * (4.0 / (count * 0.05 + 4 * l2))
        weights = weights + slope
        dense_slope = momentum * dense_slope - (((matrix.facts - centre).T @ wrong) + l2 * dense) * (1.0 / count)
        dense = dense + dense_slope
        bias -= float(wrong.mean())
    return Logistic(bias - float(centre @ dense), dense.tolist(), weights.tolist())


def train(outcomes: Outcomes, names: tuple[str, str], l2: float) -> tuple[Predictor, Matrix]:
    matrix = Matrix(outcomes.prompts)
    weak, strong = (fit(matrix, labels, l2=l2) for labels in (outcomes.weak, outcomes.strong))
    return Predictor(matrix.idf.tolist(), {names[0]: weak, names[1]: strong}), matrix


def curve(score: Floats, outcomes: Outcomes) -> tuple[float, dict[float, float]]:
    """APGR, and CPT at 50, 80 and 95 %."""
    order = np.argsort(-score, kind="stable")
    gain = np.cumsum((outcomes.strong - outcomes.weak)[order])
    pgr = np.concatenate(([0.0], gain)) / max(1e-9, float(gain[-1]))
    shares = np.linspace(0.0, 1.0, len(pgr))
    cpt = {level: float(shares[int(np.argmax(pgr >= level))]) for level in (0.5, 0.8, 0.95)}
    return float(np.trapezoid(pgr, shares)), cpt


def held_out(outcomes: Outcomes, folds: Sequence[Sequence[int]], l2: float) -> dict[str, Floats]:
    """Scores of every prompt by routers that were not trained on its fold."""
    scores = {name: np.zeros(len(outcomes.prompts)) for name in ("gain", "hard-first", "told domain")}
    for fold in folds:
        inside = set(fold)
        rest = [row for row in range(len(outcomes.prompts)) if row not in inside]
        scores["told domain"][list(fold)] = gain_of_domains(outcomes, fold, rest)
        predictor, trained = train(outcomes.part(rest), ("weak", "strong"), l2)
        matrix = Matrix([outcomes.prompts[row] for row in fold], trained.idf)
        weak, strong = (1 / (1 + np.exp(-matrix.scores(predictor.parts[name]))) for name in ("weak", "strong"))
        scores["gain"][list(fold)] = strong - weak
        scores["hard-first"][list(fold)] = 1 - weak
    return scores


def gain_of_domains(outcomes: Outcomes, fold: Sequence[int], rest: Sequence[int]) -> list[float]:
    """What somebody would say who is told the domain of each prompt, and reads none of it: its mean gain among the rest."""
    gain = (outcomes.strong - outcomes.weak).tolist()
    of: dict[str, list[float]] = {}
    for row in rest:
        of.setdefault(outcomes.domains[row], []).append(gain[row])
    overall = statistics.fmean(gain[row] for row in rest)
    return [statistics.fmean(of.get(outcomes.domains[row], [overall])) for row in fold]


def spread(score: Floats, outcomes: Outcomes) -> float:
    """Of the area, had other prompts of the same kind been asked: standard deviation over resamples."""
    dice = np.random.default_rng(0)
    drawn = [dice.integers(0, len(score), len(score)) for _ in range(RESAMPLES)]
    return statistics.pstdev(curve(score[rows], outcomes.part(rows.tolist()))[0] for rows in drawn)


def by_rows(count: int) -> list[list[int]]:
    rows = list(range(count))
    random.Random(0).shuffle(rows)
    return [rows[fold::FOLDS] for fold in range(FOLDS)]


def by_domains(outcomes: Outcomes) -> list[list[int]]:
    names = sorted(set(outcomes.domains))
    random.Random(0).shuffle(names)
    fold_of = {name: place % FOLDS for place, name in enumerate(names)}
    return [[row for row, name in enumerate(outcomes.domains) if fold_of[name] == fold] for fold in range(FOLDS)]


def report(outcomes: Outcomes, folds: Sequence[Sequence[int]], l2: float) -> dict[str, dict[str, float]]:
    scores = held_out(outcomes, folds, l2)
    noise = np.random.default_rng(0).random(len(outcomes.prompts))
    ranked: dict[str, Floats] = {"random": noise, "length": np.array([float(len(prompt)) for prompt in outcomes.prompts])}
    ranked |= {name: scores[name] for name in ("told domain", "hard-first", "gain")}
    found = {}
    for name, score in ranked.items():
        apgr, cpt = curve(score, outcomes)
        found[name] = {"apgr": apgr, **{f"cpt{int(100 * level)}": share for level, share in cpt.items()}}
    found["gain"]["apgr_spread"] = spread(scores["gain"], outcomes)
    return found


def halves(outcomes: Outcomes) -> dict[str, tuple[list[str], list[str]]]:
    """Domains that are known, and those that come then."""
    names = sorted(set(outcomes.domains))
    gain: dict[str, list[float]] = {name: [] for name in names}
    for name, difference in zip(outcomes.domains, (outcomes.strong - outcomes.weak).tolist(), strict=True):
        gain[name].append(difference)
    names.sort(key=lambda name: statistics.fmean(gain[name]))
    found = {"more to gain": (names[: len(names) // 2], names[len(names) // 2 :])}
    if "gsm8k" in gain and len(names) > 1:
        found["only gsm8k"] = ([name for name in names if name != "gsm8k"], ["gsm8k"])
    return found


def shift(outcomes: Outcomes, known: Sequence[str], new: Sequence[str], l2: float) -> list[dict[str, float]]:
    """The known domains train, the new ones come, one after the other: the share of the strong model, fixed and held."""
    before = [row for row, name in enumerate(outcomes.domains) if name in known]
    after = [row for domain in new for row, name in enumerate(outcomes.domains) if name == domain]
    predictor, matrix = train(outcomes.part(before), ("weak", "strong"), l2)

    def gains(given: Matrix) -> Floats:
        weak, strong = (1 / (1 + np.exp(-given.scores(predictor.parts[name]))) for name in ("weak", "strong"))
        return np.asarray(strong - weak)

    seen, coming = gains(matrix), gains(Matrix([outcomes.prompts[row] for row in after], matrix.idf))
    found = []
    for target in TARGETS:
        bar = float(np.quantile(seen, 1 - target))
        alias = RouteAlias(candidates=("weak", "strong"), policy="predicted", strong_share=target)
        controller = ShareController(bar)
        chosen = []
        for gain in coming:
            picked = "strong" if gain > controller.bar else "weak"
            chosen.append(picked == "strong")
            controller.saw(error_of(alias, picked, {"weak": 0.0, "strong": 1.0}, {}) or 0.0)
        found.append({"target": target, "fixed": float((coming > bar).mean()), "held": statistics.fmean(chosen)})
    return found


def decision_ms(predictor: Predictor, prompts: Sequence[str]) -> dict[str, float]:
    times = []
    for prompt in prompts[:2000]:
        started_s = time.perf_counter()
        predictor.probabilities(prompt)
        times.append((time.perf_counter() - started_s) * 1e3)
    return {"p50": statistics.median(times), "p99": float(np.quantile(times, 0.99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outcomes", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--train", type=Path, help="train on all rows and write a predictor here, instead of figures")
    parser.add_argument(
        "--names", default="weak,strong", help="with --train: what weak and strong are called in the configuration"
    )
    parser.add_argument("--l2", type=float, default=1.0)
    options = parser.parse_args()
    outcomes = read(options.outcomes)
    if options.train is not None:
        weak, strong = options.names.split(",")
        predictor, _ = train(outcomes, (weak, strong), options.l2)
        options.train.write_text(json.dumps(predictor.as_json()))
        print(f"{len(outcomes.prompts)} outcomes -> {options.train}, {options.train.stat().st_size / 1e6:.1f} MB")
        return
    groups: dict[str, Callable[[str], bool]] = {
        "all but gsm8k": lambda name: name != "gsm8k",
        "gsm8k": lambda name: name == "gsm8k",
    }
    found: dict[str, object] = {}
    for group, belongs in groups.items():
        part = outcomes.part([row for row, name in enumerate(outcomes.domains) if belongs(name)])
        if not part.prompts:
            continue
        splits = {"in-domain": by_rows(len(part.prompts))}
        if len(set(part.domains)) >= FOLDS:
            splits["domains left out"] = by_domains(part)
        for split, folds in splits.items():
            figures = report(part, folds, options.l2)
            found[f"{group}, {split}"] = figures
            print(
                f"\n{group}, {split}: {len(part.prompts)} prompts, weak {part.weak.mean():.3f}, strong {part.strong.mean():.3f}"
            )
            for router, values in figures.items():
                print(f"  {router:12}" + "".join(f"  {name} {value:.3f}" for name, value in values.items()))
    print("\nshare of the strong model when the questions change")
    for change, (known, new) in halves(outcomes).items():
        found[f"share, then {change}"] = moved = shift(outcomes, known, new, options.l2)
        for row in moved:
            print(f"  {change:14}" + "".join(f"  {name} {value:.3f}" for name, value in row.items()))
    predictor, _ = train(outcomes.part(range(min(2000, len(outcomes.prompts)))), ("weak", "strong"), options.l2)
    found["decision_ms"] = taken = decision_ms(predictor, outcomes.prompts)
    print(f"\nprediction of one prompt: median {taken['p50']:.3f} ms, p99 {taken['p99']:.3f} ms")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
