"""Benchmarks of training and decoding against what the hardware can do: ``python -m gptjax.bench``."""
