import contextlib
import io
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console
from rich.progress import Progress

from gptjax.errors import FormatError
from gptjax.train.metrics import (
    Display,
    Meter,
    MetricsFile,
    format_step,
    human_bytes,
    peak_flops,
    read_records,
)
from gptjax.train.optimizer import StepMetrics

RECORD = {
    "step": 7,
    "loss": 4.1234,
    "grad_norm": 1.02,
    "lr": 6e-4,
    "ms": 612.34,
    "tokens_per_s": 418.2,
}


def test_one_object_a_step_and_null_for_what_is_not_finite(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.write({"step": 1, "loss": 2.5})
    file.write({"step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    lines = (tmp_path / "m.jsonl").read_text().splitlines()  # on disk before the file is closed
    file.close()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": None, "grad_norm": None},
    ]


def test_resuming_drops_later_records_and_a_truncated_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = MetricsFile(path, 2)
    file.write({"step": 3, "again": True})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


@pytest.mark.parametrize("cut", ["", '{"step": 4, "lo', '{"step": 4', "\0\0", '{"st\xff'])
def test_records_are_read_while_a_line_is_being_written(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 3, "loss": 7}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 1.5}\n'
        + cut
    )
    assert read_records(path) == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 1.5},
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "x",
        "[1]",
        "7",
        "null",
        "{}",
        '{"step": null}',
        '{"step": "1"}',
        '{"step": 1, "loss": "2"}',
        "\0",
    ],
)
def test_damaged_records_are_named(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(
        FormatError, match=r"m\.jsonl is damaged: line 2 is not the record of a step"
    ):
        read_records(path)


def test_a_full_disk_is_named(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file._file.close()
    file.path = Path("/dev/full")
    file._file = file.path.open("w")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        file.write({"step": 1})
    with contextlib.suppress(OSError):
        file.close()


def test_meter_counts_skipped_steps_in_a_row():
    meter = Meter(tokens=100, flops=1e9, peak=1e12)
    seen = []
    for loss in (1.0, jnp.nan, jnp.nan, 1.0):
        metrics = StepMetrics(*(jnp.asarray(x) for x in (loss, 1.0, 0.1, loss == 1.0)))
        record = meter.record(1, metrics)
        seen.append((record.get("skipped", False), meter.nonfinite))
    assert seen == [(False, 0), (True, 1), (True, 2), (False, 0)]
    assert record["tokens_per_s"] == pytest.approx(100 / (record["ms"] / 1e3))
    assert record["mfu"] == pytest.approx(1e9 / (record["ms"] / 1e3) / 1e12)


def test_format():
    assert format_step(RECORD) == "loss 4.1234 | norm 1.02 | lr 6.00e-04 | 612.3 ms | 418 tok/s"
    full = format_step(RECORD | {"mfu": 0.451, "val_loss": 3.5, "skipped": True})
    assert full.endswith("418 tok/s | MFU 45.1% | val loss 3.5000 | not finite: update skipped")
    assert [human_bytes(n) for n in (12, 1536, 497_903_616, 2.5e9, 7e12)] == [
        "12 B",
        "1.536 KB",
        "497.9 MB",
        "2.5 GB",
        "7000 GB",
    ]


def test_plain_lines_when_piped(capsys):
    display = Display(100)
    with display.running(0):
        display.step(RECORD, line=True)
        display.step(RECORD, line=False)
    assert capsys.readouterr().out == f"step   7/100 | {format_step(RECORD)}\n"


def test_the_bar_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    screen = io.StringIO()
    display = Display(1_000_000)
    display.bar = Progress(*display.bar_columns(), console=Console(file=screen, width=500))
    with display.running(999_999):
        display.step(RECORD | {"step": 999_999, "tokens_per_s": 1_234_567.8}, line=False)
    (line,) = screen.getvalue().splitlines()
    assert line.startswith("step 999999/1000000 ")
    assert " 1,234,568 tok/s " in line
    assert line.rstrip().endswith(" left")
    assert len(line.rstrip()) <= 80


def test_peaks_by_device():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None
