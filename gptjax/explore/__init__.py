"""A page that shows a model's backward pass on a text: ``python -m gptjax.explore``."""
