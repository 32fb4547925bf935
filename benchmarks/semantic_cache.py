"""How much the semantic cache serves, how much of that is wrong, and whether its bound holds, on a stream of question pairs.

    python -m benchmarks.semantic_cache --pairs FILE --requests 14000 --seeds 5       the table
    python -m benchmarks.semantic_cache --pairs FILE --train-prior OUT                what router/semantic/prior.json is made by

FILE is a gzipped table of question_a, question_b, same (0 or 1). It is split by connected components: on one part the prior is
trained, the stream is drawn from the other. "Right" means: of the same class by the file's labels, which are noisy, so wrong
answers are over-counted. Their share is given twice: of the hits, as `max_wrong_hits` bounds it, and of all requests, as
`max_wrong_requests` (--of-requests) does and as others define an error rate. The router's own modules run, on the labels that a
router would have: of what was computed anyway, and of the verified share of hits. The other rows see the same vectors: one cosine
threshold (the best in hindsight is for the reader to pick), and per-entry thresholds after arXiv 2502.03771.

Of edited questions (another number, name, word or question word, a negation, an opposite, words that change places) it counts how
many would get the original's answer: from each policy with what it has learnt from the whole stream, and before any label, at the
threshold that the prior has for the bound. Of other tenants' questions it counts how many hit.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.semantic.edits import edited_pairs
from benchmarks.semantic.pairs import Questions, load, split, stream
from benchmarks.semantic.policies import Asked, Ours, Outcome, PerEntryLogistic, Policy, Static
from benchmarks.semantic.vectors import KeptVectors
from common.config import SemanticCacheConfig
from router.semantic.decider import Decider
from router.semantic.embedder import Embedder, HashedEmbedder
from router.semantic.library import Library
from router.semantic.making import make_embedder
from router.semantic.matching import Known, Matcher
from router.semantic.prior import Prior, PriorFile, shipped, word_weights
from router.semantic.reading import read

_TRAIN_SHARE = 0.35
_BOUNDS = (0.01, 0.02, 0.05, 0.10, 0.12, 0.13, 0.15, 0.20)
_STATIC = (0.70, 0.80, 0.85, 0.90, 0.95, 0.97, 0.99)
_DELTAS = (0.01, 0.02, 0.05)
_HELD_OUT = 0.3  # of the training classes, for the prior's trials


def asked_questions(questions: Questions, order: list[int], embedder: Embedder) -> list[Asked]:
    found = []
    for number in order:
        text = questions.texts[number]
        reading = read(text)
        found.append(Asked(number, questions.classes[number], text, reading, embedder.embed(text, reading)))
    return found


def drifted(asked: list[Asked], share: float, seed: int) -> list[Asked]:
    """From half-way on, such a share of the classes has no common answer any more: each of their questions has its own."""
    kinds = sorted({one.kind for one in asked})
    moved = set(random.Random(seed).sample(kinds, int(share * len(kinds))))
    half = len(asked) // 2
    return [replace(one, kind=-1 - one.number) if place >= half and one.kind in moved else one for place, one in enumerate(asked)]


def policies(
    file: PriorFile, revision: str, bounds: list[float], of_requests: float | None, *, seed: int, shadow: float
) -> Iterator[tuple[str, Policy]]:
    weights = word_weights(file)
    beside = "" if of_requests is None else f", {of_requests:.0%} of requests"

    def ours(bound: float, *, informed: bool, only_cosine: bool = False) -> Ours:
        return Ours(
            Prior(file, revision, informed=informed),
            weights,
            max_wrong_hits=bound,
            max_wrong_requests=of_requests,
            shadow_share=shadow,
            seed=seed,
            only_cosine=only_cosine,
        )

    for bound in bounds:
        for informed in (True, False):
            yield f"ours, {'with the prior' if informed else 'cold'}, bound {bound:.0%}{beside}", ours(bound, informed=informed)
    for bound in bounds[2:4]:
        yield f"pooled, cosine only, bound {bound:.0%}{beside}", ours(bound, informed=False, only_cosine=True)
    for threshold in _STATIC:
        yield f"one threshold {threshold}", Static(threshold)
    for delta in _DELTAS:
        yield f"per-entry thresholds, delta {delta:.0%}", PerEntryLogistic(delta, seed)


def interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's, two-sided 95 %."""
    if total == 0:
        return 0.0, 1.0
    z, ratio = 1.96, count / total
    centre = ratio + z * z / (2 * total)
    spread = z * math.sqrt(ratio * (1 - ratio) / total + (z / (2 * total)) ** 2)
    return (centre - spread) / (1 + z * z / total), (centre + spread) / (1 + z * z / total)


def summary(name: str, outcomes: list[Outcome], seconds: float, edits: Counter[str], edited_each: int) -> dict[str, Any]:
    hits, wrong, requests = (sum(getattr(one, what) for one in outcomes) for what in ("hits", "wrong", "requests"))
    low, high = interval(wrong, hits)
    return {
        "policy": name,
        "hit_percent": round(100 * hits / requests, 2),
        "hit_percent_last_quarter": round(100 * sum(one.hits_by_quarter[3] for one in outcomes) * 4 / requests, 2),
        "hits_by_quarter": [sum(one.hits_by_quarter[quarter] for one in outcomes) for quarter in range(4)],
        "wrong_by_quarter": [sum(one.wrong_by_quarter[quarter] for one in outcomes) for quarter in range(4)],
        "wrong_per_request_percent": round(100 * wrong / requests, 3),
        "wrong_per_hit_percent": round(100 * wrong / max(1, hits), 2),
        "wrong_per_hit_interval": [round(100 * low, 2), round(100 * high, 2)],
        "verified_percent_of_hits": round(100 * sum(one.verified for one in outcomes) / max(1, hits), 1),
        "per_seed": [[one.hits, one.wrong, one.requests] for one in outcomes],
        "hit_percent_sd": _deviation([100 * one.hits / one.requests for one in outcomes]),
        "wrong_per_request_percent_sd": _deviation([100 * one.wrong / one.requests for one in outcomes]),
        "edits_served_percent": round(100 * edits.total() / (edited_each * len(outcomes)), 3),
        "edits_served": dict(edits),
        "seconds_per_seed": round(seconds / len(outcomes), 1),
    }


def _deviation(values: list[float]) -> float:
    return round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else 0.0


def bounds_held(name: str, policy: Ours, outcomes: list[Outcome]) -> dict[str, Any]:
    """In how many seeds the wrong ones stayed under the bounds, as they are and as far as the seed's hits can tell (95 %)."""
    bound, of_requests = policy.max_wrong_hits, policy.max_wrong_requests
    return {
        "policy": name,
        "seeds": len(outcomes),
        "served": sum(one.hits > 0 for one in outcomes),
        "kept": sum(one.wrong <= bound * one.hits for one in outcomes),
        "not_refuted": sum(interval(one.wrong, one.hits)[0] <= bound for one in outcomes),
        "kept_of_requests": sum(one.wrong <= (of_requests or 1.0) * one.requests for one in outcomes),
    }


Edited = tuple[str, Asked, Asked]  # the kind of edit, a question, and what it became


def edited_questions(questions: Questions, allowed: list[int], embedder: Embedder, count: int) -> list[Edited]:
    texts = [questions.texts[number] for number in allowed if 20 <= len(questions.texts[number]) <= 150]
    found = []
    for kind, *pair in edited_pairs(texts, count, seed=7):
        before, after = (Asked(0, 0, text, read(text), embedder.embed(text, read(text))) for text in pair)
        found.append((kind, before, after))
    return found


def edited(pairs: list[Edited], file: PriorFile, embedder: Embedder, bounds: list[float]) -> dict[str, Any]:
    """Whether an original's answer would be given to its edited question, at each bound's threshold and at a cosine of 0.9."""
    prior, weights = Prior(file, embedder.revision), word_weights(file)
    thresholds = {f"bound {bound:.0%}": prior.threshold(bound) for bound in bounds}
    served: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for kind, before, after in pairs:
        kinds[kind] += 1
        decider = Decider(prior, max_wrong_hits=0.05, shadow_share=0.0, dice=random.Random(0))
        library = Library(dimensions=embedder.dimensions, max_entries=1)
        library.add(b"s", Known(b"k", before.reading, ""), before.vector, names=(), expires_s=1.0)
        scope = library.scope(b"s")
        best = None if scope is None else Matcher(prior, weights, decider).match(scope, b"q", after.reading, after.vector).best
        for name, threshold in thresholds.items():
            hit = best is not None and threshold is not None and best.chance >= max(0.5, threshold)
            served[name] += hit
            served[f"{name}: {kind}"] += hit
        served["one threshold 0.9"] += float(before.vector @ after.vector) >= 0.9
    return {
        "edited_questions": len(pairs),
        "kinds": dict(kinds),
        "served_percent": {
            name: round(100 * number / (kinds[name.partition(": ")[2]] if ": " in name else len(pairs)), 3)
            for name, number in sorted(served.items())
            if number or ": " not in name
        },
    }


def other_tenants(questions: Questions, allowed: list[int], file: PriorFile, embedder: Embedder, probes: int) -> dict[str, int]:
    """Each question of one tenant is asked by another, word by word; a look-up sees the asker's scope alone."""
    prior, weights = Prior(file, embedder.revision), word_weights(file)
    decider = Decider(prior, max_wrong_hits=0.5, shadow_share=0.0, dice=random.Random(0))
    matcher = Matcher(prior, weights, decider)
    library = Library(dimensions=embedder.dimensions, max_entries=4_000)
    dice = random.Random(3)
    known = dice.sample(allowed, min(2_000, len(allowed)))
    readings = {number: read(questions.texts[number]) for number in known}
    vectors = {number: embedder.embed(questions.texts[number], readings[number]) for number in known}
    for number in known:  # half of the questions are the one's, half the other's
        tenant = b"one" if number % 2 else b"two"
        library.add(
            tenant, Known(tenant + number.to_bytes(8, "big"), readings[number], ""), vectors[number], names=(), expires_s=1.0
        )
    crossed = 0
    for place in range(probes):
        number = known[place % len(known)]
        asker = b"two" if number % 2 else b"one"
        scope = library.scope(asker)
        best = None if scope is None else matcher.match(scope, b"q", readings[number], vectors[number]).best
        crossed += best is not None and not best.known.key.startswith(asker)
    return {"probes": probes, "crossed": crossed}


def look_up_times(embedder: Embedder) -> dict[str, float]:
    """Milliseconds of one look-up in 50,000 entries: all in one scope, and in fifty."""
    noise = np.random.default_rng(0)
    vectors = noise.standard_normal((50_000, embedder.dimensions)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    reading = read("How do I learn to play the piano at home?")
    found = {}
    for scopes in (1, 50):
        library = Library(dimensions=embedder.dimensions, max_entries=50_000)
        for place, vector in enumerate(vectors):
            name = (place % scopes).to_bytes(2, "big")
            library.add(name, Known(place.to_bytes(8, "big"), reading, ""), vector, names=(), expires_s=1.0)
        times = []
        for place in range(200):
            scope = library.scope((place % scopes).to_bytes(2, "big"))
            if scope is None:
                continue
            start = time.perf_counter()
            scope.nearest(vectors[place], 6)
            times.append(time.perf_counter() - start)
        found[f"p50_ms_in_{scopes}_scopes"] = round(1e3 * float(np.median(times)), 3)
    return found


def train_prior(questions: Questions, allowed: list[int], out: Path, vectors: Path | None) -> None:
    """For the hashed embedder, and for MiniLM if it is on this machine."""
    from benchmarks.semantic.training import edited_examples, examples, train, word_counts
    from common.errors import ModelLoadError

    counts, total = word_counts([questions.texts[number] for number in allowed])
    empty = PriorFile(version=1, num_questions=total, word_counts=counts, embedders={})
    weights = word_weights(empty)
    embedders: list[Embedder] = [HashedEmbedder(weights)]
    try:
        embedders.append(KeptVectors(make_embedder(SemanticCacheConfig(embedder="minilm"), empty), vectors))
    except ModelLoadError as error:
        print(f"without MiniLM: {error}", file=sys.stderr)
    order = stream(questions, allowed, 20_000, seed=0, single_share=0.25)
    classes = sorted({questions.classes[number] for number in order})
    random.Random(0).shuffle(classes)
    held = set(classes[: int(len(classes) * _HELD_OUT)])
    trained = [number for number in order if questions.classes[number] not in held]
    tried = [number for number in order if questions.classes[number] in held]
    priors = {}
    for embedder in embedders:
        rows, right = examples(questions, trained, embedder, weights)
        wrong = edited_examples([questions.texts[number] for number in trained], 6_000, embedder, weights)
        rows, right = np.concatenate([rows, wrong]), np.concatenate([right, np.zeros(len(wrong))])
        priors[embedder.revision] = train(rows, right, *examples(questions, tried, embedder, weights))
        if isinstance(embedder, KeptVectors):
            embedder.save()
    file = PriorFile(version=1, num_questions=total, word_counts=counts, embedders=priors)
    out.write_text(file.model_dump_json() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=14_000, help="length of the stream, at most")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--bounds",
        type=lambda text: [float(bound) for bound in text.split(",")],
        default=list(_BOUNDS),
        help="shares of wrong hits that are allowed, with commas between them",
    )
    parser.add_argument("--of-requests", type=float, help="share of requests that may be answered wrongly, beside each of these")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--embedder", choices=("hashed", "minilm"), default="hashed")
    parser.add_argument("--vectors", type=Path, help="an .npz that keeps vectors from run to run")
    parser.add_argument("--shadow", type=float, default=SemanticCacheConfig().shadow, help="share of hits that are verified")
    parser.add_argument("--drift", type=float, default=0.0, help="share of classes whose questions part half-way")
    parser.add_argument("--only", default="", help="only policies whose name holds one of these parts (part;part)")
    parser.add_argument("--edits", type=int, default=2_400)
    parser.add_argument("--probes", type=int, default=100_000)
    parser.add_argument("--train-prior", type=Path, metavar="OUT")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    questions, components = load(options.pairs)
    to_train, to_judge = split(questions, components, _TRAIN_SHARE)
    if options.train_prior is not None:
        train_prior(questions, to_train, options.train_prior, options.vectors)
        return
    file = shipped()
    embedder = KeptVectors(make_embedder(SemanticCacheConfig(embedder=options.embedder), file), options.vectors)
    outcomes: dict[str, list[Outcome]] = {}
    seconds: dict[str, float] = defaultdict(float)
    last: dict[str, Ours] = {}
    possible: list[float] = []
    lengths: list[int] = []  # a file may not have so many questions as are wanted
    edits = edited_questions(questions, to_judge, embedder, options.edits)
    edits_served: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        asked = asked_questions(questions, stream(questions, to_judge, options.requests, seed), embedder)
        lengths.append(len(asked))
        possible.append(1.0 - len({one.kind for one in asked}) / len(asked))
        asked = drifted(asked, options.drift, seed)
        for name, policy in policies(
            file, embedder.revision, options.bounds, options.of_requests, seed=seed, shadow=options.shadow
        ):
            if any(part in name for part in options.only.split(";")):
                start = time.perf_counter()
                outcomes.setdefault(name, []).append(policy.run(asked, len(asked)))
                seconds[name] += time.perf_counter() - start
                if isinstance(policy, Ours):
                    last[name] = policy
                    edits_served[name].update(kind for kind, before, after in edits if policy.would_serve(after, before))
    rows = [summary(name, found, seconds[name], edits_served[name], len(edits)) for name, found in outcomes.items()]
    report = {
        "embedder": embedder.revision,
        "requests": round(float(np.mean(lengths))),
        "seeds": options.seeds,
        "drift": options.drift,
        "possible_hit_percent": round(100 * float(np.mean(possible)), 1),
        "policies": rows,
        "bounds": [bounds_held(name, policy, outcomes[name]) for name, policy in last.items() if name.startswith("ours")],
        "edits": edited(edits, file, embedder, options.bounds),
        "other_tenants": other_tenants(questions, to_judge, file, embedder, options.probes),
        "look_up": look_up_times(embedder),
    }
    embedder.save()
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(
        f"{report['embedder']}: {options.seeds} x {report['requests']} requests, at most {report['possible_hit_percent']} % hits"
    )
    print("in percent: hits of requests, of the last quarter's; wrong of requests, of hits; verified of hits; edits served")
    print(
        f"{'policy':50}{'hits':>7}{'sd':>6}{'last 1/4':>9}{'wrong/req':>10}{'sd':>6}{'wrong/hit':>10}  {'95 %':14}"
        f"{'verified':>9}{'edits':>7}{'s':>6}"
    )
    for row in rows:
        low, high = row["wrong_per_hit_interval"]
        print(
            f"{row['policy']:50}{row['hit_percent']:7}{row['hit_percent_sd']:6}{row['hit_percent_last_quarter']:9}"
            f"{row['wrong_per_request_percent']:10}{row['wrong_per_request_percent_sd']:6}{row['wrong_per_hit_percent']:10}"
            f"  {f'{low} - {high}':14}"
            f"{row['verified_percent_of_hits']:9}{row['edits_served_percent']:7}{row['seconds_per_seed']:6}"
        )
    for what in ("bounds", "edits", "other_tenants", "look_up"):
        print(what, json.dumps(report[what], indent=1))


if __name__ == "__main__":
    main()
