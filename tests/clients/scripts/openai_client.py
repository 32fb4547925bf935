"""What users of openai-python do first. Arguments: base URL (with /v1), model. Prints one JSON object."""

import json
import sys

import openai

base_url, model = sys.argv[1:3]
messages = [{"role": "user", "content": "tell me of the word that they had for it"}]
client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0)
whole = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0)
with client.chat.completions.stream(
    model=model, messages=messages, max_tokens=12, temperature=0, stream_options={"include_usage": True}
) as events:
    kinds = sorted({event.type for event in events})
    final = events.current_completion_snapshot  # the final one is for answers that are complete
try:
    client.chat.completions.create(model="absent", messages=messages)
    refused = None
except openai.NotFoundError as error:
    refused = error.param
try:
    client.chat.completions.create(model=model, messages=messages, temperature=9)
    bad = None
except openai.BadRequestError as error:
    bad = error.param
print(
    json.dumps(
        {
            "models": [found.id for found in client.models.list()],
            "whole": whole.choices[0].message.content,
            "streamed": final.choices[0].message.content,
            "completion_tokens": [whole.usage.completion_tokens, final.usage.completion_tokens],
            "kinds": kinds,
            "refused": refused,
            "bad": bad,
        }
    )
)
