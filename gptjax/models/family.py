"""What a model family is.

A family is a module with a weight table and pairs of forward and backward. Everything else is a
function of those: the network and its gradient (`gptjax.models.transformer`), decoding,
initialisation, counts, sharding, checkpoints, plans. `Family` is the interface, `FAMILIES` the
registry.
"""

from typing import Any, Literal, NamedTuple, Protocol

from gptjax.config import Architecture, ModelConfig
from gptjax.errors import ConfigError


class Weight(NamedTuple):
    """One row of a family's table of weights."""

    axes: tuple[str, ...]
    """Logical axes, by their letters in the legend of `gptjax.ops`."""
    kind: Literal["matrix", "table", "vector"]
    """A matrix multiplies activations, a table is looked up, a vector is added or multiplies
    element by element.
    """
    init: Literal["normal", "residual", "zeros", "ones"]
    """N(0, 0.02^2); the same divided by sqrt(2 L), for projections into the residual stream; or
    constant.
    """
    inputs: int = 1
    """How many of a matrix's first axes are inputs."""


class Family(Protocol):
    """What every family module offers.

    ``params`` is a NamedTuple with one entry ``blocks``: the layers, each a NamedTuple of its own,
    in a tuple where layers are unrolled, or in one with stacked arrays, (L, ...), where they are
    scanned. The rest is outside the blocks.
    """

    Params: Any
    """The class of all weights; its field ``blocks`` holds the layers."""
    Block: Any
    """The class of one layer's weights."""
    HEAD: str
    """The field of ``Params`` that is the classifier's matrix, (Vp, C): a table, or a weight of its
    own.
    """

    def weights(self, cfg: Architecture) -> Any:
        """``Params`` of `Weight`; ``blocks`` is one layer's ``Block`` of them."""

    def embed_fwd(self, params: Any, tokens: Any, positions: Any, cfg: ModelConfig) -> Any:
        """(B, T) ids and (T) or (B, T) positions -> (B, T, C), the residual stream in the compute
        dtype.
        """

    def embed_bwd(
        self, params: Any, tokens: Any, positions: Any, dhead: Any, dx: Any
    ) -> dict[str, Any]:
        """Gradients of the tables by name; ``dhead``, the gradient of the classifier's matrix, is
        included.
        """

    def block_fwd(
        self, w: Any, x: Any, positions: Any, cfg: ModelConfig, attend: Any, key: Any
    ) -> Any:
        """(y, saved) of one layer, with all that `block_bwd` needs in ``saved``, a NamedTuple.

        ``attend(q, k, v) -> (o, saved)`` says what the queries look at: the sequence itself in
        training, a cache in decoding. What it saves, in decoding the updated cache, is kept in
        ``saved.att``; None where there is no attention. ``key`` turns dropout on.
        """

    def block_bwd(
        self, w: Any, saved: Any, dx: Any, positions: Any, cfg: ModelConfig, attend_bwd: Any
    ) -> Any:
        """(dx, dw) of `block_fwd`."""

    def discard(self, saved: Any) -> Any:
        """``saved`` without what `recompute` computes again: the setting ``recompute gelu``.

        In the forward that array carries `jax.ad_checkpoint.checkpoint_name` `RECOMPUTED`.
        """

    def recompute(self, saved: Any, dx: Any, cfg: ModelConfig) -> Any:
        """`discard` undone, once ``dx``, the gradient of the block's output, is there."""

    def norm_fwd(self, params: Any, x: Any) -> Any:
        """(h, saved) of the final norm."""

    def norm_bwd(self, params: Any, saved: Any, dh: Any) -> tuple[Any, dict[str, Any]]:
        """(dx, gradients of its weights by name) of `norm_fwd`."""


RECOMPUTED = "recomputed"


def family_of(cfg: Architecture) -> Any:
    """The module of a configuration's family.

    Raises:
        ConfigError: there is none of that name.

    """
    from gptjax.models import FAMILIES

    if cfg.family not in FAMILIES:
        raise ConfigError(
            f"model.family {cfg.family!r} is not known: choose one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[cfg.family]
