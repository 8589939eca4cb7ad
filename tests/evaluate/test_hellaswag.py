import hashlib
import json

import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.errors import CheckpointError, DataError, FormatError
from gptjax.evaluate import hellaswag
from gptjax.evaluate.hellaswag import (
    accuracy,
    find_questions,
    load_questions,
    make_rows,
    read_jsonl,
    score_questions,
)
from gptjax.evaluate.statistics import Estimate
from gptjax.formats.llmc_eval import Question
from tests.formats.test_llmc_eval import EXAMPLE, evaluation_file
from tests.models import tiny
from tests.server import serving

ROW = {"ctx": "The cat", "endings": ["sat.", "is", "!", "the"], "label": 1}
BYTE = tokenizers.byte()


def test_acc_goes_by_the_sum_and_acc_norm_by_the_mean():
    """The lowest of each row is marked.

    ====================  ===================  =====  ==========
    sums                  means                acc    acc_norm
    ====================  ===================  =====  ==========
    4 **3** 8 9           2 3 2 **1**          1      3
    **2** 3 4 5           2 **1** 2 5          0      1
    **1** 1 1 1           1 1/2 **1/3** 1      0      2
    ====================  ===================  =====  ==========
    """
    sums = np.array([4, 3, 8, 9, 2, 3, 4, 5, 1, 1, 1, 1.0])
    lengths = np.array([2, 1, 4, 9, 1, 3, 2, 1, 1, 2, 3, 1])
    found = accuracy(sums, lengths, np.array([3, 0, 0]))
    # One right of three: the sample's variance is 1/3, its mean's a third of that
    third = pytest.approx(1 / 3)
    assert found.acc == (pytest.approx(2 / 3), third)
    assert found.acc_norm == (third, third)
    assert accuracy(sums[:4], lengths[:4], np.array([3])) == (
        1,
        Estimate(0, None),
        Estimate(1, None),
    )


def test_how_rows_are_laid_out():
    """The context's last token predicts the ending's first; the longest row sets the length."""
    rows = make_rows([Question([1, 2], [[3], [4, 5], [6], [7, 8]], 3)], max_seq_len=9, vocab_size=9)
    assert rows.ids.tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 6, 0], [1, 2, 7, 8]]
    assert rows.scored.tolist() == [[False, True, False], [False, True, True]] * 2
    assert (rows.labels.tolist(), rows.cut) == ([3], 0)


def test_a_context_that_does_not_fit_loses_its_start():
    questions = [
        Question([1, 2, 3], [[4], [5, 6], [7], [8]], 0),
        Question([1], [[2], [3], [4], [5]], 0),
    ]
    rows = make_rows(questions, max_seq_len=3, vocab_size=9)
    assert rows.ids[:2].tolist() == [[1, 2, 3, 4], [2, 3, 5, 6]]
    assert rows.scored[:2].tolist() == [[False, False, True], [False, True, True]]
    assert rows.cut == 1


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "there are no questions"),
        (
            [Question([1], [[2], [3], [4] * 4, [5]], 0)],
            "an ending has 4 tokens, but the model takes sequences of at most 3",
        ),
        ([Question([9], [[2], [3], [4], [5]], 0)], "token id 9, but model.vocab_size is 9"),
    ],
)
def test_questions_that_do_not_fit_the_model(questions, message):
    with pytest.raises(DataError, match=message):
        make_rows(questions, max_seq_len=3, vocab_size=9)


# Ids 0..4 have the losses 1, 2, 3, 4, 4 bits wherever they stand.
CFG = tiny.config(num_layers=1, vocab_size=5, dtype="float32", layers="scan")
HALVES = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
QUESTIONS = [
    # Sums 4 3 4 4, means 1 3 2 4: acc takes 1, acc_norm 0
    Question([3, 3, 3], [[0, 0, 0, 0], [2], [1, 1], [3]], 1),
    # Sums 5 7 3 6, means 2.5 2.3 1 3: both take 2
    Question([4], [[3, 0], [4, 1, 0], [0, 0, 0], [1, 4]], 2),
    # Sums 9 4 5 6, means 3 4 2.5 3: acc takes 1, acc_norm 2
    Question([0, 0], [[0, 3, 3], [4], [2, 1], [2, 2]], 0),
]


@pytest.mark.parametrize("batch_size", [1, 5, 12, 16])
def test_a_model_whose_losses_are_known(batch_size):
    seen = []
    rows = make_rows(QUESTIONS, CFG.max_seq_len, CFG.vocab_size)
    found = score_questions(
        tiny.unigram(CFG, HALVES), rows, CFG, batch_size, lambda n, text: seen.append((n, text))
    )
    assert (found.questions, found.acc.value, found.acc_norm.value) == (3, 2 / 3, 1 / 3)
    assert sum(n for n, _ in seen) == 12
    assert seen[-1][1] == "acc_norm 0.3333"


def test_losses_that_are_not_finite():
    params = tiny.unigram(CFG, HALVES)
    rows = make_rows(QUESTIONS, CFG.max_seq_len, CFG.vocab_size)
    with pytest.raises(CheckpointError, match="losses that are not finite"):
        score_questions(params._replace(lnfb=params.lnfb * np.nan), rows, CFG, 4)


def test_json_lines(tmp_path):
    """A blank goes before each ending."""
    path = tmp_path / "h.jsonl"
    path.write_text(
        json.dumps(ROW) + "\n\n" + json.dumps(ROW | {"ctx": "é", "label": 0, "ind": 24}) + "\n"
    )
    first, second = read_jsonl(path, BYTE)
    assert first == Question(
        list(b"The cat"), [list(b" sat."), list(b" is"), list(b" !"), list(b" the")], 1
    )
    assert (second.context, second.label) == ([0xC3, 0xA9], 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(ROW | {"label": 4}), "line 2 of .* has the label '4', not one from 0 to 3"),
        (json.dumps(ROW | {"label": "1"}), "has the label '1'"),
        (json.dumps(ROW | {"label": True}), "has the label 'True'"),
        (
            json.dumps({"ctx": "a", "endings": []}),
            "not a question with ctx, endings and label: there is no 'label'",
        ),
        (
            json.dumps(ROW | {"endings": ["a", "b", "c"]}),
            "does not have a context and 4 endings of text",
        ),
        (json.dumps(ROW | {"endings": ["a", "b", "c", ""]}), "4 endings"),
        (json.dumps(ROW | {"endings": "abcd"}), "4 endings"),
        (json.dumps(ROW | {"ctx": 5}), "4 endings"),
        (json.dumps(ROW)[:-3], "line 2 of .* is not a question"),
        ("[]", "is not a question"),
        ("[" * 100_000, "is not a question"),
    ],
)
def test_a_line_that_is_not_a_question(tmp_path, line, message):
    (tmp_path / "h.jsonl").write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(FormatError, match=message):
        read_jsonl(tmp_path / "h.jsonl", BYTE)


def test_which_files_are_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "e.bin").write_bytes(evaluation_file([EXAMPLE]))
    for name, content in {
        "text.jsonl": json.dumps({"text": "the endings"}),
        "odd.jsonl": "5",
        "bad.jsonl": "{",
        "a.txt": "a",
    }.items():
        (tmp_path / name).write_text(content)
    found = {path.name for path in tmp_path.iterdir() if find_questions(str(path), tmp_path)}
    assert found == {"q.jsonl", "e.bin"}
    assert find_questions("tinyshakespeare", tmp_path) is None
    with pytest.raises(DataError, match="there is no dataset helaswag: did you mean hellaswag"):
        find_questions("helaswag", tmp_path)


def test_the_original_is_downloaded_once_and_verified(tmp_path, monkeypatch):
    content = json.dumps(ROW).encode()
    with serving() as site:
        site.files["v.jsonl"] = content
        monkeypatch.setattr(hellaswag, "URL", f"{site.url}/v.jsonl")
        with pytest.raises(DataError, match="has the SHA-256"):
            find_questions("hellaswag", tmp_path)
        monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(content).hexdigest())
        for _ in range(2):
            path = find_questions("hellaswag", tmp_path)
        assert path == tmp_path / "downloads" / "hellaswag_val.jsonl"
        assert len(site.requests) == 2
    assert len(load_questions(path, BYTE)) == 1


def test_which_tokenizer_a_file_goes_with(tmp_path, monkeypatch):
    """An evaluation file holds GPT-2's ids; of text a tokenizer has to be known."""
    (tmp_path / "q.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "e.bin").write_bytes(evaluation_file([EXAMPLE]))
    assert load_questions(tmp_path / "e.bin", None)[0].label == 2
    with pytest.raises(
        DataError, match="holds GPT-2's ids, but the model's tokenizer is byte of 257 ids"
    ):
        load_questions(tmp_path / "e.bin", BYTE)
    with pytest.raises(DataError, match="the model has no tokenizer: name one"):
        load_questions(tmp_path / "q.jsonl", None)
