"""How the tokens of one choice of a call become its text: one way for who shows it and for who only wants to know its end."""

from __future__ import annotations

from router.streaming import ChoiceText
from router.validate import ValidCall


def choice_text(call: ValidCall, index: int) -> ChoiceText:
    """`index` counts the choices of the whole call."""
    plan = call.plan
    request = call.requests[index // call.requests[0].num_choices]
    return ChoiceText(
        index,
        call.model.tokenizer.stream(request.prompt_token_ids, skip_special_tokens=plan.skip_special_tokens),
        stops=plan.stops,
        include_stop=plan.include_stop,
        min_tokens=plan.min_tokens,
        client_stop_token_ids=plan.client_stop_token_ids,
        discard_tokens=plan.discard_tokens,
        reports_tokens=plan.reports_tokens,
    )
