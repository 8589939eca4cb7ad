"""Damaged checkpoints: whatever byte or file of the newest one changes, what is restored is what
was saved.

Either the damage does no harm, and the newest comes back bit for bit, or it is set aside with a
warning, and the one before it comes back bit for bit. There is no third outcome.
"""

import random
import shutil
import warnings

import jax
import numpy as np
import pytest

from gptjax.config import OptimConfig
from gptjax.errors import CheckpointError
from gptjax.train import step as steps
from gptjax.train.checkpoint import CheckpointWriter, open_newest, restore_newest
from gptjax.train.optimizer import make_optimizer
from tests.faults.tally import trials
from tests.models import tiny

CFG = tiny.config(dtype="float32", num_layers=1)
OPTIMIZER = make_optimizer(OptimConfig(), 10, CFG)
OLDER, NEWER = "step_00000003", "step_00000005"

# Orbax drops a coroutine where it fails to read; Python then warns whenever it collects it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def states():
    return {n: steps.init_state(jax.random.key(n), CFG, OPTIMIZER) for n in (3, 5)}


@pytest.fixture
def folder(states, tmp_path):
    """The checkpoints of steps 3 and 5."""
    writer = CheckpointWriter(tmp_path / "c", keep=2)
    for n, state in states.items():
        writer.save(n, state, CFG, OPTIMIZER, {"position": n})
    writer.close()
    return tmp_path / "c"


def restored(folder, states):
    """The step that training goes on from; None if what it would go on with is not what was
    saved.
    """
    found = restore_newest(folder, CFG, OPTIMIZER)
    return (
        found.step
        if found.meta == {"position": found.step} and same(found.state, states[found.step])
        else None
    )


def opened(folder, states):
    """The step whose model every other command uses; None if it is of neither."""
    cfg, params, meta = open_newest(folder)
    found = jax.tree.map(np.asarray, params)
    models = {
        n: state.params._replace(wte=state.params.wte[: CFG.vocab_size])
        for n, state in states.items()
    }
    return next(
        (
            n
            for n, model in models.items()
            if (cfg, meta) == (CFG, {"position": n}) and same(found, model)
        ),
        None,
    )


def same(a, b):
    return all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def holds(read, folder, states):
    """Whether ``read`` gives the newest as it was, or sets it aside and gives the one before it.
    Undoes the setting aside.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = read(folder, states)
    told = [str(w.message) for w in caught if "is damaged and was set aside" in str(w.message)]
    aside = list(folder.glob("damaged-*"))
    for path in aside:
        path.rename(folder / NEWER)
    if step == 3:
        return len(told) == 1 and [path.name for path in aside] == [f"damaged-{NEWER}"]
    return step == 5 and not told and not aside


def flips(file, positions, generator):
    """The file with one byte changed, at each position."""
    content = file.read_bytes()
    for at in positions:
        changed = bytearray(content)
        changed[at] ^= generator.choice(
            [*(1 << bit for bit in range(8)), generator.randrange(1, 256)]
        )
        file.write_bytes(changed)
        yield
    file.write_bytes(content)


def test_every_byte_of_the_json_flipped(folder, states, tally):
    """With no other checkpoint to go back to, so that the refusal is quick: the flip does no harm,
    or nothing is believed.
    """
    shutil.rmtree(folder / OLDER)
    file = folder / NEWER / "info" / "metadata"
    size, held = file.stat().st_size, 0
    for _ in flips(file, range(size), random.Random(0)):
        try:
            held += holds(opened, folder, states)
        except CheckpointError as error:
            held += "no checkpoint in" in str(error) and (folder / f"damaged-{NEWER}").exists()
            (folder / f"damaged-{NEWER}").rename(folder / NEWER)
    tally("bytes of a checkpoint's JSON flipped", size, held)


@pytest.mark.parametrize("read", [restored, opened])
@pytest.mark.parametrize(
    ("kind", "pattern", "few"),
    [
        ("JSON", "info/metadata", 4),
        ("Orbax metadata", "**/_*", 12),
        ("Orbax metadata", "**/array_metadatas/*", 4),
        ("database", "**/manifest.ocdbt", 6),
        ("database", "**/d/*", 12),
        ("other files", "**/commit_success.txt", 3),
    ],
)
def test_bytes_of_every_file_flipped(folder, states, tally, read, kind, pattern, few):
    generator = random.Random(f"{read.__name__} {pattern}")
    places = [
        (path, at)
        for path in sorted((folder / NEWER).glob(pattern))
        for at in range(path.stat().st_size)
    ]
    chosen = generator.sample(places, min(trials(few), len(places)))
    held = sum(
        holds(read, folder, states) for path, at in chosen for _ in flips(path, [at], generator)
    )
    tally(f"bytes of a checkpoint's {kind} flipped", len(chosen), held)


def cut(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path, other):
    path.write_bytes(b"")


def zeroed(path, other):
    path.write_bytes(bytes(path.stat().st_size))


def nested(path, other):
    path.write_text("[" * 100_000)


def missing(path, other):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def swapped(path, other):
    missing(path, other)
    (shutil.copytree if other.is_dir() else shutil.copyfile)(other, path)


@pytest.mark.parametrize("read", [restored, opened])
@pytest.mark.parametrize("change", [cut, emptied, zeroed, nested, missing, swapped])
def test_files_damaged_whole(folder, states, tally, change, read):
    """Each file, and for the last two each folder, of the newest; ``swapped`` puts the other
    checkpoint's in its place.
    """
    newest, kept = folder / NEWER, folder.parent / "kept"
    shutil.copytree(newest, kept)
    of_folders = change in (missing, swapped)
    names = [
        path.relative_to(newest)
        for path in newest.rglob("*")
        if "ocdbt.process_0" not in path.parts
    ]
    names = sorted(name for name in names if of_folders or (newest / name).is_file())
    if change is swapped:  # the files of the database have random names
        names = [
            name
            for name in (*names, newest.relative_to(newest))
            if (folder / OLDER / name).exists()
        ]
    generator = random.Random(f"{read.__name__} {change.__name__}")
    chosen = generator.sample(names, min(trials(len(names) if read is opened else 4), len(names)))
    if change is swapped and not any(str(name) == "state" for name in chosen):
        # Arrays that are whole, and are others
        chosen.append(next(name for name in names if str(name) == "state"))
    held = 0
    for name in chosen:
        change(newest / name, folder / OLDER / name)
        held += holds(read, folder, states)
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    tally(f"files of a checkpoint {change.__name__}", len(chosen), held)


@pytest.mark.parametrize(
    "content", [b"[1, 2]", b"[" * 100_000, b'{"commit_timestamp_nsecs": 99999999999999999999999}']
)
def test_damaged_metadata_of_an_older_checkpoint_does_not_prevent_saving(folder, states, content):
    (folder / OLDER / "_CHECKPOINT_METADATA").write_bytes(content)
    writer = CheckpointWriter(folder, keep=2)
    writer.save(7, states[5], CFG, OPTIMIZER, {"position": 7})
    writer.close()
    assert sorted(path.name for path in folder.iterdir()) == [NEWER, "step_00000007"]
