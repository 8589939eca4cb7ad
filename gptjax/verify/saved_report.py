"""Saved reports: JSON and a web page, with the environment of the check."""

import dataclasses
import hashlib
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import yaml

from gptjax.errors import naming
from gptjax.verify.html import as_html
from gptjax.verify.ops import OpError
from gptjax.verify.proof import Report
from gptjax.verify.rows import Comparison, Row


def environment(settings: Any) -> dict[str, str]:
    """The device, versions, XLA's flags, and a hash of the configuration ``settings``."""
    versions = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    text = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=True)
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").strip() or "none",
        "config": f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}",
    }


def write_report(
    report: Report, json_file: str | Path | None, html_file: str | Path | None
) -> None:
    """Write the report to the given files.

    Raises:
        OSError: a file cannot be written; the error names it.

    """
    for path, text in (
        (json_file, lambda: json.dumps(as_json(report), indent=1)),
        (html_file, lambda: as_html(report)),
    ):
        if path:
            with naming(path):
                Path(path).write_text(text() + "\n", encoding="utf-8")


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data; a non-finite number becomes text, such as ``"nan"``."""

    def plain(x: Any) -> Any:
        if isinstance(x, Comparison):
            return {"ok": bool(x), "rows": [row._asdict() | {"ok": row.ok} for row in x.rows]}
        if isinstance(x, Row | OpError):
            return x._asdict() | {"ok": x.ok}
        return x

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [finite(value) for value in x]
        return str(x) if isinstance(x, float) and not math.isfinite(x) else x

    return finite(
        {
            "ok": bool(report),
            "closing": report.closing,
            "reference": report.reference,
            "relaxed": report.relaxed,
            "mismatch": report.mismatch._asdict() if report.mismatch else None,
            "gradient": plain(report.gradient),
            "forward": plain(report.forward),
            "hessian_vector_product": plain(report.curvature),
            "ops": [plain(op) for op in report.ops],
            "environment": report.environment,
        }
    )
