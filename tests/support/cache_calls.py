"""Validated calls without a router, for tests of what names an answer."""

from __future__ import annotations

from typing import Any

from common.tokenizer import Tokenizer
from common.types import Grammar, GrammarKind
from router.cache.digest import AnswerKey, answer_key
from router.schemas import ChatBody, CompletionBody, parse
from router.structured.examination import Examination
from router.structured.wanted import LARK_OR_GBNF, Wanted
from router.validate import Caller, ServedModel, Validator, ValidCall
from support.fake_cluster import CONTEXT, MODEL, router_config


class OneModel:
    """A directory of one model under two names."""

    def __init__(self, tokenizer: Tokenizer, fingerprint: str = "f1") -> None:
        self._tokenizer, self._fingerprint = tokenizer, fingerprint

    async def model(self, name: str) -> ServedModel:
        return ServedModel("other" if name == "other" else MODEL, self._tokenizer, 8 * CONTEXT, 0, self._fingerprint)


class Unexamined(Examination):
    """Takes every grammar as it is: whether it compiles is no question of these tests."""

    def __init__(self) -> None:
        super().__init__(1.0)

    async def examine(self, wanted: Wanted) -> Grammar:
        return Grammar(GrammarKind.LARK if wanted.kind == LARK_OR_GBNF else GrammarKind(wanted.kind), wanted.text)


class Calls:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def chat(self, body: dict[str, Any], *, tenant: str = "t", fingerprint: str = "f1", request_id: str = "r") -> ValidCall:
        validator = Validator(router_config().router, OneModel(self._tokenizer, fingerprint), Unexamined())
        return await validator.chat(parse(ChatBody, {"model": MODEL, **body}), Caller(request_id, cache_salt=tenant))

    async def completion(self, body: dict[str, Any], *, tenant: str = "t", fingerprint: str = "f1") -> ValidCall:
        validator = Validator(router_config().router, OneModel(self._tokenizer, fingerprint), Unexamined())
        return await validator.completion(parse(CompletionBody, {"model": MODEL, **body}), Caller("r", cache_salt=tenant))

    async def chat_key(self, body: dict[str, Any], names: tuple[str, ...] = (), **more: Any) -> AnswerKey:
        return answer_key(await self.chat(body, **more), 0, names)

    async def completion_key(self, body: dict[str, Any], names: tuple[str, ...] = (), **more: Any) -> AnswerKey:
        return answer_key(await self.completion(body, **more), 0, names)
