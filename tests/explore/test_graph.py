from functools import partial

import pytest

from gptjax.explore.graph import arguments, pairs_of, places_of
from gptjax.models import transformer
from gptjax.verify import trace
from tests.explore.conftest import small_batch
from tests.models import mlp_family, tiny


def graph(cfg):
    args = tiny.params(cfg), small_batch()
    _, calls = trace.record(partial(transformer.loss_and_grad, cfg=cfg), *args)
    pairs = pairs_of(calls)
    return calls, pairs, places_of(pairs, arguments(partial(transformer.loss, cfg=cfg), *args))


def test_every_call_that_computes_something_has_its_mirror():
    calls, pairs, places = graph(tiny.config(num_layers=1))
    computing = [c for c in calls if c.op.endswith("_fwd") and c.jaxpr.jaxpr.eqns]
    assert [pair.forward for pair in pairs] == computing
    assert [pair.backward.base for pair in pairs] == [call.base for call in computing]
    assert len(places) == len(pairs) == 2 + 10 + 2


def test_gpt2s_block_as_it_is_drawn():
    _, pairs, places = graph(tiny.config())
    names = [f"{p.forward.base} {p.forward.weight}" for p in pairs]
    layer = [(names[i], place) for i, place in enumerate(places) if place.row == 1]
    assert [(name, place.column) for name, place in layer] == [
        ("layernorm ln1w", 0),
        ("linear qw", 1),
        ("linear kw", 1),
        ("linear vw", 1),
        ("attention vw", 2),
        ("linear attprojw", 3),
        ("layernorm ln2w", 4),
        ("linear fcw", 5),
        ("gelu fcw", 6),
        ("linear fcprojw", 7),
    ]
    by_name = dict(layer)
    sources = {name: [names[i] for i in place.sources] for name, place in layer}
    assert sources["attention vw"] == ["linear qw", "linear kw", "linear vw"]
    assert sources["linear kw"] == ["layernorm ln1w"]
    reads = {name for name, place in by_name.items() if place.reads_stream}
    writes = {name for name, place in by_name.items() if place.writes_stream}
    assert reads == {"layernorm ln1w", "layernorm ln2w"}
    assert writes == {"linear attprojw", "linear fcprojw"}
    assert [p.row for p in places] == [0] * 2 + [1] * 10 + [2] * 10 + [3] * 2
    assert places[0].writes_stream
    assert (places[0].column, places[1].column) == (0, 1)
    assert places[-2].reads_stream
    assert places[-1].sources == (len(places) - 2,)


def test_llamas_rotations_stand_between_the_products_and_attention():
    cfg = tiny.config(family="llama", num_heads=4, num_kv_heads=2, num_layers=1)
    _, pairs, places = graph(cfg)
    layer = [(p.forward.base, at) for p, at in zip(pairs, places, strict=True) if at.row == 1]
    assert [(op, at.column) for op, at in layer] == [
        ("rmsnorm", 0),
        *[("linear", 1)] * 3,
        *[("rotary", 2)] * 2,
        ("attention", 3),
        ("linear", 4),
        ("rmsnorm", 5),
        *[("linear", 6)] * 2,
        ("swiglu", 7),
        ("linear", 8),
    ]
    attention, value = layer[6][1], 1 + 3
    assert attention.sources == (value, 5, 6)


def test_a_family_that_the_package_does_not_know_is_drawn_too():
    with mlp_family.registered() as family:
        _, pairs, places = graph(tiny.config(family=family))
    assert [p.forward.base for p in pairs[1:5]] == ["layernorm", "linear", "gelu", "linear"]
    assert [p.row for p in places] == [0] + [1] * 4 + [2] * 4 + [3] * 2
    assert [p.column for p in places[1:5]] == [0, 1, 2, 3]
    assert [p.reads_stream for p in places[:6]] == [False, True, False, False, False, True]
    assert [p.writes_stream for p in places[:5]] == [True, False, False, False, True]


@pytest.mark.parametrize("end", [0, 3])
def test_a_backward_that_does_not_mirror_the_forward_ends_the_pairs(end):
    calls, pairs, _ = graph(tiny.config(num_layers=1))
    first = next(i for i, call in enumerate(calls) if call.op.endswith("_bwd"))
    other = next(call for call in calls if call.op == "gelu_bwd")
    assert pairs_of([*calls[: first + end], other]) == [
        pair for pair in pairs if pair.backward in calls[first : first + end]
    ]
