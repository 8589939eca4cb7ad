import io
import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from gptjax import tokenizers
from gptjax.config import GenerateConfig, Sampler
from gptjax.convert.weights import open_weights
from gptjax.errors import ConfigError
from gptjax.formats import llmc
from gptjax.generate import __main__ as command
from gptjax.ops.quantized import Blocks, OutIn
from tests.commands import expect_error
from tests.models import tiny

CFG = tiny.config(dtype="float32", vocab_size=262)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.bin"
    llmc.write_model(path, tiny.params(CFG, jnp.float32), CFG)
    return str(path)


@pytest.fixture
def generate(model, capsys):
    """What the command prints, given these arguments."""

    def run(*args):
        arguments = ["--checkpoint", model, "--tokenizer", "byte", "--max_new_tokens", "8", *args]
        assert command.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


def records(out):
    return [json.loads(line) for line in out.splitlines()]


def test_a_start_loads_no_library_that_it_may_not_need():
    code = (
        "import sys, gptjax.generate.__main__; "
        "print({'requests', 'rich', 'tokenizers', 'gguf'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_decoding_holds_little_beside_the_model(model):
    """At most 150 MB. The start holds more, and returns it."""
    if sys.platform != "linux":
        pytest.skip("Linux alone")
    script = """
import re, sys
from gptjax.generate.__main__ import main
main(sys.argv[1:])
status = open("/proc/self/status").read()
print(*(int(re.search(rf"{name}:\\s+(\\d+)", status)[1]) for name in ("VmHWM", "VmRSS")))
"""
    options = ["--tokenizer", "byte", "--ignore_end", "--max_new_tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-c", script, "--checkpoint", model, *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    most, held = (1024 * int(kilobytes) for kilobytes in done.stdout.splitlines()[-1].split())
    assert held < 150e6 < most


def test_one_text_is_the_prompt_and_what_follows(generate):
    (record,) = records(generate("--prompt", "ab", "--json"))
    assert len(record["ids"]) == 8
    assert record["finish"] == "length"
    assert generate("--prompt", "ab") == f"ab{record['text']}\n"


def test_what_jax_traced_is_forgotten_in_the_last_batch_alone(generate, monkeypatch):
    forgotten = []
    monkeypatch.setattr(command.cli, "forget_traces", lambda: forgotten.append(True))
    generate("--prompt", "ab", "--num_samples", 2, "--batch_size", 1, "--ignore_end")
    assert forgotten == [True]


def test_the_seed_decides(generate):
    one, same, other = (generate("--prompt", "ab", "--seed", seed, "--json") for seed in (1, 1, 2))
    assert one == same != other


def test_samples_of_several_prompts(generate):
    found = records(generate("--prompt", "ab", "c", "--num_samples", 3, "--json", "--logprobs"))
    assert [record["prompt"] for record in found] == ["ab"] * 3 + ["c"] * 3
    assert len({tuple(record["ids"]) for record in found}) == 6
    assert all(len(record["logprobs"]) == 8 and max(record["logprobs"]) < 0 for record in found)
    shown = generate("--prompt", "ab", "c", "--num_samples", 3)
    assert all(
        f"--- {i + 1} of 6 ---\n{r['prompt']}{r['text']}\n" in shown for i, r in enumerate(found)
    )


def test_prompts_from_a_file_and_from_standard_input(generate, tmp_path, monkeypatch):
    # Only line ends end a prompt
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfab\r\nc\x0cd\n")
    expected = generate("--prompt", "ab", "c\x0cd", "--json")
    assert generate("--prompts", tmp_path / "prompts.txt", "--json") == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\nc\x0cd")))
    assert generate("--prompts", "-", "--json") == expected


def test_without_a_prompt_it_begins_after_end_of_text(generate):
    (record,) = records(generate("--json", "--temperature", 0))
    assert record["prompt"] == ""
    assert len(record["ids"]) == 8


def test_a_listing_of_ids_and_tokens(generate):
    (record,) = records(generate("--prompt", "ab", "--json", "--logprobs"))
    lines = generate("--prompt", "ab", "--show_tokens", "--logprobs").splitlines()
    parts = [line.split(", ", 2) for line in lines]
    assert [int(token) for token, _, _ in parts] == record["ids"]
    assert [float(logprob) for _, logprob, _ in parts] == pytest.approx(
        record["logprobs"], abs=1e-4
    )


def test_a_stop_string_and_the_options_that_change_what_is_drawn(generate):
    (free,) = records(generate("--prompt", "ab", "--temperature", 0, "--json"))
    third = tokenizers.byte().decode(free["ids"][2:3])
    (stopped,) = records(generate("--prompt", "ab", "--top_k", 1, "--stop", third, "--json"))
    assert (stopped["finish"], stopped["ids"]) == ("stop", free["ids"][: len(stopped["ids"])])
    assert len(stopped["ids"]) <= 3
    assert third not in stopped["text"]


def loaded(model, *args):
    """What the command makes of the checkpoint, given these options."""
    return command.load(
        command.parse(
            GenerateConfig, "generate", "", ["--checkpoint", model, "--tokenizer", "byte", *args]
        )[0]
    )


def test_the_options_reach_the_model(model):
    chosen = loaded(
        model, "--temperature", "0.5", "--top_k", "3", "--top_p", "0.6", "--min_p", "0.1"
    )
    assert chosen.rules.sampler == Sampler(0.5, 3, 0.6, 0.1)
    assert chosen.rules.ends == (256,)
    assert loaded(model, "--ignore_end").rules.ends == ()
    assert [loaded(model, *option).rules.lookup for option in ([], ["--lookup", "true"])] == [0, 1]
    assert loaded(model, "--dtype", "bfloat16").rules.cfg.dtype == "bfloat16"
    assert isinstance(chosen.params.wte, OutIn)
    assert loaded(model, "--weights", "bfloat16").params.wte.w.dtype == "bfloat16"
    for option in (["--int8"], ["--weights", "q8_0"], ["--int8", "--weights", "q8_0"]):
        assert loaded(model, *option).params.wte.q.dtype == "int8"
    for weights, kind in (("q4_1", Blocks), ("bfloat16", OutIn)):
        blocks = loaded(model, "--weights", weights).params.blocks
        first = blocks if hasattr(blocks, "fcw") else blocks[0]
        assert isinstance(first.fcw, kind)
    with pytest.raises(ConfigError, match="int8 is short for weights q8_0"):
        loaded(model, "--int8", "--weights", "q4_1")


def test_a_batch_at_a_time_gives_the_same(generate):
    together, apart = (
        generate("--prompt", "ab", "c", "d", "--batch_size", size, "--json") for size in (3, 2)
    )
    assert together == apart


@pytest.fixture
def session(model, capsys, monkeypatch):
    """The output of a session in which these lines are typed, and the prompts that the model was
    given.
    """

    def run(*lines, stops=()):
        seen, typed = [], iter(lines)
        continued = command.continued

        def spy(params, samples, *args):
            seen.append(bytes(samples[0].prompt))
            return continued(params, samples, *args)

        monkeypatch.setattr(command, "continued", spy)
        monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
        arguments = [
            "--checkpoint",
            model,
            "--tokenizer",
            "byte",
            "--max_new_tokens",
            "4",
            "--temperature",
            "0",
        ]
        assert command.main([*arguments, "--interactive", *stops]) == 0
        assert next(typed) == "never typed"
        return capsys.readouterr().out, seen

    return run


def test_a_session_keeps_what_was_said(session):
    out, (first, again, longer) = session("ab", "/reset", "ab", "c", "/end", "never typed")
    assert first == again == b"ab"
    assert longer.startswith(b"ab")
    assert longer.endswith(b"\nc")
    assert len(longer) == len("ab") + 4 + len("\nc")  # with the answer in between
    assert out.split("\n")[0] == out.split("\n")[1]


def test_ctrl_c_ends_the_answer_and_not_the_session(session, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "show", lambda text: None if text == "\n" else interrupted())
    _, seen = session("ab", "/reset", "c", "/end", "never typed")
    assert seen == [b"ab", b"c"]


def test_a_session_ends_with_its_input(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    assert (
        command.main(
            ["--checkpoint", model, "--tokenizer", "byte", "--max_new_tokens", "2", "--interactive"]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out.startswith("> ")
    assert err.startswith("type text to continue; /reset starts over; ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tokenizer", "byte", "--max_new_tokens", "0"], "must be from 1 to"),
        (["--tokenizer", "byte", "--seed", "-1"], "seed must be from 0 to 4294967295, not -1"),
        (["--tokenizer", "byte", "--top_p", "2"], "top_p must be from 1e-06 to 1, not 2"),
        (
            ["--tokenizer", "byte", "--temprature", "1"],
            "unknown option temprature: did you mean temperature?",
        ),
        (["--tokenizer", "byte", "--prompt", "a", "--interactive"], "exclude each other: give one"),
        (
            ["--tokenizer", "byte", "--json", "--interactive"],
            "interactive prints one text as it",
        ),
        (
            ["--tokenizer", "byte", "--prompts", "nowhere.txt"],
            "prompts nowhere.txt cannot be read: No such file",
        ),
        (["--tokenizer", "byte", "--prompt", "a\udcff"], "prompt and stop must be UTF-8 text"),
        (["--tokenizer", "nowhere.json"], "there is no tokenizer nowhere.json"),
        ([], "has no tokenizer: name one, as in --tokenizer gpt2"),
    ],
)
def test_bad_input_ends_in_one_sentence(model, args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_error(command.main, ["--checkpoint", model, *args], message, capsys)


def test_a_tokenizer_that_is_too_large(tmp_path, capsys):
    small = tiny.config(dtype="float32")
    llmc.write_model(tmp_path / "small.bin", tiny.params(small, jnp.float32), small)
    arguments = ["--checkpoint", str(tmp_path / "small.bin"), "--tokenizer", "byte"]
    message = f"the tokenizer byte has 257 ids, but {tmp_path / 'small.bin'} only 11: name the"
    expect_error(command.main, arguments, message, capsys)


def test_another_tokenizer_than_the_models_own(model, monkeypatch):
    own = tokenizers.train_bpe(["the cat sat on the mat"] * 9, 262, "cats")
    source = open_weights(model)._replace(tokenizer=own)
    monkeypatch.setattr(command, "open_weights", lambda where: source)
    with pytest.raises(ConfigError, match="has its own tokenizer, cats of 262 ids, and byte is an"):
        loaded(model)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\xff", "is not UTF-8 text")]
)
def test_prompts_that_cannot_be_used(model, tmp_path, content, message, capsys):
    (tmp_path / "prompts.txt").write_bytes(content)
    arguments = [
        "--checkpoint",
        model,
        "--tokenizer",
        "byte",
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    expect_error(command.main, arguments, message, capsys)


def test_standard_input_that_is_closed(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    arguments = ["--checkpoint", model, "--tokenizer", "byte", "--prompts", "-"]
    expect_error(command.main, arguments, "standard input is closed", capsys)


def test_a_checkpoint_that_is_not_there(capsys):
    expect_error(command.main, ["--checkpoint", "nowhere"], "nowhere does not exist", capsys)
