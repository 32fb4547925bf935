"""Answers that need no worker: the exact cache, the sharing of answers in the making, and the port of the semantic cache."""
