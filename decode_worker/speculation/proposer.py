"""What guesses: the protocol that every proposer keeps.

A proposer lives on the engine's thread, between two steps. It sees the tokens of sequences, and the hidden rows that the last of
them were drawn from if it asks for those. It may guess anything, as long as it is a token of the model; a wrong guess costs a row
of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from common.types import SamplingParams

if TYPE_CHECKING:
    from common.engine.heads.rows import HiddenRow


class ChoiceKey(NamedTuple):
    """One choice of one request, from its first guess until `end`."""

    request_id: str
    choice: int


class Wanted(NamedTuple):
    """A sequence whose continuation is to be guessed."""

    key: ChoiceKey
    salt: str  # the tenant's partition: what one tenant said is no guess for another
    tokens: Sequence[int]  # prompt and answer so far. The scheduler's own list: read it now, keep no reference. It only grows.
    sampling: SamplingParams  # how the answer is drawn
    most_tokens: int  # more of a guess is of no use
    row: HiddenRow | None = None  # what the last token was drawn from, if the proposer reads rows and it is known


@dataclass(frozen=True, slots=True)
class Guess:
    token_ids: tuple[int, ...] = ()
    evidence: int = 0  # a class of guesses that are right about equally often; small integers of the proposer's choice


class Proposer(Protocol):
    @property
    def name(self) -> str:
        """For metrics."""
        ...

    @property
    def takes_time(self) -> bool:
        """Whether each token of a guess takes computing of its own, so that it has to pay before it is made."""
        ...

    @property
    def reads_rows(self) -> bool: ...

    def propose(self, wanted: Sequence[Wanted]) -> list[Guess]:
        """One guess for each, empty if there is none. Who was asked about before has more tokens now."""
        ...

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """The choice is over, with these tokens. Keys that were never asked about are ended as well."""
        ...
