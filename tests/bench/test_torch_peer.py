"""That PyTorch is given the same work: as large a model, the same batches, an update of every
weight.
"""

import numpy as np
import pytest

from gptjax.bench import torch_peer
from gptjax.bench.steps import random_batch
from gptjax.config import Config, DataConfig, ModelConfig, OptimConfig
from gptjax.models.params import num_padded_params

MODEL = ModelConfig(num_layers=2, num_heads=2, channels=8, vocab_size=11, max_seq_len=12)
CFG = Config(
    model=MODEL,
    data=DataConfig(batch_size=2, seq_len=8),
    optim=OptimConfig(accumulate=3),
)


@pytest.fixture
def peer(monkeypatch):
    """(torch, the model that is stepped, the contenders by name); nothing is compiled."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "compile", lambda f: f)
    loaded = torch_peer.load(CFG)
    monkeypatch.setattr(torch_peer, "load", lambda cfg: loaded)
    return (
        torch,
        loaded[1],
        {contender.name: contender for contender in torch_peer.step_contenders(CFG)},
    )


def test_only_some_contenders(peer):
    _, _, contenders = peer
    assert len(contenders) == 4
    found = torch_peer.step_contenders(CFG, ("compile",), ("bfloat16",))
    assert [contender.name for contender in found] == ["torch compile, bfloat16"]


def test_the_model_is_as_large_as_ours(peer):
    _, model, _ = peer
    assert sum(p.numel() for p in model.parameters()) == num_padded_params(MODEL)


@pytest.mark.parametrize("how", ["eager", "compile"])
@pytest.mark.parametrize("precision", torch_peer.PRECISIONS)
def test_a_step_reads_all_micro_batches_and_moves_every_weight(peer, how, precision):
    torch, model, contenders = peer
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    contenders[f"torch {how}, {precision}"].run()
    np.testing.assert_array_equal(np.stack(seen), random_batch(CFG).inputs)
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
        assert p.grad is None, name
