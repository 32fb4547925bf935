"""Who guesses in tests of real workers: right, wrong, or without end, for every speculator must be survived."""

from __future__ import annotations

import random
from collections.abc import Sequence

from common.engine.heads.heads import DraftHeads
from common.engine.heads.rows import HiddenRow
from common.types import Request
from decode_worker.scheduler import DecodeScheduler
from decode_worker.speculation.medusa import MedusaProposer
from decode_worker.speculation.ngram import NgramProposer
from decode_worker.speculation.proposer import ChoiceKey, Wanted
from decode_worker.speculation.speculator import Speculator
from support.workers import Answer


class Hostile:
    """Guesses without a thought for what pays or fits. Knows the right answers, and uses them as its name says; or asks the
    real proposer, and takes all of what it gives."""

    keeps_rows = False

    def __init__(self, kind: str, work: Sequence[Request], answers: Sequence[Answer]) -> None:
        self.kind = kind
        self.random = random.Random(kind)
        self.proposer = NgramProposer(gram_tokens=1, shared_tokens=1000)
        self.said: dict[tuple[str, int], list[int]] = {}
        self.num_prompt_tokens: dict[str, int] = {}
        for item, answer in zip(work, answers, strict=True):
            self.num_prompt_tokens[item.request_id] = item.num_prompt_tokens
            for choice, tokens in answer.token_ids.items():
                self.said[item.request_id, choice] = tokens

    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        if self.kind == "ngram":
            return [guess.token_ids for guess in self.proposer.propose(wanted)]
        return [self._guess(item) for item in wanted]

    def _guess(self, item: Wanted) -> list[int]:
        name = item.key.request_id.partition("#")[0]
        done = len(item.tokens) - self.num_prompt_tokens[name]
        right = self.said[name, item.key.choice][done:]
        junk = [self.random.randrange(3, 380) for _ in range(self.random.randrange(1, 8))]
        match self.kind:
            case "random":
                return junk
            case "always wrong":
                return [(token + 1) % 380 for token in right[:5]]
            case "always right":
                return right[:6]
            case "over-long":
                return [*right, *junk * 40]
            case _:
                return [*right[: self.random.randrange(5)], *junk]

    def author(self, key: ChoiceKey) -> str:
        return self.kind

    def remember(self, key: ChoiceKey, row: HiddenRow) -> None:
        """Asked for none."""

    def settle(self, key: ChoiceKey, came: Sequence[int], row: HiddenRow | None = None) -> None:
        """Learns nothing."""

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """Nor from this."""

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        self.proposer.end(key, salt, tokens, num_prompt_tokens)


class Headstrong:
    """Takes all that heads guess, always, and remembers which rows choices began with."""

    keeps_rows = True

    def __init__(self, heads: DraftHeads) -> None:
        self.proposer = MedusaProposer(heads)
        self.rows: dict[ChoiceKey, HiddenRow] = {}
        self.begun: dict[str, HiddenRow] = {}

    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        asked = [item._replace(row=self.rows.get(item.key)) for item in wanted]
        return [guess.token_ids for guess in self.proposer.propose(asked)]

    def author(self, key: ChoiceKey) -> str:
        return "medusa"

    def remember(self, key: ChoiceKey, row: HiddenRow) -> None:
        self.rows[key] = row
        self.begun[key.request_id.partition("#")[0]] = row

    def settle(self, key: ChoiceKey, came: Sequence[int], row: HiddenRow | None = None) -> None:
        assert row is not None
        self.rows[key] = row

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """Whatever it costs."""

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        self.rows.pop(key, None)


KINDS = ("ngram", "random", "always wrong", "always right", "over-long", "half right")


def install(scheduler: DecodeScheduler, speculator: Speculator) -> None:
    """From now on it is this one that guesses."""
    scheduler._speculator = scheduler._planner._speculator = speculator
