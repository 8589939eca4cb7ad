import dataclasses
import html.parser
import math

import jax.numpy as jnp

from gptjax.verify import Report, compare
from gptjax.verify.html import as_html
from gptjax.verify.ops import OpError

OURS = {"w": (jnp.ones(2), jnp.ones(2) * 2), "<b>": jnp.ones(3)}


def page(ours=OURS, **changes):
    report = Report(
        compare(ours, OURS),
        ops=(OpError("gelu", 0, 1, 0, 1),),
        environment={"device": "cpu & co"},
        **changes,
    )
    return as_html(report), report


class Reader(html.parser.HTMLParser):
    """Fails where tags do not nest; keeps the tags' attributes and the text."""

    VOID = ("meta", "!doctype")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):  # noqa: D102
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):  # noqa: D102
        assert self.open.pop() == tag

    def handle_data(self, data):  # noqa: D102
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_well_formed_and_self_contained():
    text, report = page()
    reader = read(text)
    assert report.closing in reader.text
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    assert "url(" not in text
    assert "//" not in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert {"<b>", "cpu & co", "gelu"} <= set(reader.text)


def test_the_heat_map_has_a_field_for_each_tensor_and_layer():
    text, _ = page({"w": (OURS["w"][0] * (1 + 1e-15), OURS["w"][1]), "<b>": OURS["<b>"]})
    fields = [attrs["title"] for tag, attrs in read(text).tags if tag == "td" and "title" in attrs]
    assert [field.split(":")[0] for field in fields] == ["w[0]", "w[1]", "<b>[None]"]
    assert "exact" in read(text).text
    assert f"{math.log10(1.11e-15):.1f}" in read(text).text


def test_what_is_wrong_is_marked():
    text, report = page({"w": (OURS["w"][0], OURS["w"][1] + 1), "<b>": OURS["<b>"] * jnp.nan})
    assert not report
    wrong = [
        attrs.get("title")
        for tag, attrs in read(text).tags
        if tag == "td" and attrs.get("class") == "bad"
    ]
    assert [title.split(":")[0] for title in wrong if title] == ["w[1]", "<b>[None]"]
    assert ("div", {"class": "verdict bad"}) in read(text).tags
    assert "nan" in read(text).text


def test_relaxed_tolerances_are_told():
    _, report = page(OURS)
    pages = [as_html(dataclasses.replace(report, relaxed=relaxed)) for relaxed in (False, True)]
    assert ["moves by one unit in the last place" in page for page in pages] == [False, True]
