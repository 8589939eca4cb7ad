"""A pure-functional GPT-2 in JAX whose backward pass is derived by hand: see `gptjax.models.gpt2`.

The names that ``__init__.pyi`` lists are here once they are asked for, so that importing the package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
