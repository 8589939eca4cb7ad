"""Draw runs: ``python -m gptjax.plot runs/124m`` or ``python -m gptjax.plot runs/*``, also while
they train.

A RUN is a run's folder, its name in ``runs``, or its ``metrics.jsonl``. One picture shows the loss,
validation loss, learning rate, gradient norm and throughput of all runs, as far as they were
measured. It is ``metrics.png`` in the folder of a single run, or in the current folder for several
runs, and replaces an earlier one. Noisy quantities are drawn as a running mean, with the measured
values as a faint line behind it; a cross marks values that were not finite.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax import cli
from gptjax.cli.options import parse
from gptjax.config import PlotConfig
from gptjax.errors import ConfigError, DataError
from gptjax.files import write_whole
from gptjax.plot.runs import RunRecords, draw
from gptjax.train.metrics import read_records

PROG = "python -m gptjax.plot"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status 0; bad input raises SystemExit(2)."""
    with cli.reported_errors(PROG):
        args, _ = parse(PlotConfig, PROG, __doc__ or "", argv)
        paths = [named_run(name) for name in args.runs]
        output = output_path(args.output, paths)
        runs = read_runs(paths, note=lambda text: print(f"{'note':<10} {text}"))
        with warnings.catch_warnings():
            # About characters that the font lacks, and axes of zero extent
            warnings.simplefilter("ignore")
            picture = draw(runs, args.x, args.smooth)
            output.parent.mkdir(parents=True, exist_ok=True)
            with write_whole(output) as file:
                picture.savefig(file, format=output.suffix[1:].lower())
        for run in runs:
            print(f"{'run':<10} {run.name}: {summary(run)}")
        print(f"{'wrote':<10} {output}, {output.stat().st_size:,} bytes")
    return 0


def named_run(name: str) -> str:
    """The path of a run that is given by its name alone; another path as it is."""
    in_runs = Path("runs") / name
    return str(in_runs) if not Path(name).exists() and in_runs.is_dir() else name


def output_path(given: str | None, runs: Sequence[str]) -> Path:
    """The file to write.

    Raises:
        ConfigError: its suffix is not that of a known format.

    """
    if given is None:
        place = Path(runs[0]) if len(runs) == 1 else Path()
        return (place if place.is_dir() else place.parent) / "metrics.png"
    path = Path(given)
    if path.is_dir() or path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--output {given} must be a file whose name ends in .png, .svg or .pdf")
    return path


def read_runs(paths: Sequence[str], note: Callable[[str], None]) -> list[RunRecords]:
    """Read the records of the runs, each once and under a distinct name; ``note`` gets a line about
    a run without any step, which is left out.

    Raises:
        ConfigError: a path is not a run.
        DataError: none has a step.
        FormatError: a file is damaged.

    """
    files = list(
        dict.fromkeys(
            (path / "metrics.jsonl" if path.is_dir() else path).resolve()
            for path in map(Path, paths)
        )
    )
    for path, given in zip(files, paths, strict=False):
        if not path.is_file():
            raise ConfigError(
                f"{given} is not a run: there is no {path}; name a folder that training has made, "
                "as in runs/NAME"
            )
    found = [(path, records) for path in files if (records := read_records(path))]
    for path in files if found else []:
        if path not in [kept for kept, _ in found]:
            note(f"{path} has no step yet and is left out")
    if not found:
        raise DataError(f"{files[0]} has no step yet, so there is nothing to draw")
    return [
        RunRecords(name, records)
        for name, (_, records) in zip(short_names([path for path, _ in found]), found, strict=True)
    ]


def short_names(files: Sequence[Path]) -> list[str]:
    """The names of the files' folders, with as many parent folders as it takes to make them
    distinct.
    """
    folders = [path.parent if path.name == "metrics.jsonl" else path for path in files]
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def summary(run: RunRecords) -> str:
    """The run's latest figures, in one line."""
    parts = [f"step {run.records[-1]['step']:,}"]
    losses = [r["loss"] for r in run.records if r.get("loss") is not None]
    if losses:
        parts.append(f"loss {_digits(losses[-1])}")
    validated = [(r["val_loss"], r["step"]) for r in run.records if r.get("val_loss") is not None]
    if validated:
        (last, step), (best, best_step) = validated[-1], min(validated)
        parts.append(
            f"validation loss {_digits(last)}"
            + f" ({_digits(best)} after step {best_step:,})" * (best_step != step)
        )
    skipped = sum("skipped" in r for r in run.records)
    return ", ".join(parts + [f"{skipped} updates skipped"] * bool(skipped))


def _digits(loss: float) -> str:
    return f"{loss:.4f}" if loss < 1e4 else f"{loss:.1e}"


if __name__ == "__main__":
    sys.exit(main())
