"""Which served model answers a call: names that stand for several models, rules, canaries, prediction, fallbacks."""
