"""GPT-2's tensors as other programs hold them: written by hand, independent of the format tables.

16 arrays under llm.c's names, stacked over the layers, (in, out). Queries, keys and values are one
array (L, C, 3C), their heads merged.
"""

from typing import Any

import jax
import numpy as np

from gptjax.models.gpt2 import Block, Params
from gptjax.models.params import stack

# fmt: off
ORDER = ["wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
         "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb"]
# fmt: on
MATRICES = ["qkvw", "attprojw", "fcw", "fcprojw"]


def fuse(params: Any) -> dict[str, np.ndarray]:
    """Parameters in either layout -> the 16 arrays, in llm.c's order."""
    params = jax.tree.map(np.asarray, stack(params))
    found = params.blocks._asdict() | params._asdict()
    L, C, H, D = found["qw"].shape
    found["qkvw"] = np.concatenate(
        [found[name].reshape(L, C, H * D) for name in ("qw", "kw", "vw")], axis=2
    )
    found["qkvb"] = np.concatenate(
        [found[name].reshape(L, H * D) for name in ("qb", "kb", "vb")], axis=1
    )
    found["attprojw"] = found["attprojw"].reshape(L, H * D, C)
    return {name: found[name] for name in ORDER}


def split(tensors: dict[str, np.ndarray], num_heads: int) -> Params:
    """The 16 arrays -> stacked parameters."""
    found = dict(tensors)
    L, C, _ = found["qkvw"].shape
    weights, biases = found.pop("qkvw"), found.pop("qkvb")
    for i, name in enumerate("qkv"):
        found[f"{name}w"] = weights[:, :, i * C : (i + 1) * C].reshape(L, C, num_heads, -1)
        found[f"{name}b"] = biases[:, i * C : (i + 1) * C].reshape(L, num_heads, -1)
    found["attprojw"] = found["attprojw"].reshape(L, num_heads, -1, C)
    return Params(blocks=Block(**{name: found.pop(name) for name in Block._fields}), **found)
