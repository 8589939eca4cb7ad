"""What a run prints before its first step."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from gptjax import tokenizers
from gptjax.config import Config, DataConfig
from gptjax.datasets.batches import BatchShape
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.train.report import describe, describe_memory
from tests.models import tiny


def run(mesh=None, tokenizer=None):
    """A run of a tiny model on 900 training tokens in two shards."""
    cfg = Config(model=tiny.config(dtype="float32"), data=DataConfig(order="random"))
    shards = [SimpleNamespace(tokens=np.zeros(n, np.uint16)) for n in (500, 400, 70)]
    corpus = SimpleNamespace(
        folder=Path("data/x"), sha256="0123456789abcdef" * 4, tokenizer=tokenizer
    )
    corpus.train, corpus.val = shards[:2], shards[2:]
    return SimpleNamespace(
        cfg=cfg,
        model=cfg.model,
        shape=BatchShape(3, 8, 6),
        corpus=corpus,
        mesh=mesh,
        folder=Path("runs/x"),
    )


def lines(text):
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_what_is_trained_on_what_and_where_it_is_kept():
    found = lines(describe(run()))
    # The pad rows
    count = sum(x.size for x in jax.tree.leaves(tiny.params(tiny.CONFIG))) - (128 - 11) * 8
    assert found["model"] == f"{count:,} parameters, 2 layers, 2 heads, 8 channels, vocabulary 11"
    assert (
        found["compute"]
        == "float32, attention materialised, layers unroll, recompute none, backward manual"
    )
    assert (
        found["corpus"] == "data/x, 900 training and 70 validation tokens, sha256 0123456789abcdef"
    )
    assert found["tokenizer"] == "unknown, so samples show ids: name it as --data.tokenizer"
    assert found["step"].startswith("144 tokens (3 x 8 x 6), random, ")
    assert found["run"] == f"runs/x, {Config(model=tiny.CONFIG).train.steps} steps, seed 0"
    assert "processes" not in found


def test_a_tokenizer_is_described_by_its_vocabulary():
    assert lines(describe(run(tokenizer=tokenizers.Characters("abc"))))["tokenizer"] == (
        "3 ids, fewer than the model's 11"
    )


def test_idle_devices_are_reported():
    idle = "7 more devices idle: --mesh.data -1 uses all"
    assert lines(describe(run()))["device"].endswith(idle)
    found = lines(describe(run(mesh=make_mesh(MeshConfig(data=8), tiny.CONFIG.axis_sizes, 8))))
    assert "idle" not in found["device"]
    assert found["mesh"] == "8 devices: data 8 x fsdp 1 x tensor 1"


def test_memory_is_described_in_parts_and_in_total():
    compiled = SimpleNamespace(
        memory={"parameters": 1500, "gradients": 2_000_000}, native_code=False
    )
    expected = "memory     2.002 MB predicted: parameters 1.5 KB, gradients 2 MB; compiled in 1.2 s"
    assert describe_memory(compiled, 1.24) == expected
    assert (
        describe_memory(SimpleNamespace(memory=compiled.memory, native_code=True), 1.24)
        == f"{expected}, AdamW in C++"
    )
