"""The engine: models, attention, KV pool, block manager, sampler, runner. The only part that imports torch."""
