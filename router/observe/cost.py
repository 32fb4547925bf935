"""What answers cost: seconds of workers, split by what they were spent on, and what the caches spared.

    prefill     steps' time, by rows, for prompt tokens (prefill and decode workers alike)
    transfer    time in which reserved blocks waited for KV after it was computed: what the computation did not hide
    decode      steps' time, by rows, for tokens that came
    wasted      steps' time, by rows, for guesses of tokens that did not come
    saved       what cached tokens would have cost: prompt tokens found in prefix caches, answers found in the answer cache, each
                at the mean price of such a token so far; not part of the total

A step's seconds are shared among its rows, each row being one token of one sequence, so the first, third and fourth part of all
requests add up to the seconds of all steps (`common.types.WorkAccount`). Workers tell them with an answer's last tokens; an
answer that its client broke off is told by no worker, and costs the mean of what the others cost.

Plain arithmetic: no clock, no metric, no request.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.types import WorkAccount

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class CostSplit:
    """Seconds of workers."""

    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    wasted_s: float = 0.0
    saved_s: float = 0.0

    @property
    def total_s(self) -> float:
        """What was paid."""
        return self.prefill_s + self.transfer_s + self.decode_s + self.wasted_s

    @property
    def parts(self) -> dict[str, float]:
        """What was paid, by what for."""
        return {"prefill": self.prefill_s, "transfer": self.transfer_s, "decode": self.decode_s, "wasted": self.wasted_s}

    def __add__(self, other: CostSplit) -> CostSplit:
        return CostSplit(
            self.prefill_s + other.prefill_s,
            self.transfer_s + other.transfer_s,
            self.decode_s + other.decode_s,
            self.wasted_s + other.wasted_s,
            self.saved_s + other.saved_s,
        )


NOTHING = CostSplit()


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """Tokens behind those seconds."""

    prefill: int = 0  # computed prompt tokens
    decode: int = 0  # generated ones
    wasted: int = 0  # rows for wrong guesses
    cached_prompt: int = 0  # found in a prefix cache
    cached_answer: int = 0  # prompt and answer of what the answer cache gave


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """What is known of an answer whose worker did not say what it took."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    transfer_s: float

    @property
    def computed_tokens(self) -> int:
        return max(0, self.prompt_tokens - self.cached_tokens)


class Ledger:
    """All that one model's answers have cost since the router started; only ever grows."""

    def __init__(self) -> None:
        self._prefill_s = self._transfer_s = self._decode_s = self._wasted_s = self._saved_s = 0.0
        self._prefill = self._decode = self._wasted = self._cached_prompt = self._cached_answer = 0  # tokens

    @property
    def seconds(self) -> CostSplit:
        return CostSplit(self._prefill_s, self._transfer_s, self._decode_s, self._wasted_s, self._saved_s)

    @property
    def tokens(self) -> TokenSplit:
        return TokenSplit(self._prefill, self._decode, self._wasted, self._cached_prompt, self._cached_answer)

    @property
    def prefill_token_s(self) -> float:
        """Mean seconds per computed prompt token so far; 0 before the first."""
        return self._prefill_s / self._prefill if self._prefill else 0.0

    @property
    def decode_token_s(self) -> float:
        """Mean seconds per generated token so far, wrong guesses included."""
        return (self._decode_s + self._wasted_s) / self._decode if self._decode else 0.0

    def paid(self, work: WorkAccount) -> CostSplit:
        """Of an answer whose worker told what it took."""
        self._prefill += work.prefill_tokens
        self._decode += work.decode_tokens
        self._wasted += work.wasted_tokens
        self._cached_prompt += work.cached_tokens
        self._prefill_s += work.prefill_s
        self._transfer_s += work.transfer_s
        self._decode_s += work.decode_s
        self._wasted_s += work.wasted_s
        saved_s = work.cached_tokens * self.prefill_token_s
        self._saved_s += saved_s
        return CostSplit(work.prefill_s, work.transfer_s, work.decode_s, work.wasted_s, saved_s)

    def estimate(self, answer: BrokenOff) -> CostSplit:
        """By the mean of others."""
        return CostSplit(
            answer.computed_tokens * self.prefill_token_s,
            answer.transfer_s,
            answer.generated_tokens * self.decode_token_s,
            saved_s=answer.cached_tokens * self.prefill_token_s,
        )

    def broken_off(self, answer: BrokenOff) -> None:
        """Its tokens count with its seconds, so that the means stay what they are."""
        cost = self.estimate(answer)
        self._prefill += answer.computed_tokens
        self._decode += answer.generated_tokens
        self._cached_prompt += answer.cached_tokens
        self._prefill_s += cost.prefill_s
        self._transfer_s += cost.transfer_s
        self._decode_s += cost.decode_s
        self._saved_s += cost.saved_s

    def spared(self, *, prompt_tokens: int, answer_tokens: int) -> CostSplit:
        """Of an answer that no worker computed."""
        saved_s = prompt_tokens * self.prefill_token_s + answer_tokens * self.decode_token_s
        self._cached_answer += prompt_tokens + answer_tokens
        self._saved_s += saved_s
        return CostSplit(saved_s=saved_s)


class Ledgers:
    """One per model that was ever asked."""

    def __init__(self) -> None:
        self._ledgers: dict[str, Ledger] = {}

    def of(self, model: str) -> Ledger:
        ledger = self._ledgers.get(model)
        if ledger is None:
            ledger = self._ledgers[model] = Ledger()
        return ledger

    def all(self) -> tuple[tuple[str, Ledger], ...]:
        return tuple(self._ledgers.items())


def price(cost: CostSplit, *, prefill_hour: float, decode_hour: float) -> CostSplit:
    """The same in money: prompts are computed at the price of a prefill worker's hour, all else at a decode worker's."""
    prefill, decode = prefill_hour / _SECONDS_PER_HOUR, decode_hour / _SECONDS_PER_HOUR
    return CostSplit(
        cost.prefill_s * prefill, cost.transfer_s * decode, cost.decode_s * decode, cost.wasted_s * decode, cost.saved_s * prefill
    )
