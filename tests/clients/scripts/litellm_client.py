"""What users of LiteLLM do first, by both of its ways to a server like this. Arguments: base URL (with /v1), model."""

import json
import sys

import litellm

base_url, model = sys.argv[1:3]
messages = [{"role": "user", "content": "tell me of the word that they had for it"}]
options = {"messages": messages, "api_base": base_url, "api_key": "unused", "max_tokens": 12, "temperature": 0, "num_retries": 0}
found = {}
for provider in ("openai", "hosted_vllm"):
    whole = litellm.completion(model=f"{provider}/{model}", **options)
    pieces = litellm.completion(model=f"{provider}/{model}", stream=True, **options)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    found[provider] = [whole.choices[0].message.content, streamed]
try:
    litellm.completion(model=f"hosted_vllm/{model}", **{**options, "temperature": 9})
    refused = None
except litellm.BadRequestError as error:
    refused = error.status_code
text = litellm.text_completion(
    model=f"text-completion-openai/{model}", prompt="the word", api_base=base_url, api_key="unused", max_tokens=6
)
print(json.dumps({"answers": found, "refused": refused, "text_tokens": text.usage.completion_tokens}))
