"""What a model is asked so that its answers can be learned from: tasks, each about many subjects, in a fixed order.

Prompts are only there to make a model talk in all the ways in which it is going to be asked. Better ones are the users' own
(`pdserve train-heads --prompts FILE`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_TASKS = (
    "Explain {} in simple words.",
    "What is {}, and why does it matter?",
    "Give me five facts about {}.",
    "Write a short poem about {}.",
    "Write a story of a few sentences in which {} plays a part.",
    "What are common mistakes people make with {}?",
    "List the advantages and disadvantages of {}.",
    "How would you teach {} to a group of ten-year-olds?",
    "Write an email to a colleague about {}.",
    "What is the history of {}?",
    "Make a plan for one week to learn more about {}.",
    "Compare {} today with how it was a hundred years ago.",
    "Which tools does one need for {}?",
    "Summarise what an expert would say about {}.",
    "Answer three questions that a beginner has about {}.",
    "Tell me something surprising about {}.",
    "Write a dialogue between two friends who disagree about {}.",
    "What should I read first about {}?",
    "Give step-by-step instructions that have to do with {}.",
    "How does {} affect everyday life?",
    "Write a product description related to {}.",
    "Write a Python function that has to do with {} and explain it.",
    "Make a table in Markdown with four rows about {}.",
    "Why do some people not like {}?",
)
_SUBJECTS = (
    "gardening", "the moon", "chess", "electric cars", "coffee", "photosynthesis", "public speaking", "the stock market",
    "volcanoes", "cooking rice", "machine learning", "the Roman Empire", "sleepwalking cats", "recycling", "mountain hiking",
    "a lost key", "antibiotics", "jazz music", "swimming", "the alphabet", "railways", "friendship", "taxes", "honey bees",
    "sorting a list of numbers", "the water cycle", "remote work", "learning Spanish", "dinosaurs", "a small bakery",
    "the printing press",
    "running a marathon", "black holes", "knitting", "democracy", "a broken window", "prime numbers", "vegetarian food",
    "watching birds", "the human heart", "saving money", "old maps", "renewable energy", "a train journey at night",
    "reading files", "first aid", "dreams", "the desert", "email security", "raising a puppy",
)  # fmt: skip


def built_in_prompts() -> Iterator[str]:
    """All tasks with all subjects, mixed; the same order every time. 1200 of them."""
    prompts = [task.format(subject) for task in _TASKS for subject in _SUBJECTS]
    random.Random(0).shuffle(prompts)
    return iter(prompts)
