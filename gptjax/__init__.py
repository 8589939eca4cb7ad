"""Language models in JAX as pure functions, with a backward pass derived by hand: see
`gptjax.models.gpt2`.

The names in ``__init__.pyi`` are imported on first use, so importing the package takes no time.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
