import inspect
import re

import pytest

from gptjax import ops
from gptjax.explore.faults import IN_NETWORK, IN_OPS, faults_of, planted, wrong_version
from gptjax.models import gpt2, layers, llama, transformer
from gptjax.ops.attention import materialised_bwd
from tests.models import mlp_family, tiny

OPS = [name.removesuffix("_bwd") for name in ops.__all__ if name.endswith("_bwd")]
LLAMA = {"family": "llama", "num_heads": 4, "num_kv_heads": 2}
GPT2S, LLAMAS = faults_of(tiny.config(), OPS), faults_of(tiny.config(**LLAMA), OPS)
FAULTS = [*GPT2S, *(fault for fault in LLAMAS if fault not in GPT2S)]


def test_every_fault_is_named_and_changes_one_place():
    for faults in (GPT2S, LLAMAS):
        assert len({fault.name for fault in faults}) == len(faults) > 35
    for fault in FAULTS:
        assert inspect.getsource(inspect.unwrap(fault.function)).count(fault.right) == 1, fault.name
        assert fault.right != fault.wrong
        assert re.fullmatch(r"[a-z ]+", fault.kind)


def test_every_op_with_a_backward_can_be_broken():
    broken = {fault.place for fault in IN_OPS}
    assert set(OPS) == broken | {"dropout"}  # of which the page shows none
    assert {"gate and up are exchanged"} == {f.breaks for f in FAULTS} - {f.breaks for f in GPT2S}


def test_the_models_own_faults_alone_are_offered():
    with mlp_family.registered() as family:
        found = faults_of(tiny.config(family=family), ["linear"])
    assert {fault.place for fault in found} == {"linear", *(f.place for f in IN_NETWORK)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_planted_everywhere_and_mended(fault):
    name, right = fault.function.__name__, fault.function
    holders = [m for m in (ops, gpt2, llama, layers, transformer) if vars(m).get(name) is right]
    attention_bwd = ops.attention_bwd
    with pytest.raises(KeyError), planted(fault):
        assert all(vars(module)[name] is not right for module in holders)
        assert (transformer.attention_bwd is attention_bwd) == (right is not materialised_bwd)
        raise KeyError
    assert all(vars(module)[name] is right for module in holders)
    assert transformer.attention_bwd is attention_bwd


def test_what_is_not_in_the_source_cannot_be_replaced():
    with pytest.raises(ValueError, match="0 times, not once"):
        wrong_version(ops.gelu_bwd, "nothing of the kind", "")
