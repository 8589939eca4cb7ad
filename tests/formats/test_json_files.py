import pytest

from gptjax.errors import FormatError
from gptjax.formats import json_files
from gptjax.formats.json_files import read_object


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"ü": [1, null]}', "utf-8")
    assert read_object(tmp_path / "a.json") == {"ü": [1, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"a": "' + b"x" * 100 + b'"}', "more than the 99 bytes that are read"),
        (None, "cannot be read: No such file"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(tmp_path, monkeypatch, content, message):
    if content is not None and len(content) < 1000:
        monkeypatch.setattr(json_files, "LARGEST", 99)
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        read_object(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
