import io
import json
import signal

import jax.numpy as jnp
import pytest

pytest.importorskip("jinja2")

from gptjax.chat import __main__ as command
from gptjax.formats import safetensors
from tests.chatml import chatml_tokenizer
from tests.commands import expect_error
from tests.models import tiny

TOKENIZER = chatml_tokenizer()
CFG = tiny.config(
    dtype="float32",
    family="llama",
    num_heads=4,
    num_kv_heads=2,
    vocab_size=TOKENIZER.vocab_size,
    max_seq_len=160,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    params = tiny.params(CFG, jnp.float32)
    safetensors.write_model(folder / "m.safetensors", params, CFG, jnp.dtype("float32"))
    TOKENIZER.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def arguments(model):
    return [
        *("--checkpoint", str(model / "m.safetensors")),
        *("--tokenizer", str(model / "tokenizer.json")),
        *("--max_new_tokens", "5", "--temperature", "0"),
    ]


@pytest.fixture
def chat(arguments, capsys, monkeypatch):
    """(stdout, stderr) of a conversation in which these lines come from a pipe."""

    def run(*lines, options=()):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert command.main([*arguments, *options]) == 0
        return capsys.readouterr()

    return run


def test_what_jax_traced_is_forgotten_when_an_answer_has_begun(chat, monkeypatch):
    forgotten = []
    monkeypatch.setattr(command.cli, "forget_traces", lambda: forgotten.append(True))
    chat("hello")
    assert forgotten == [True]


def test_one_answer(arguments, chat, capsys):
    assert command.main([*arguments, "--prompt", "hello"]) == 0
    answer = capsys.readouterr().out
    assert answer.endswith("\n")
    assert chat("hello").out == f"> hello\n{answer}"


def test_looking_up_changes_no_answer(arguments, chat, monkeypatch):
    asked = []
    rules = command.Rules
    monkeypatch.setattr(command, "Rules", lambda *args: asked.append(args[-1]) or rules(*args))
    found = [chat("hello, hello", options=options).out for options in ((), ("--lookup", "true"))]
    assert found[0] == found[1]
    assert asked == [False, True]


def test_several_prompts_are_turns_of_one_conversation(arguments, chat, capsys):
    assert command.main([*arguments, "--prompt", "a", "b"]) == 0
    both = capsys.readouterr().out
    out, err = chat("a", "b")
    assert out.replace("> a\n", "").replace("> b\n", "") == both
    assert err == f"{command.HINT}\n"


def test_a_conversation_is_saved_as_lines_of_json(chat, tmp_path):
    path = tmp_path / "talk.jsonl"
    out, err = chat("a", f"/save {path}", "b", f"/save {path}", options=["--system", "S"])
    first, second = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in second if m["role"] != "assistant"] == ["S", "a", "b"]
    assert second[:3] == first
    assert second[2]["content"].lstrip() in out
    assert f"added 3 messages to {path}" in err


def test_a_reset_forgets(chat):
    out, _ = chat("a", "b", "/reset", "a")
    first, _, again = (part.partition("\n")[2] for part in out.split("> ")[1:] if part[0] != "/")
    assert first == again


def test_the_list_of_commands_and_one_that_is_unknown(chat):
    out, err = chat("/help", "/nothing", "/save", "", "  ")
    assert command.HELP in err
    assert "there is no /nothing; /help lists the commands" in err
    assert "/save needs a file" in err
    assert out == "> /help\n> /nothing\n> /save\n> \n>   \n"


def test_a_path_is_no_command(chat, monkeypatch):
    said = []
    monkeypatch.setattr(command, "say", lambda conversation, text, *rest: said.append(text))
    chat("/etc/passwd is what?", "a /reset")
    assert said == ["/etc/passwd is what?", "a /reset"]


def test_a_file_that_cannot_be_written_and_a_message_that_is_too_long(chat, tmp_path):
    out, err = chat(f"/save {tmp_path}/none/talk", "x" * 160, "a")
    assert "none/talk cannot be written: No such file" in err
    assert "of the model's context of 160 are free for it: shorten it" in err
    assert out.endswith("\n")


def test_it_says_when_the_oldest_turns_go(chat):
    _, err = chat(*["x" * 30] * 4)
    assert "(the context of 160 tokens is full: the model no longer sees the oldest " in err


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(chat, monkeypatch, tmp_path):
    show = command.show

    def interrupted(text):
        show(text)
        if text.strip() and not text.startswith(">"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command, "CHUNK", 1)
    monkeypatch.setattr(command, "show", interrupted)
    path = tmp_path / "talk"
    chat("a", "b", f"/save {path}", options=["--max_new_tokens", "50"])
    (line,) = path.read_text().splitlines()
    messages = json.loads(line)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert all(len(m["content"].strip()) == 1 for m in messages[1::2])


def test_ctrl_c_while_typing_and_sigterm(arguments, monkeypatch, capsys):
    typed = iter([signal.SIGINT, signal.SIGTERM])
    monkeypatch.setattr("builtins.input", lambda prompt: signal.raise_signal(next(typed)))
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 130
    assert "Ctrl-D exits" in capsys.readouterr().err


def test_on_a_terminal(arguments, monkeypatch, capsys):
    """There is a prompt and no echo, and Ctrl-D ends the line, too."""
    prompts, typed = [], iter(["a"])

    def typing(prompt):
        prompts.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert command.main(arguments) == 0
    assert prompts == ["> ", "> "]
    out = capsys.readouterr().out
    assert not out.startswith("> ")
    assert out.endswith("\n\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "nowhere"], "there is no template nowhere: chatml, llama2 or a file"),
        (["--template", "bad"], "the template bad is no Jinja template"),
        (["--prompt", "a\udcff"], "prompt and system must be UTF-8 text"),
        (["--prompt", "x" * 200], "of the model's context of 160"),
        (["--stop", "x"], "chat does not read stop"),
        (["--tokenizer", "byte"], "has no chat template"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("{% if %}")
    expect_error(command.main, [*arguments, *options], message, capsys)


def test_input_that_is_no_utf_8(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "standard input is not UTF-8 text" in capsys.readouterr().err


def test_standard_input_that_is_closed(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    expect_error(command.main, arguments, "standard input is closed", capsys)


def test_a_model_without_a_tokenizer(arguments, capsys):
    expect_error(command.main, arguments[:2], "has no tokenizer", capsys)
