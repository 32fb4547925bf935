"""Pairs of questions that other caches have answered wrongly, by the kind of difference, and pairs that must not be ruled out."""

from __future__ import annotations

import pytest

from router.semantic.prior import shipped, word_weights
from router.semantic.reading import read
from router.semantic.vetoes import Veto, veto

WEIGHTS = word_weights(shipped())

RULED_OUT = [
    ("How do I turn on dark mode?", "How do I turn off dark mode?", Veto.OPPOSITE),
    ("How do I enable two factor auth?", "How do I disable two factor auth?", Veto.OPPOSITE),
    ("What are the advantages of nuclear power?", "What are the disadvantages of nuclear power?", Veto.OPPOSITE),
    ("Should I buy a house now or later?", "Should I sell a house now or later?", Veto.OPPOSITE),
    ("Is it safe to eat raw eggs?", "Is it not safe to eat raw eggs?", Veto.NEGATION),
    ("Why can I log in?", "Why can't I log in?", Veto.NEGATION),
    ("Can I cook pasta with salt?", "Can I cook pasta without salt?", Veto.NEGATION),
    ("Kann ich das essen?", "Kann ich das nicht essen?", Veto.NEGATION),
    ("What is 12 times 7?", "What is 12 times 8?", Veto.NUMBERS),
    ("How do I lose 5 kg?", "How do I lose 10 kg?", Veto.NUMBERS),
    ("How far is 5 km?", "How far is 5 miles?", Veto.NUMBERS),
    ("Who won the 2018 world cup?", "Who won the 2022 world cup?", Veto.NUMBERS),
    ("What happened in March?", "What happened in April?", Veto.NUMBERS),
    ("Who was the first president?", "Who was the second president?", Veto.NUMBERS),
    ("Give me two examples of verbs", "Give me three examples of verbs", Veto.NUMBERS),
    ("What is new in Python 3.11.2?", "What is new in Python 3.12.0?", Veto.NUMBERS),
    ("Convert -5 to Kelvin", "Convert 5 to Kelvin", Veto.NUMBERS),
    ("What does $20 buy?", "What does €20 buy?", Veto.NUMBERS),
    ("What does get_user do?", "What does set_user do?", Veto.CODE),
    ("What is in /etc/passwd?", "What is in /etc/shadow?", Veto.CODE),
    ("What does git commit --amend do?", "What does git commit --fixup do?", Veto.CODE),
    ('Translate "good morning" please', 'Translate "good night" please', Veto.CODE),
    ("How do I learn C++?", "How do I learn C#?", Veto.CODE),
    ("What is the capital of France?", "What is the capital of Spain?", Veto.NAMES),
    ("Who founded Apple and why?", "Who founded Google and why?", Veto.NAMES),
    ("Is the GPU faster here?", "Is the CPU faster here?", Veto.NAMES),
    ("who is the ceo of volkswagen", "who is the ceo of toyota", Veto.TOPIC),
    ("how do i cook quinoa", "how do i cook couscous", Veto.TOPIC),
    ("How do I fly from Paris to Rome?", "How do I fly from Rome to Paris?", Veto.ORDER),
    ("How do I convert celsius to kelvin?", "How do I convert kelvin to celsius?", Veto.ORDER),
    ("Why do the margins of headers grow from h1 to h6?", "Why do the margins of headers grow from h6 to h1?", Veto.ORDER),
    ("Why do dogs chase cats?", "Why do cats chase dogs?", Veto.ORDER),
    ("When did the war begin?", "Where did the war begin?", Veto.QUESTION_WORD),
    ("How do people become rich?", "Why do people become rich?", Veto.QUESTION_WORD),
    ("how do i pay for my car online", "how do i pay for my car offline", Veto.WORD),
    ("as an atheist what do you believe", "as an theist what do you believe", Veto.WORD),
    ("What may an employer ask for?", "What may an employee ask for?", Veto.WORD),
    ("What are the strengths and weaknesses of it?", "What are the weaknesses and weaknesses of it?", Veto.WORD),
    ("do indian men respect indian women", "do indian men respect other women", Veto.WORD),
    ("which game was the last they won in new york", "which game was the last they won in boston", Veto.WORD),
    ("What do ships bring to the island?", "What do ships bring from the island?", Veto.WORD),
]

NOT_RULED_OUT = [
    ("How do I turn on dark mode?", "How can I turn on the dark mode?"),
    ("How do I enable 2FA on my account?", "How do I turn on 2FA for my account?"),
    ("What's the best way to learn Python?", "What is the best way to learn Python?"),
    ("Give me 2 examples of verbs", "Give me two examples of verbs"),
    ("How much is 1,000 grams?", "How much is 1000 grams?"),
    ("What is 20 kilometers in steps?", "What is 20 km in steps?"),
    ("What is the population of the United States of America?", "What is the population of the USA?"),
    ("Who is better, Messi or Ronaldo?", "Who is better, Ronaldo or Messi?"),
    ("Does my iPhone need a case?", "does my iphone need a case?"),
    ("how to make lasagna at home", "how to make lasagne at home"),
    ("How do I buy a good house?", "How do I purchase a good house?"),
    ("Why isn't the sky green?", "Why is the sky not green?"),
    ('What does "recursion" mean?', "What does recursion mean?"),
    ("What is the best way to earn money online?", "What is the best way to make money online?"),
    ("How do I repair my old bike?", "How can someone fix my old bike?"),
    ("How do I become a succesful writer?", "How do I become a successful writer?"),
    ("How does new york compare with boston?", "How does ny compare with boston?"),
    ("Is tea or coffee better at night?", "Is coffee or tea better at night?"),
]


@pytest.mark.parametrize(("one", "other", "reason"), RULED_OUT)
def test_what_other_caches_confuse_is_ruled_out_both_ways(one: str, other: str, reason: Veto) -> None:
    assert veto(read(one), read(other), WEIGHTS) is reason
    assert veto(read(other), read(one), WEIGHTS) is reason


@pytest.mark.parametrize(("one", "other"), NOT_RULED_OUT)
def test_paraphrases_are_not_ruled_out(one: str, other: str) -> None:
    assert veto(read(one), read(other), WEIGHTS) is None
    assert veto(read(other), read(one), WEIGHTS) is None


def test_a_question_is_never_ruled_out_against_itself() -> None:
    for one, other, _ in RULED_OUT:
        assert veto(read(one), read(one), WEIGHTS) is None
        assert veto(read(other), read(other), WEIGHTS) is None
