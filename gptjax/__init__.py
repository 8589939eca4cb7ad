"""Language models in JAX as pure functions, with a backward pass derived by hand: see
`gptjax.models.gpt2`.

The names that ``__init__.pyi`` lists are here once they are asked for, so that importing the
package costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
