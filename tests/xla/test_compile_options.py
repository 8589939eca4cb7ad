"""The options of each platform, and what becomes of those that an XLA does not know."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gptjax.xla import compile_options
from gptjax.xla.compile_options import OPTIONS, compile_tuned

H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
RADEON = SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


class Lowered:
    """Compiles with the options that it knows, as XLA does."""

    def __init__(self, known):
        self.known, self.asked = known, []

    def compile(self, compiler_options):
        """Raise at the first unknown option."""
        self.asked.append(set(compiler_options))
        for option in compiler_options:
            if option not in self.known:
                raise jax.errors.JaxRuntimeError(
                    f"INVALID_ARGUMENT: No such compile option: '{option}'"
                )
        return compiler_options


@pytest.mark.parametrize(("device", "name"), [(H100, "cuda"), (CPU, "cpu"), (RADEON, None)])
def test_a_platform_gets_its_own(device, name):
    expected = OPTIONS.get(name, {})
    assert compile_tuned(Lowered(set(expected)), device) == expected


def test_what_an_xla_does_not_know_is_left_out_and_the_rest_is_kept():
    _, *rest = OPTIONS["cuda"]
    lowered = Lowered(set(rest))
    assert set(compile_tuned(lowered, H100)) == set(rest)
    assert len(lowered.asked) == 2


def test_this_xla_leaves_out_what_it_does_not_know(monkeypatch):
    monkeypatch.setitem(compile_options.OPTIONS, "cpu", {"xla_cpu_no_such_option": "1"})
    compiled = compile_tuned(jax.jit(lambda x: 2 * x).lower(jnp.zeros(3)), jax.devices()[0])
    assert (compiled(jnp.ones(3)) == 2).all()


def test_another_error_is_raised():
    class Failing:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("INTERNAL: other")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_tuned(Failing(), H100)
