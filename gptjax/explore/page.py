"""The page: one HTML file that holds its style, its script and its data, and fetches nothing."""

import json
from pathlib import Path
from string import Template
from typing import Any

from gptjax.files import read_text

LARGEST = 1 << 20  # bytes of a part of the page


def page(title: str, heading: str, data: dict[str, Any]) -> str:
    """The whole page as HTML.

    Args:
        title: the window's title.
        heading: the first line of the page.
        data: what `gptjax.explore.scene.scene` computed, with ``tokens``, ``facts`` and ``made``.

    """
    folder = Path(__file__).parent
    text = {kind: read_text(folder / f"page.{kind}", LARGEST) for kind in ("html", "css", "js")}
    # Escaped so that no text in the data can end the script element.
    content = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return Template(text["html"]).substitute(
        title=title, heading=heading, css=text["css"], script=text["js"], data=content
    )
