"""Who guesses in a simulated decode worker: half of it right, as an oracle knows, and never with a thought for what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from common.engine.heads.rows import HiddenRow
from decode_worker.speculation.proposer import ChoiceKey, Wanted
from support.simulation import oracle
from support.simulation.scenario import RequestPlan


class HalfRight:
    keeps_rows = False

    def __init__(self, plans: Sequence[RequestPlan], random: Random, complain: Callable[[str], None]) -> None:
        self._plans = {plan.name: plan for plan in plans}
        self._random = random
        self._complain = complain
        self._answers: dict[tuple[str, int], tuple[int, ...]] = {}
        self._alive: set[ChoiceKey] = set()

    @property
    def num_alive(self) -> int:
        return len(self._alive)

    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        self._alive.update(item.key for item in wanted)
        return [self._guess(item) for item in wanted]

    def author(self, key: ChoiceKey) -> str:
        return "half right"

    def remember(self, key: ChoiceKey, row: HiddenRow) -> None:
        self._complain("nobody asked for rows")

    def settle(self, key: ChoiceKey, came: Sequence[int], row: HiddenRow | None = None) -> None:
        if not came:
            self._complain("a step gave no token")

    def observe_step(self, num_rows: int, seconds: float) -> None:
        if num_rows < 1 or seconds <= 0.0:
            self._complain(f"a step of {num_rows} rows took {seconds} s")

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        self._alive.discard(key)

    def _guess(self, item: Wanted) -> list[int]:
        plan = self._plans[item.key.request_id.partition("#")[0]]
        place = (plan.name, item.key.choice)
        if place not in self._answers:
            self._answers[place] = oracle.answer(plan.prompt, plan.max_tokens, plan.seed, item.key.choice)
        right = self._answers[place][len(item.tokens) - len(plan.prompt) :]
        guess = list(right[: self._random.randrange(6)])
        return guess + [self._random.randrange(oracle.VOCABULARY) for _ in range(self._random.randrange(4))]
