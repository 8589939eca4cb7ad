"""Draw the README's pictures beside this file, from a run: ``python notebooks/images/draw.py RUN``.

Those that are here are of ``python -m gptjax.train --config configs/shakespeare-char.yaml``.
"""

import sys
from pathlib import Path

import jax
import numpy as np

import gptjax
from gptjax.plot.figures import block_diagram, by_layer, heat_map, plt, use_style
from gptjax.plot.runs import RunRecords, draw
from gptjax.train.metrics import read_records

HERE = Path(__file__).parent
TEXT = "ROMEO:\nBut, soft! what light through yonder window breaks?\n"


def loss_curve(run: Path) -> None:
    """Training and validation loss."""
    records = read_records(run / "metrics.jsonl")
    losses = [
        {k: r[k] for k in ("step", "loss", "val_loss") if k in r} for r in records
    ]
    draw([RunRecords(run.name, losses)]).savefig(HERE / "loss.png", dpi=110)


def gradient(run: Path) -> None:
    """The norm of each tensor's gradient by layer, at the run's parameters, on one text."""
    model = gptjax.load(str(run))
    by_hand = model.grad(TEXT)
    by_jax = jax.grad(gptjax.loss)(model.params, model.batch(TEXT), model.cfg)
    found = gptjax.compare(by_hand, by_jax)
    values, tensors, layers = by_layer(found, lambda row: row.norm)
    figure, axes = plt.subplots(figsize=(8, 4.6))
    heat_map(
        axes,
        values,
        "L2 norm of the gradient",
        rows=tensors,
        columns=layers,
        log=True,
        limits=(1e-3, float(np.nanmax(values))),
    )
    axes.set_xlabel("layer")
    worst = max(row.relative_l2 for row in found.rows)
    axes.set_title(f"backward by hand; at most {worst:.0e} from jax.grad in float32")
    figure.savefig(HERE / "gradient.png", dpi=130)


def block() -> None:
    """One block of GPT-2, forward and backward."""
    block_diagram(backward=True).savefig(HERE / "block.png", dpi=130)


if __name__ == "__main__":
    use_style()
    loss_curve(Path(sys.argv[1]))
    gradient(Path(sys.argv[1]))
    block()
