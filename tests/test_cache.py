import jax
import pytest

from gptjax.cache import compiled_folder, processor


@pytest.fixture
def unset():
    """JAX keeps no programs."""
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", kept)


def test_each_processor_has_a_folder_in_the_users_cache(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled_folder()
    assert first.is_dir()
    assert first.parent == tmp_path / "gptjax"
    assert processor() in first.name
    monkeypatch.setattr("gptjax.cache.processor", lambda: "another")
    assert compiled_folder() == tmp_path / "gptjax" / "compiled-another"


def test_where_jax_keeps_its_programs_is_where_all_is_kept(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "here"))
    assert compiled_folder() == tmp_path / "here"
    assert compiled_folder().is_dir()


def test_what_is_kept_far_away_is_jaxs_alone(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/folder")
    assert compiled_folder().parent == tmp_path / "gptjax"


def test_a_folder_that_cannot_be_made_is_an_error(unset, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(OSError, match="/dev/null"):
        compiled_folder()
