"""Plan the memory, traffic and time of a configuration on devices that need not be present:
``python -m gptjax.plan``.
"""
