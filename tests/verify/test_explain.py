import jax.numpy as jnp

from gptjax.verify.explain import explain
from gptjax.verify.model import Subject, tolerances
from tests.models import tiny


def test_every_tensor_has_its_number_of_roundings_and_its_tolerance():
    cfg = tiny.config(dtype="float32")
    subject = Subject(cfg, tiny.params(cfg, jnp.float32), tiny.batch(cfg), None)
    text = explain(subject)
    assert "5.96e-08 in float32" in text
    table = {line.split()[0]: line.split()[1:] for line in text.splitlines()[-19:]}
    assert len(table) == 19
    n, tolerance = int(table["fcw"][0].replace(",", "")), float(table["fcw"][1])
    assert abs(tolerance / (4 * n**0.5 * 2**-24) - 1) < 0.05
    assert abs(tolerance / max(tolerances(subject).params.fcw) - 1) < 0.05
    assert int(table["wte"][0].replace(",", "")) > n > int(table["lnfw"][0].replace(",", ""))
