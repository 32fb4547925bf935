from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from common.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from common.errors import InvalidRequest, ModelLoadError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Größe</b> & 'quotes' 😀\n  two  spaces"},
    {"role": "assistant", "content": "fine"},
    {"role": "user", "content": ""},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": [1, 2.5, None, True], "a<b": "c&d"}}}]

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'system' %}
        [{{ message['content'] | trim }}]
    {% else %}
<|im_start|>{{ message['role'] }}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA2 = """{{ bos_token }}{% set ns = namespace(seen=0) %}{% for message in messages %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}{% set ns.seen = ns.seen + 1 %}
{{ '[INST] ' + message['content'] + ' [/INST]' if message['role'] == 'user' else message['content'] + eos_token }}
{%- endfor %}{{ ns.seen }}"""
GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}
  {{ m.content }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("source", [CHATML, LLAMA2, GENERATION], ids=["chatml", "llama2", "generation"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(source: str, tools: list[dict[str, object]] | None, add_generation_prompt: bool) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=source, add_generation_prompt=add_generation_prompt, **special
    )
    ours = ChatTemplate(source, special_tokens=special)
    assert ours.render(MESSAGES, tools=tools, add_generation_prompt=add_generation_prompt) == expected


def test_further_variables_reach_the_template_but_replace_nothing() -> None:
    template = ChatTemplate("{{ enable_thinking }}|{{ bos_token }}|{{ messages | length }}", special_tokens={"bos_token": "<s>"})
    assert template.render(MESSAGES, enable_thinking=False, bos_token="forged") == "False|<s>|4"


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages[0].content.append('b') }}").render(messages)
    assert messages == [{"role": "user", "content": ["a"]}]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[0].nothing.more }}", "no attribute"),
        ("{{ messages[0]['content'][999] + 'x' }}", "no element"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% for i in range(99999999) %}x{% endfor %}", "Range"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.__init__.__globals__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{% set _ = messages.clear() %}", "immutable|unsafe|not safely"),
    ],
)
def test_a_template_that_fails_or_tries_to_escape_is_refused(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"(?i){reason}") as caught:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_output_is_cut_off_while_it_is_produced() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}", max_rendered_chars=1000)
    with pytest.raises(InvalidRequest, match="1000 characters"):
        template.render([{"role": "user", "content": "0123456789"}])
    assert ChatTemplate("{{ messages[0].content }}", max_rendered_chars=10).render([{"content": "0123456789"}]) == "0123456789"


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages", "{% unknown_tag %}", "{{ x | no_such_filter }}", "x" * (MAX_TEMPLATE_CHARS + 1)]
)
def test_a_template_that_does_not_compile_is_a_load_error(source: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate(source)


def test_strftime_now_is_available() -> None:
    rendered = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert rendered.isdigit()
    assert len(rendered) == 4
