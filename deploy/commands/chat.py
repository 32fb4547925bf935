"""`pdserve chat`: talks to a running cluster over its OpenAI HTTP face, and shows where each answer's time went."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from deploy.commands.examples import examples
from deploy.commands.output import err, errors_as_lines
from deploy.commands.which_cluster import ClusterName

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 600.0
EXAMPLES = examples(
    ("a conversation", "pdserve chat"),
    ("one answer, and where its time went", 'pdserve chat "Why is the sky blue?" --stats'),
    ("another model, at another router", "pdserve chat --model gemma3-270m --url http://10.0.0.7:8000"),
)


def chat(
    message: Annotated[str | None, typer.Argument(help="One message; without it a conversation starts.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model; the first one by default.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show where the time of each answer went.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    url: Annotated[str | None, typer.Option(help="Address of a router; that of the local cluster by default.")] = None,
    cluster: ClusterName = None,
) -> None:
    """Chats with a model. /clear forgets the conversation, /stats turns the timings on and off, /quit ends."""
    with errors_as_lines():
        base_url = url or router_of(cluster)
        talk = _Conversation(base_url.rstrip("/"), model, max_tokens, temperature, stats)
        if message is not None:
            talk.say(message)
            return
        err.print(f"{talk.model} at {base_url}; /clear, /stats, /quit", markup=False)
        while (line := _ask()) is not None:
            match line.strip():
                case "":
                    continue
                case "/quit":
                    return
                case "/clear":
                    talk.forget()
                case "/stats":
                    talk.stats = not talk.stats
                case text:
                    _say_or_complain(talk, text)


def _say_or_complain(talk: _Conversation, text: str) -> None:
    """Within a conversation: neither an error nor Ctrl-C ends more than the answer it hits."""
    from common.errors import PdserveError

    try:
        talk.say(text)
    except PdserveError as error:
        err.print(f"\n{error.message}", style="red", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        err.print("\n(stopped)", style="dim")


class _Conversation:
    def __init__(self, base_url: str, model: str | None, max_tokens: int, temperature: float, stats: bool) -> None:
        self._base_url = base_url
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._messages: list[dict[str, str]] = []
        self.stats = stats
        self.model = model or self._first_model()

    def forget(self) -> None:
        self._messages.clear()

    def say(self, text: str) -> None:
        """Sends the conversation and prints the answer as it comes."""
        from deploy.commands.waterfall import draw

        asked = [*self._messages, {"role": "user", "content": text}]
        answer = ""
        timings: dict[str, Any] | None = None
        for event in self._stream(asked):
            for choice in event.get("choices", ()):
                piece = choice.get("delta", {}).get("content") or ""
                answer += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
            timings = event.get("timings", timings)
        sys.stdout.write("\n")
        self._messages = [*asked, {"role": "assistant", "content": answer}]
        if self.stats and timings is not None:
            draw(timings, err.console)

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        import httpx

        from common.errors import EngineFailure

        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self._max_tokens,
            "temperature": self._temperature,
            "stream": True,
        }
        with (
            self._client() as client,
            self._reachable(),
            client.stream("POST", "/v1/chat/completions", json=body, headers=self._headers()) as response,
        ):
            if response.status_code != httpx.codes.OK:
                response.read()
                raise _error(response.text)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise EngineFailure(str(event["error"].get("message", "the stream ended in an error")))
                yield event

    def _first_model(self) -> str:
        from common.errors import ModelNotFound

        with self._client() as client, self._reachable():
            response = client.get("/v1/models", headers=self._headers())
        if response.is_error:
            raise _error(response.text)
        models = response.json()["data"]
        if not models:
            raise ModelNotFound("the cluster serves no model")
        return str(models[0]["id"])

    def _client(self) -> Any:
        import httpx

        timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        return httpx.Client(base_url=self._base_url, timeout=timeout, trust_env=False)

    def _reachable(self) -> Any:
        return _unreachable_as_error(self._base_url)

    def _headers(self) -> dict[str, str]:
        headers = {"x-pdserve-timings": "1"}
        key = os.environ.get("OPENAI_API_KEY")
        return {**headers, "authorization": f"Bearer {key}"} if key else headers


class _unreachable_as_error:
    """A context: transport errors of httpx become ours."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import httpx

        from common.errors import WorkerLost

        if isinstance(error, httpx.TransportError):
            raise WorkerLost(f"no router answers at {self._base_url}") from error


def _error(body: str) -> Exception:
    from common.errors import EngineFailure

    try:
        return EngineFailure(str(json.loads(body)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return EngineFailure("the server answered with something that is not ours")


def router_of(cluster: str | None) -> str:
    from common.errors import NoWorkerAvailable
    from deploy.commands.manager import cluster_status

    routers = cluster_status(cluster)["routers"]
    if not routers:
        raise NoWorkerAvailable("the cluster has no router yet")
    return f"http://{routers[0]['http_address']}"


def _ask() -> str | None:
    try:
        return err.console.input("> ")
    except (EOFError, KeyboardInterrupt):
        return None
