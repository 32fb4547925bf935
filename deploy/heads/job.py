"""Makes the heads of a model: has it answer, trains on what it said, writes the file. One process, no cluster.

model -> engine -> answers, for at most half of the time -> training, for the rest of it -> file
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from common.clock import Clock
from common.config import EngineConfig
from common.engine.engine import build_engine
from common.engine.heads.file import write_heads
from common.engine.heads.training import Lesson, Plan, Report, train
from common.errors import ConfigError
from common.heads_store import heads_path
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer
from deploy.heads.answers import ask
from deploy.heads.prompts import built_in_prompts

_AT_ONCE = 16
_SHARE_OF_ANSWERS = 0.5  # of the time
_PROGRESS_ANSWERS = 50


@dataclass(frozen=True, slots=True)
class Job:
    files: ModelFiles
    output: Path | None  # None: where workers look for the heads of this model
    prompts: Path | None  # None: the built-in ones
    num_answers: int
    answer_tokens: int
    num_guesses: int
    num_words: int
    width: int
    passes: float
    budget_s: float
    threads: int


def make_heads(job: Job, home: Path, clock: Clock, progress: Callable[[str], None]) -> tuple[Path, Report]:
    """Where the file is now, and what the heads in it are worth. Blocking. Raises ConfigError, or a StartupError."""
    prompts = built_in_prompts() if job.prompts is None else _read(job.prompts)
    digest = job.files.digest()
    lessons = _lessons(job, itertools.islice(prompts, job.num_answers), digest, clock, progress)
    plan = Plan(
        num_guesses=job.num_guesses,
        num_words=job.num_words,
        width=job.width,
        passes=job.passes,
        budget_s=job.budget_s * (1.0 - _SHARE_OF_ANSWERS),
    )
    weights, report = train(lessons, job.files.path, digest, plan, clock, progress)
    path = job.output or heads_path(home, digest)
    try:
        write_heads(path, weights)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", param="output") from error
    return path, report


def _lessons(job: Job, prompts: Iterable[str], digest: str, clock: Clock, progress: Callable[[str], None]) -> list[Lesson]:
    tokenizer = Tokenizer.load(job.files.path)
    config = EngineConfig(device="cpu", prefix_cache=False, kv_pool_tokens=_AT_ONCE * 2048)
    engine = build_engine(
        job.files.path, config, threads=job.threads, model_digest=digest, tokenizer_digest=tokenizer.digest, announce=progress
    )
    hidden_size = engine.architecture.hidden_size
    started_s = clock.monotonic_s()
    lessons: list[Lesson] = []
    num_tokens = 0
    for answer in ask(engine, tokenizer, prompts, at_once=_AT_ONCE, max_tokens=job.answer_tokens):
        if answer.tokens:
            lessons.append(Lesson.of(answer.rows, answer.tokens, hidden_size))
            num_tokens += len(answer.tokens)
        if len(lessons) % _PROGRESS_ANSWERS == 0:
            progress(f"{len(lessons)} answers, {num_tokens} tokens")
        if clock.monotonic_s() - started_s > _SHARE_OF_ANSWERS * job.budget_s:
            break
    return lessons


def _read(path: Path) -> list[str]:
    """A prompt a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", param="prompts") from error
    return [line.strip() for line in lines if line.strip()]
