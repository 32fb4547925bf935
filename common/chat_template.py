"""Chat templates: from a list of messages to the prompt text of one model.

A template comes with the model and is code from a stranger. It runs in jinja2's immutable sandbox: no attribute of Python's
machinery is reachable, arguments cannot be changed, `range` is capped, and the output is cut off at `MAX_RENDERED_CHARS` while it
is produced. Compiled once at load, rendered per request, from any thread.

    chat = ChatTemplate(source, special_tokens={"bos_token": "<s>"})    ModelLoadError if it does not compile
    chat.render(messages, add_generation_prompt=True)                   InvalidRequest(param="messages") if it refuses them

The variables and functions that templates rely on are those of Hugging Face: `messages`, `tools`, `add_generation_prompt`, the
special tokens, `raise_exception`, `strftime_now`, a `tojson` that leaves characters as they are. Does not know: tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from common.errors import InvalidRequest, ModelLoadError

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_RENDERED_CHARS = 8 * 1024 * 1024


class ChatTemplate:
    """Immutable and safe to share between threads."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str] | None = None, max_rendered_chars: int = MAX_RENDERED_CHARS
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._max_rendered_chars = max_rendered_chars
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelLoadError(f"the chat template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}")
        try:
            environment = _environment()
            self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the model's chat template does not compile: {error}", param="chat_template") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text, special tokens spelled out: encode it with `add_special_tokens=False`.

        `variables` are further names that the template may read; they cannot replace the ones above.
        """
        scope = {
            **variables,
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        size_chars = 0
        try:
            for part in self._template.generate(scope):
                size_chars += len(part)
                if size_chars > self._max_rendered_chars:
                    raise InvalidRequest(f"the rendered prompt exceeds {self._max_rendered_chars} characters", param="messages")
                parts.append(part)
        # Templates index, add and compare whatever the messages hold; these are the ways in which that fails.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise InvalidRequest(f"the model's chat template refused the messages: {error}", param="messages") from error
        return "".join(parts)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}..{% endgeneration %}` marks the assistant's words for training; in serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes characters for HTML, which would put other text in front of the model.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
