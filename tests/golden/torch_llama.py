"""What Hugging Face's Llama on PyTorch computes: logits, loss, gradients, and ten AdamW steps of
small models with grouped heads, tied and not.

``python -m tests.golden.torch_llama`` writes tests/golden/torch_llama.npz, from which the same is
tested where PyTorch is not installed. It is made again only when this file changes; the numbers
then differ by rounding alone on another machine.
"""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.models.llama import Block, Params

FILE = Path(__file__).with_suffix(".npz")
L, H, K, C, V, T = 2, 4, 2, 32, 97, 24
SIZES = {
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "hidden_size": C,
    "intermediate_size": 56,
    "vocab_size": V,
    "max_position_embeddings": T,
}
THETA, EPS = 500.0, 1e-3  # far from the defaults, so that a lost one shows
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6}
WEIGHT_DECAY = 0.1
STEPS = 10
KINDS = {"tied": True, "untied": False}
NAMES = {  # ours -> Hugging Face's, per layer
    "att_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w3": "mlp.up_proj",
    "w2": "mlp.down_proj",
}
OUTSIDE = {
    "tok_emb": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "wcls": "lm_head.weight",
}


def compute(tied: bool) -> dict[str, Any]:
    """Everything, by PyTorch, in float32, since their norms and rotations know nothing wider;
    parameters and gradients as ours, stacked, the vocabulary unpadded.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, rms_norm_eps=EPS, tie_word_embeddings=tied, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    ids = np.random.default_rng(0).integers(0, V, (4, T + 1)).astype(np.int32)
    inputs, targets = (torch.tensor(x, dtype=torch.long) for x in (ids[:, :-1], ids[:, 1:]))
    params = tensors(model, lambda p: p.detach().numpy().copy())
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    losses: list[float] = []
    for step in range(STEPS):
        scores = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(scores.reshape(-1, V), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            logits = scores.detach().numpy().copy()
            grads = tensors(model, lambda p: p.grad.numpy().copy())
        losses.append(loss.item())
        optimizer.step()
    return {
        "ids": ids,
        "params": params,
        "logits": logits,
        "grads": grads,
        "losses": np.array(losses),
        "trained": tensors(model, lambda p: p.detach().numpy().copy()),
    }


def tensors(model: Any, kind: Any) -> Params:
    """Their parameters, or what ``kind`` makes of each, as ours: stacked over the layers, without
    pad rows.
    """
    named = {name: kind(p) for name, p in model.named_parameters()}
    shapes = {"wq": (C, H, -1), "wk": (C, K, -1), "wv": (C, K, -1), "wo": (H, -1, C)}
    layers = {
        ours: [named[f"model.layers.{i}.{theirs}.weight"].T for i in range(L)]
        for ours, theirs in NAMES.items()
    }
    block = {
        ours: np.stack([x.reshape(shapes[ours]) if ours in shapes else x for x in found])
        for ours, found in layers.items()
    }
    outside = {ours: named.get(theirs) for ours, theirs in OUTSIDE.items()}
    return Params(blocks=Block(**block), **outside)


def named_tensors(params: Params) -> dict[str, Any]:
    """Its tensors by name."""
    outside = {name: getattr(params, name) for name in OUTSIDE}
    return {k: x for k, x in (outside | params.blocks._asdict()).items() if x is not None}


def save() -> None:
    """Write the file."""
    arrays: dict[str, Any] = {}
    for kind, tied in KINDS.items():
        for name, value in compute(tied).items():
            found = named_tensors(value) if isinstance(value, Params) else {"": value}
            arrays |= {f"{kind}.{name}.{n}": x for n, x in found.items()}
    np.savez_compressed(FILE, **arrays)


def load(tied: bool) -> dict[str, Any]:
    """What `save` wrote, as `compute` returns it."""
    kind = next(kind for kind, value in KINDS.items() if value == tied)
    with np.load(FILE, allow_pickle=False) as file:
        arrays = {k.removeprefix(f"{kind}."): x for k, x in file.items() if k.startswith(kind)}

    def tree(name: str) -> Params:
        outside = {n: arrays.get(f"{name}.{n}") for n in OUTSIDE}
        return Params(blocks=Block(**{n: arrays[f"{name}.{n}"] for n in NAMES}), **outside)

    found = {name: arrays[f"{name}."] for name in ("ids", "logits", "losses")}
    return found | {name: tree(name) for name in ("params", "grads", "trained")}


if __name__ == "__main__":
    save()
