"""Every family of the registry offers what `gptjax.models.family.Family` asks for."""

import inspect

import pytest

from gptjax.errors import ConfigError
from gptjax.models import FAMILIES
from gptjax.models.family import OPTIONAL, Family, Weight, family_of
from gptjax.models.params import is_weight, rows
from tests.models import tiny

NAMES = [*Family.__annotations__, *(name for name in vars(Family) if not name.startswith("_"))]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_offers_the_whole_interface(name):
    family = FAMILIES[name]
    for member in NAMES:
        assert hasattr(family, member), member
        if member in vars(Family):
            asked = [
                p for p in inspect.signature(getattr(Family, member)).parameters if p != "self"
            ]
            assert list(inspect.signature(getattr(family, member)).parameters) == asked, member


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_table_has_known_axes_and_kinds(name):
    cfg = tiny.config(family=name)
    family, known = family_of(cfg), set(cfg.axis_sizes)
    table = family.weights(cfg)
    assert isinstance(table, family.Params)
    assert isinstance(table.blocks, family.Block)
    head = getattr(table, family.head_name(cfg))
    assert is_weight(head)
    assert head.axes == ("Vp", "C")
    assert set(family.OPTIONS) <= set(OPTIONAL)
    for _, _, weight, shape in rows(cfg):
        assert isinstance(weight, Weight)
        assert set(weight.axes) <= known
        assert weight.kind in ("matrix", "table", "vector")
        assert weight.inputs < len(shape) or weight.kind != "matrix"


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_kv_heads", 1), ("rope_theta", 5e5), ("norm_eps", 1e-6), ("tied", False)],
)
def test_an_option_that_the_family_does_not_read_is_refused(option, value):
    with pytest.raises(ConfigError, match=rf"model\.{option} .* does not apply to .* gpt2"):
        rows(tiny.config(**{option: value}))
    assert rows(tiny.config(family="llama", **{option: value}))
