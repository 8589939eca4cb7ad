import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gptjax.config import OptimConfig
from gptjax.errors import CheckpointError
from gptjax.models.params import head_of, param_axes, stack, unstack
from gptjax.parallel import mesh as meshes
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.train import checkpoint
from gptjax.train import step as steps
from gptjax.train.checkpoint import CheckpointWriter, open_newest, restore_newest
from gptjax.train.optimizer import make_optimizer
from tests.models import tiny

CFG = tiny.config(dtype="float32")
OPTIMIZER = make_optimizer(OptimConfig(), 10, CFG)


def state_of(cfg, optimizer, seed):
    """A training state with other numbers in every array, moments and counters included."""
    shapes = jax.eval_shape(lambda key: steps.init_state(key, cfg, optimizer), jax.random.key(0))
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.numpy.asarray(9 * generator.standard_normal(x.shape), x.dtype), shapes
    )


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 3 and 5, of which no array is the same."""
    states = {n: state_of(CFG, OPTIMIZER, n) for n in (3, 5)}
    writer = CheckpointWriter(tmp_path / "c", keep=2)
    for n, state in states.items():
        writer.save(n, state, CFG, OPTIMIZER, {"position": n})
    writer.close()
    return tmp_path / "c", states


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_newest_comes_back_as_it_was(saved):
    folder, states = saved
    restored = restore_newest(folder, CFG, OPTIMIZER)
    assert (restored.step, restored.meta) == (5, {"position": 5})
    assert_equal(restored.state, states[5])


def test_it_comes_back_in_the_layout_asked_for(saved):
    folder, states = saved
    restored = restore_newest(folder, tiny.config(dtype="float32", layers="scan"), OPTIMIZER).state
    for found, mine in (
        (restored.params, states[5].params),
        (restored.opt_state[1][0].mu, states[5].opt_state[1][0].mu),
        (restored.opt_state[1][0].nu, states[5].opt_state[1][0].nu),
    ):
        assert_equal(unstack(found), mine)


def test_a_bfloat16_first_moment_is_restored(saved, tmp_path):
    """Nor is a checkpoint that has the other kind taken for a damaged one."""
    folder, _ = saved
    rounded = make_optimizer(OptimConfig(mu_dtype="bfloat16"), 10, CFG)
    state = state_of(CFG, rounded, 3)
    assert state.opt_state[1][0].mu.wte.dtype == "bfloat16"
    writer = CheckpointWriter(tmp_path / "rounded", keep=1)
    writer.save(1, state, CFG, rounded, {})
    writer.close()
    assert_equal(restore_newest(tmp_path / "rounded", CFG, rounded).state, state)
    with pytest.raises(CheckpointError, match="optim.mu_dtype bfloat16, not None"):
        restore_newest(tmp_path / "rounded", CFG, OPTIMIZER)
    with pytest.raises(CheckpointError, match="optim.mu_dtype None, not bfloat16"):
        restore_newest(folder, CFG, rounded)
    assert not list(folder.glob("damaged-*"))


def test_arrays_that_differ_from_what_was_saved_are_not_used(saved, monkeypatch):
    """The storage returns other numbers for step 5: the checksums notice."""
    folder, states = saved
    real = checkpoint._checksums
    calls = []

    def checksums(tree):
        calls.append(1)
        if len(calls) == 1:
            one_bit_more = np.nextafter(np.float32(1), np.float32(2))
            params = tree.params._replace(lnfw=tree.params.lnfw.at[3].set(one_bit_more))
            tree = tree._replace(params=params)
        return real(tree)

    monkeypatch.setattr(checkpoint, "_checksums", checksums)
    with pytest.warns(
        UserWarning, match="step_00000005 is damaged and was set aside: its checksums do not match"
    ):
        restored = restore_newest(folder, CFG, OPTIMIZER)
    assert restored.step == 3
    assert_equal(restored.state, states[3])


def checksum(words, places):
    """The checksum as its definition says, one word at a time, in Python's integers."""
    total = 0
    for word, place in zip(words.tolist(), places, strict=True):
        x = word ^ (place * 0x9E3779B9 % 2**32)
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        total += x ^ (x >> 16)
    return total % 2**32


def test_checksums_are_the_same_on_the_device_and_from_the_file(saved, monkeypatch):
    """Also where the file is read in many parts, and where numbers have two bytes."""
    folder, states = saved
    wte = np.asarray(states[5].params.wte)
    expected = checksum(wte.view(np.uint32).ravel(), range(wte.size))
    assert checkpoint._sums(states[5])["params.wte"] == expected
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1000)
    stored = checkpoint._open_array(folder / "step_00000005", "params.wte")
    assert checkpoint._read(stored, 0, len(wte)) == expected
    assert (
        checkpoint._read(stored, 0, 50) + checkpoint._read(stored, 50, len(wte))
    ) % 2**32 == expected
    short = wte.astype("bfloat16")
    assert checkpoint._checksums(short) == checksum(
        short.view(np.uint16).ravel(), range(short.size)
    )


def test_no_simple_change_of_an_array_keeps_its_checksum():
    """Sums of words, even with weights, miss some of these."""
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    others = [
        -x,
        np.zeros_like(x),
        x[::-1],
        np.roll(x, 1),
        x.T.reshape(x.shape),
        np.concatenate([x[32:], x[:32]]),
    ]
    assert len({int(checkpoint._checksums(y)) for y in [x, *others]}) == 1 + len(others)


# The JSON document of a checkpoint


def change(folder, edit, *, sign=False):
    """Edit the JSON of step 5; with ``sign``, so that its checksum is right again."""
    file = folder / "step_00000005" / "info" / "metadata"
    info = json.loads(file.read_text())
    edit(info)
    if sign:
        info["sha256"] = checkpoint._digest(info["content"])
    file.write_text(json.dumps(info))


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged and was set aside")
@pytest.mark.parametrize(
    ("edit", "sign", "model_of"),
    [
        (lambda info: info["content"]["model"].update(num_heads=4), False, 3),
        (lambda info: info["content"]["meta"].update(position=6), False, 3),
        (lambda info: info["content"].update(arrays={}), False, 3),
        (lambda info: info["content"].update(arrays={}), True, 3),
        (lambda info: info["content"]["arrays"].pop("params.lnfb"), True, 3),
        (lambda info: info["content"]["arrays"].update({"params.lnfc": 0}), True, 3),
        # Which a model does without
        (lambda info: info["content"]["arrays"].pop("opt_state.1.0.mu.lnfb"), True, 5),
        (lambda info: info["content"].update(step=3), True, 3),
        (lambda info: info.pop("sha256"), False, 3),
        (lambda info: info.clear(), False, 3),
    ],
)
def test_the_json_document_needs_a_matching_checksum(saved, edit, sign, model_of):
    """Of the arrays' checksums, the names and their number count as well."""
    folder, states = saved
    change(folder, edit, sign=sign)
    shutil.copytree(folder, folder.parent / "again")
    restored = restore_newest(folder, CFG, OPTIMIZER)
    assert (restored.step, restored.meta) == (3, {"position": 3})
    assert_equal(restored.state, states[3])
    cfg, _, meta = open_newest(folder.parent / "again")
    assert (cfg, meta) == (CFG, {"position": model_of})


@pytest.mark.parametrize(
    "edit",
    [
        lambda info: info["content"]["model"].update(rope=True),
        lambda info: info["content"].pop("optimizer"),
        lambda info: info["content"]["model"].update(channels=7),
    ],
)
@pytest.mark.parametrize(
    "read", [open_newest, lambda folder: restore_newest(folder, CFG, OPTIMIZER)]
)
def test_a_checkpoint_of_another_version_is_refused_but_stays(saved, edit, read):
    folder, _ = saved
    change(folder, edit, sign=True)
    with pytest.raises(
        CheckpointError,
        match="step_00000005 was written by another version of gptjax: use that version",
    ):
        read(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000003", "step_00000005"]


def of_flat_parameters(info):
    """As it was when GPT-2's 16 tensors lay side by side, their attention weights fused, and AdamW
    was the one optimizer.
    """
    content = info["content"]
    content["mu_dtype"] = content.pop("optimizer")["optim.mu_dtype"]
    del content["model"]["family"], content["model"]["dropout_mlp"]
    content["arrays"] = {"params.wte": 1, "params.fcw.0": 2, "opt_state.moments.1.mu.fcw.0": 3}


def of_a_list_of_checksums(info):
    info.clear()
    info.update({"model": {}, "mu_dtype": None, "checksums": [1, 2], "meta": {}})


@pytest.mark.parametrize("edit", [of_flat_parameters, of_a_list_of_checksums])
@pytest.mark.parametrize(
    "read", [open_newest, lambda folder: restore_newest(folder, CFG, OPTIMIZER)]
)
def test_one_of_a_layout_before_is_refused_in_the_same_words(saved, edit, read):
    folder, _ = saved
    change(folder, edit, sign=edit is of_flat_parameters)
    with pytest.raises(
        CheckpointError,
        match="step_00000005 was written by another version of gptjax: use that version",
    ):
        read(folder)
    assert not list(folder.glob("damaged-*"))


# Which one is read


def break_newest(folder):
    (folder / "step_00000005" / "state" / "manifest.ocdbt").write_bytes(b"")


def test_one_that_cannot_be_renamed_is_left_out(saved, monkeypatch):
    folder, states = saved
    break_newest(folder)

    def read_only(path):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(checkpoint, "set_aside", read_only)
    for read in (
        lambda: restore_newest(folder, CFG, OPTIMIZER).state.params,
        lambda: open_newest(folder)[1],
    ):
        with pytest.warns(
            UserWarning,
            match="is damaged and is skipped .it cannot be renamed: Read-only file system",
        ):
            params = read()
        np.testing.assert_array_equal(params.blocks[1].fcw, states[3].params.blocks[1].fcw)
    assert (folder / "step_00000005").exists()


def test_one_that_is_being_written_is_left_alone(saved):
    folder, _ = saved
    unfinished = folder / "step_00000007.orbax-checkpoint-tmp"
    shutil.copytree(folder / "step_00000005" / "info", unfinished / "info")
    break_newest(folder)
    with pytest.warns(UserWarning, match="step_00000005 is damaged"):
        open_newest(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "damaged-step_00000005",
        "step_00000003",
        unfinished.name,
    ]


@pytest.mark.parametrize("dropped", ["whole", "half"])
def test_a_run_that_trains_meanwhile_is_followed(saved, monkeypatch, dropped):
    """While step 5 is read it is dropped for step 7: that is no damage, and nothing in the run's
    way is renamed.
    """
    folder, states = saved
    real = checkpoint._open

    def train_on(path, step):
        if step == 5:
            (folder / "step_00000003").rename(folder.parent / "older")
            writer = CheckpointWriter(folder, keep=2)
            writer.save(7, states[5], CFG, OPTIMIZER, {"position": 7})
            writer.close()
            shutil.rmtree(path if dropped == "whole" else path / "state")
        return real(path, step)

    monkeypatch.setattr(checkpoint, "_open", train_on)
    assert open_newest(folder)[2] == {"position": 7}
    assert not list(folder.glob("damaged-*"))


def test_one_that_another_command_sets_aside_meanwhile(saved, monkeypatch):
    """It has warned of it already."""
    folder, _ = saved
    real = checkpoint._open

    def and_another(path, step):
        if step == 5:
            checkpoint.set_aside(path)
        return real(path, step)

    monkeypatch.setattr(checkpoint, "_open", and_another)
    assert open_newest(folder)[2] == {"position": 3}


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_one_that_is_dropped_after_it_was_opened(tmp_path, layers):
    """Its storage reads zeros where a file is gone."""
    # Too large to be read along with others
    cfg = tiny.config(dtype="float32", vocab_size=4000, channels=64, layers=layers)
    optimizer = make_optimizer(OptimConfig(), 10, cfg)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, steps.init_state(jax.random.key(1), cfg, optimizer), cfg, optimizer, {})
    writer.close()
    _, params, _ = open_newest(tmp_path)
    shutil.rmtree(tmp_path / "step_00000001")
    for tensor in (params.wte, params.blocks[1].fcw):
        with pytest.raises(
            CheckpointError,
            match="step_00000001 changed while it was read .*: if its run is training",
        ):
            np.asarray(tensor)


def test_nothing_to_restore(tmp_path):
    assert restore_newest(tmp_path / "none", CFG, OPTIMIZER) is None


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_all_damaged_is_an_error_not_a_fresh_start(saved):
    folder, _ = saved
    for path in folder.glob("step_*/state/manifest.ocdbt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        restore_newest(folder, CFG, OPTIMIZER)
    assert len(list(folder.glob("damaged-*"))) == 2
    # Nor at the second try
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        restore_newest(folder, CFG, OPTIMIZER)


def test_running_out_of_memory_is_no_damage(saved, monkeypatch):
    folder, _ = saved

    def fail(tree):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(checkpoint, "_checksums", fail)
    with pytest.raises(CheckpointError, match="cannot be read: RESOURCE_EXHAUSTED"):
        restore_newest(folder, CFG, OPTIMIZER)
    assert not list(folder.glob("damaged-*"))


def test_another_model_is_refused_and_nothing_is_set_aside(saved):
    folder, _ = saved
    with pytest.raises(CheckpointError, match=r"was trained with model\.num_heads 2, not 4"):
        restore_newest(folder, tiny.config(dtype="float32", num_heads=4), OPTIMIZER)
    assert not list(folder.glob("damaged-*"))


# Of every optimizer, on every mesh


OPTIMIZERS = ["adamw", "muon", "lion", "adafactor", "sgd"]


LLAMA = tiny.config(
    dtype="float32", family="llama", num_heads=4, num_kv_heads=2, channels=16, tied=False
)


@pytest.mark.parametrize(
    ("name", "cfg"),
    [("adamw", CFG), ("adamw", LLAMA), *((name, CFG) for name in OPTIMIZERS[1:])],
)
def test_training_goes_on_bit_for_bit(tmp_path, name, cfg):
    """Two steps, a checkpoint and a third, or three steps."""
    optimizer = make_optimizer(OptimConfig(name=name, learning_rate=0.01, warmup_steps=4), 10, cfg)
    key = jax.random.key(0)
    batches = [
        jax.tree.map(lambda x: np.asarray(x)[None], tiny.batch(cfg, seed=n)) for n in range(3)
    ]
    with jax.enable_x64(False):
        compiled = steps.compile_step(
            cfg, optimizer, "manual", *steps.step_arguments(cfg, optimizer, batches[0].inputs.shape)
        )

        def train(state, numbers):
            buffer = steps.gradient_buffer(state.params)
            for n in numbers:
                state, buffer, _ = steps.run_step(compiled, state, buffer, batches[n], key, n + 1)
            return state

        two = train(steps.make_state(key, cfg, optimizer), [0, 1])
        writer = CheckpointWriter(tmp_path, keep=1)
        writer.save(2, two, cfg, optimizer, {})
        writer.close()
        before = jax.device_get(two)
        straight = train(two, [2])
        resumed = restore_newest(tmp_path, cfg, optimizer).state
        assert_equal(resumed, before)
        assert jax.tree.structure(resumed) == jax.tree.structure(straight)
        assert_equal(train(resumed, [2]), straight)
    head = head_of(before.params, cfg)
    assert not np.array_equal(head_of(straight.params, cfg), head)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_another_optimizer_is_refused_and_nothing_is_set_aside(saved, name):
    folder, _ = saved
    optimizer = make_optimizer(OptimConfig(name=name), 10, CFG)
    with pytest.raises(
        CheckpointError,
        match=rf"step_00000005 was trained with optim\.name adamw, not {name}: set it",
    ) as error:
        restore_newest(folder, CFG, optimizer)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000003", "step_00000005"]


def trees_of_parameters(state):
    """The parameters, what the optimizer keeps for each of them, and its other arrays."""
    return jax.tree.leaves(state, is_leaf=lambda tree: hasattr(tree, "blocks"))


def in_one_layout(tree):
    """With its layers stacked, if it is like the parameters."""
    return stack(tree) if hasattr(tree, "blocks") else tree


ALL_DEVICES = MeshConfig(2, 2, 2)
ELSEWHERE = [
    *(("adamw", "unroll", "unroll", mesh) for mesh in (MeshConfig(fsdp=8), None)),
    ("adamw", "unroll", "scan", MeshConfig(tensor=8)),
    *((name, "unroll", "scan", MeshConfig(2, 1, 2)) for name in OPTIMIZERS if name != "adafactor"),
    *((name, "scan", "unroll", None) for name in OPTIMIZERS if name != "adafactor"),
    ("adafactor", "unroll", "unroll", MeshConfig(2, 1, 2)),
]


@pytest.mark.parametrize(("name", "saved", "read", "other"), ELSEWHERE)
def test_a_checkpoint_is_read_onto_any_other_mesh(tmp_path, name, saved, read, other):
    """And in the other layout."""
    cfg = tiny.config(
        dtype="float32", num_layers=2, num_heads=8, channels=16, vocab_size=120, layers=saved
    )
    optimizer = make_optimizer(OptimConfig(name=name), 10, cfg)
    layouts = lambda mesh, cfg, state: meshes.shardings(mesh, param_axes(cfg), state)  # noqa: E731
    values = state_of(cfg, optimizer, 1)
    state = jax.device_put(values, layouts(make_mesh(ALL_DEVICES, cfg.axis_sizes, 8), cfg, values))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, state, cfg, optimizer, {})
    writer.close()
    now = dataclasses.replace(cfg, layers=read)
    mesh = make_mesh(other, cfg.axis_sizes, 8) if other else None
    state = restore_newest(tmp_path, now, optimizer, mesh).state
    shapes = jax.eval_shape(lambda key: steps.init_state(key, now, optimizer), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    for found, mine in zip(trees_of_parameters(state), trees_of_parameters(values), strict=True):
        assert_equal(in_one_layout(found), in_one_layout(mine))
    if mesh is None:
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {1}
    else:
        expected = layouts(mesh, now, state)
        assert all(
            jax.tree.leaves(
                jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, expected)
            )
        )
        assert state.params.wte.sharding.device_set == set(mesh.devices.flat)


def test_adafactors_state_cannot_change_between_unroll_and_scan(tmp_path):
    optimizer = make_optimizer(OptimConfig(name="adafactor"), 10, CFG)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, state_of(CFG, optimizer, 1), CFG, optimizer, {})
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"was trained with model\.layers unroll: set it to that value"
    ):
        restore_newest(tmp_path, dataclasses.replace(CFG, layers="scan"), optimizer)
    assert not list(tmp_path.glob("damaged-*"))


def test_a_replaced_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """A process that ends while it deletes leaves nothing damaged under a checkpoint's name."""
    state = state_of(CFG, OPTIMIZER, 0)

    def save(*numbers):
        writer = CheckpointWriter(tmp_path, keep=1)
        for n in numbers:
            writer.save(n, state, CFG, OPTIMIZER, {})
        writer.close()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        save(1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replaced", "step_00000003"]
    assert restore_newest(tmp_path, CFG, OPTIMIZER).step == 3
    save(4)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
