"""What Hugging Face's GPT-2 on PyTorch computes: logits, loss, gradients, and ten AdamW steps of a
small model.

``python -m tests.golden.torch_gpt2`` writes tests/golden/torch_gpt2.npz, from which the same is
tested where PyTorch is not installed. It is made again only when this file changes; the numbers
then differ by rounding alone on another machine.
"""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.models.gpt2 import Params
from tests.models.fused import ORDER, fuse, split

FILE = Path(__file__).with_suffix(".npz")
SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 97, "n_positions": 24}
# The key bias has a gradient of zero but for rounding (a softmax does not see it), which AdamW
# scales up to whole steps unless eps is above that rounding: at 1e-8, kb ends 3e-4 apart in float32
# for that reason alone.
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6}
WEIGHT_DECAY = 0.1
STEPS = 10
NAMES = {  # ours -> Hugging Face's, per layer
    "ln1": "ln_1",
    "qkv": "attn.c_attn",
    "attproj": "attn.c_proj",
    "ln2": "ln_2",
    "fc": "mlp.c_fc",
    "fcproj": "mlp.c_proj",
}


def compute(dtype: str) -> dict[str, Any]:
    """Everything, by PyTorch, in ``dtype``; parameters and gradients as ours, stacked, the
    vocabulary unpadded.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **SIZES, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    model = model.to(getattr(torch, dtype))
    ids = (
        np.random.default_rng(0)
        .integers(0, SIZES["vocab_size"], (4, SIZES["n_positions"] + 1))
        .astype(np.int32)
    )
    inputs, targets = (torch.tensor(x, dtype=torch.long) for x in (ids[:, :-1], ids[:, 1:]))
    params = tensors(model, lambda p: p.detach().numpy().copy())
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    losses: list[float] = []
    for step in range(STEPS):
        scores = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(
            scores.reshape(-1, SIZES["vocab_size"]), targets.reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            logits = scores.detach().numpy().copy()
            grads = tensors(model, lambda p: p.grad.numpy().copy())
        losses.append(loss.item())
        optimizer.step()
    trained = tensors(model, lambda p: p.detach().numpy().copy())
    return {
        "ids": ids,
        "params": params,
        "logits": logits,
        "grads": grads,
        "losses": np.array(losses),
        "trained": trained,
    }


def tensors(model: Any, kind: Any) -> Params:
    """Their parameters, or what ``kind`` makes of each, as ours: stacked over the layers, without
    pad rows.
    """
    named = {name: kind(p) for name, p in model.transformer.named_parameters()}
    found = {
        "wte": named["wte.weight"],
        "wpe": named["wpe.weight"],
        "lnfw": named["ln_f.weight"],
        "lnfb": named["ln_f.bias"],
    }
    for ours, theirs in NAMES.items():
        for suffix, kind_name in (("w", "weight"), ("b", "bias")):
            layers = [named[f"h.{i}.{theirs}.{kind_name}"] for i in range(model.config.n_layer)]
            found[ours + suffix] = np.stack(layers)
    return split(found, SIZES["n_head"])


def save() -> None:
    """Write the file, in float32, with the tensors as PyTorch has them."""
    arrays: dict[str, Any] = {}
    for name, value in compute("float32").items():
        arrays |= (
            {f"{name}.{n}": t for n, t in fuse(value).items()}
            if isinstance(value, Params)
            else {name: value}
        )
    np.savez_compressed(FILE, **arrays)


def load() -> dict[str, Any]:
    """What `save` wrote, as `compute` returns it."""
    with np.load(FILE, allow_pickle=False) as file:
        arrays = dict(file)
    found = {name: arrays[name] for name in ("ids", "logits", "losses")}
    trees = {
        k: split({n: arrays[f"{k}.{n}"] for n in ORDER}, SIZES["n_head"])
        for k in ("params", "grads", "trained")
    }
    return found | trees


if __name__ == "__main__":
    save()
