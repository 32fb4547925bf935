"""Chat answers. The first chunk of a choice has the role and content "" and is sent when its first token exists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from router.generation import Generation
from router.openai_format import Envelope, Json, WholeChoice, json_logprob
from router.streaming import ChoiceDelta, ReportedToken

_OBJECT, _CHUNK_OBJECT = "chat.completion", "chat.completion.chunk"


class ChatFormat:
    def __init__(self, generation: Generation, *, request_id: str, created_s: int) -> None:
        self._plan = generation.call.plan
        self._tokenizer = generation.call.model.tokenizer
        self._prompt_token_ids = generation.call.requests[0].prompt_token_ids
        self._envelope = Envelope(generation, response_id=f"chatcmpl-{request_id}", created_s=created_s)
        self._started: set[int] = set()

    def chunks(self, delta: ChoiceDelta) -> Iterable[Json]:
        if delta.choice not in self._started:
            self._started.add(delta.choice)
            choice = {"index": delta.choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            prompt = {"prompt_token_ids": self._prompt_token_ids} if self._plan.return_token_ids else {}
            yield self._envelope.chunk(_CHUNK_OBJECT, {**choice, "finish_reason": None}, **prompt)
        tokens_shown = delta.tokens and (self._plan.return_token_ids or self._plan.logprobs is not None)
        if delta.text or tokens_shown or delta.finish_reason is not None:
            choice = {
                "index": delta.choice,
                "delta": {"content": delta.text} if delta.text or tokens_shown else {},
                **self._about(delta.tokens),
                "finish_reason": delta.finish_reason,
            }
            if delta.finish_reason is not None:
                choice["stop_reason"] = delta.stop_reason
            yield self._envelope.chunk(_CHUNK_OBJECT, choice)

    def last_chunk(self) -> Json | None:
        return self._envelope.last_chunk(_CHUNK_OBJECT)

    def body(self, choices: Sequence[WholeChoice]) -> Json:
        whole = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                **self._about(choice.tokens),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for choice in choices
        ]
        prompt = {"prompt_token_ids": self._prompt_token_ids} if self._plan.return_token_ids else {}
        return self._envelope.body(_OBJECT, whole, **prompt)

    def _about(self, tokens: Sequence[ReportedToken]) -> Json:
        about: Json = {"logprobs": None}
        if self._plan.logprobs is not None:
            about["logprobs"] = {"content": [self._logprob(token) for token in tokens], "refusal": None}
        if self._plan.return_token_ids:
            about["token_ids"] = [token.token_id for token in tokens]
        return about

    def _logprob(self, token: ReportedToken) -> Json:
        logprob = token.logprob
        top = logprob.top[: self._plan.logprobs] if logprob is not None else ()
        return {
            **self._entry(token.token_id, logprob.logprob if logprob is not None else 0.0),
            "top_logprobs": [self._entry(token_id, value) for token_id, value in top],
        }

    def _entry(self, token_id: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", errors="replace"), "logprob": json_logprob(logprob), "bytes": list(data)}
