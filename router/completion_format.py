"""Completion answers. With `echo` the prompt comes before the first generated text of every choice, with its log-probabilities if
asked; the first prompt token has none (null), because nothing came before it.

    text          |prompt text ........|generated text ...|
    text_offset    0    3    9           len(prompt) + offset in the generated text
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from common.errors import EngineFailure
from common.types import TokenLogprob
from router.generation import Generation
from router.openai_format import Envelope, Json, WholeChoice, json_logprob
from router.streaming import ChoiceDelta, ReportedToken

_OBJECT = "text_completion"


class CompletionFormat:
    def __init__(self, generation: Generation, *, request_id: str, created_s: int) -> None:
        self._generation = generation
        self._plan = generation.call.plan
        self._tokenizer = generation.call.model.tokenizer
        self._requests = generation.call.requests
        self._envelope = Envelope(generation, response_id=f"cmpl-{request_id}", created_s=created_s)
        self._started: set[int] = set()
        self._echoed_logprobs = cache(self._prompt_logprobs)  # the choices of one prompt share them

    def chunks(self, delta: ChoiceDelta) -> Iterable[Json]:
        first = delta.choice not in self._started
        self._started.add(delta.choice)
        text = self._echoed_text(delta.choice) + delta.text if first else delta.text
        tokens_shown = self._plan.reports_tokens
        if not first and not text and delta.finish_reason is None and not (delta.tokens and tokens_shown):
            return
        choice = {
            "index": delta.choice,
            "text": text,
            **self._about(delta.choice, delta.tokens, with_prompt=first),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        yield self._envelope.chunk(_OBJECT, choice)

    def last_chunk(self) -> Json | None:
        return self._envelope.last_chunk(_OBJECT)

    def body(self, choices: Sequence[WholeChoice]) -> Json:
        whole = [
            {
                "index": choice.index,
                "text": self._echoed_text(choice.index) + choice.text,
                **self._about(choice.index, choice.tokens, with_prompt=True),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for choice in choices
        ]
        return self._envelope.body(_OBJECT, whole)

    def _request_of(self, index: int) -> int:
        return index // self._requests[0].num_choices

    def _echoed_text(self, index: int) -> str:
        return self._plan.prompt_texts[self._request_of(index)] if self._plan.echo else ""

    def _about(self, index: int, tokens: Sequence[ReportedToken], *, with_prompt: bool) -> Json:
        about: Json = {"logprobs": None}
        if self._plan.logprobs is not None:
            echoed = self._echoed_logprobs(self._request_of(index)) if self._plan.echo and with_prompt else []
            start = len(self._echoed_text(index))
            entries = [*echoed, *(self._entry(token.token_id, token.logprob, start + token.offset) for token in tokens)]
            about["logprobs"] = {
                name: [entry[name] for entry in entries] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            }
        if self._plan.return_token_ids:
            about["token_ids"] = [token.token_id for token in tokens]
            if with_prompt:
                about["prompt_token_ids"] = self._requests[self._request_of(index)].prompt_token_ids
        return about

    def _prompt_logprobs(self, request: int) -> list[Json]:
        ids = self._requests[request].prompt_token_ids
        logprobs = self._generation.prompt_logprobs(request)
        if len(logprobs) != len(ids):
            raise EngineFailure("the worker sent no log-probabilities of the prompt")
        pieces = self._tokenizer.stream(skip_special_tokens=self._plan.skip_special_tokens)
        length = len(self._plan.prompt_texts[request])
        entries, offset = [], 0
        for token_id, logprob in zip(ids, logprobs, strict=True):
            entries.append(self._entry(token_id, logprob, min(offset, length)))
            offset += len(pieces.push(token_id))
        return entries

    def _entry(self, token_id: int, logprob: TokenLogprob | None, offset: int) -> Json:
        """One position, as a row; the answer has columns."""
        value: float | None = None
        top: dict[str, float] | None = None
        if logprob is not None:
            value = json_logprob(logprob.logprob)
            top = {self._text(token_id): value}
            for other, other_logprob in logprob.top[: self._plan.logprobs]:
                top.setdefault(self._text(other), json_logprob(other_logprob))  # best first: of equal texts the best stays
        return {"tokens": self._text(token_id), "token_logprobs": value, "top_logprobs": top, "text_offset": offset}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
