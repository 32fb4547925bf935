"""The prefill pool: computes prompts and pushes their KV to decode workers."""
