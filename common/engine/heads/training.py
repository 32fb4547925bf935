"""Training of heads on a CPU in minutes: what a model said, and from which hidden rows, is all that is needed.

    lessons -> words (the tokens said most) -> steps of AdamW until the passes or the time are over -> HeadWeights
    held back: every twelfth lesson, never trained on, which the report is about

A guess is compared with the model's whole distribution at that place, which its hidden row there tells, not only with the token
that came; and its state with that row, so that each place teaches as much as it can. The model itself is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from common.clock import Clock
from common.engine.heads.file import Description, HeadWeights, as_written
from common.engine.heads.heads import NORM, DraftHeads, normed, scaled, word_rows
from common.engine.heads.rows import HiddenRow
from common.engine.loader import keep_only, load_architecture, load_weights
from common.errors import ConfigError

_HELD_BACK = 12
_BATCH = 512
_RATE, _WARM_UP_STEPS, _BETAS = 1e-3, 50, (0.9, 0.98)
_LATER = 0.8  # what a guess counts, against the one before it
_STATE_LOSS = 0.1
_PROGRESS_STEPS = 50
_LEAST_LESSONS = 2 * _HELD_BACK


@dataclass(frozen=True, slots=True)
class Lesson:
    """An answer: its tokens, and the row that each was drawn from."""

    rows: torch.Tensor  # bf16 [tokens, hidden]
    tokens: torch.Tensor  # int64 [tokens]

    @classmethod
    def of(cls, rows: Sequence[HiddenRow], tokens: Sequence[int], hidden_size: int) -> Lesson:
        """Of as many rows as tokens, at least one."""
        return cls(torch.stack([row.values[:hidden_size] for row in rows]).to("cpu", torch.bfloat16), torch.tensor(tokens))


@dataclass(frozen=True, slots=True)
class Plan:
    num_guesses: int
    num_words: int
    width: int
    passes: float  # over all lessons, if time allows
    budget_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """About lessons that were held back, as the file will have it."""

    num_tokens: int  # trained on
    num_held_back: int
    words_cover: float  # share of tokens that can be named at all
    right: tuple[float, ...]  # per guess, whatever the ones before it
    right_so_far: tuple[float, ...]  # per guess, and all before it

    @property
    def more_tokens(self) -> float:
        """Per step, if all guesses are checked."""
        return sum(self.right_so_far)


def train(
    lessons: Sequence[Lesson],
    model_path: Path,
    model_digest: str,
    plan: Plan,
    clock: Clock,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[HeadWeights, Report]:
    """Blocking. `progress` is told a line from time to time. Raises ConfigError where there is too little to learn from."""
    if len(lessons) < _LEAST_LESSONS:
        raise ConfigError(f"{len(lessons)} answers are too few to learn from: at least {_LEAST_LESSONS}", param="prompts")
    architecture = load_architecture(model_path)
    held = lessons[::_HELD_BACK]
    taught = _Places([lesson for number, lesson in enumerate(lessons) if number % _HELD_BACK], plan.num_guesses)
    counts = torch.bincount(taught.tokens, minlength=architecture.vocab_size)
    words = counts.argsort(descending=True, stable=True)[: plan.num_words].sort().values
    head, embedding = word_rows(model_path, words)
    description = Description(model_digest, plan.num_guesses, architecture.hidden_size, architecture.vocab_size, plan.width)
    norm = _norm(model_path, architecture.family)
    cell = _Cell(description, norm, words, head, scaled(embedding))
    _fit(cell, taught, plan, clock, progress)
    weights = cell.weights()
    heads = DraftHeads(as_written(weights), head, embedding, torch.device("cpu"), torch.float32)
    return weights, report(heads, words, held, len(taught.tokens))


def report(heads: DraftHeads, words: torch.Tensor, held: Iterable[Lesson], num_tokens: int = 0) -> Report:
    count = heads.num_guesses
    right = torch.zeros(count)
    trials = torch.zeros(count)
    so_far = torch.zeros(count)
    whole = named = total = 0
    for lesson in held:
        places = len(lesson.tokens) - 1
        total += len(lesson.tokens)
        named += int(torch.isin(lesson.tokens, words).sum())
        if places < 1:
            continue
        rows = [HiddenRow(row) for row in lesson.rows[:places]]
        guesses = torch.tensor(heads.guess(rows, lesson.tokens[:places].tolist(), count)[0])
        came = torch.full_like(guesses, -1)
        for guess in range(count):
            there = max(0, places - guess)
            came[:there, guess] = lesson.tokens[guess + 1 : guess + 1 + there]
        is_right = guesses == came
        right += is_right.sum(0)
        trials += (came >= 0).sum(0)
        far = came[:, -1] >= 0
        so_far += is_right[far].long().cumprod(1).sum(0)
        whole += int(far.sum())
    return Report(
        num_tokens=num_tokens,
        num_held_back=total,
        words_cover=named / max(1, total),
        right=tuple((right / trials.clamp(min=1)).tolist()),
        right_so_far=tuple((so_far / max(1, whole)).tolist()),
    )


class _Places:
    """All lessons one behind the other; a place is a token with others behind it."""

    def __init__(self, lessons: Sequence[Lesson], most_ahead: int) -> None:
        self.rows = torch.cat([lesson.rows for lesson in lessons])
        self.tokens = torch.cat([lesson.tokens for lesson in lessons])
        ahead = torch.cat([torch.arange(len(lesson.tokens) - 1, -1, -1) for lesson in lessons])
        self.ahead = ahead.clamp(max=most_ahead)
        self.all = torch.nonzero(ahead).squeeze(1)


class _Cell(torch.nn.Module):
    def __init__(
        self, description: Description, norm: torch.Tensor, words: torch.Tensor, head: torch.Tensor, embedding: torch.Tensor
    ) -> None:
        super().__init__()
        hidden, width = description.hidden_size, description.width
        generator = torch.Generator().manual_seed(0)

        def noise(rows: int, columns: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(rows, columns, generator=generator) * (0.5 / math.sqrt(columns)))

        self.description, self.norm, self.words, self.head, self.embedding = description, norm, words, head, embedding
        self.word_of = torch.full((description.vocab_size,), -1)
        self.word_of[words] = torch.arange(len(words))
        self.keep = torch.nn.Parameter(torch.ones(hidden))
        self.bias = torch.nn.Parameter(torch.zeros(width))
        self.state, self.word, self.out = noise(width, hidden), noise(width, hidden), noise(hidden, width)

    def after(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        words = self.word_of[tokens]
        embedded = torch.where((words >= 0).unsqueeze(1), self.embedding[words], 0.0)
        inner = F.silu(F.linear(state, self.state) + F.linear(embedded, self.word, self.bias))
        return self.keep * state + F.linear(inner, self.out)

    def weights(self) -> HeadWeights:
        given = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        return HeadWeights(self.description, self.words, self.norm, **given)


def _fit(cell: _Cell, taught: _Places, plan: Plan, clock: Clock, progress: Callable[[str], None]) -> None:
    optimiser = torch.optim.AdamW(cell.parameters(), lr=_RATE, betas=_BETAS, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    steps = max(1, int(plan.passes * len(taught.all) / _BATCH))
    started_s = clock.monotonic_s()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        # The middle of the step: the clock has no say in what comes out, unless there is too little of it.
        done = max((step + 0.5) / steps, (clock.monotonic_s() - started_s) / plan.budget_s)
        if done >= 1.0:
            progress(f"time is over after {step} of {steps} steps")
            return
        if len(order) < _BATCH:
            order = torch.cat([order, taught.all[torch.randperm(len(taught.all), generator=generator)]])
        batch, order = order[:_BATCH], order[_BATCH:]
        for group in optimiser.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / _WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * done))
        loss = _loss(cell, taught, batch)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
        optimiser.step()
        if step % _PROGRESS_STEPS == 0:
            progress(f"step {step} of {steps}, loss {float(loss.detach()):.2f}")


def _loss(cell: _Cell, taught: _Places, batch: torch.Tensor) -> torch.Tensor:
    state = normed(taught.rows[batch], cell.norm)
    size = state.detach().std()
    total = torch.zeros(())
    half = cell.head.to(torch.bfloat16)
    for ahead in range(1, cell.description.num_guesses + 1):
        there = taught.ahead[batch] >= ahead
        batch, state = batch[there], state[there]
        if ahead > 1:  # the first guess is worth most; the others share its weights
            batch, state = batch[: len(batch) // 2], state[: len(state) // 2]
        state = cell.after(state, taught.tokens[batch + ahead - 1])
        with torch.no_grad():
            truth = normed(taught.rows[batch + ahead], cell.norm)
            wanted = F.linear(truth.to(torch.bfloat16), half).float().softmax(dim=-1)
        logits = F.linear(state.to(torch.bfloat16), half).float()
        guess = -(wanted * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        near = F.smooth_l1_loss(state / size, truth / size)
        total = total + _LATER ** (ahead - 1) * (guess + _STATE_LOSS * near)
    return total


def _norm(model_path: Path, family: str) -> torch.Tensor:
    _, found = load_weights(model_path, torch.float32, keep=keep_only(NORM))
    return found[NORM] + 1.0 if family == "gemma3" else found[NORM]
