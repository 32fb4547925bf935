"""Streams of questions, baselines and training for `benchmarks.semantic_cache`."""
