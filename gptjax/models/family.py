"""The interface of a model family.

A family is a module with a weight table and pairs of forward and backward. Everything else derives
from those: the network and its gradient (`gptjax.models.transformer`), decoding, initialisation,
counts, sharding, checkpoints, plans. `Family` is the interface, `FAMILIES` the registry.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

from gptjax.config import Architecture, ModelConfig
from gptjax.errors import ConfigError


class Weight(NamedTuple):
    """One row of a family's table of weights."""

    axes: tuple[str, ...]
    """Logical axes, as letters of the legend in `gptjax.ops`."""
    kind: Literal["matrix", "table", "vector"]
    """A matrix multiplies activations; a table is looked up; a vector acts elementwise."""
    init: Literal["normal", "residual", "zeros", "ones"]
    """N(0, 0.02^2), for projections into the residual stream divided by sqrt(2 L); or constant."""
    inputs: int = 1
    """The number of a matrix's leading input axes."""


class Family(Protocol):
    """The functions and names of every family module.

    ``params`` is a NamedTuple. Its entry ``blocks`` holds the layers: a tuple of one `Block` per
    layer when they are unrolled, a single `Block` of stacked (L, ...) arrays when they are scanned.
    The other entries are the weights outside the blocks.
    """

    Params: Any
    """The class of all weights; its field ``blocks`` holds the layers."""
    Block: Any
    """The class of one layer's weights."""
    OPTIONS: tuple[str, ...]
    """The options of the architecture, among `OPTIONAL`, that the family reads."""

    def weights(self, cfg: Architecture) -> Any:
        """A ``Params`` of `Weight`, whose ``blocks`` is a single layer's ``Block``.

        A field that this configuration does not use is None.
        """

    def head_name(self, cfg: Architecture) -> str:
        """The field of ``Params`` that is the classifier's matrix, (Vp, C), tied or untied."""

    def embed_fwd(self, params: Any, tokens: Any, positions: Any, cfg: ModelConfig) -> Any:
        """(B, T) ids, (T) or (B, T) positions -> (B, T, C) residual stream in the compute dtype."""

    def embed_bwd(
        self, params: Any, tokens: Any, positions: Any, dhead: Any, dx: Any
    ) -> dict[str, Any]:
        """Gradients by name of the tables and the classifier, whose own gradient is ``dhead``."""

    def block_fwd(
        self, w: Any, x: Any, positions: Any, cfg: ModelConfig, attend: Any, key: Any
    ) -> Any:
        """(y, saved) of one layer; ``saved`` is a NamedTuple of everything `block_bwd` needs.

        ``attend(q, k, v) -> (o, saved)`` attends to the sequence itself in training, to a cache in
        decoding. ``saved.att`` holds what it saves (in decoding, the updated cache), or None
        without attention. ``key`` turns dropout on.
        """

    def block_bwd(
        self, w: Any, saved: Any, dx: Any, positions: Any, cfg: ModelConfig, attend_bwd: Any
    ) -> Any:
        """(dx, dw) of `block_fwd`."""

    def discard(self, saved: Any) -> Any:
        """Drop from ``saved`` what `recompute` recomputes, under the setting ``recompute gelu``.

        The forward labels that array `RECOMPUTED` with `jax.ad_checkpoint.checkpoint_name`.
        """

    def recompute(self, saved: Any, dx: Any, cfg: ModelConfig) -> Any:
        """Undo `discard` once ``dx``, the gradient of the block's output, is available."""

    def norm_fwd(self, params: Any, x: Any, cfg: ModelConfig) -> Any:
        """(h, saved) of the final norm."""

    def norm_bwd(self, params: Any, saved: Any, dh: Any) -> tuple[Any, dict[str, Any]]:
        """(dx, gradients of its weights by name) of `norm_fwd`."""


RECOMPUTED = "recomputed"
OPTIONAL = ("num_kv_heads", "rope_theta", "norm_eps", "tied")
"""Options of the architecture that only some families read."""


def family_of(cfg: Architecture) -> Any:
    """The module of a configuration's family.

    Raises:
        ConfigError: the family is unknown.

    """
    from gptjax.models import FAMILIES

    if cfg.family not in FAMILIES:
        raise ConfigError(
            f"model.family {cfg.family!r} is not known: choose one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[cfg.family]


def check_options(cfg: Architecture) -> None:
    """Refuse options that the family does not read.

    Raises:
        ConfigError: one differs from its default.

    """
    defaults = {field.name: field.default for field in dataclasses.fields(Architecture)}
    defaults["num_kv_heads"] = cfg.num_heads
    for name in set(OPTIONAL) - set(family_of(cfg).OPTIONS):
        if getattr(cfg, name) != defaults[name]:
            raise ConfigError(
                f"model.{name} {getattr(cfg, name)} does not apply to model.family {cfg.family}, "
                f"which always has {defaults[name]}: leave it out"
            )
