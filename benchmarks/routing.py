"""How well the predictor of model routing spends a dear model, on recorded outcomes of a weak and a strong model.

    python -m benchmarks.routing --outcomes FILE [--splits 10] [--json OUT]    figures, five-fold and with whole domains left out
    python -m benchmarks.routing --outcomes FILE --train OUT [--names small,large]      a file for `routing.predictor`
    ... --embedder minilm [--vectors FILE]      with similar questions beside the words; FILE keeps vectors for the next run

FILE is a CSV, perhaps gzipped, with the columns prompt, weak_ok, strong_ok, domain. A router gives each prompt a score; the
prompts with the highest scores go to the strong model.

    PGR(share)  = (accuracy - weak) / (strong - weak)         APGR = area under it over the share; random is 0.5
    CPT(x)      = least share that reaches PGR x

Baselines: random; length; hard-first (the words, ranked by how likely the weak model fails); and, when the questions change, a
threshold that was fixed on the training prompts, as routers with a calibrated threshold use it, against our controller. What is
learned (`benchmarks/routing_training.py`) sees prompts and outcomes; the score is the gain of the strong model. Domains are used
for nothing but the split, and every choice that the training makes is made within the training part. How domains fall into folds
matters as much as most improvements: figures are means over several divisions, with the least, the most and the deviation among
them. `spread` is another thing: how far the area of one division would be off, had other prompts been asked. In-domain figures
promise nothing for questions of another kind; left-out ones say more. With an embedder a division takes a minute and a half.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.routing_training import FACTS, RIDGES, Texts, fit_words, foreseen, scores_of, train
from benchmarks.semantic.vectors import KeptVectors
from common.config import RouteAlias
from router.models.policy import error_of
from router.models.predictor import Predictor
from router.models.share import ShareController
from router.models.text_features import facts, words_of
from router.semantic.onnx_embedder import OnnxEmbedder
from router.semantic.reading import read as read_words

FOLDS = 5
TARGETS = (0.2, 0.5)
RESAMPLES = 200
Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]


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

    def of_models(self) -> Floats:
        return np.stack([self.weak, self.strong], axis=1)


@dataclass(frozen=True)
class Known:
    """Of the prompts of the outcomes, in their order."""

    texts: Texts
    vectors: Vectors | None
    embedder: str  # its revision

    def part(self, rows: Sequence[int]) -> Known:
        return Known(self.texts.part(rows), None if self.vectors is None else self.vectors[list(rows)], self.embedder)


def read(path: Path) -> Outcomes:
    data = path.read_bytes()
    text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.DictReader(io.StringIO(text.decode("utf-8"))))
    weak, strong = (np.array([float(row[name]) for row in rows]) for name in ("weak_ok", "strong_ok"))
    return Outcomes([row["prompt"] for row in rows], weak, strong, [row["domain"] for row in rows])


def curve(score: Floats, outcomes: Outcomes) -> tuple[float, dict[float, float]]:
    """APGR, and CPT at 50, 80 and 95 %."""
    order = np.argsort(-score, kind="stable")
    gain = np.cumsum((outcomes.strong - outcomes.weak)[order])
    pgr = np.concatenate(([0.0], gain)) / max(1e-9, float(gain[-1]))
    shares = np.linspace(0.0, 1.0, len(pgr))
    cpt = {level: float(shares[int(np.argmax(pgr >= level))]) for level in (0.5, 0.8, 0.95)}
    return float(np.trapezoid(pgr, shares)), cpt


def held_out(outcomes: Outcomes, known: Known, folds: Sequence[Sequence[int]]) -> dict[str, Floats]:
    """Scores of every prompt by routers that were not trained on its fold.

    Each router's are relative to the mean of what it was trained on: where a fold has more to gain, the rest has less, so who
    says nothing but that mean would put the folds in the wrong order, and be worse than chance.
    """
    scores: dict[str, Floats] = {}
    for fold in folds:
        rest = sorted(set(range(len(outcomes.prompts))) - set(fold))
        weak, strong = outcomes.of_models()[rest].mean(axis=0)
        said = gains(trained(outcomes, known, rest), known, fold)
        said["told domain"] = np.array(gain_of_domains(outcomes, fold, rest))
        for name, values in said.items():
            mean = -weak if name == "hard-first" else strong - weak
            scores.setdefault(name, np.zeros(len(outcomes.prompts)))[list(fold)] = values - mean
    return scores


def trained(outcomes: Outcomes, known: Known, rows: Sequence[int], names: Sequence[str] = ("weak", "strong")) -> Predictor:
    vectors = None if known.vectors is None else known.vectors[list(rows)]
    return train(names, known.texts.part(rows), outcomes.of_models()[list(rows)], vectors, known.embedder)


def gains(predictor: Predictor, known: Known, rows: Sequence[int]) -> dict[str, Floats]:
    """Of the strong model, as the words say and as the whole predictor says; and how likely the weak one fails."""
    alone = scores_of(predictor.words, known.texts.part(rows))
    found = {"hard-first": -alone[:, 0], "words": alone[:, 1] - alone[:, 0]}
    if predictor.neighbours is not None and known.vectors is not None:
        shifts = np.stack([predictor.neighbours.shift(known.vectors[row], known.texts.facts[row]) for row in rows])
        both = predictor.neighbours.with_words(alone.astype(np.float32), shifts)
        found["words and similar"] = (both[:, 1] - both[:, 0]).astype(np.float64)
    return found


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


def by_rows(count: int, seed: int) -> list[list[int]]:
    rows = list(range(count))
    random.Random(seed).shuffle(rows)
    return [rows[fold::FOLDS] for fold in range(FOLDS)]


def by_domains(outcomes: Outcomes, seed: int) -> list[list[int]]:
    names = sorted(set(outcomes.domains))
    random.Random(seed).shuffle(names)
    fold_of = {name: place % FOLDS for place, name in enumerate(names)}
    return [[row for row, name in enumerate(outcomes.domains) if fold_of[name] == fold] for fold in range(FOLDS)]


def report(outcomes: Outcomes, known: Known, divisions: Sequence[Sequence[Sequence[int]]]) -> dict[str, dict[str, float]]:
    """By router the means over the divisions into folds, and of the area the least and the most."""
    noise = np.random.default_rng(0).random(len(outcomes.prompts))
    same = {"random": noise, "length": np.array([float(len(prompt)) for prompt in outcomes.prompts])}
    areas: dict[str, list[float]] = {}
    parts: dict[str, list[dict[float, float]]] = {}
    last: dict[str, Floats] = {}
    for folds in divisions:
        last = same | held_out(outcomes, known, folds)
        for name, score in last.items():
            apgr, cpt = curve(score, outcomes)
            areas.setdefault(name, []).append(apgr)
            parts.setdefault(name, []).append(cpt)
    found = {}
    for name, values in areas.items():
        found[name] = {"apgr": statistics.fmean(values), "least": min(values), "most": max(values)}
        found[name]["deviation"] = statistics.pstdev(values)
        found[name] |= {f"cpt{int(100 * level)}": statistics.fmean(cpt[level] for cpt in parts[name]) for level in parts[name][0]}
        found[name]["spread"] = spread(last[name], outcomes)
    return found


def changes(outcomes: Outcomes) -> dict[str, tuple[list[str], list[str]]]:
    """Domains that are known, and those that come then."""
    names = sorted(set(outcomes.domains))
    gain: dict[str, list[float]] = {name: [] for name in names}
    for name, difference in zip(outcomes.domains, (outcomes.strong - outcomes.weak).tolist(), strict=True):
        gain[name].append(difference)
    names.sort(key=lambda name: statistics.fmean(gain[name]))
    half, quarter = len(names) // 2, len(names) // 4
    found = {"more to gain": (names[:half], names[half:])}
    if quarter:
        found["most to gain"] = names[:-quarter], names[-quarter:]
        found["least to gain"] = names[quarter:], names[:quarter]
    if "gsm8k" in gain and len(names) > 1:
        found["only gsm8k"] = ([name for name in names if name != "gsm8k"], ["gsm8k"])
    return found


def shift(outcomes: Outcomes, known: Known, old: Sequence[str], new: Sequence[str]) -> list[dict[str, float]]:
    """The old domains train, the new ones come, one after the other: the share of the strong model, fixed and held. By words."""
    before = [row for row, name in enumerate(outcomes.domains) if name in old]
    after = [row for domain in new for row, name in enumerate(outcomes.domains) if name == domain]
    part, labels = known.texts.part(before), outcomes.of_models()[before]
    way = (RIDGES[0], FACTS[0])
    seen = foreseen(part, labels, *way) @ (-1.0, 1.0)
    coming = scores_of(fit_words(part, labels, *way), known.texts.part(after)) @ (-1.0, 1.0)
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


def decision_ms(predictor: Predictor, outcomes: Outcomes, known: Known) -> dict[str, float]:
    """Of the words, and of the neighbours once there is a vector."""
    rows = range(min(2000, len(outcomes.prompts)))
    found: dict[str, float] = {}
    calls: dict[str, Callable[[int], object]] = {"words": lambda row: predictor.probabilities(outcomes.prompts[row])}
    neighbours, vectors = predictor.neighbours, known.vectors
    if neighbours is not None and vectors is not None:
        calls["neighbours"] = lambda row: neighbours.shift(
            vectors[row], facts(outcomes.prompts[row], words_of(outcomes.prompts[row]))
        )
    for name, call in calls.items():
        times = []
        for row in rows:
            started_s = time.perf_counter()
            call(row)
            times.append((time.perf_counter() - started_s) * 1e3)
        found |= {f"{name}_p50_ms": statistics.median(times), f"{name}_p99_ms": float(np.quantile(times, 0.99))}
    return found


def known_of(outcomes: Outcomes, embedder: str, file: Path | None) -> Known:
    texts = Texts.of(outcomes.prompts)
    if embedder == "none":
        return Known(texts, None, "")
    kept = KeptVectors(OnnxEmbedder.stored(), file)
    vectors = np.stack([kept.embed(prompt, read_words(prompt)) for prompt in outcomes.prompts])
    kept.save()
    return Known(texts, vectors, kept.revision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outcomes", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--train", type=Path, help="train on all rows and write a predictor here, instead of figures")
    parser.add_argument(
        "--names", default="weak,strong", help="with --train: what weak and strong are called in the configuration"
    )
    parser.add_argument("--splits", type=int, default=10, help="divisions into folds that figures are means of")
    parser.add_argument("--first-split", type=int, default=0, help="seed of the first division")
    parser.add_argument("--embedder", choices=("none", "minilm"), default="none")
    parser.add_argument("--vectors", type=Path, help="an .npz that keeps vectors from run to run")
    options = parser.parse_args()
    outcomes = read(options.outcomes)
    known = known_of(outcomes, options.embedder, options.vectors)
    everything = range(len(outcomes.prompts))
    if options.train is not None:
        predictor = trained(outcomes, known, everything, options.names.split(","))
        options.train.write_text(json.dumps(predictor.as_json()))
        print(f"{len(outcomes.prompts)} outcomes -> {options.train}, {options.train.stat().st_size / 1e6:.1f} MB")
        return
    groups: dict[str, Callable[[str], bool]] = {
        "all but gsm8k": lambda name: name != "gsm8k",
        "gsm8k": lambda name: name == "gsm8k",
    }
    found: dict[str, object] = {}
    for group, belongs in groups.items():
        rows = [row for row, name in enumerate(outcomes.domains) if belongs(name)]
        if not rows:
            continue
        part, known_part = outcomes.part(rows), known.part(rows)
        seeds = range(options.first_split, options.first_split + options.splits)
        splits = {"in-domain": [by_rows(len(rows), seed) for seed in seeds]}
        if len(set(part.domains)) >= FOLDS:
            splits["domains left out"] = [by_domains(part, seed) for seed in seeds]
        for split, divisions in splits.items():
            figures = report(part, known_part, divisions)
            found[f"{group}, {split}"] = figures
            print(f"\n{group}, {split}: {len(rows)} prompts, weak {part.weak.mean():.3f}, strong {part.strong.mean():.3f}")
            for router, values in figures.items():
                print(f"  {router:18}" + "".join(f"  {name} {value:.3f}" for name, value in values.items()), flush=True)
    print("\nshare of the strong model when the questions change")
    for change, (old, new) in changes(outcomes).items():
        found[f"share, then {change}"] = moved = shift(outcomes, known, old, new)
        for row in moved:
            print(f"  {change:14}" + "".join(f"  {name} {value:.3f}" for name, value in row.items()))
    predictor = trained(outcomes, known, everything)
    found["decision"] = taken = decision_ms(predictor, outcomes, known)
    found["megabytes"] = len(json.dumps(predictor.as_json())) / 1e6
    print("\nprediction of one prompt:" + "".join(f"  {name} {value:.3f}" for name, value in taken.items()))
    print(f"a predictor of all: {found['megabytes']:.1f} MB")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
