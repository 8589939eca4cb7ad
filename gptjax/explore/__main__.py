"""Write a page that shows a model's backward on a text: ``python -m gptjax.explore --checkpoint
runs/debug --text "..." --out page.html``.

The page is one file that opens from disk and fetches nothing. It draws the network as a diagram,
forward to the right and backward to the left. Each op opens to its equation, its derivation, its
code, its activations and gradients on the text, and its error against jax.grad. Known errors can be
planted, to see how far the damage spreads and what the verifier says. Everything is computed by the
package's own code, in float64, when the page is written.

Without --config and --checkpoint the model has the size of configs/debug.yaml. Use small models:
the page grows with the number of layers.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import cli, tokenizers
from gptjax.cli.options import parse
from gptjax.config import ExploreConfig, ModelConfig
from gptjax.convert.weights import load_params, open_weights
from gptjax.errors import ConfigError, DataError
from gptjax.explore.page import page
from gptjax.explore.scene import scene
from gptjax.files import write_whole
from gptjax.models.batch import Batch
from gptjax.models.params import num_params
from gptjax.tokenizers import Tokenizer
from gptjax.train.metrics import human_bytes
from gptjax.train.setup import set_up
from gptjax.verify.model import noisy_params
from gptjax.xla.backend import platform_name, start_jax
from gptjax.xla.cache import enable_compilation_cache

PROG = "python -m gptjax.explore"
MOST_TOKENS = 48  # each is a row in the pictures
SMALL = ["--model.num_layers=2", "--model.num_heads=4", "--model.channels=64"]
SMALL += ["--model.max_seq_len=128"]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    with cli.reported_errors(PROG, less="give a shorter text"):
        given = sys.argv[1:] if argv is None else argv
        if not any(arg.startswith(("--config", "--model")) for arg in given):
            given = [*SMALL, *given]
        cfg, _ = parse(ExploreConfig, PROG, __doc__ or "", given)
        enable_compilation_cache()
        cli.quiet_libraries()
        check_writable(Path(cfg.out))
        jax.config.update("jax_enable_x64", True)
        start_jax("float64")
        model, params, tokenizer = open_model(cfg)
        ids, batch = read(cfg.text, tokenizer, model)
        print("computing both passes, and the backward with each error planted", file=sys.stderr)
        with jax.default_matmul_precision("highest"):
            found = scene(model, params, batch)
        data = found | {
            "tokens": [tokenizer.decode([i]) for i in ids],
            "facts": facts(cfg, model, found),
            "made": f"Written by {PROG} with gptjax {version()} and jax {jax.__version__}. Every "
            "number, picture and verdict was computed by the package's own code; the code shown is "
            "the code that ran.",
        }
        family = {"gpt2": "GPT-2", "llama": "Llama"}.get(model.family, model.family)
        heading = f"{family}\N{RIGHT SINGLE QUOTATION MARK}s backward pass, derived by hand"
        content = page(f"{heading} \N{MIDDLE DOT} gptjax", heading, data).encode()
        with write_whole(Path(cfg.out)) as file:
            file.write(content)
        print(f"wrote {cfg.out}, {human_bytes(len(content))}: {len(found['nodes'])} ops, ", end="")
        print(f"{len(found['faults'])} errors planted; open it in a browser")
    return 0


def version() -> str:
    """The package's version."""
    import gptjax

    return gptjax.__version__


def check_writable(path: Path) -> None:
    """Check, before anything is computed, that the page can be written.

    Raises:
        ConfigError: it is a folder, or lies in one that does not exist or may not be written to.

    """
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: permission denied")


def open_model(cfg: ExploreConfig) -> tuple[ModelConfig, Any, Tokenizer]:
    """(the model as the page shows it, its parameters in float64, the tokenizer of the text).

    Raises:
        GptjaxError: the checkpoint, the corpus or the tokenizer cannot be read.

    """
    if cfg.checkpoint is None:
        run = set_up(cfg)
        model, tokenizer = shown(run.model), run.corpus.tokenizer or tokenizers.gpt2()
        key = jax.random.key(cfg.seed)
        params = jax.jit(lambda: noisy_params(key, model))()
    else:
        source = open_weights(cfg.checkpoint)
        which = cfg.data.tokenizer
        found = tokenizers.find(which) if which else source.tokenizer
        if found is None:
            raise ConfigError(
                f"{cfg.checkpoint} has no tokenizer"
                + (f" ({source.note})" if source.note else "")
                + ": give --data.tokenizer gpt2, byte or a tokenizer file"
            )
        model, tokenizer = shown(source.cfg), found
        params = load_params(source, model)
    return model, jax.tree.map(lambda x: x.astype(jnp.float64), params), tokenizer


def shown(model: ModelConfig) -> ModelConfig:
    """The model in float64, without dropout, with settings that make every op a call of its own."""
    return dataclasses.replace(
        model,
        dropout=0.0,
        dropout_mlp=0.0,
        dtype="float64",
        attention="materialised",
        layers="unroll",
        recompute="none",
        loss_chunks=1,
    ).resolve(platform_name(), min(MOST_TOKENS, model.max_seq_len))


def read(text: str, tokenizer: Tokenizer, model: ModelConfig) -> tuple[list[int], Batch]:
    """(ids of a text, the batch of one sequence in which each predicts the next).

    Raises:
        DataError: the text has fewer than two tokens, or one outside the model's vocabulary.

    """
    ids = tokenizer.encode(text)[: min(MOST_TOKENS, model.max_seq_len) + 1]
    if len(ids) < 2:
        raise DataError(f"text {text!r} has {len(ids)} tokens: give one of at least 2")
    if max(ids) >= model.vocab_size:
        raise DataError(
            f"text {text!r} has the id {max(ids)}, but the model's vocabulary is "
            f"{model.vocab_size}: give --data.tokenizer the one it was trained with"
        )
    row = jnp.asarray(np.asarray(ids, np.int32))[None]
    return ids, Batch(row[:, :-1], row[:, 1:])


def facts(cfg: ExploreConfig, model: ModelConfig, found: dict[str, Any]) -> dict[str, str]:
    """The facts at the top of the page, by name."""
    tensors = found["tensors"]
    worst = 10 ** max(tensor["error"] for tensor in tensors)
    sizes = f"{model.num_layers} layers, {model.num_heads} heads, {model.channels} channels"
    weights = Path(cfg.checkpoint).absolute().name if cfg.checkpoint else "random"
    return {
        "Model": f"{num_params(model):,} parameters, {sizes}",
        "Weights": weights,
        "Loss on the text": f"{found['loss']:.3f} nats a token",
        "Gradient against jax.grad": f"{len(tensors)} tensors, error at most {worst:.0e}",
    }


if __name__ == "__main__":
    sys.exit(main())
