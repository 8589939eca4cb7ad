"""Plans: memory, traffic and time of a configuration on devices that need not be here: ``python -m
gptjax.plan``.
"""
