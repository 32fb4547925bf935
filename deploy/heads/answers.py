"""Has a model answer prompts, and keeps the hidden row that each token was drawn from.

    prompts -> engine and decode scheduler of a worker, without network -> Answer for each, as they end

Nothing is guessed on the way: the scheduler's speculator is here one who only listens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from common.clock import SystemClock
from common.config import DecodeConfig
from common.engine.engine import Engine
from common.engine.heads.rows import HiddenRow
from common.tokenizer import Tokenizer
from common.types import Request, SamplingParams
from decode_worker.events import Failed
from decode_worker.scheduler import DecodeScheduler
from decode_worker.speculation.proposer import ChoiceKey, Wanted

TEMPERATURES = (0.0, 0.7, 0.0, 1.0)
"""Half greedy, half as people draw."""


@dataclass(frozen=True, slots=True)
class Answer:
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    rows: tuple[HiddenRow, ...]  # what each token was drawn from


class _Listener:
    """A `Speculator` that guesses nothing and writes down what came."""

    keeps_rows = True

    def __init__(self) -> None:
        self.ended: list[Answer] = []
        self._heard: dict[ChoiceKey, list[HiddenRow]] = {}

    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        return [()] * len(wanted)

    def author(self, key: ChoiceKey) -> str:
        return ""

    def remember(self, key: ChoiceKey, row: HiddenRow) -> None:
        self._heard[key] = [row]

    def settle(self, key: ChoiceKey, came: Sequence[int], row: HiddenRow | None = None) -> None:
        if row is not None:
            self._heard[key].append(row)

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """Of no interest."""

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        rows = self._heard.pop(key, [])
        said = tuple(tokens[num_prompt_tokens:])
        self.ended.append(Answer(tuple(tokens[:num_prompt_tokens]), said, tuple(rows[: len(said)])))


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    *,
    at_once: int,
    max_tokens: int,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Iterator[Answer]:
    """An answer to each prompt, in the order in which they end; prompts take turns with the temperatures. Raises what a request
    ends in."""
    listener = _Listener()
    scheduler = DecodeScheduler(
        DecodeConfig(local_prefill="always", max_running=at_once), engine.layout, engine.blocks, SystemClock(), listener
    )
    waiting = enumerate(prompts)
    running = 0
    exhausted = False
    while not exhausted or not scheduler.is_idle:
        while running < at_once and not exhausted:
            number, text = next(waiting, (0, None))
            if text is None:
                exhausted = True
            else:
                scheduler.submit(_request(tokenizer, number, text, max_tokens, temperatures[number % len(temperatures)]), ())
                running += 1
        plan = scheduler.schedule()
        if plan.batch.slices:
            scheduler.complete(plan, engine.runner.execute(plan.batch))
        for event in scheduler.take_events():
            if isinstance(event, Failed):
                raise event.error
        heard, listener.ended = listener.ended, []
        running = scheduler.num_running + scheduler.num_waiting
        yield from heard


def _request(tokenizer: Tokenizer, number: int, text: str, max_tokens: int, temperature: float) -> Request:
    template = tokenizer.chat_template
    if template is not None:
        text = template.render([{"role": "user", "content": text}], add_generation_prompt=True)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        seed=number,
        temperature=temperature,
        stop_token_ids=tuple(tokenizer.eos_token_ids),
    )
    return Request(str(number), "m", tuple(tokenizer.encode(text, add_special_tokens=template is None)), sampling)
