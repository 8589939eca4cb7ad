"""Models as pure functions over a pytree of parameters."""
