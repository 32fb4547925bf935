"""What users of langchain-openai do first: invoke, stream, batch, bind. Arguments: base URL (with /v1), model."""

import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

base_url, model = sys.argv[1:3]
chat = ChatOpenAI(
    model=model, base_url=base_url, api_key="unused", temperature=0, max_tokens=12, max_retries=0, stream_usage=True, timeout=60
)
messages = [SystemMessage("be brief"), HumanMessage("tell me of the word that they had for it")]
whole = chat.invoke(messages)
streamed = None
for chunk in chat.stream(messages):
    streamed = chunk if streamed is None else streamed + chunk
batch = chat.batch([messages, messages])
stopped = chat.bind(stop=[whole.content[3:5]]).invoke(messages)
print(
    json.dumps(
        {
            "whole": whole.content,
            "streamed": streamed.content,
            "batch": [answer.content for answer in batch],
            "stopped": stopped.content,
            "stop": whole.content[3:5],
            "finish_reason": whole.response_metadata["finish_reason"],
            "usage": [whole.usage_metadata["output_tokens"], streamed.usage_metadata["output_tokens"]],
        }
    )
)
