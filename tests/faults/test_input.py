"""Input that is made to hang a program or to fill its memory, and processes started in odd ways.

Each ends with status 2 and one sentence, within `SECONDS` and `BYTES` more memory.
"""

import contextlib
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from gptjax.formats import safetensors
from gptjax.generate.__main__ import as_json
from tests.conftest import ROOT
from tests.faults import forked
from tests.models import tiny

SECONDS = 60
BYTES = 1 << 29
SENTENCE = 1200  # characters
MAINS = {command: forked.main_of(command) for command in forked.COMMANDS}
MODEL = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 257, "n_positions": 16}


@contextlib.contextmanager
def bounded():
    """Let what takes `SECONDS`, or `BYTES` more than now, fail."""

    def late(number, frame):
        raise AssertionError(f"it takes more than {SECONDS} s")

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_one_sentence(error):
    return (
        error.count("\n") == 1
        and ": error: " in error
        and len(error) < SENTENCE
        and "out of memory" not in error
    )


def refused(command, arguments, capsys):
    """What the command says as it ends with status 2; None if it ends in another way."""
    status = 0
    with bounded():
        try:
            status = MAINS[command](arguments)
        except SystemExit as stop:
            status = stop.code
        except Exception as error:
            return print(f"{command} {arguments}: {error!r}")
    error = capsys.readouterr().err
    if status != 2 or not is_one_sentence(error):
        return print(f"{command} {arguments}: status {status}, {error[:300]}")
    return error


# --- Configurations ---

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, this in zip("abcdefghi", "bcdefghij", strict=True)
)
NESTED = (
    "[&a [x, x, x, x, x, x, x, x, x], &b [*a, *a, *a, *a, *a, *a, *a, *a, *a], [*b, *b, *b, *b, "
    "*b, *b]]"
)
CONFIGS = {
    "a billion laughs": (BOMB, "used again by an alias"),
    "a billion laughs for a name": (f"{BOMB}name: *j", "used again by an alias"),
    "a billion laughs in quotes": (f'seed: "{NESTED}"', "used again by an alias"),
    "a list in itself": ("&a [*a]", "used again by an alias"),
    "a section in itself": ("model: &a {num_layers: *a}", "used again by an alias"),
    "a config in itself": ("&a {model: *a}", "used again by an alias"),
    "an integer of 5,000 digits": (f"seed: {'9' * 5000}", "too many digits"),
    "a float of 5,000 digits": (f"optim: {{learning_rate: {'9' * 5000}}}", "too many digits"),
    "5,000 digits in quotes": (f'seed: "{"9" * 5000}"', "too many digits"),
    "brackets that do not close": ("[" * 60_000, "nesting depth"),
    "5,000 lists in each other": (f"seed: {'[' * 5000}{']' * 5000}", "nesting depth"),
    "300 sections in each other": (f"model: {'{a: ' * 300}1{'}' * 300}", "nested more than"),
    "no section": ("model: null", "the section model must hold options"),
    "a section without options": ("seed: 1\ndata:\n", "the section data must hold options"),
    "a list for a section": ("model: []", "the section model must hold options"),
    "a number for a section": ("model: 3", "the section model must hold options"),
    "a word for a section": ("train: yes", "the section train must hold options"),
    "a file for a section": ("model: /dev/zero", "the section model must hold options"),
    "a set for a section": ("model: !!set {a, b}", "the section model must hold options"),
    "a list": ("- seed\n- 1", "must hold options"),
    "a word": ("hello", "must hold options"),
    "nothing": ("", "must hold options"),
    "a comment": ("# seed: 1\n", "must hold options"),
    "a key twice": ("seed: 1\nseed: 2", "seed is given again on line 2"),
    "an option twice": ("train:\n  steps: 1\n  steps: 2", "steps is given again on line 3"),
    "a tab": ("model:\n\tnum_layers: 1", "cannot start any token"),
    "a NUL": ("seed: 1\0", "control characters are not allowed"),
    "Latin-1": ("name: Zoë".encode("latin-1"), "is not UTF-8 text"),
    "UTF-16": ("seed: 1".encode("utf-16"), "is not UTF-8 text"),
    "half a surrogate pair": ('name: "\\ud800"', "invalid Unicode character"),
    "a tag that runs a program": (
        'name: !!python/object/apply:os.system ["touch owned"]',
        "constructor for the tag",
    ),
    "a tag of nobody's": ("name: !mine x", "constructor for the tag"),
    "a date of no calendar's": ("seed: !!timestamp 2001-99-99", "month must be in"),
    "two documents": ("seed: 1\n---\nseed: 2", "expected a single document"),
    "a number for a key": ("model: {1: 2}", "the key 1 is not text"),
    "a list for a key": ("[1]: 2", "unhashable key"),
    "a config in a config": ("config: again.yaml", "names another config"),
    "a megabyte": (f"name: {'a' * (1 << 20)}", "has more than the"),
    "thousands of keys": ("".join(f"k{i}: 1\n" for i in range(4000)), "unknown option k0"),
    "a key of 60,000 characters": (f"? {'k' * 60_000}\n: 1", "unknown option kkk"),
    "a value of 60,000 characters": (f"seed: {'a' * 60_000}", "Expected an int"),
}
CONFIGURED = ("train", "verify", "plan", "bench")


@pytest.mark.parametrize("command", CONFIGURED)
def test_a_hostile_config_is_refused(command, tmp_path, monkeypatch, capsys, tally):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    held = 0
    chosen = list(CONFIGS.values())
    # They share what reads it
    chosen = chosen if command == "train" else chosen[CONFIGURED.index(command) :: 3]
    for text, message in chosen:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        error = refused(command, ["--config", str(path)], capsys)
        held += bool(error and message in error) or print(f"{message!r} is not in {error!r}") or 0
    assert not (tmp_path / "owned").exists()
    tally("hostile configurations", len(chosen), held)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", BOMB], "used again by an alias"),
        (["--seed", "9" * 5000], "too many digits"),
        (["--model", "null"], "model is a section"),
        (["--model=/dev/zero"], "model is a section"),
        (["--config", "/dev/zero"], "/dev/zero"),
        (["--config", "."], "not a file"),
        (["--config", ""], "must hold options"),
        (["--model.num_layers", "[[[[[[[[[[[[[[[[[[[["], "Expected an int"),
    ],
)
def test_a_hostile_option_is_refused(arguments, message, capsys, tally):
    error = refused("train", arguments, capsys)
    tally("hostile options", 1, bool(error and message in error))


# --- Files ---


def device(path):
    path.symlink_to("/dev/zero")


def bind(path):
    # Whose names are short
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
        made.bind(path.name)


def endless(path):
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: it takes no room


KINDS = {
    "a device": device,
    "a named pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a socket": bind,
    "endless": endless,
}
GENERATE = ["--tokenizer", "byte", "--max_new_tokens", "2"]
# What is read: the hostile file's name in a folder, the command that reads it ({} is the folder),
# and kinds left out.
READ = {
    "config": ("c.yaml", "train --config {}/c.yaml", ()),
    "Hugging Face config": ("config.json", "convert {} --inspect", ()),
    "Hugging Face index": ("model.safetensors.index.json", "convert {}/hf --inspect", ()),
    "Hugging Face tensors": ("model.safetensors", "convert {}/hf --inspect", ("endless",)),
    "weights": ("x.bin", "generate --checkpoint {}/x.bin", ("a folder",)),
    "safetensors": (
        "x.safetensors",
        "evaluate --checkpoint {}/x.safetensors --dataset x",
        ("a folder",),
    ),
    "tokenizer": ("t.json", "tokenizers encode --tokenizer {}/t.json hi", ()),
    "a folder's tokenizer": ("tokenizer.json", "tokenizers encode --tokenizer {} hi", ()),
    "tokenizer of a corpus": (
        "t.json",
        "datasets {}/text.txt --root {}/data --tokenizer {}/t.json",
        (),
    ),
    "token shard": ("x.bin", "tokenizers decode --tokenizer byte --input {}/x.bin", ()),
    "shards": ("train.bin", "datasets {}", ("endless",)),
    "text": ("a.txt", "datasets {}/a.txt --root {}/data --tokenizer byte", ("endless",)),
    "text to train on": (
        "a.txt",
        "tokenizers train --input {}/a.txt --output {}/t.json",
        ("endless",),
    ),
    "metrics": ("metrics.jsonl", "plot {}", ()),
    "questions": ("q.jsonl", "evaluate --checkpoint {}/hf --dataset {}/q.jsonl", ()),
    "a reference": (
        "s.bin",
        "verify --model.preset 124m --reference {}/s.bin --checkpoint {}/hf",
        (),
    ),
    "prompts": ("p.txt", "generate --checkpoint {} --prompts {}/p.txt", ("a named pipe",)),
}


@pytest.mark.parametrize("what", READ)
def test_what_is_no_file_is_refused(what, tmp_path, capsys, tally):
    name, line, left_out = READ[what]
    kinds = [kind for kind in KINDS if kind not in left_out]
    held = 0
    for kind in kinds:
        folder = tmp_path / kind.replace(" ", "-")
        (folder / "hf").mkdir(parents=True)
        (folder / "hf" / "config.json").write_text(json.dumps(MODEL))
        (folder / "text.txt").write_text("once upon a time " * 100)
        where = folder / "hf" if name.startswith("model.") else folder
        KINDS[kind](where / name)
        command, *arguments = line.replace("{}", str(folder)).split()
        held += refused(command, arguments, capsys) is not None
    tally("devices, pipes and endless files", len(kinds), held)


def test_a_named_pipe_can_hold_prompts(tmp_path, capsys):
    """A shell makes one of ``<(command)``. The checkpoint is looked for once the prompts are
    read.
    """
    subprocess.run(["mkfifo", tmp_path / "p"], check=True)
    with subprocess.Popen(["sh", "-c", 'echo hello > "$0"', tmp_path / "p"]):
        assert "none does not exist" in refused(
            "generate", ["--checkpoint", "none", "--prompts", str(tmp_path / "p")], capsys
        )


LINES = {
    "nested": "[" * 100_000,
    "5,000 digits": f'{{"step": 1, "loss": {"9" * 5000}}}',
    "an infinite step": '{"step": 1e400, "loss": 1}',
    "a step in words": '{"step": "one"}',
    "Latin-1": '{"step": "Zoë"}'.encode("latin-1"),
}


def test_metrics_of_no_step_are_refused(tmp_path, capsys, tally):
    held = 0
    for line in LINES.values():
        (tmp_path / "metrics.jsonl").write_bytes(
            (line if isinstance(line, bytes) else line.encode()) + b"\n"
        )
        held += "line 1 is not the record of a step" in (
            refused("plot", [str(tmp_path)], capsys) or ""
        )
    tally("hostile metrics", len(LINES), held)


# --- Numbers ---


@pytest.mark.parametrize("option", ["num_samples", "max_new_tokens", "batch_size"])
@pytest.mark.parametrize("value", ["0", "100000000000", "9" * 5000])
def test_an_absurd_number_of_continuations_is_refused(option, value, capsys, tally):
    error = refused("generate", ["--checkpoint", "none", f"--{option}", value], capsys)
    tally("absurd numbers of continuations", 1, bool(error and option in error))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("number", [np.nan, np.inf, 1e39])
def test_weights_that_are_not_finite_are_refused(dtype, number, tmp_path, capsys, tally):
    """However they are to be kept: in 8 bits they would look like numbers. Of 1e39, float32 makes
    an infinity.
    """
    tried = [("wte", None), ("wpe", None), ("kw", 0), ("fcprojb", 1), ("lnfw", None)]
    held = 0
    for name, layer in tried:
        cfg = tiny.config(vocab_size=257, max_seq_len=8)
        path = tmp_path / f"{name}.safetensors"
        params = jax.tree.map(np.array, tiny.params(cfg, np.float64))
        getattr(params if layer is None else params.blocks[layer], name).flat[3] = number
        safetensors.write_model(path, params, cfg, np.dtype(np.float64))
        arguments = ["--checkpoint", str(path), *GENERATE, *(["--int8"] if dtype == "int8" else [])]
        with jax.enable_x64(False):
            error = refused("generate", arguments, capsys)
        said = f"numbers in {name if layer is None else f'{name}[{layer}]'} that are not finite"
        held += bool(error and said in error)
    tally("weights that are not finite", len(tried), held)


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("utf-8", '{"text": "Zoë, 東"}'),
        ("latin-1", r'{"text": "Zo\u00eb, \u6771"}'),
        ("ascii", r'{"text": "Zo\u00eb, \u6771"}'),
    ],
)
def test_json_is_whole_in_every_encoding(encoding, line, monkeypatch, tally):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    tally("encodings of JSON", 1, as_json({"text": "Zoë, 東"}) == line)


# --- Streams and folders ---

LISTEN = {
    "tokenizers": ["encode", "--tokenizer", "byte"],
    "generate": ["--checkpoint", "none", "--prompts", "-"],
}
SPEAK = {command: ["--help"] for command in forked.COMMANDS} | {
    "tokenizers": ["encode", "--tokenizer", "byte", "hi"]
}
NAMED = {
    "train": ["--config", "x.yaml"],
    "verify": ["--config", "x.yaml"],
    "plan": ["--config", "x.yaml"],
    "bench": ["--config", "x.yaml"],
    "evaluate": ["--checkpoint", "x", "--dataset", "y", "--json", "z.json"],
    "generate": ["--checkpoint", "x"],
    "convert": ["x", "--inspect"],
    "plot": ["x"],
    "datasets": ["x"],
    "tokenizers": ["encode", "--tokenizer", "x", "hi"],
}


def in_forks(cases):
    """(status, stdout, stderr) of each (command, arguments, fault)."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.forked"],
        input=json.dumps(cases), capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_commands_without_a_stream_or_a_folder(tally):
    closed = [(command, arguments, "stdin") for command, arguments in LISTEN.items()]
    closed += [(command, arguments, "stdout") for command, arguments in SPEAK.items()]
    full = [(command, arguments, "full") for command, arguments in SPEAK.items()]
    silent = [
        ("tokenizers", SPEAK["tokenizers"], "stderr"),
        ("convert", NAMED["convert"], "stderr"),
    ]
    removed = [(command, arguments, "removed") for command, arguments in NAMED.items()]
    found = dict(
        zip(
            map(repr, [*closed, *full, *silent, *removed]),
            in_forks([*closed, *full, *silent, *removed]),
            strict=True,
        )
    )

    def held(cases, message=""):
        results = [found[repr(case)] for case in cases]
        good = [
            status == 2 and is_one_sentence(error) and message in error
            for status, _, error in results
        ]
        print(
            [
                (case, result)
                for case, result, ok in zip(cases, results, good, strict=True)
                if not ok
            ]
        )
        return sum(good)

    assert found[repr(silent[0])] == [0, "104 105\n", ""]
    assert found[repr(silent[1])] == [2, "", ""]
    tally("closed streams", len(closed), held(closed, "is closed"))
    tally("full disks under stdout", len(full), held(full, "No space left on device"))
    tally("removed folders", len(removed), held(removed))


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ('exec "$@" >&-', 2, "standard output is closed"),
        ('exec "$@" >/dev/full', 2, "No space left on device"),
        ('mkdir gone; cd gone; rmdir ../gone; exec "$@"', 0, ""),
    ],
)
def test_a_process_that_is_started_so(line, status, message, tmp_path, tally):
    """The same from the start of Python, which imports what it needs in that state, too."""
    command = [sys.executable, "-m", "gptjax.tokenizers", "encode", "--tokenizer", "byte", "hi"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(
        ["sh", "-c", line, "sh", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert message in done.stderr
    tally(
        "processes started oddly",
        1,
        done.returncode == status and (status == 0 or is_one_sentence(done.stderr)),
    )
