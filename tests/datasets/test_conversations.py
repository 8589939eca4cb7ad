import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import datasets
from gptjax.datasets.batches import BatchShape, TrainingBatches, validation_batches
from gptjax.datasets.conversations import (
    ASSISTANT,
    FIRST,
    Conversations,
    hold_conversations,
    labels_of,
)
from gptjax.errors import ConfigError, DataError, FormatError
from gptjax.formats.token_shards import Shard, open_shard, write_shard
from gptjax.models import transformer
from gptjax.ops import IGNORE_INDEX
from gptjax.tokenizers import byte
from gptjax.tokenizers.chat_template import CHATML
from tests.models import tiny

pytest.importorskip("jinja2")


def said(*contents):
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


TWENTY = [said(f"Question {i}?", f"Answer {i}.") for i in range(20)]


@pytest.fixture
def file(tmp_path):
    def write(rows):
        path = tmp_path / "talk.jsonl"
        lines = (row if isinstance(row, str) else json.dumps({"messages": row}) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def opened(path):
    return datasets.find_corpus(str(path), path.parent / "data", "byte")


def test_the_assistants_tokens_count_and_no_others(file):
    corpus = opened(file(TWENTY))
    assert corpus.tokenizer.same_as(byte())
    assert datasets.template_of(corpus) == CHATML
    found = Conversations(corpus.train, 128, 257)
    text = [byte().decode([t for t in row.targets.tolist() if t != IGNORE_INDEX]) for row in found]
    assert text[0] == "Answer 1.<|im_end|>\n"
    assert len(text) == 18  # every tenth is held out
    assert len(Conversations(corpus.val, 128, 257)) == 2


def test_a_corpus_is_prepared_once_and_a_template_makes_another(file):
    path = file(TWENTY)
    first = opened(path)
    assert opened(path).folder == first.folder
    from gptjax.tokenizers.chat_template import find

    other = datasets.find_corpus(str(path), path.parent / "data", "byte", template=find("llama2"))
    assert other.folder != first.folder


@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12), T=st.integers(2, 10))
def test_packing_keeps_each_conversation_whole_and_apart(tmp_path_factory, lengths, T):
    folder = tmp_path_factory.mktemp("packed")
    ids = np.arange(1, sum(lengths) + 1)
    labels = np.concatenate([[FIRST] + [ASSISTANT] * (n - 1) for n in lengths])
    write_shard(folder / "train_0.bin", ids)
    write_shard(folder / "train_0.labels", labels)
    packed = Conversations([open_shard(folder / "train_0.bin")], T, len(ids) + 1)
    assert packed.cut == sum(n > T + 1 for n in lengths)
    found = []
    for row in packed:
        assert row.inputs.shape == row.targets.shape == row.segments.shape == (T,)
        for segment in np.unique(row.segments):
            here = row.segments == segment
            if (row.targets[here] == IGNORE_INDEX).all():
                assert (row.inputs[here] == 0).all()  # padding
                continue
            found.append(row.inputs[here].tolist())
            np.testing.assert_array_equal(row.targets[here], row.inputs[here] + 1)
    ends = np.cumsum(lengths)
    expected = [list(range(b - n + 1, b))[:T] for n, b in zip(lengths, ends, strict=True)]
    assert found == expected


def test_no_conversation_learns_from_another(file):
    """Other words in one conversation of a sequence leave the losses of the others alone."""
    rows = Conversations(opened(file(TWENTY)).train, 256, 257)
    assert max(rows[0].segments) > 1
    cfg = tiny.config(family="llama", vocab_size=257, max_seq_len=256)
    params = tiny.params(cfg)
    batch = jax.tree.map(lambda x: jnp.asarray(x[None]), rows[0])
    losses = jax.jit(transformer.token_losses, static_argnums=2)
    one = losses(params, batch, cfg)
    first = batch.segments == 0
    other = losses(params, batch._replace(inputs=jnp.where(first, 65, batch.inputs)), cfg)
    moved = one != other
    assert moved[first].any()
    assert not moved[~first].any()


def test_training_reads_them_in_a_seeded_order_and_resumes(file):
    corpus = opened(file(TWENTY))
    shape = BatchShape(2, 2, 64)

    def batches():
        return TrainingBatches(corpus.train, shape, "shuffle", 3, 257)

    whole = batches()
    first, position = next(whole), whole.position()
    assert {x.shape for x in (first.inputs, first.targets, first.segments)} == {(2, 2, 64)}
    second = next(whole)
    again = batches()
    again.seek(position)
    jax.tree.map(np.testing.assert_array_equal, next(again), second)
    val = validation_batches(corpus.val, 10_000, 4, 64, 257)
    assert val[0].segments.shape == (4, 64)
    assert val[0].mask[:, 0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ("{", FormatError, "line 2 is not JSON"),
        ("[1]", DataError, "line 2 has no list of messages"),
        (json.dumps({"messages": []}), DataError, "line 2 has no list of messages"),
        ([{"role": "bot", "content": ""}], DataError, "a role, one of system, user, assistant"),
        ([{"role": "user", "content": 3}], DataError, "a role, one of system, user, assistant"),
        ([{"role": "user", "content": "a"}], DataError, "no message of the assistant"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(file, row, error, message):
    with pytest.raises(error, match=message):
        opened(file([TWENTY[0], row]))


def test_a_single_conversation_is_too_little(file):
    with pytest.raises(DataError, match="has 1 conversation: training takes at least two"):
        opened(file(TWENTY[:1]))


def test_only_json_lines_with_messages_hold_conversations(file, tmp_path):
    path = file(TWENTY)
    assert hold_conversations([path])
    assert datasets.holds_conversations(str(path))
    assert datasets.holds_conversations(str(opened(path).folder))
    for name, content in (("a.jsonl", '{"text": "a"}'), ("b.jsonl", "{"), ("c.txt", '{"messages"')):
        (tmp_path / name).write_text(content)
        assert not datasets.holds_conversations(str(tmp_path / name))
    assert not datasets.holds_conversations("pydoc")
    assert not datasets.holds_conversations(str(tmp_path / "nothing"))


def test_damaged_labels_are_refused(file):
    (shard,) = opened(file(TWENTY)).train
    labels = shard.path.with_suffix(".labels")
    write_shard(labels, np.ones(3, int))
    with pytest.raises(FormatError, match="does not label the"):
        labels_of(shard)
    labels.unlink()
    with pytest.raises(ConfigError, match="no labels beside it"):
        Conversations([shard], 8, 257)


def test_an_id_beyond_the_vocabulary_is_refused(file):
    rows = Conversations(opened(file(TWENTY)).train, 64, 100)
    with pytest.raises(DataError, match="but model.vocab_size is 100"):
        rows[0]
    assert isinstance(rows.shards[0], Shard)
