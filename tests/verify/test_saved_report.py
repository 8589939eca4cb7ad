import json

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import ModelConfig
from gptjax.verify import Report, compare
from gptjax.verify.ops import OpError
from gptjax.verify.saved_report import as_json, environment, write_report
from gptjax.verify.trace import Mismatch

RIGHT = {"w": (jnp.ones((2, 3)), jnp.ones((2, 3)))}


def report(factor=1.0):
    found = compare(jax.tree.map(lambda x: x * factor, RIGHT), RIGHT)
    return Report(
        found,
        found,
        ops=(OpError("gelu", 0.0, 1.0, 0.0, 1.0),),
        mismatch=Mismatch("layer 0, gelu", "what", 0.5),
    )


def test_json_holds_every_row():
    data = json.loads(json.dumps(as_json(report()), allow_nan=False))
    assert data["ok"] is True
    rows = data["gradient"]["rows"]
    assert [(row["tensor"], row["layer"], row["shape"], row["ok"]) for row in rows] == [
        ("w", 0, [2, 3], True),
        ("w", 1, [2, 3], True),
    ]
    assert data["ops"][0]["op"] == "gelu"
    assert data["mismatch"]["place"] == "layer 0, gelu"


def test_json_says_so_where_a_number_is_none():
    data = json.loads(json.dumps(as_json(report(jnp.nan)), allow_nan=False))
    assert data["ok"] is False
    assert data["gradient"]["rows"][0]["relative_l2"] == "nan"


def test_files_are_written_and_a_full_disk_is_named(tmp_path):
    write_report(report(), tmp_path / "r.json", tmp_path / "r.html")
    assert json.loads((tmp_path / "r.json").read_text())["ok"]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    with pytest.raises(OSError, match="nowhere"):
        write_report(report(), tmp_path / "nowhere" / "r.json", None)


def test_environment_tells_configurations_apart():
    here = environment(ModelConfig(preset="124m"))
    assert here["versions"].startswith(f"jax {jax.__version__}, jaxlib ")
    assert "optimization_level" in here["XLA_FLAGS"]
    assert here == environment(ModelConfig(preset="124m"))
    assert here["config"] != environment(ModelConfig(preset="350m"))["config"]
