import dataclasses
import json
from pathlib import Path

import yaml

from gptjax.bench import loop
from gptjax.config import Config, DataConfig, ModelConfig, TrainConfig
from gptjax.train import hooks, trainer
from tests.train.test_command import data_root  # noqa: F401


def test_only_the_last_contender_does_all_that_is_configured(data_root, monkeypatch, capsys):  # noqa: F811
    """All three take as many steps; validations, samples and records are counted."""
    made = {"validations": 0, "samples": 0}

    def sample_text(run, params, step):
        made["samples"] += 1
        return "text"

    evaluate = trainer.evaluate

    def counted(loss, params, batches):
        made["validations"] += len(batches) > 1
        return evaluate(loss, params, batches)

    monkeypatch.setattr(hooks, "sample_text", sample_text)
    monkeypatch.setattr(trainer, "evaluate", counted)
    folders = []
    monkeypatch.setattr(loop, "write_run_files", lambda run: folders.append(run.folder))
    model = ModelConfig(num_layers=1, num_heads=1, channels=8, vocab_size=4096, max_seq_len=8)
    train = TrainConfig(steps=99, eval_every=3, eval_tokens=64, sample_tokens=4)
    cfg = Config(model, DataConfig(root=str(data_root), batch_size=2, seq_len=8), train=train)
    with loop.contenders(cfg) as (bare, logging, everything):
        path = Path(folders[0]) / "metrics.jsonl"

        def after(contender):
            contender.run()
            return len(path.read_text().splitlines()), made["validations"], made["samples"]

        assert after(bare) == (0, 0, 0)
        assert after(logging) == (3, 0, 0)
        assert after(everything) == (6, 1, 1)
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
            4,
            5,
            6,
            7,
            8,
            9,
        ]
        assert not capsys.readouterr().out
    assert not path.exists()


def test_the_command(data_root, tmp_path, capsys, monkeypatch):  # noqa: F811
    from gptjax.bench import __main__ as command

    monkeypatch.setattr("gptjax.bench.timing.WARMUP", 1)
    config = tmp_path / "tiny.yaml"
    model = {"num_layers": 1, "num_heads": 1, "channels": 8, "vocab_size": 4096, "max_seq_len": 8}
    data = {"root": str(data_root), "batch_size": 2, "seq_len": 8}
    config.write_text(
        yaml.safe_dump(
            {"model": model, "data": data, "train": {"eval_every": 2, "eval_tokens": 16}}
        )
    )
    assert (
        command.main(
            [
                "--config",
                str(config),
                "--what",
                "loop",
                "--rounds",
                "1",
                "--json",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "2 steps of 16 tokens" in out
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "steps alone",
        "the loop, logging",
        "the loop, as configured",
    ]
    assert rows[0]["ratio"] == 1
    assert all(row["ms"] > 0 for row in rows)


def test_a_round_without_validations_is_the_whole_run():
    cfg = Config(ModelConfig(preset="124m"), train=TrainConfig(steps=7, eval_every=0))
    assert loop.steps_per_round(cfg) == 7
    assert loop.steps_per_round(dataclasses.replace(cfg, train=TrainConfig(eval_every=5))) == 5
