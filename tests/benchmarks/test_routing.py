"""The benchmark of model routing on outcomes that are made up so that the right answer is known."""

from __future__ import annotations

import csv
import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.routing import Matrix, Outcomes, curve, gain_of_domains, read, spread, train
from router.models.predictor import Predictor


def made_up(count: int) -> Outcomes:
    """The strong model helps with proofs alone; riddles are hard for both."""
    rng = random.Random(1)
    kinds = [rng.choice(["proof", "riddle", "chat"]) for _ in range(count)]
    prompts = [f"{kind} {rng.choice('abcdefgh')} {rng.randrange(100)}" for kind in kinds]
    weak = np.array([float(kind == "chat") for kind in kinds])
    strong = np.array([float(kind != "riddle") for kind in kinds])
    return Outcomes(prompts, weak, strong, kinds)


def test_outcomes_are_read_from_plain_and_gzipped_files(tmp_path: Path) -> None:
    plain, packed = tmp_path / "o.csv", tmp_path / "o.csv.gz"
    with plain.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "weak_ok", "strong_ok", "domain"], ["a\nb", "0", "1", "d"]])
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        found = read(path)
        assert (found.prompts, found.weak.tolist(), found.strong.tolist(), found.domains) == (["a\nb"], [0.0], [1.0], ["d"])


def test_the_curve_of_a_perfect_a_useless_and_a_perverse_order() -> None:
    outcomes = made_up(300)
    gain = outcomes.strong - outcomes.weak
    share = float(gain.mean())
    perfect, cpt = curve(gain, outcomes)
    assert perfect == pytest.approx(1 - share / 2, abs=0.01)
    assert cpt[0.5] == pytest.approx(share / 2, abs=0.01)
    assert curve(-gain, outcomes)[0] == pytest.approx(share / 2, abs=0.01)
    assert curve(np.random.default_rng(0).random(300), outcomes)[0] == pytest.approx(0.5, abs=0.1)


def test_what_is_learned_is_the_gain_and_the_router_reads_the_same(tmp_path: Path) -> None:
    outcomes = made_up(300)
    predictor, matrix = train(outcomes, ("small", "large"), 0.3)
    assert isinstance(predictor, Predictor)
    for prompt in ("proof a 5", "riddle b 7", "chat c 9"):
        found = predictor.probabilities(prompt)
        assert (found["large"] - found["small"] > 0.5) == prompt.startswith("proof")
    rows = Matrix(outcomes.prompts[:5], matrix.idf)
    scores = 1 / (1 + np.exp(-rows.scores(predictor.parts["small"])))
    assert scores == pytest.approx([predictor.probabilities(prompt)["small"] for prompt in outcomes.prompts[:5]], abs=1e-9)


def test_a_told_domain_says_its_mean_gain_among_the_others() -> None:
    outcomes = made_up(300)
    fold, rest = range(60), range(60, 300)
    told = gain_of_domains(outcomes, fold, rest)
    assert told == [float(outcomes.domains[row] == "proof") for row in fold]
    unknown = [row for row in range(300) if outcomes.domains[row] != "proof"]
    assert set(gain_of_domains(outcomes, range(60), unknown)) == {0.0}  # of what it never met it says the mean of the rest


def test_the_spread_of_an_area_shrinks_with_more_prompts() -> None:
    few, many = (spread(np.random.default_rng(0).random(count), made_up(count)) for count in (100, 1600))
    assert 0 < many < few / 2
