import json
import re

import pytest

from gptjax.explore.page import page
from tests.conftest import ROOT
from tests.verify.test_html import read


@pytest.fixture(scope="module")
def text(shown):
    return page("title", "A heading", shown.scene)


def test_the_page_is_well_formed(text):
    tags = read(text).tags
    assert text.startswith("<!doctype html>")
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in tags:
        assert set(attrs.get("aria-labelledby", "").split()) <= set(ids)


def test_it_fetches_nothing(text):
    """No address, and no element or rule that loads something."""
    tags = {tag for tag, _ in read(text).tags}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "source"}
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import|\bimport\b.*from|src=", text)
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon", text)


def test_it_holds_the_data_as_it_was_given(text, shown):
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert json.loads(content) == json.loads(json.dumps(shown.scene))


def test_no_text_can_end_the_script():
    text = page("t", "h", {"tokens": ["</script><script>alert(1)</script>"]})
    assert text.count("</script>") == 2
    assert len(read(text).tags) == len(read(page("t", "h", {})).tags)


def test_it_is_light_and_dark(text):
    assert 'data-theme="dark"' in text
    assert "prefers-color-scheme: dark" in text
    assert "prefers-reduced-motion" in text


def test_it_is_small(text):
    assert len(text.encode()) < 1_000_000


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_pages_beside_the_notebooks_are_whole(family):
    text = (ROOT / "notebooks" / f"backward-{family}.html").read_text("utf-8")
    read(text)
    assert not re.search(r"https?:|url\(|@import|src=", text)
    assert len(text.encode()) < 1_000_000
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    data = json.loads(content)
    ops = {"gpt2": {"layernorm", "gelu"}, "llama": {"rmsnorm", "rotary", "swiglu"}}[family]
    assert ops <= set(data["lessons"])
    assert max(tensor["error"] for tensor in data["tensors"]) < -14
    assert all(fault["wrong"] for fault in data["faults"])
