"""A run before its first step: what is decided, and what is kept."""

import dataclasses

import jax
import pytest
import yaml

from gptjax.config import Config, DataConfig, ModelConfig, TrainConfig
from gptjax.errors import CheckpointError, DataError
from gptjax.train.setup import claim_folder, resolved_config, restore, set_up, write_run_files

MODEL = ModelConfig(num_layers=1, num_heads=2, channels=8, vocab_size=257, max_seq_len=8)


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n" * 100)
    data = DataConfig(
        str(tmp_path / "text.txt"), str(tmp_path / "data"), "byte", batch_size=2, seq_len=8
    )
    with jax.enable_x64(False):
        yield Config(MODEL, data, train=TrainConfig(steps=3), runs=str(tmp_path / "runs"), name="r")


def test_every_auto_is_resolved_and_no_folder_made(cfg, tmp_path):
    run = set_up(cfg)
    model = resolved_config(run)["model"]
    assert model.pop("loss_chunks") == "auto"  # chosen for each batch by its size
    assert "auto" not in yaml.safe_dump(model)
    assert (run.shape, run.mesh, run.share) == ((1, 2, 8), None, (0, 1))
    assert run.next_batch().inputs.shape == (1, 2, 8)
    assert not (tmp_path / "runs").exists()


def test_the_folder_keeps_the_configuration_and_the_tokenizer(cfg, tmp_path):
    with claim_folder(set_up(cfg)) as run:
        write_run_files(run)
    assert run.folder == tmp_path / "runs" / "r"
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == resolved_config(run)
    assert (run.folder / "tokenizer.json").exists()


def test_a_folder_to_resume_must_hold_a_checkpoint(cfg):
    with claim_folder(set_up(cfg)) as run:
        write_run_files(run)
        assert restore(run._replace(cfg=dataclasses.replace(cfg, resume="auto"))) is None
        with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
            restore(run._replace(cfg=dataclasses.replace(cfg, resume=str(run.folder))))


def test_a_vocabulary_that_is_too_small_for_the_corpus_is_an_error(cfg):
    with pytest.raises(DataError, match="model.vocab_size is 100"):
        set_up(dataclasses.replace(cfg, model=dataclasses.replace(MODEL, vocab_size=100)))
