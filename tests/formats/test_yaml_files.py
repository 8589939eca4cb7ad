import pytest
import yaml

from gptjax.errors import FormatError
from gptjax.formats.yaml_files import AliasError, load, read_mapping


def test_plain_values_as_jsonargparse_reads_them():
    assert load("a: 1e-3\nb: {c: [1, yes, null]}\nd: 2001-01-01") == {
        "a": 1e-3,
        "b": {"c": [1, True, None]},
        "d": "2001-01-01",
    }
    # A name that nobody uses; the key in another section
    assert load("a: &name 1\nb: {a: 2}") == {"a": 1, "b": {"a": 2}}
    assert load("") is None


@pytest.mark.parametrize("text", ["[&a 1, *a]", "&a [*a]", "a: &a {b: 1}\nc: {<<: *a}"])
def test_an_alias_is_refused(text):
    with pytest.raises(AliasError, match="on line 1 is used again by an alias"):
        load(text)


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "b: {a: 1, a: 2}", "[" * 17 + "1" + "]" * 17, "9" * 5000, "a: b: c"]
)
def test_what_else_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        load(text)


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b"a: b: c", b"# nothing"])
def test_a_file_holds_a_mapping(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(FormatError, match=r"a\.yaml"):
        read_mapping(tmp_path / "a.yaml")
