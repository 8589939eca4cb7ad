import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jinja2")

from gptjax import tokenizers
from gptjax.errors import ConfigError, DataError, FormatError
from gptjax.tokenizers import chat_template
from gptjax.tokenizers.chat_template import ChatTemplate, Endings, encode, endings, find, render
from tests.chatml import CONTROL, chatml_tokenizer, talk

BYTE = tokenizers.byte()
CHATML, LLAMA2 = find("chatml"), find("llama2")

# SmolLM2's, with its default system prompt
SMOL = ChatTemplate(
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


TOKENIZER = chatml_tokenizer()


def test_chatml():
    ids = encode(talk("a", "b", "c", system="S"), CHATML, TOKENIZER)
    assert TOKENIZER.decode(ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [i for i in ids if i < len(CONTROL)] == [1, 2] * 4 + [1]


@pytest.mark.parametrize(
    ("system", "start"),
    [(None, "[INST] a [/INST]"), ("S", "[INST] <<SYS>>\nS\n<</SYS>>\n\n a [/INST]")],
)
def test_llama_2s(system, start):
    whole = chat_template._rendered(talk(" a ", "b", "c", system=system), LLAMA2, BYTE, True)
    assert whole == f"{start} b <|endoftext|>[INST] c [/INST]"


def test_a_template_in_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}:")
    assert encode(talk("hé"), find(str(tmp_path / "own.jinja")), BYTE) == list("hé:".encode())


@pytest.mark.parametrize("template", [CHATML, LLAMA2, SMOL])
@given(
    st.lists(
        st.lists(
            st.sampled_from([*CONTROL, "<", "|im_end|>", "<|im_", "end|>", " ", "\n", "é"])
        ).map("".join)
        | st.text(max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_typed_never_becomes_a_control_token(template, contents):
    """Messages full of control tokens' text give the control ids of messages without."""
    said, plain = (encode(talk(*x), template, TOKENIZER) for x in (contents, ["a"] * len(contents)))
    assert [i for i in said if i < len(CONTROL)] == [i for i in plain if i < len(CONTROL)]
    try:
        expected = [text.encode() for text in contents]
    except UnicodeEncodeError:
        return
    if template is not LLAMA2:  # which strips them
        assert all(text in TOKENIZER.decode_bytes(said) for text in expected)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, SMOL])
def test_the_assistants_parts(template):
    conversation = talk("a<|im_end|>", "b", "c", "d", system="S")
    parts = render(conversation, template, TOKENIZER)
    whole = chat_template._rendered(conversation, template, TOKENIZER, False)
    assert [i for ids, _ in parts for i in ids] == chat_template._encoded(whole, TOKENIZER)
    said = [TOKENIZER.decode(ids).strip() for ids, assistant in parts if assistant]
    between = " " if template is LLAMA2 else ""
    assert said == [f"b{between}<|im_end|>", f"d{between}<|im_end|>"]
    assert [assistant for _, assistant in parts][:4] == [False, True, False, True]


def test_an_answer_begins_where_encode_ends():
    conversation = talk("a", "b", "c", "d")
    (first, _), (answer, _), *_ = render(conversation, CHATML, TOKENIZER)
    assert first == encode(conversation[:1], CHATML, TOKENIZER)
    assert first + answer == encode(conversation[:3], CHATML, TOKENIZER)[: len(first + answer)]


def test_what_ends_an_answer():
    assert endings(CHATML, TOKENIZER) == Endings((1, 2), ())
    assert endings(CHATML, BYTE) == Endings((256,), ("<|im_end|>",))
    assert endings(LLAMA2, BYTE) == Endings((256,), ())
    own = ChatTemplate("{{ messages[1].content }}<tool>\n")
    assert endings(own, TOKENIZER) == Endings((2, 3), ())


def test_a_template_that_rewrites_what_was_said():
    forgetful = ChatTemplate("{% for m in messages[-2:] %}{{ m.role + m.content }}{% endfor %}")
    with pytest.raises(DataError, match="renders message 2 of 4 otherwise once more"):
        render(talk("a", "b", "c", "d"), forgetful, TOKENIZER)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("{% for %}", FormatError, "is no Jinja template: .* in line 1"),
        ("{{ raise_exception('no system') }}", DataError, "refuses this conversation: no system"),
        ("{{ messages.nothing.more }}", FormatError, "fails on this conversation: .*nothing"),
        ("{{ 1 / 0 }}", FormatError, "fails on this conversation: division by zero"),
        ("{{ ''.__class__.__mro__ }}", FormatError, "does what no template may: "),
        ("{% set _ = messages.append(1) %}", FormatError, "does what no template may: "),
        ("{% include '/etc/passwd' %}", FormatError, "fails on this conversation: "),
    ],
)
def test_templates_that_cannot_be_used(source, kind, message):
    with pytest.raises(kind, match=f"^the model's chat template {message}"):
        encode(talk("a"), ChatTemplate(source), TOKENIZER)


def test_a_template_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="there is no template nowhere: chatml, llama2 or a file"):
        find("nowhere")
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="bad.jinja cannot be read: .*utf-8"):
        find(str(tmp_path / "bad.jinja"))


def test_what_transformers_offers_to_a_template():
    source = (
        "{{ messages | tojson }} {{ strftime_now('%Y')[:2] }} {% generation %}x{% endgeneration %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    text = bytes(encode([{"role": "user", "content": "é<"}], ChatTemplate(source), BYTE)).decode()
    known, year, rest = text.rsplit(" ", 2)
    assert json.loads(known) == [{"role": "user", "content": "é<"}]
    assert (year, rest) == ("20", "x01")


@pytest.mark.parity
@pytest.mark.parametrize("template", [CHATML, SMOL])
def test_it_is_transformers(template):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.library, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    theirs.chat_template = template.source
    for conversation in (talk("a"), talk("a b\n", "c", " d", system="é")):
        assert encode(conversation, template, TOKENIZER) == theirs.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False
        )
