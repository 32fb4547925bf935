"""Chat answers. The first chunk of a choice has the role and content "" and is sent when its first token exists.

With tools, text goes through a reader (`router.tools.reading`): a call is a chunk with its id and name, then chunks with pieces
of its arguments; what is no call is content. A choice with calls that ended by itself has the finish reason "tool_calls".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from router.generation import Generation
from router.openai_format import Envelope, Json, WholeChoice, json_logprob
from router.streaming import ChoiceDelta, ReportedToken
from router.tools.naming import draw_call_id, finish_reason
from router.tools.reading import CallArguments, CallBegins, Content, Piece, Reader

_OBJECT, _CHUNK_OBJECT = "chat.completion", "chat.completion.chunk"


class ChatFormat:
    def __init__(
        self,
        generation: Generation,
        *,
        request_id: str,
        created_s: int,
    ) -> None:
        self._plan = generation.call.plan
        self._tokenizer = generation.call.model.tokenizer
        self._prompt_token_ids = generation.call.requests[0].prompt_token_ids
        self._envelope = Envelope(generation, response_id=f"chatcmpl-{request_id}", created_s=created_s)
        self._started: set[int] = set()
        self._readers: dict[int, Reader] = {}  # by choice
        self._called: set[int] = set()  # choices with calls

    def chunks(self, delta: ChoiceDelta) -> Iterable[Json]:
        if delta.choice not in self._started:
            self._started.add(delta.choice)
            choice = {"index": delta.choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            prompt = {"prompt_token_ids": self._prompt_token_ids} if self._plan.return_token_ids else {}
            yield self._envelope.chunk(_CHUNK_OBJECT, {**choice, "finish_reason": None}, **prompt)
        contents = self._contents(delta)
        if not contents and delta.tokens and self._plan.reports_tokens:
            contents = [{"content": ""}]
        if not contents and delta.finish_reason is not None:
            contents = [{}]
        for position, content in enumerate(contents):
            last = position == len(contents) - 1
            choice = {
                "index": delta.choice,
                "delta": content,
                **self._about(delta.tokens if position == 0 else ()),
                "finish_reason": finish_reason(delta.finish_reason, called=delta.choice in self._called) if last else None,
            }
            if last and delta.finish_reason is not None:
                choice["stop_reason"] = delta.stop_reason
            yield self._envelope.chunk(_CHUNK_OBJECT, choice)

    def _contents(self, delta: ChoiceDelta) -> list[Json]:
        """What goes under `delta`, chunk by chunk."""
        if self._plan.tools is None:
            return [{"content": delta.text}] if delta.text else []
        reader = self._readers.get(delta.choice)
        if reader is None:
            reader = self._readers[delta.choice] = self._plan.tools.reader()
        pieces = reader.push(delta.text)
        if delta.finish_reason is not None:
            pieces += reader.finish()
        return [self._content(delta.choice, piece) for piece in pieces]

    def _content(self, choice: int, piece: Piece) -> Json:
        call: Json
        match piece:
            case Content():
                return {"content": piece.text}
            case CallBegins():
                self._called.add(choice)
                function = {"name": piece.name, "arguments": ""}
                call = {"index": piece.index, "id": draw_call_id(), "type": "function", "function": function}
            case CallArguments():
                call = {"index": piece.index, "function": {"arguments": piece.text}}
        return {"tool_calls": [call]}

    def last_chunk(self) -> Json | None:
        return self._envelope.last_chunk(_CHUNK_OBJECT)

    def body(self, choices: Sequence[WholeChoice]) -> Json:
        whole = [
            {
                "index": choice.index,
                "message": self._message(choice),
                **self._about(choice.tokens),
                "finish_reason": finish_reason(choice.finish_reason, called=choice.index in self._called),
                "stop_reason": choice.stop_reason,
            }
            for choice in choices
        ]
        prompt = {"prompt_token_ids": self._prompt_token_ids} if self._plan.return_token_ids else {}
        return self._envelope.body(_OBJECT, whole, **prompt)

    def _message(self, choice: WholeChoice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._plan.tools is None:
            return message
        reader = self._plan.tools.reader()
        texts: list[str] = []
        calls: list[Json] = []
        for piece in (*reader.push(choice.text), *reader.finish()):
            match piece:
                case Content():
                    texts.append(piece.text)
                case CallBegins():
                    self._called.add(choice.index)
                    function = {"name": piece.name, "arguments": ""}
                    calls.append({"id": draw_call_id(), "type": "function", "function": function})
                case CallArguments():
                    calls[-1]["function"]["arguments"] += piece.text
        message["content"] = "".join(texts) or (None if calls else "")
        return {**message, "tool_calls": calls} if calls else message

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
