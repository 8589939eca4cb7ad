"""Benchmarks of training and decoding: ``python -m gptjax.bench``."""
