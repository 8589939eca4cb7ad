import dataclasses

import jax
import pytest

from gptjax.bench import steps
from gptjax.config import Config, DataConfig
from tests.models import tiny

MODEL = tiny.config(num_layers=1, dtype="float32")
CFG = Config(MODEL, DataConfig(batch_size=2, seq_len=4))


def test_variants_begin_with_the_configured_one_and_are_distinct():
    known = steps.variants(MODEL, "manual")
    assert known[0][1:] == (MODEL, "manual")
    assert len({(model, backward) for _, model, backward in known}) == len(known)
    assert {backward for _, _, backward in known} == {"manual", "autodiff"}


LLAMA = dataclasses.replace(MODEL, family="llama", num_kv_heads=1, tied=False)


@pytest.mark.parametrize("model", [MODEL, LLAMA])
def test_a_contender_trains_and_says_what_it_takes(model):
    with jax.enable_x64(False):
        (contender,) = steps.step_contenders(dataclasses.replace(CFG, model=model), compare=False)
        contender.run()
    assert contender.facts["temporary_bytes"] > 0
    assert contender.facts["total_bytes"] > contender.facts["temporary_bytes"]
    assert contender.facts["compile_s"] > 0
    # The gradient, and an update of one program or two
    assert 2 <= len(contender.programs) <= 3
    assert "jit_gradient" in contender.programs[0].as_text().splitlines()[0]


def test_batches_are_of_the_configured_shape_and_vocabulary():
    batch = steps.random_batch(dataclasses.replace(CFG, seed=1))
    assert batch.inputs.shape == (1, 2, 4)
    assert int(batch.inputs.max()) < MODEL.vocab_size
