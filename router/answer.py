"""What has been handed on of one request's answer: enough to let the rest of it be computed elsewhere, and to tell that it is.

    request ── add(chunks) ... ──> rest() -> one request per choice that is not finished: its prompt ends with the tokens so far

A draw depends on seed, choice and position alone, so whoever computes the rest draws what the lost worker would have drawn. The
dispatcher owns one per request; it knows nothing of workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from common.errors import EngineFailure
from common.types import Request, TokenChunk


class Answer:
    def __init__(self, request: Request) -> None:
        self._request = request
        self._tokens: dict[int, list[int]] = {
            choice: [] for choice in range(request.first_choice, request.first_choice + request.num_choices)
        }
        self._unfinished = set(self._tokens)

    @property
    def finished(self) -> bool:
        return not self._unfinished

    @property
    def num_prompt_tokens(self) -> int:
        return self._request.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Of all choices, so far."""
        return sum(map(len, self._tokens.values()))

    def add(self, chunks: Iterable[TokenChunk]) -> None:
        """Raises EngineFailure for a choice that is finished already or was not asked for."""
        for chunk in chunks:
            if chunk.choice not in self._unfinished:
                raise EngineFailure("the worker sent tokens for a choice that is finished or was not asked for")
            self._tokens[chunk.choice].extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                self._unfinished.discard(chunk.choice)

    def rest(self) -> tuple[Request, ...]:
        request = self._request
        return tuple(
            replace(
                request,
                prompt_token_ids=(*request.prompt_token_ids, *self._tokens[choice]),
                sampling=replace(request.sampling, prompt_logprobs=None),  # they came with the first event
                num_choices=1,
                first_choice=choice,
                num_resumed_tokens=request.num_resumed_tokens + len(self._tokens[choice]),
            )
            for choice in sorted(self._unfinished)
        )
