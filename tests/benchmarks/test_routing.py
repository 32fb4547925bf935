"""The benchmark of model routing on outcomes that are made up so that the right answer is known."""

from __future__ import annotations

import csv
import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.routing import Known, Outcomes, by_rows, curve, gain_of_domains, gains, held_out, read, report, spread, trained
from benchmarks.routing_training import (
    FACTS,
    KERNEL_RIDGE,
    RIDGES,
    SHARPNESS,
    Scaled,
    Texts,
    differences,
    fit_pull,
    fit_words,
    folds_apart,
    foreseen,
    order_agreement,
    random_folds,
    scores_of,
    shifts,
)
from router.models.likeness import Form
from router.models.predictor import Predictor


def made_up(count: int) -> Outcomes:
    """The strong model helps with proofs alone; riddles are hard for both."""
    rng = random.Random(1)
    kinds = [rng.choice(["proof", "riddle", "chat"]) for _ in range(count)]
    prompts = [f"{kind} {rng.choice('abcdefgh')} {rng.randrange(100)}" for kind in kinds]
    weak = np.array([float(kind == "chat") for kind in kinds])
    strong = np.array([float(kind != "riddle") for kind in kinds])
    return Outcomes(prompts, weak, strong, kinds)


def known_of(outcomes: Outcomes, vectors: np.ndarray | None = None) -> Known:
    return Known(Texts.of(outcomes.prompts), vectors, "some-1")


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


def test_what_is_learned_is_the_gain_and_the_router_reads_the_same() -> None:
    outcomes = made_up(300)
    known = known_of(outcomes)
    predictor = trained(outcomes, known, range(300), ("small", "large"))
    assert isinstance(predictor, Predictor)
    for prompt in ("proof a 5", "riddle b 7", "chat c 9"):
        found = predictor.probabilities(prompt)
        assert (found["large"] - found["small"] > 0.5) == prompt.startswith("proof")
    all_at_once = np.clip(scores_of(predictor.words, known.texts), 0.01, 0.99)
    one_by_one = [list(predictor.probabilities(prompt).values()) for prompt in outcomes.prompts]
    assert all_at_once == pytest.approx(np.array(one_by_one), abs=1e-5)


def test_a_ridge_is_what_the_normal_equations_say() -> None:
    outcomes = made_up(80)
    scaled = Scaled(Texts.of(outcomes.prompts), 0.1)
    width = len(scaled.kept) + scaled.facts.shape[1]
    dense = scaled.forward(np.eye(width))
    assert np.linalg.norm(dense[:, : len(scaled.kept)], axis=1) == pytest.approx(1.0)
    target = outcomes.of_models() - outcomes.of_models().mean(axis=0)
    exact = np.linalg.solve(dense.T @ dense + 3.0 * np.eye(width), dense.T @ target)
    assert scaled.ridge(target, 3.0) == pytest.approx(exact, abs=1e-4)


def test_nobody_foresees_what_only_its_own_prompt_says() -> None:
    """Each prompt has words of its own, twice, so they are known words; its outcome is a coin. Learnt, it would be foreseen."""
    dice = random.Random(3)
    prompts = [f"word{number} word{number}" for number in range(200)]
    coin = np.array([[float(dice.random() < 0.5)] for _ in prompts])
    texts = Texts.of([f"{prompt} common" for prompt in prompts])
    said = foreseen(texts, coin, RIDGES[0], FACTS[0])[:, 0]
    assert abs(float(np.corrcoef(said, coin[:, 0])[0, 1])) < 0.2


def vectors_about(about: np.ndarray, num_subjects: int, dice: np.random.Generator) -> np.ndarray:
    """One per question, of length 1, near those of the same subject."""
    noise = dice.normal(0, 0.05, (len(about), num_subjects)).astype(np.float32)
    vectors = np.eye(num_subjects, dtype=np.float32)[about] + noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_similar_questions_tell_what_words_do_not() -> None:
    """What words prompts share says nothing, but their vectors show what they are about."""
    dice = np.random.default_rng(0)
    count = 240
    about = dice.integers(0, 3, count)
    vectors = vectors_about(about, 4, dice)
    prompts = ["what is " + "".join(chr(97 + int(letter)) for letter in dice.integers(0, 26, 9)) for _ in range(count)]
    outcomes = Outcomes(prompts, (about == 0).astype(float), (about != 1).astype(float), ["one"] * count)
    known = known_of(outcomes, vectors)
    said = gains(trained(outcomes, known, range(160)), known, range(160, count))
    part = outcomes.part(range(160, count))
    best = curve(part.strong - part.weak, part)[0]
    assert curve(said["words and similar"], part)[0] > best - 0.01
    assert curve(said["words"], part)[0] < 0.65
    folds = [list(range(fold, count, 5)) for fold in range(5)]
    assert curve(held_out(outcomes, known, folds)["words and similar"], outcomes)[0] > best - 0.02


def test_the_form_of_a_question_tells_what_its_subject_does_not() -> None:
    """Of two subjects, the strong model gains in one where there is much to read, in the other where there is little."""
    dice = np.random.default_rng(8)
    count = 600
    about, is_long = dice.integers(0, 2, count), dice.integers(0, 2, count)
    vectors = vectors_about(about, 3, dice)
    facts = Texts.of([" ".join(["word"] * int(dice.integers(4, 9) + 40 * more)) for more in is_long]).facts
    strong = (about == is_long).astype(float)
    outcomes = Outcomes([""] * count, np.zeros(count), strong, ["one"] * count)

    def area(forms: np.ndarray) -> float:
        return curve(shifts(vectors, forms, outcomes.of_models(), random_folds(count)) @ (-1.0, 1.0), outcomes)[0]

    assert area(Form.of(facts)(facts)) > curve(strong, outcomes)[0] - 0.01
    assert area(np.zeros((count, 1), np.float32)) < 0.6


def test_words_and_similar_questions_count_alike() -> None:
    """Half of the gain is told by a word, half by what a prompt is about: either alone leaves half unsaid. All have one form."""
    dice = np.random.default_rng(6)
    count = 900
    told, about = dice.integers(0, 2, count), dice.integers(0, 2, count)
    vectors = vectors_about(about, 3, dice)
    prompts = [("prove it" if one else "guess it") + f" w{dice.integers(0, 40)}" for one in told]
    strong = (dice.random(count) < 0.1 + 0.4 * told + 0.4 * about).astype(float)
    outcomes = Outcomes(prompts, np.zeros(count), strong, ["one"] * count)
    known = known_of(outcomes, vectors)
    said = gains(trained(outcomes, known, range(600)), known, range(600, count))["words and similar"]
    mean = {(word, kind): said[(told[600:] == word) & (about[600:] == kind)].mean() for word in (0, 1) for kind in (0, 1)}
    of_word, of_kind = mean[1, 0] - mean[0, 0], mean[0, 1] - mean[0, 0]
    assert of_word == pytest.approx(of_kind, rel=0.35)
    assert of_word + of_kind == pytest.approx(mean[1, 1] - mean[0, 0], rel=0.2)
    assert 0.4 < mean[1, 1] - mean[0, 0] < 1.0  # 0.8


def test_the_words_are_those_of_a_way_that_was_tried() -> None:
    outcomes = made_up(300)
    known = known_of(outcomes)
    chosen = trained(outcomes, known, range(300)).words.of_runs.ravel()
    tried = [fit_words(known.texts, outcomes.of_models(), ridge, weight) for ridge in RIDGES for weight in FACTS]
    assert max(float(np.corrcoef(chosen, one.of_runs.ravel())[0, 1]) for one in tried) == pytest.approx(1.0, abs=1e-6)


def test_words_that_say_nothing_are_not_believed() -> None:
    """Outcomes are coins: what the words learn of them is noise, and is said softly, near the mean."""
    dice = np.random.default_rng(2)
    prompts = [" ".join(f"w{dice.integers(0, 60)}" for _ in range(6)) for _ in range(400)]
    outcomes = Outcomes(prompts, *(dice.random((2, 400)) < 0.5).astype(float), ["one"] * 400)
    known = known_of(outcomes)
    said = scores_of(trained(outcomes, known, range(400)).words, known.texts)
    loud = scores_of(fit_words(known.texts, outcomes.of_models(), RIDGES[0], FACTS[0]), known.texts)
    assert said.std(axis=0).max() < 0.5 * loud.std(axis=0).min()
    assert said.mean(axis=0) == pytest.approx(outcomes.of_models().mean(axis=0), abs=0.02)


def test_the_pull_of_known_questions_solves_the_kernel_ridge() -> None:
    dice = np.random.default_rng(1)
    vectors = dice.normal(size=(40, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    outcomes = (dice.random((40, 2)) < 0.5).astype(float)
    forms = dice.normal(0, 0.3, (40, 3)).astype(np.float32)
    known = list(zip(vectors, forms, strict=True))
    kernel = [[np.exp(SHARPNESS * (float(v @ w) - 1) - float(np.square(f - h).sum())) for w, h in known] for v, f in known]
    exact = np.linalg.solve(np.array(kernel) + KERNEL_RIDGE * np.eye(40), outcomes - outcomes.mean(axis=0))
    assert fit_pull(vectors, forms, outcomes) == pytest.approx(exact, abs=1e-3)


def test_a_told_domain_says_its_mean_gain_among_the_others() -> None:
    outcomes = made_up(300)
    fold, rest = range(60), range(60, 300)
    told = gain_of_domains(outcomes, fold, rest)
    assert told == [float(outcomes.domains[row] == "proof") for row in fold]
    unknown = [row for row in range(300) if outcomes.domains[row] != "proof"]
    assert set(gain_of_domains(outcomes, range(60), unknown)) == {0.0}  # of what it never met it says the mean of the rest


def test_figures_are_means_over_the_divisions() -> None:
    outcomes = made_up(200)
    known, divisions = known_of(outcomes), [by_rows(200, seed) for seed in (3, 4, 5)]
    areas = [curve(held_out(outcomes, known, folds)["words"], outcomes)[0] for folds in divisions]
    found = report(outcomes, known, divisions)["words"]
    assert found["apgr"] == pytest.approx(np.mean(areas))
    assert found["deviation"] == pytest.approx(np.std(areas))
    assert (found["least"], found["most"]) == (min(areas), max(areas))


def test_the_spread_of_an_area_shrinks_with_more_prompts() -> None:
    few, many = (spread(np.random.default_rng(0).random(count), made_up(count)) for count in (100, 1600))
    assert 0 < many < few / 2


def test_settings_are_chosen_by_what_the_area_measures() -> None:
    """Of two models, agreement exceeds none as far as the area under the curve exceeds one half."""
    outcomes = made_up(240)
    truth = differences(outcomes.of_models() - outcomes.of_models().mean(axis=0))
    dice = np.random.default_rng(4)
    ratios = []
    for noise in (0.2, 1.0, 3.0):
        gain = outcomes.strong - outcomes.weak + dice.normal(0, noise, 240)
        area = curve(gain, outcomes)[0]
        ratios.append(order_agreement(np.stack([-gain, gain], axis=1) / 2, truth) / (area - 0.5))
        assert order_agreement(np.stack([-gain, gain], axis=1) * 7, truth) == pytest.approx(ratios[-1] * (area - 0.5))
    assert ratios == pytest.approx([ratios[0]] * 3, rel=0.02)


def test_prompts_that_are_alike_are_foreseen_together() -> None:
    dice = np.random.default_rng(5)
    about = dice.integers(0, 12, 300)
    vectors = np.eye(12, dtype=np.float32)[about] + dice.normal(0, 0.01, (300, 12)).astype(np.float32)
    folds = folds_apart(vectors)
    assert sorted(row for out, _ in folds for row in out) == list(range(300))
    for out, rest in folds:
        assert sorted([*out, *rest]) == list(range(300))
    for kind in range(12):  # a kind that several drawn prompts are of may be cut; most are not drawn often
        shares = [np.mean(np.isin(np.flatnonzero(about == kind), out)) for out, _ in random_folds(300)]
        assert max(shares) < 0.6
    whole = [max(np.mean(np.isin(np.flatnonzero(about == kind), out)) for out, _ in folds) for kind in range(12)]
    assert np.mean(whole) > 0.6


def test_who_knows_nothing_of_a_new_kind_is_as_good_as_chance() -> None:
    """A domain that nobody was trained on gets the mean of the others, which is the lower, the more there is to gain in it."""
    outcomes = made_up(300)
    folds = [[row for row in range(300) if outcomes.domains[row] == kind] for kind in ("proof", "riddle", "chat")]
    told = held_out(outcomes, known_of(outcomes), folds)["told domain"]
    assert told == pytest.approx(np.zeros(300), abs=1e-12)
