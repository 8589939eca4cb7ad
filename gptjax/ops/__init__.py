"""The models' operations: each forward with its hand-derived backward directly below it.

Every op is a pair of pure functions::

    y, saved = op_fwd(x, *weights)
    dx, *dweights = op_bwd(saved, *weights, dy)

``saved`` holds activations only, never weights, so that a scan over layers does not copy the
weights. The gradient of the loss with respect to ``z`` is called ``dz`` and has the shape of ``z``.
All sums, including those in weight gradients, are accumulated in float32 or wider whatever the
compute dtype (`gptjax.xla.products.accumulation_dtype`). No op carries a ``custom_vjp``, so
differentiating a forward with JAX gives an independent reference for its backward.

The dimension legend for all shapes (einsum letters are the lower case):

==  =====================================  ==  =======================================
B   batch                                  H   heads
T   time: positions of the query           K   key-value heads; G = H / K share one
S   time: positions of the key and value   D   head dimension, C / H
C   channels (the model's width)           F   hidden width of the MLP
L   layers                                 V   vocabulary
                                           Vp  vocabulary padded to a multiple of 128
==  =====================================  ==  =======================================
"""

from gptjax.ops.activation import gelu_bwd, gelu_fwd, swiglu_bwd, swiglu_fwd
from gptjax.ops.attention import ATTENTION_IMPLEMENTATIONS, attention, attention_bwd, attention_fwd
from gptjax.ops.dropout import dropout_bwd, dropout_fwd
from gptjax.ops.embedding import embedding_bwd, embedding_fwd
from gptjax.ops.linear import linear_bwd, linear_fwd
from gptjax.ops.loss import IGNORE_INDEX, cross_entropy_bwd, cross_entropy_fwd, target_weights
from gptjax.ops.norm import layernorm_bwd, layernorm_fwd, rmsnorm_bwd, rmsnorm_fwd
from gptjax.ops.rotary import rotary_bwd, rotary_fwd

__all__ = [
    "ATTENTION_IMPLEMENTATIONS",
    "IGNORE_INDEX",
    "attention",
    "attention_bwd",
    "attention_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "dropout_bwd",
    "dropout_fwd",
    "embedding_bwd",
    "embedding_fwd",
    "gelu_bwd",
    "gelu_fwd",
    "layernorm_bwd",
    "layernorm_fwd",
    "linear_bwd",
    "linear_fwd",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "rotary_bwd",
    "rotary_fwd",
    "swiglu_bwd",
    "swiglu_fwd",
    "target_weights",
]
