"""Text generation: sampling with a key-value cache."""

from gptjax.generate.engine import CHUNK, Drawn, Rules, generate, sample, window_start
from gptjax.generate.stream import TextStream

__all__ = ["CHUNK", "Drawn", "Rules", "TextStream", "generate", "sample", "window_start"]
