"""Models from wherever they are kept, to wherever they should go; ``python -m gptjax.convert``."""
