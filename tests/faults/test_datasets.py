"""Several processes that prepare one corpus at once."""

import hashlib
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults.tally import trials
from tests.server import serving

PROCESSES = 4
TEXT = "\n\n".join(f"Speaker {n}:\nWords, words, words {n * n}." for n in range(3000))
# With the play's own address replaced, since no test goes further than this machine.
COMMAND = f"""
import os, sys
from gptjax.datasets import __main__, named
named.TINYSHAKESPEARE_URL = os.environ["PLAY"]
named.TINYSHAKESPEARE_SHA256 = "{hashlib.sha256(TEXT.encode()).hexdigest()}"
print("ready", flush=True)
sys.stdin.readline()
sys.exit(__main__.main(sys.argv[1:]))
"""


def at_once(arguments: list[str], play: str) -> list[tuple[int, str, str]]:
    """Status, output and errors of processes that begin at the same time, once each has imported
    what it needs.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PLAY": play}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", COMMAND, *arguments]
    started = [
        subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(PROCESSES)
    ]
    try:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        for process in started:
            process.stdin.write("\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *shown) for process, shown in zip(started, ended, strict=True)]


@pytest.mark.parametrize("dataset", ["text", "shakespeare-char", "tinyshakespeare"])
def test_one_corpus_prepared_by_four_processes_at_once(dataset, tally, tmp_path):
    """All end well and say the same, the digest of its ids included, and nothing but the corpus is
    left.
    """
    tried = held = 0
    (tmp_path / "text.txt").write_text(TEXT)
    named = str(tmp_path / "text.txt") if dataset == "text" else dataset
    tokenizer = [] if dataset == "shakespeare-char" else ["--tokenizer", "bpe:300"]
    with serving() as site:
        site.files["input.txt"] = TEXT.encode()
        for trial in range(trials(1)):
            root = tmp_path / f"{trial}"
            ended = at_once([named, "--root", str(root), *tokenizer], f"{site.url}/input.txt")
            tried += PROCESSES
            held += sum(
                (status, out) == (0, ended[0][1]) and "Traceback" not in err
                for status, out, err in ended
            )
            left = [path.name for path in root.rglob("*")]
            assert not [name for name in left if "lock" in name or "partial" in name]
            assert len({path.name for path in root.iterdir()} - {"downloads"}) == 1, ended
    tally("processes that prepare one corpus at once", tried, held)
