"""The same weights in Hugging Face's GPT-2 on PyTorch: what our forward computes is GPT-2, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import gpt2
from gptjax.models.params import Params, stack
from tests.compare import relative_l2
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

NAMES = {  # ours -> Hugging Face's, per layer
    "ln1": "ln_1",
    "qkv": "attn.c_attn",
    "attproj": "attn.c_proj",
    "ln2": "ln_2",
    "fc": "mlp.c_fc",
    "fcproj": "mlp.c_proj",
}


def tensors_of(model, kind):
    """Their parameters, or gradients, under our names and stacked over the layers."""
    named = {name: kind(p) for name, p in model.transformer.named_parameters()}
    found = {"wte": named["wte.weight"], "wpe": named["wpe.weight"], "lnfw": named["ln_f.weight"], "lnfb": named["ln_f.bias"]}
    for ours, theirs in NAMES.items():
        for suffix, kind_name in (("w", "weight"), ("b", "bias")):
            layers = [named[f"h.{i}.{theirs}.{kind_name}"] for i in range(model.config.n_layer)]
            found[ours + suffix] = np.stack(layers)
    return Params(**found)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_logits_loss_and_all_gradients_equal_transformers(dtype):
    cfg = tiny.config(num_layers=3, num_heads=4, channels=32, vocab_size=97, max_seq_len=24, layers="scan", dtype=dtype)
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 97, "n_positions": 24}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).to(getattr(torch, dtype))
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    theirs = tensors_of(model, lambda p: p.detach().numpy())
    params = theirs._replace(wte=np.pad(theirs.wte, ((0, cfg.padded_vocab_size - 97), (0, 0))))
    params = jax.tree.map(jnp.asarray, params)
    batch = tiny.batch(cfg, B=3, T=24)

    inputs, targets = (torch.tensor(np.asarray(x), dtype=torch.long) for x in batch[:2])
    expected = model(inputs).logits
    loss = torch.nn.functional.cross_entropy(expected.reshape(-1, 97), targets.reshape(-1))
    loss.backward()

    assert relative_l2(gpt2.logits(params, batch.inputs, cfg), expected.detach().numpy()) <= tolerance
    ours, grads = gpt2.loss_and_grad(params, batch, cfg)
    assert float(ours) == pytest.approx(loss.item(), rel=tolerance)
    reference = tensors_of(model, lambda p: p.grad.numpy())
    grads = stack(grads)._replace(wte=grads.wte[:97])
    for name, mine, wanted in zip(Params._fields, grads, reference, strict=True):
        assert relative_l2(mine, wanted) <= tolerance, name
