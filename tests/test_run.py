import pytest

from gptjax import tokenizers
from gptjax.errors import CheckpointError, ConfigError, DataError
from gptjax.run import prompt_ids, run_folder, start_jax
from tests.models import tiny


def test_a_new_run_never_takes_an_old_ones_folder(tmp_path):
    for expected in ("a", "a-2", "a-3"):
        folder = run_folder(tmp_path, "a", None)
        assert folder == tmp_path / expected
        folder.mkdir()
    assert run_folder(tmp_path, "a", "auto") == tmp_path / "a-3"
    assert run_folder(tmp_path, "b", "auto") == tmp_path / "b"
    (tmp_path / "a").rmdir()
    assert run_folder(tmp_path, "a", "auto") == tmp_path / "a-3"
    assert run_folder(tmp_path, "a", None) == tmp_path / "a-4"


def test_a_named_folder_must_be_a_runs(tmp_path):
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        run_folder(tmp_path, "a", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    assert run_folder(tmp_path, "a", str(tmp_path)) == tmp_path


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no such device")])
def test_a_platform_that_is_not_there(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr("jax.devices", fail)
    with pytest.raises(ConfigError, match="JAX cannot start: no such device; unset JAX_PLATFORMS"):
        start_jax(tiny.CONFIG)


def test_a_sample_always_has_an_id_to_start_from():
    byte, lines, words = tokenizers.byte(), tokenizers.Characters("\n!ab"), tokenizers.Characters("!ab")
    assert prompt_ids(None, "ab") == [0]
    assert [prompt_ids(t, "ab") for t in (byte, lines, words)] == [[97, 98], [2, 3], [1, 2]]
    assert [prompt_ids(t, "\n") for t in (byte, lines, words)] == [[10], [0], [0]]
    assert [prompt_ids(t, "") for t in (byte, lines, words)] == [[256], [0], [0]]


def test_a_prompt_that_the_vocabulary_lacks_is_an_error_before_training():
    with pytest.raises(DataError, match="'c' .* at position 2"):
        prompt_ids(tokenizers.Characters("!ab"), "abc")
