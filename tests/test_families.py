"""A family that the package does not know goes through every command: nothing in the package
changes for it.

Its gradient on a mesh, the figures of its plan, and its proof have tests beside GPT-2's:
tests/parallel/test_sharding.py, tests/plan/test_predict.py and tests/verify/test_references.py.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from gptjax.convert import __main__ as convert
from gptjax.convert.weights import load_weights
from gptjax.evaluate import __main__ as evaluate
from gptjax.generate import __main__ as generate
from gptjax.models import transformer
from gptjax.models.decode import decode, prefill, store_for_decoding
from gptjax.models.params import unstack
from gptjax.plan import __main__ as plan
from gptjax.train import __main__ as train
from tests.models import mlp_family, tiny

TEXT = "".join(f"The cat number {n} sat on the mat, and the dog saw it.\n" for n in range(200))
CONFIG = {
    "model": {
        "family": "mlp",
        "num_layers": 2,
        "num_heads": 2,
        "channels": 16,
        "vocab_size": 257,
        "max_seq_len": 32,
        "dtype": "float64",
        "dropout": 0.1,
    },
    "data": {"batch_size": 8, "seq_len": 16, "tokenizer": "byte"},
    "optim": {"learning_rate": 1e-2, "warmup_steps": 1},
    "train": {
        "steps": 4,
        "eval_every": 2,
        "eval_tokens": 64,
        "sample_tokens": 4,
        "checkpoint_every": 2,
        "verify_every": 3,
    },
}


@pytest.fixture(scope="module", autouse=True)
def family():
    with mlp_family.registered() as name:
        yield name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the text, the configuration, and ``runs/mlp``, which trained to its end."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "text.txt").write_text(TEXT)
    (folder / "mlp.yaml").write_text(yaml.safe_dump(CONFIG))
    trained(folder)
    return folder


def trained(folder, *args):
    where = [
        "--data.dataset",
        folder / "text.txt",
        "--data.root",
        folder / "data",
        "--runs",
        folder / "runs",
    ]
    assert train.main([str(x) for x in ("--config", folder / "mlp.yaml", *where, *args)]) == 0


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [[record[key] for key in ("loss", "grad_norm")] for record in records(run)]


def weights(checkpoint):
    """Its arrays, whatever the layout of the layers."""
    return jax.tree.leaves(unstack(load_weights(str(checkpoint))[1]))


def test_it_trains_and_its_live_gradient_is_checked(folder):
    found = records(folder / "runs" / "mlp")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert found[0]["loss"] == pytest.approx(np.log(257), rel=0.05)
    assert found[-1]["val_loss"] < found[0]["loss"] - 0.1
    assert found[2]["gradient_error"] < 1e-6


def test_it_resumes_from_its_checkpoint_bit_for_bit(folder):
    whole, again = folder / "runs" / "mlp", folder / "resumed"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    trained(folder, "--resume", again)
    assert losses(again) == losses(whole)
    for one, other in zip(weights(again), weights(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_it_trains_alike_on_eight_devices(folder):
    trained(
        folder,
        "--name",
        "mesh",
        "--mesh.data",
        2,
        "--mesh.fsdp",
        2,
        "--mesh.tensor",
        2,
        "--model.layers",
        "scan",
    )
    np.testing.assert_allclose(
        losses(folder / "runs" / "mesh"), losses(folder / "runs" / "mlp"), rtol=1e-5
    )


def test_it_is_planned(folder, capsys):
    assert (
        plan.main(
            [
                "--config",
                str(folder / "mlp.yaml"),
                "--topology",
                "h100:8",
                "--mesh.fsdp",
                "8",
                "--predict",
            ]
        )
        == 0
    )
    assert "parameters" in capsys.readouterr().out


def test_its_cached_logits_equal_uncached_ones(family):
    cfg = tiny.config(family=family)
    params, tokens, padding = (
        tiny.params(cfg),
        tiny.batch(cfg, B=2, T=5).inputs,
        jnp.zeros(2, jnp.int32),
    )
    expected = jax.jit(transformer.logits, static_argnames="cfg")(params, tokens, cfg=cfg)
    weights = store_for_decoding(params, cfg)
    logits, cache = jax.jit(prefill, static_argnames=("slots", "cfg"))(
        weights, tokens[:, :3], padding, slots=8, cfg=cfg
    )
    np.testing.assert_allclose(logits, expected[:, 2], rtol=1e-12, atol=1e-14)
    for at in (3, 4):
        step = jax.jit(decode, static_argnames="cfg")
        logits, cache = step(weights, tokens[:, at], padding, cache, jnp.int32(at), cfg=cfg)
        np.testing.assert_allclose(logits, expected[:, at], rtol=1e-12, atol=1e-14)


def test_it_becomes_safetensors_and_both_forms_write_and_score_the_same(folder, capsys):
    run, file, figures = (
        folder / "runs" / "mlp",
        folder / "mlp.safetensors",
        folder / "figures.json",
    )
    assert convert.main([str(run), str(file)]) == 0
    for one, other in zip(weights(file), weights(run), strict=True):
        np.testing.assert_array_equal(one, other)
    texts, scores = [], []
    for checkpoint in map(str, (run, file)):
        tokenizer = [] if checkpoint == str(run) else ["--tokenizer", "byte"]
        capsys.readouterr()
        prompt = ["--prompt", "The cat", "--max_new_tokens", "8", "--json"]
        assert generate.main(["--checkpoint", checkpoint, *prompt, *tokenizer]) == 0
        texts.append(json.loads(capsys.readouterr().out)["ids"])
        data = [
            "--dataset",
            str(folder / "text.txt"),
            "--root",
            str(folder / "data"),
            "--tokens",
            "64",
            "--seq_len",
            "16",
        ]
        figures.unlink(missing_ok=True)
        assert (
            evaluate.main(["--checkpoint", checkpoint, *data, *tokenizer, "--json", str(figures)])
            == 0
        )
        scores.append(json.loads(figures.read_text())["loss"])
    assert len(texts[0]) == 8
    assert texts[0] == texts[1]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert scores[0] == pytest.approx(records(run)[-1]["val_loss"], rel=1e-5)
