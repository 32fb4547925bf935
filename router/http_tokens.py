"""The routes that only tokenise. A name that stands for several models is tokenised as the first of them that serves would."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from router.front import Front
from router.http_answers import ReadJson
from router.http_edge import Json
from router.http_routes import Routes
from router.schemas import DetokenizeBody, TokenizeBody, parse


def add_token_routes(routes: Routes, front: Front, read_json: ReadJson) -> None:
    @routes.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeBody, await read_json(request))
        text = await front.tokenize(body)
        ids = text.token_ids
        strings = [text.model.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
        return Json({"count": len(ids), "max_model_len": text.model.max_model_tokens, "tokens": ids, "token_strs": strings})

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeBody, await read_json(request))
        return Json({"prompt": await front.detokenize(body)})

    @routes.get("/tokenizer_info")
    async def tokenizer_info(request: Request) -> Response:
        name = front.tokenizing_model(request.query_params.get("model", ""))
        tokenizer = (await front.registry.model(name)).tokenizer
        end, begin = tokenizer.eos_token_ids, tokenizer.bos_token_id
        return Json(
            {
                "eos_token": tokenizer.token_text(end[0]) if end else None,
                "bos_token": tokenizer.token_text(begin) if begin is not None else None,
                "vocab_size": tokenizer.vocab_size,
            }
        )
