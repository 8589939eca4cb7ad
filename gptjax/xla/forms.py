"""Forms of an expression for one platform's compiler, which JAX differentiates as the plain one."""

from collections.abc import Callable
from typing import Any

import jax


def form_of(plain: Callable[[Any], Any]) -> Callable[[Callable[[Any], Any]], Any]:
    """Mark a function of one array as another form of ``plain``: the same numbers up to rounding.

    JAX's gradient of the forward stays that of the plain form, and with it the reference that
    hand-written gradients are compared with.
    """

    def mark(form: Callable[[Any], Any]) -> Any:
        marked = jax.custom_jvp(form)
        marked.defjvp(lambda x, dx: jax.jvp(plain, x, dx))
        return marked

    return mark
