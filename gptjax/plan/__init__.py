"""What a configuration would need and take on devices that are not here: ``python -m gptjax.plan``."""
