"""`jax.jit` whose programs stay when JAX forgets what it compiled."""

import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
Result = TypeVar("Result")


class LastingJit(Generic[P, Result]):
    """A function that is compiled once for each kind of arguments, as by `jax.jit`, but whose
    programs `jax.clear_caches` leaves alone.

    JAX keeps the traces of what it compiled, which take more memory than the programs: 12 MB beside
    9 MB for the two of a chat with SmolLM2. Clearing its caches frees them.

    The kind is the constant, and the tree, shapes, dtypes and devices of the other arguments. A
    program does not change with JAX's settings, as one of `jax.jit` would.
    """

    def __init__(self, function: Callable[P, Result], static: str, donate: str) -> None:
        """Wrap a function, which is compiled when it is called.

        Args:
            function: to compile.
            static: name of the argument that is a constant of the program.
            donate: name of the one whose memory the results may take.

        """
        self.function: Any = function
        self.programs: dict[Any, Any] = {}
        """The compiled program of each kind of arguments."""
        self._signature, self._static, self._donate = inspect.signature(function), static, donate

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        """Call the function."""
        values = self._signature.bind(*args, **kwargs).arguments
        constant, donated = values.pop(self._static), values.pop(self._donate)
        (given, form), (leaves, tree) = jax.tree.flatten(donated), jax.tree.flatten(values)
        places = tuple(getattr(x, "sharding", None) for x in (*given, *leaves))
        kind = constant, form, tree, tuple(map(jax.typeof, (*given, *leaves))), places
        if kind not in self.programs:

            def of_leaves(given: list[Any], leaves: list[Any]) -> Any:
                named = {self._static: constant, self._donate: jax.tree.unflatten(form, given)}
                return self.function(**jax.tree.unflatten(tree, leaves), **named)

            # Leaves alone: JAX puts descriptions of arguments in their tree, which may refuse them
            program = jax.jit(of_leaves, donate_argnums=0).lower(given, leaves)
            self.programs[kind] = program.compile()
        result: Result = self.programs[kind](given, leaves)
        return result
