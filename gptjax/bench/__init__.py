"""What the hardware gives, and what of it is used: ``python -m gptjax.bench``."""
